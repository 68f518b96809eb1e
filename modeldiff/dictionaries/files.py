"""The file format of dictionaries: tensors in one file, a JSON record beside it.

This module knows the format alone; `modeldiff.dictionaries.models` says what the tensors mean.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeldiff._files import PathLike, atomic_write, file_digest
from modeldiff.errors import FileFormatError, StoreError

WEIGHTS, RECORD = "model.safetensors", "dictionary.json"
_FORMAT, _VERSION = "modeldiff.dictionary", 1

Record = dict[str, Any]


def write_dictionary(
    folder: PathLike, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON-able record into a folder, each file whole or not at all.

    The record is written last and names the tensors' digest, so that what a crash left between
    the two is found when it is read.

    Raises:
        StoreError: If the disk is full or refuses.
    """
    folder = Path(folder)
    write_tensors(folder / WEIGHTS, tensors, {"format": _FORMAT, "version": str(_VERSION)})
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        **record,
        "weights_digest": file_digest(folder / WEIGHTS),
    }
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(about, indent=2), encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Write tensors as safetensors, whole or not at all.

    Raises:
        StoreError: If the disk is full or refuses; what was there before is kept.
    """
    kept = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            save_file(kept, temporary, about)
    except (SafetensorError, OSError) as error:
        n_bytes = sum(each.numel() * each.element_size() for each in kept.values())
        raise StoreError(
            f"writing {str(path)!r} ({n_bytes / 1e6:.1f} MB) failed: {error}. What was there "
            "before is kept; make room, and begin again: a training goes on from its last "
            "checkpoint."
        ) from error


def read_dictionary(folder: PathLike, device: str = "cpu") -> tuple[dict[str, Tensor], Record]:
    """Read what `write_dictionary` wrote.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        FileFormatError: If they are damaged, of another kind or version, or not of one writing.
    """
    folder = Path(folder)
    record = _record(folder / RECORD)
    found = file_digest(folder / WEIGHTS)
    if found != record.get("weights_digest"):
        raise FileFormatError(
            f"{str(folder / WEIGHTS)!r} has digest {found}, but its record was written for "
            f"{record.get('weights_digest')}: the two are not of one writing, or the weights are "
            "damaged. Nothing was read; save the dictionary again."
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt", device=device) as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}, record  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(
            f"{str(folder / WEIGHTS)!r} is not a readable safetensors file ({error})."
        ) from error


def _record(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r} is not JSON ({error}); nothing was read.") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise FileFormatError(
            f"{str(path)!r} is not the record of a dictionary. Folders written by save_to can be "
            "read here; those of other libraries by modeldiff.dictionaries.readers."
        )
    if record.get("version") != _VERSION:
        raise FileFormatError(
            f"{str(path)!r} has format version {record.get('version')!r}, this modeldiff reads "
            f"{_VERSION}. Update modeldiff, or save the dictionary again."
        )
    return record
