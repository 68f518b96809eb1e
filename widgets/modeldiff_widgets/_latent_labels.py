"""Labels of latents, in a file beside the dictionary they belong to."""

import json
from collections.abc import Mapping
from pathlib import Path

from modeldiff._files import atomic_write
from modeldiff.errors import FileFormatError

FILE = "labels.json"
_FORMAT, _VERSION = "modeldiff.labels", 1


def read_labels(folder: str | Path) -> dict[int, str]:
    """Read the labels of a dictionary's folder; empty if it has none.

    Raises:
        FileFormatError: If the file is not one of labels.
    """
    path = _file(folder)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT or found["version"] != _VERSION:
            raise ValueError(f"format {found['format']!r}, version {found['version']!r}")
        return {int(latent): str(label) for latent, label in found["labels"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"{str(path)!r} is not a file of labels ({error}). It was left as it is; move it away "
            "to begin a new one."
        ) from error


def write_labels(folder: str | Path, labels: Mapping[int, str]) -> Path:
    """Write all labels, whole or not at all; returns the file."""
    path = _file(folder)
    kept = {str(latent): label for latent, label in sorted(labels.items()) if label}
    with atomic_write(path) as temporary:
        about = {"format": _FORMAT, "version": _VERSION, "labels": kept}
        temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def _file(folder: str | Path) -> Path:
    place = Path(folder)
    return (place.parent if place.is_file() else place) / FILE
