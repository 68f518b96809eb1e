"""The files of an activation store: manifest, shards, receipts; written whole or not at all.

::

    manifest.json               what this is, what it depends on, every file's size and hash
    token_ids.bin roles.bin rows.bin documents.bin          see `modeldiff.store_texts`
    resid_post.3/00000.bin      raw rows [row, model, width], little-endian bfloat16 or float32
    receipts/00000.safetensors  a shard is finished: its hashes, and its statistics in float64
    statistics.safetensors      the statistics of all shards
"""

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modeldiff._files import PathLike, atomic_write, digest, file_digest
from modeldiff.errors import FileFormatError, SiteError, StoreError
from modeldiff.sites import Site
from modeldiff.store_statistics import RowStatistics
from modeldiff.store_texts import FILES

FORMAT, VERSION = "modeldiff.activations", 1
MANIFEST, RECEIPTS, STATISTICS = "manifest.json", "receipts", "statistics.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
STORED = {"bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4")}
"""As numpy sees the bytes; it has no bfloat16."""
N_MODELS = 2
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.ENOENT}  # of a folder that is to be made
_GO_ON = (
    "Finished shards are kept; make room, then harvest again with the same arguments to go on "
    "after them."
)

Manifest = dict[str, Any]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a refusal of the system into a `StoreError`.

    Raises:
        StoreError: If the disk is full, a limit is reached, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _IN_THE_WAY and not folder.is_dir():
            raise StoreError(
                f"{str(folder)!r} can be no folder ({error.strerror}): a file is in the way, or "
                "the system makes none there. Give another place."
            ) from error
        if error.errno not in _REFUSED:
            raise
        raise StoreError(
            f"writing to {str(folder)!r} failed: {error.strerror}. {_GO_ON}"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from harvesting into a folder; a killed one holds no lock.

    Raises:
        StoreError: If another one is.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"another harvest is writing to {str(folder)!r}. Wait for it, or choose another "
                "folder."
            ) from error
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Shard:
    """Consecutive texts whose rows lie in one file a site.

    Args:
        number: From 0.
        documents: First text, and one after the last.
        first_row: Its first row.
        n_rows: Rows.
    """

    number: int
    documents: tuple[int, int]
    first_row: int
    n_rows: int


def plan_shards(counts: np.ndarray, rows_per_shard: int) -> tuple[Shard, ...]:
    """Cut texts into shards of whole texts, each closed once it has ``rows_per_shard`` rows.

    Args:
        counts: Rows of each text.
        rows_per_shard: At least one.
    """
    ends, shards, start, done = np.cumsum(counts), [], 0, 0
    while done < ends[-1]:
        stop = int(np.searchsorted(ends, min(done + rows_per_shard, ends[-1]))) + 1
        n_rows = int(ends[stop - 1]) - done
        shards.append(Shard(len(shards), (start, stop), done, n_rows))
        start, done = stop, done + n_rows
    return tuple(shards)


def shard_path(folder: Path, site: "Site | str", number: int) -> Path:
    """File of one site's rows in one shard."""
    return folder / str(site) / f"{number:05d}.bin"


@contextmanager
def shard_files(
    folder: Path, number: int, sites: Sequence[Site]
) -> Iterator[dict[Site, tuple[int, Path]]]:
    """Open a temporary file for each site; flushed and renamed if the block succeeds."""
    with ExitStack() as stack:
        files: dict[Site, tuple[int, Path]] = {}
        for site in sites:
            path = stack.enter_context(atomic_write(shard_path(folder, site, number)))
            handle = os.open(path, os.O_RDWR)
            stack.callback(os.close, handle)
            files[site] = handle, path
        yield files
        for handle, _ in files.values():
            os.fsync(handle)


def write_at(handle: int, values: np.ndarray, offset: int) -> None:
    """Write all of an array's bytes at a place in a file."""
    left = values.data.cast("B")
    while left:
        n = os.pwrite(handle, left, offset)
        left, offset = left[n:], offset + n


def write_receipt(
    folder: Path, number: int, record: Manifest, statistics: dict[Site, RowStatistics]
) -> None:
    """Note that a shard is finished."""
    _write_statistics(folder / RECEIPTS / f"{number:05d}.safetensors", record, statistics)


def read_receipt(
    folder: Path, key: str, shard: Shard
) -> tuple[Manifest, dict[Site, RowStatistics]] | None:
    """Read a shard's receipt; None if the shard is not finished, or a file of it is amiss."""
    path = folder / RECEIPTS / f"{shard.number:05d}.safetensors"
    try:
        record, statistics = read_statistics(path)
    except FileFormatError:
        return None
    whole = record.get("key") == key and record.get("n_rows") == shard.n_rows
    if not whole or any(wrong_sizes(folder, shard.number, record)):
        return None
    return record, statistics


