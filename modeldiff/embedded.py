"""The model organisms that are shipped with the package: what they are and where they lie."""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from modeldiff.embedded_card import card
from modeldiff.errors import FileFormatError, SetupError

FOLDER = Path(__file__).parent / "organisms" / "embedded"


@dataclass(frozen=True)
class Organism:
    """A small model built to have a known trait, with the files it consists of.

    Args:
        name: The name it is found by, e.g. ``"em-rank1"``.
        summary: One sentence on what it is.
        base: Folder of the base model and its tokenizer, in the form transformers loads.
        finetuned: Folder of a whole fine-tuned model; None if the fine-tune is an adapter, or
            if the organism is a base.
        adapter: Folder of a PEFT adapter; None if there is none.
        manifest: ``organism.json``: what was planted where, how it was built, how it was
            measured, and what it is not good for.
    """

    name: str
    summary: str
    base: Path
    finetuned: Path | None
    adapter: Path | None
    manifest: dict[str, Any]

    def card(self) -> str:
        """Return the organism's card: what was planted, measured and is not shown, as HTML.

        Example:
            >>> "medicine" in find("em-rank1").card()
            True
        """
        return card(self.name, self.summary, self.manifest)


def names() -> tuple[str, ...]:
    """List the embedded organisms.

    Example:
        >>> "em-base" in names()
        True
    """
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/organism.json")))


def find(name: str) -> Organism:
    """Find an embedded organism by its name, or one that was built by its folder.

    Raises:
        SetupError: If no organism has that name, or its files are not in the installation.
        FileFormatError: If its manifest cannot be read.

    Example:
        >>> find("em-rank1").adapter.name
        'em-rank1'
    """
    if "/" in name or "\\" in name:
        return read_organism(Path(name))
    if name not in names():
        near = get_close_matches(name, names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(names()) or "none are installed; install modeldiff again"
        raise SetupError(f"no embedded organism is called {name!r}.{hint} Known: {known}.")
    return read_organism(FOLDER / name)


def read_organism(folder: Path) -> Organism:
    """Read the organism that was built in ``folder``.

    Raises:
        SetupError: If a file it names does not exist.
        FileFormatError: If the manifest is not JSON, or lacks a field.
    """
    path = folder / "organism.json"
    if not path.is_file():
        raise SetupError(
            f"{folder} holds no organism.json. Give the folder of one organism, as "
            "`modeldiff organisms build --out DIR` writes them: DIR/NAME."
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = Organism(
            name=manifest["name"],
            summary=manifest["summary"],
            base=(folder / manifest["base"]).resolve(),
            finetuned=_within(folder, manifest.get("finetuned")),
            adapter=_within(folder, manifest.get("adapter")),
            manifest=manifest,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} is not an organism's manifest ({error!r}). Build the organism again with "
            "python -m modeldiff.organisms.build."
        ) from error
    weights = (
        found.base / "model.safetensors",
        found.finetuned and found.finetuned / "model.safetensors",
        found.adapter and found.adapter / "adapter_model.safetensors",
    )
    missing = [each for each in weights if each and not each.is_file()]
    if missing:
        raise SetupError(
            f"the organism {found.name!r} lacks {', '.join(map(str, missing))}. Install "
            "modeldiff again, or build the organism with python -m modeldiff.organisms.build."
        )
    return found


def _within(folder: Path, relative: str | None) -> Path | None:
    return (folder / relative).resolve() if relative else None
