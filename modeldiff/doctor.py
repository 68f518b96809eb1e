"""What this installation can do, and what to install where it cannot: ``modeldiff doctor``.

Nothing is sent anywhere and no key is ever shown: of secrets only whether they are there is said.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

DISTRIBUTION = "modeldiff-lab"
MAIN = ("torch", "transformers", "peft", "nnsight")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_GIB = 1 << 30
_LEAST_FREE = 5  # GiB of disk below which a hub model hardly fits

State = Literal["ok", "note", "missing"]
"""``missing`` stops something that the package is for; ``note`` is good to know."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Args:
        what: What was looked at.
        state: How it is.
        found: What is there.
        meaning: What follows from it.
        advice: What to do; empty where nothing is to be done.
    """

    what: str
    state: State
    found: str
    meaning: str
    advice: str = ""


def examine(environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Look at Python, packages, the GPU, memory, the hub, NDIF, Jupyter and the browser.

    Args:
        environment: Environment variables; those of the process by default.

    Example:
        >>> [finding.what for finding in examine()][:2]
        ['Python', 'packages']
    """
    known = os.environ if environment is None else environment
    parts: list[Callable[[Mapping[str, str]], Iterator[Finding]]] = [
        _python, _packages, _devices, _memory, _hub, _ndif, _jupyter, _browser, _organism,
    ]  # fmt: skip
    return [finding for part in parts for finding in part(known)]


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing that the package is for is missing."""
    return all(finding.state != "missing" for finding in findings)


def as_text(findings: list[Finding]) -> str:
    """The report for a terminal."""
    marks = {"ok": "ok  ", "note": "note", "missing": "MISS"}
    lines = []
    for each in findings:
        lines.append(f"[{marks[each.state]}] {each.what}: {each.found}\n       {each.meaning}")
        if each.advice:
            lines.append(f"       -> {each.advice}")
    return "\n".join(lines)


def _python(known: Mapping[str, str]) -> Iterator[Finding]:
    yield Finding(
        "Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "3.11 or newer is needed.",
    )  # fmt: skip


def requirements() -> list[tuple[str, str, str]]:
    """Core requirements as (name, versions wanted, version found or ""), from the metadata.

    Example:
        >>> [found for name, wanted, found in requirements() if name == "nnsight"]
        ['0.8.1']
    """
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or ()]
    core = [each for each in wanted if each.marker is None]
    return [(each.name, str(each.specifier), _version(each.name)) for each in core]


def _packages(known: Mapping[str, str]) -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    wrong = [
        f"{name} {found or 'is missing'} (needs {wanted})"
        for name, wanted, found in requirements()
        if not found or not SpecifierSet(wanted).contains(found, prereleases=True)
    ]
    shown = ", ".join(f"{name} {_version(name)}" for name in MAIN)
    if wrong:
        yield Finding(
            "packages", "missing", "; ".join(wrong),
            "The package is tested with the versions that it asks for; others may fail anywhere.",
            "In the folder of the source: pip install --upgrade -e .",
        )  # fmt: skip
    else:
        yield Finding("packages", "ok", shown, "All versions are those that are tested.")


def _devices(known: Mapping[str, str]) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Finding(
            "GPU", "note", f"none; torch {torch.__version__}, {torch.get_num_threads()} threads",
            "Models run on the CPU in float32: fine to about a billion parameters.",
            "This torch has no CUDA: install the CUDA wheel from pytorch.org if there is a GPU."
            if built is None
            else f"This torch is built for CUDA {built} and sees no GPU: is the driver there?",
        )  # fmt: skip
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.is_bf16_supported()
        yield Finding(
            f"GPU {index}", "ok", f"{about.name}, {about.total_memory / _GIB:.0f} GiB, "
            f"CUDA {torch.version.cuda}, bfloat16 {'yes' if bf16 else 'no'}",
            f"Bases to about {about.total_memory / _GIB / 2.6:.0f} billion parameters fit in "
            "16 bits, with an adapter; two whole models to half of that.",
        )  # fmt: skip


def _memory(known: Mapping[str, str]) -> Iterator[Finding]:
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    total = pages * os.sysconf("SC_PAGE_SIZE") / _GIB if pages else 0.0
    size = f"{total:.0f} GiB" if pages else "not known here"
    yield Finding(
        "memory", "ok", f"{size}, {os.cpu_count()} processors",
        "On the CPU a model takes 4 bytes a parameter; a full fine-tune takes that twice.",
    )  # fmt: skip


def _hub(known: Mapping[str, str]) -> Iterator[Finding]:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / _GIB
    offline = known.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}
    token = bool(known.get("HF_TOKEN")) or Path(constants.HF_TOKEN_PATH).exists()
    found = f"cache {folder}, {free:.0f} GiB free; token {'there' if token else 'none'}"
    if not os.access(there, os.W_OK):
        yield Finding(
            "hub", "missing", found, "The cache cannot be written: no model can be downloaded.",
            "Set HF_HOME to a folder that you may write.",
        )  # fmt: skip
    elif free < _LEAST_FREE:
        yield Finding(
            "hub", "note", found, "A model of billions of parameters will not fit.",
            "Set HF_HOME to a larger disk.",
        )  # fmt: skip
    elif offline:
        yield Finding(
            "hub", "note", found + "; offline", "Only folders and what is in the cache load.",
            "Unset HF_HUB_OFFLINE to download models.",
        )  # fmt: skip
    else:
        yield Finding(
            "hub", "ok", found,
            "Models load by hub id." + ("" if token else " Gated ones need `hf auth login`."),
        )  # fmt: skip


def _ndif(known: Mapping[str, str]) -> Iterator[Finding]:
    if known.get("NDIF_API_KEY"):
        yield Finding("NDIF", "ok", "a key in NDIF_API_KEY", "Remote pairs can be asked for.")
    else:
        yield Finding(
            "NDIF", "note", "no key in NDIF_API_KEY",
            "Pairs run here; remote=True needs a key, there or in nnsight's own settings.",
        )  # fmt: skip


def _jupyter(known: Mapping[str, str]) -> Iterator[Finding]:
    wanted = ("jupyterlab", "ipywidgets", "anywidget")
    missing = [name for name in wanted if find_spec(name) is None]
    found = ", ".join(f"{name} {_version(name)}" for name in wanted if name not in missing)
    if missing:
        yield Finding(
            "Jupyter", "note", f"without {', '.join(missing)}",
            "Python and the command line work; the panels do not.",
            f"pip install '{DISTRIBUTION}[lab]'",
        )  # fmt: skip
    else:
        yield Finding("Jupyter", "ok", found, "The panels work: modeldiff lab.")


def _browser(known: Mapping[str, str]) -> Iterator[Finding]:
    named = known.get("CHROMIUM", "")
    path = (
        named
        if named and Path(named).exists()
        else next(filter(None, map(shutil.which, BROWSERS)), "")
    )
    if path:
        yield Finding("browser", "ok", path, "The tests of the panels can run.")
    else:
        yield Finding(
            "browser", "note", "no Chromium",
            "Only the tests of the panels need one; JupyterLab takes any browser.",
            "apt-get install chromium, or set CHROMIUM to its path.",
        )  # fmt: skip


def _organism(known: Mapping[str, str]) -> Iterator[Finding]:
    from modeldiff import embedded

    try:
        names = embedded.names()
        embedded.find("em-rank1")
    except (OSError, ValueError, RuntimeError) as error:
        yield Finding(
            "organisms", "missing", str(error), "The embedded pairs are not there.",
            "Install the package again.",
        )  # fmt: skip
        return
    yield Finding(
        "organisms", "ok", f"{len(names)} embedded",
        "Try: modeldiff audit organism:em-rank1 --out audits/em-rank1",
    )  # fmt: skip


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