def wrong_sizes(folder: Path, number: int, record: Manifest) -> Iterator[str]:
    """Say which files of a shard are missing or have another size."""
    for site, n_bytes in record["bytes"].items():
        path = shard_path(folder, site, number)
        found = path.stat().st_size if path.is_file() else None
        if found != n_bytes:
            yield f"{path.relative_to(folder)} " + (
                "is missing" if found is None else f"has {found} of {n_bytes} bytes"
            )


def _write_statistics(path: Path, record: Manifest, statistics: dict[Site, RowStatistics]) -> None:
    tensors = {}
    for site, each in statistics.items():
        tensors[f"{site}.mean"] = each.mean.cpu().contiguous()
        tensors[f"{site}.square"] = each.square.cpu().contiguous()
    counts = {str(site): each.n for site, each in statistics.items()}
    header = json.dumps({**record, "counts": counts}, sort_keys=True)
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, {"record": header})
    except SafetensorError as error:
        raise StoreError(f"writing {str(path)!r} failed: {error}. {_GO_ON}") from error


def read_statistics(path: Path) -> tuple[Manifest, dict[Site, RowStatistics]]:
    """Read a receipt, or the statistics of a whole store.

    Raises:
        FileFormatError: If it is missing, damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            record = json.loads((stream.metadata() or {})["record"])
            return record, {
                Site.parse(site): RowStatistics(
                    n, stream.get_tensor(f"{site}.mean"), stream.get_tensor(f"{site}.square")
                )
                for site, n in record["counts"].items()
            }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{str(path)!r} cannot be read as statistics of a store ({error}). Harvest again with "
            "the same arguments: what is missing is made."
        ) from error


def write_statistics(folder: Path, statistics: dict[Site, RowStatistics]) -> None:
    """Write the statistics of a whole store."""
    _write_statistics(folder / STATISTICS, {}, statistics)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with its own hash."""
    whole = {**manifest, "format": FORMAT, "version": VERSION}
    with atomic_write(folder / MANIFEST) as temporary:
        text = json.dumps({**whole, "digest": digest(whole)}, indent=1, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: PathLike) -> Manifest | None:
    """Read the manifest of a folder; None if there is none.

    Raises:
        FileFormatError: If it is damaged, of another format, or of another version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        given = found.pop("digest", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise FileFormatError(f"{str(path)!r} is not a manifest ({error}).") from error
    if found.get("format") != FORMAT:
        raise FileFormatError(
            f"{str(path)!r} is not the manifest of an activation store (format "
            f"{found.get('format')!r}); nothing was read or written."
        )
    if found.get("version") != VERSION:
        raise FileFormatError(
            f"{str(path)!r} has format version {found.get('version')!r}, this modeldiff reads "
            f"{VERSION}. Update modeldiff, or harvest into another folder."
        )
    if given != digest(found):
        raise FileFormatError(
            f"{str(path)!r} was changed or damaged after it was written: its own hash does not "
            "fit. Delete it and harvest again with the same arguments."
        )
    return found


def prepare_folder(folder: Path) -> Manifest | None:
    """Make a folder ready to be harvested into; return its manifest, if it has one.

    What a killed run left half-written is removed.

    Raises:
        FileFormatError: If it holds something else than a store, finished or not.
    """
    manifest = read_manifest(folder)
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    if manifest is None and foreign:
        raise FileFormatError(
            f"{str(folder)!r} holds no activation store but {foreign[:3]}; nothing was written. "
            "Give an empty folder or a new one."
        )
    for path in _leftovers(folder):
        path.unlink()
    return manifest


def _is_ours(path: Path) -> bool:
    """Whether a store has an entry of this name, also one that has lost its manifest."""
    if path.name in (*FILES, STATISTICS, RECEIPTS) or path in _leftovers(path.parent):
        return True
    try:
        return path.is_dir() and bool(Site.parse(path.name))
    except SiteError:
        return False


def _leftovers(folder: Path) -> list[Path]:
    """Temporary files of `atomic_write`, named after the files that they were to become."""
    names = (*FILES, MANIFEST, STATISTICS)
    top = [path for name in names for path in folder.glob(f".{name}.*")]
    parts = [p for end in ("bin", "safetensors") for p in folder.glob(f"*/.[0-9]*.{end}.*")]
    return [*top, *parts]


def file_facts(folder: Path, name: str) -> Manifest:
    """Size and hash of a file."""
    return {"bytes": (folder / name).stat().st_size, "digest": file_digest(folder / name)}
