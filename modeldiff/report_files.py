"""The file format of reports: a manifest, one JSON file a table, directions and the page.

This module knows the format alone; `modeldiff.report` says what the parts mean.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from modeldiff._files import PathLike, atomic_write, digest, file_digest
from modeldiff.directions import Direction, load_directions, save_directions
from modeldiff.errors import FileFormatError

_FORMAT, _VERSION = "modeldiff.report", "1"
_MANIFEST, _DIRECTIONS, _PAGE = "manifest.json", "directions.safetensors", "report.html"
_TEXT = pd.Series([""]).dtype  # "str" or, before pandas 3, "object"
_FLOAT = "__float__"  # JSON has no NaN and no infinities: {"__float__": "nan"}
_LISTED = re.compile(r"tables/[a-z0-9][a-z0-9_-]*\.json|directions\.safetensors|report\.html")

Content = dict[str, Any]


def storable(column: pd.Series) -> bool:
    """Whether a column is of a kind that comes back from a file exactly."""
    dtype = column.dtype
    if pd.api.types.is_object_dtype(dtype):
        plain = (str, bool, int, float, np.bool_, np.integer, np.floating)
        return all(value is None or isinstance(value, plain) for value in column)
    numeric = isinstance(dtype, np.dtype) and dtype.kind in "biuf" and dtype.itemsize <= 8
    return numeric or dtype == _TEXT


def write_folder(
    folder: PathLike,
    content: Content,
    frames: Mapping[str, pd.DataFrame],
    directions: Sequence[Direction],
    page: str,
) -> None:
    """Write all files or, if interrupted, none; the manifest is put in place last."""
    root = Path(folder)
    stale = _listed_tables(root)
    hashes: dict[str, str] = {}
    with ExitStack() as stack:
        # contexts close in reverse: what is entered first is renamed last
        manifest = stack.enter_context(atomic_write(root / _MANIFEST))
        for name, frame in frames.items():
            path = stack.enter_context(atomic_write(root / _table_file(name)))
            path.write_bytes(_json(_encode_frame(frame)))
            hashes[_table_file(name)] = file_digest(path)
        if directions:
            path = stack.enter_context(atomic_write(root / _DIRECTIONS))
            save_directions(path, directions)
            hashes[_DIRECTIONS] = file_digest(path)
        path = stack.enter_context(atomic_write(root / _PAGE))
        path.write_bytes(page.encode())
        hashes[_PAGE] = file_digest(path)
        body = {"report": _encode(content), "files": hashes}
        head = {"format": _FORMAT, "version": _VERSION, "digest": digest(body)}
        manifest.write_bytes(_json(head | body))
    for name in stale - hashes.keys():
        (root / name).unlink(missing_ok=True)


def read_folder(
    folder: PathLike,
) -> tuple[Content, dict[str, pd.DataFrame], list[Direction]]:
    """Read what `write_folder` wrote.

    Raises:
        FileFormatError: If a file is missing, damaged, or not the one that was written.
    """
    root = Path(folder)
    manifest = _read_manifest(root / _MANIFEST)
    content, hashes = _decode(manifest["report"]), manifest["files"]
    for name, expected in hashes.items():
        _check_file(root, name, expected)
    frames = {name: _read_frame(root, _table_file(name), hashes) for name in content["tables"]}
    directions = load_directions(root / _DIRECTIONS) if _DIRECTIONS in hashes else []
    return content, frames, directions


def _table_file(name: str) -> str:
    return f"tables/{name}.json"


def _listed_tables(root: Path) -> set[str]:
    """Table files of the report that is in the folder now, if a readable one is."""
    try:
        listed = _read_manifest(root / _MANIFEST)["files"]
    except FileFormatError:
        return set()
    return {name for name in listed if _LISTED.fullmatch(name) and name.startswith("tables/")}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise FileFormatError(
            f"{str(path)!r} cannot be read ({error.strerror}). A report is a folder with a "
            "manifest.json, as Report.save_to writes it."
        ) from error
    except ValueError as error:
        raise _broken(path, f"it is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise _broken(path, "it is not the manifest of a report")
    if manifest.get("version") != _VERSION:
        raise FileFormatError(
            f"{str(path)!r} has format version {manifest.get('version')!r}, this modeldiff reads "
            f"{_VERSION!r}. Update modeldiff, or run the audit again."
        )
    body = {key: manifest.get(key) for key in ("report", "files")}
    parts = isinstance(body["report"], dict) and isinstance(body["files"], dict)
    if not parts or manifest.get("digest") != digest(body):
        raise _broken(path, "its content does not match its own hash")
    if not isinstance(manifest["report"].get("tables"), dict):
        raise _broken(path, "it lists no tables")
    return manifest


def _check_file(root: Path, name: str, expected: str) -> None:
    if not _LISTED.fullmatch(name):
        raise _broken(root / _MANIFEST, f"it lists {name!r}, which no report has")
    try:
        found = file_digest(root / name)
    except OSError as error:
        raise FileFormatError(
            f"{name!r} of the report in {str(root)!r} cannot be read ({error.strerror}). Copy "
            "the whole folder, or run the audit again."
        ) from error
    if found != expected:
        raise _broken(root / name, f"its hash is {found}, {expected} was written")


def _read_frame(root: Path, name: str, hashes: Mapping[str, str]) -> pd.DataFrame:
    if name not in hashes:
        raise _broken(root / _MANIFEST, f"it lists no file for {name!r}")
    try:
        return _decode_frame(json.loads((root / name).read_bytes()))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _broken(root / name, repr(error)) from error


def _broken(path: Path, why: str) -> FileFormatError:
    return FileFormatError(
        f"{str(path)!r} is not what was written with the report: {why}. It was changed, damaged "
        "or cut short; nothing was read. Restore it, or run the audit again."
    )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _encode_frame(frame: pd.DataFrame) -> dict[str, Any]:
    columns = [
        {"name": name, "dtype": _dtype_name(column), "values": _values(column)}
        for name, column in frame.items()
    ]
    return {"format": "modeldiff.table", "rows": len(frame), "columns": columns}


def _is_text(column: pd.Series) -> bool:
    return column.dtype == _TEXT and not pd.api.types.is_object_dtype(_TEXT)


def _dtype_name(column: pd.Series) -> str:
    return "text" if _is_text(column) else str(column.dtype)


def _values(column: pd.Series) -> list[Any]:
    if _is_text(column):
        return [None if pd.isna(value) else value for value in column]
    return _encode(column.tolist())


def _decode_frame(stored: dict[str, Any]) -> pd.DataFrame:
    index = pd.RangeIndex(stored["rows"])
    columns = {
        column["name"]: pd.Series(
            _decode(column["values"]),
            index=index,
            dtype=_TEXT if column["dtype"] == "text" else column["dtype"],
        )
        for column in stored["columns"]
    }
    return pd.DataFrame(columns, index=index)


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(entry) for entry in value]
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: repr(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_FLOAT} and value[_FLOAT] in ("nan", "inf", "-inf"):
            return float(value[_FLOAT])
        return {key: _decode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    return value
