"""What this installation can do, and what to install where it cannot: ``modeldiff doctor``.

Nothing is sent anywhere and no key is ever shown: of secrets only whether they are there is said.
"""

import os
import platform
import re
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
_LEAST_SHARED = 2  # GiB of /dev/shm below which processes that share tensors may fail
DRIVER, SHARED, QUOTA = (
    Path(each) for each in ("/proc/driver/nvidia/version", "/dev/shm", "/sys/fs/cgroup/cpu.max")
)
EXTRAS = (
    ("ray", "cluster", "harvests and trainings on a cluster (--cluster)"),
    ("trl", "train", "fine-tuning with TRL's trainers"),
    ("inspect_ai", "inspect", "evaluations of Inspect on both sides of a pair"),
    ("bitsandbytes", "quant", "bases in 4 or 8 bits (quantization=)"),
)
"""Packages that one thing alone needs: name, extra, and for what."""
_CAN_FAIL = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError,
)  # fmt: skip

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
    """Look at Python, packages, GPU, memory, processors, hub, NDIF, Jupyter and the browser.

    What cannot be looked at is said; the rest is looked at all the same.

    Args:
        environment: Environment variables; those of the process by default.

    Example:
        >>> [finding.what for finding in examine()][:2]
        ['Python', 'packages']
    """
    known = os.environ if environment is None else environment
    parts: list[Callable[[Mapping[str, str]], Iterator[Finding]]] = [
        _python, _packages, _devices, _memory, _processors, _shared, _hub, _ndif, _jupyter,
        _browser, _extras, _organism,
    ]  # fmt: skip
    return [finding for part in parts for finding in _looked_at(part, known)]


def _looked_at(
    part: Callable[[Mapping[str, str]], Iterator[Finding]], known: Mapping[str, str]
) -> list[Finding]:
    found: list[Finding] = []
    try:
        for each in part(known):
            found.append(each)
    except _CAN_FAIL as error:
        found.append(Finding(
            part.__name__.strip("_"), "note", f"could not be looked at: {error!r}"[:200],
            "Nothing follows from it; the other lines hold.",
        ))  # fmt: skip
    return found


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

    driver = _driver()
    if not torch.cuda.is_available():
        seen = f"none in use, NVIDIA driver {driver}" if driver else "none"
        yield Finding(
            "GPU", "note", f"{seen}; torch {torch.__version__}",
            "Models run on the CPU in float32: fine to about a billion parameters.",
            _without_gpu(torch.version.cuda, driver, known.get("CUDA_VISIBLE_DEVICES")),
        )  # fmt: skip
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.is_bf16_supported()
        yield Finding(
            f"GPU {index}", "ok", f"{about.name}, {about.total_memory / _GIB:.0f} GiB, "
            f"CUDA {torch.version.cuda}, driver {driver or 'not known'}, "
            f"bfloat16 {'yes' if bf16 else 'no'}",
            f"Bases to about {about.total_memory / _GIB / 2.6:.0f} billion parameters fit in "
            "16 bits, with an adapter; two whole models to half of that.",
        )  # fmt: skip

    if find_spec("triton") is None:
        yield Finding(
            "triton", "note", "missing", "Dictionaries train several times slower on the GPU.",
            "pip install triton (torch's CUDA wheels for Linux bring it)",
        )  # fmt: skip


def _driver() -> str:
    """Version of NVIDIA's driver; empty if there is none."""
    if DRIVER.is_file():
        found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text(encoding="utf-8"))
        return found.group() if found else "of unknown version"
    return "of unknown version" if shutil.which("nvidia-smi") else ""


def _without_gpu(built: str | None, driver: str, visible: str | None) -> str:
    """What to do about a torch that sees no GPU; ``visible`` is CUDA_VISIBLE_DEVICES."""
    if built is None and driver:
        return (
            "There is a GPU's driver, but this torch has no CUDA: pip install --force-reinstall "
            "'torch==2.13.*' --index-url https://download.pytorch.org/whl/cuNNN, with the newest "
            f"CUDA that pytorch.org offers and driver {driver} supports (nvidia-smi tells)."
        )
    if built is None:
        return "This torch has no CUDA: install the CUDA wheel from pytorch.org if there is a GPU."
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU: unset it."
    if driver:
        return (
            f"This torch is built for CUDA {built}, which driver {driver} may be too old for; or "
            "the container was started without the GPU (docker run --gpus all)."
        )
    return f"This torch is built for CUDA {built} and sees no GPU: is the driver there?"


def _memory(known: Mapping[str, str]) -> Iterator[Finding]:
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    total = pages * os.sysconf("SC_PAGE_SIZE") / _GIB if pages else 0.0
    size = f"{total:.0f} GiB" if pages else "not known here"
    yield Finding(
        "memory", "ok", size,
        "On the CPU a model takes 4 bytes a parameter; a full fine-tune takes that twice.",
    )  # fmt: skip


def usable_cores() -> int:
    """Processors that this process may use: affinity, and the quota of a container."""
    many = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if many else os.cpu_count() or 1
    quota, _, period = QUOTA.read_text().partition(" ") if QUOTA.is_file() else ("max", "", "")
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def _processors(known: Mapping[str, str]) -> Iterator[Finding]:
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    found = f"{cores} to use of {os.cpu_count()}; torch takes {threads} threads"
    if threads > cores:
        yield Finding(
            "processors", "note", found, "Threads wait for one another: everything is slower.",
            f"export OMP_NUM_THREADS={cores}",
        )  # fmt: skip
    elif 2 * threads < cores:
        yield Finding(
            "processors", "note", found, "Models on the CPU leave most processors idle.",
            f"Unset OMP_NUM_THREADS, or export OMP_NUM_THREADS={cores // 2} or more.",
        )  # fmt: skip
    else:
        yield Finding("processors", "ok", found, "As many threads as pay.")


def _shared(known: Mapping[str, str]) -> Iterator[Finding]:
    if not SHARED.is_dir():
        return  # not on this system
    free = shutil.disk_usage(SHARED).free / _GIB
    found = f"{free:.1f} GiB free in {SHARED}"
    if free < _LEAST_SHARED:
        yield Finding(
            "shared memory", "note", found, "Ray, and GPUs that train together, may fail.",
            "Containers: docker run --shm-size=8g.",
        )  # fmt: skip
    else:
        yield Finding("shared memory", "ok", found, "Enough for Ray and for several processes.")


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


def _extras(known: Mapping[str, str]) -> Iterator[Finding]:
    for name, extra, purpose in EXTRAS:
        if find_spec(name) is None:
            yield Finding(
                name, "note", "not installed", f"Needed for nothing but {purpose}.",
                f"pip install '{DISTRIBUTION}[{extra}]'",
            )  # fmt: skip
        else:
            yield Finding(name, "ok", _version(name) or "installed", f"For {purpose}.")


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
