"""The file format of directions: unit vectors as tensors, the rest as JSON in the header.

This module knows the format alone; `modeldiff.directions` says what the records mean.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeldiff._files import PathLike, atomic_write
from modeldiff._shapes import Float
from modeldiff.errors import FileFormatError

_FORMAT, _VERSION = "modeldiff.directions", "1"

Record = dict[str, Any]


def write_vectors(
    path: PathLike, vectors: Sequence[Float[Tensor, " _d_model"]], records: Sequence[Record]
) -> None:
    """Write vectors, each with a JSON-able record, to one file: whole or not at all."""
    header = {"format": _FORMAT, "version": _VERSION, "directions": json.dumps(list(records))}
    tensors = {f"unit.{i}": vector.clone().contiguous() for i, vector in enumerate(vectors)}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, header)


def read_vectors(path: PathLike) -> list[tuple[Float[Tensor, " _d_model"], Record]]:
    """Read what `write_vectors` wrote, in order.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If the file is cut short or damaged, is not a file of directions, or
            has another format version.
    """
    try:
        with safe_open(Path(path), framework="pt") as stream:
            header = stream.metadata() or {}
            _check(header, path)
            records = json.loads(header["directions"])
            return [
                (stream.get_tensor(f"unit.{i}").clone(), dict(record))
                for i, record in enumerate(records)
            ]
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise damaged(path, error) from error


def damaged(path: PathLike, error: Exception) -> FileFormatError:
    """The error for a file that does not hold together, to be raised from ``error``."""
    return FileFormatError(
        f"{str(path)!r} is not a readable file of directions ({error}). It may be cut short, "
        "damaged or of another kind; nothing was read. Write it again."
    )


def _check(header: dict[str, str], path: PathLike) -> None:
    if header.get("format") != _FORMAT:
        raise FileFormatError(
            f"{str(path)!r} is a safetensors file but holds no directions. Only files written "
            "by save_to or save_directions can be read."
        )
    if header.get("version") != _VERSION:
        raise FileFormatError(
            f"{str(path)!r} has format version {header.get('version')!r}, this modeldiff reads "
            f"{_VERSION!r}. Update modeldiff, or write the file again."
        )
