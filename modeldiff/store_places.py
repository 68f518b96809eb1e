"""Where a store is written: a folder, or any address that fsspec knows (``s3://bucket/run``)."""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from modeldiff._files import PathLike
from modeldiff.errors import FileFormatError, ModelDiffError, SetupError, SiteError
from modeldiff.sites import Site
from modeldiff.store_files import (
    MANIFEST,
    RECEIPTS,
    STATISTICS,
    Manifest,
    Shard,
    prepare_folder,
    read_manifest,
    read_statistics,
    shard_path,
    writing,
)
from modeldiff.store_statistics import RowStatistics
from modeldiff.store_texts import FILES
from modeldiff.stores import ActivationStore

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


class _Reaching:
    """Says what could not be reached: packages behind fsspec raise errors of their own kinds."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        known = ModelDiffError | OSError | MemoryError
        if kind is not None and isinstance(error, Exception) and not isinstance(error, known):
            raise SetupError(
                f"{self.address!r} cannot be reached: {error} ({kind.__name__}). Are the "
                "credentials there, as the package for such addresses wants them, and may they "
                "read and write it?"
            ) from error


@dataclass(frozen=True)
class Place:
    """A store's files, wherever they lie, by their names inside it.

    Args:
        address: A folder, or an address of fsspec.
        local: The folder itself; for an address, a folder here for the small files.
    """

    address: str
    local: Path

    @property
    def is_far(self) -> bool:
        """Whether the files lie behind fsspec."""
        return is_address(self.address)

    @cached_property
    def _system(self) -> tuple[Any, str]:
        return _file_system(self.address)

    def prepare(self) -> Manifest | None:
        """Make ready to be harvested into; the manifest, if there is one.

        Raises:
            FileFormatError: If something else than a store lies there.
        """
        if not self.is_far:
            return prepare_folder(self.local)
        if self.size(MANIFEST) is not None:
            self.fetch(MANIFEST)
            return read_manifest(self.local)
        system, root = self._system
        with _Reaching(self.address):
            listed = system.ls(root, detail=False) if system.exists(root) else []
        names = [str(each).rstrip("/").rsplit("/", 1)[-1] for each in listed]
        if foreign := sorted(name for name in names if not _is_ours(name)):
            raise FileFormatError(
                f"{self.address!r} holds no activation store but {foreign[:3]}; nothing was "
                "written. Give an empty place or a new one."
            )
        return None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is missing."""
        if not self.is_far:
            path = self.local / name
            return path.stat().st_size if path.is_file() else None
        system, root = self._system
        try:
            with _Reaching(self.address):
                return int(system.info(f"{root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def refresh(self) -> None:
        """Forget what was listed before: others write here too."""
        if self.is_far:
            self._system[0].invalidate_cache()

    def listed(self, folder: str) -> list[str]:
        """Names of the files in a folder; none if it is missing."""
        if not self.is_far:
            where = self.local / folder
            return sorted(each.name for each in where.iterdir()) if where.is_dir() else []
        system, root = self._system
        try:
            with _Reaching(self.address):
                found = system.ls(f"{root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(each).rstrip("/").rsplit("/", 1)[-1] for each in found)

    def fetch(self, name: str) -> Path:
        """Copy a file here, unless this is where it lies; its path."""
        path = self.local / name
        if self.is_far:
            system, root = self._system
            path.parent.mkdir(parents=True, exist_ok=True)
            with _Reaching(self.address):
                system.get_file(f"{root}/{name}", str(path))
        return path

    def send(self, name: str) -> None:
        """Copy a file from here to the address under another name, then rename it."""
        if not self.is_far:
            return
        system, root = self._system
        folder, _, last = f"{root}/{name}".rpartition("/")
        temporary = f"{folder}/.{last}.{uuid.uuid4().hex}"
        with _Reaching(self.address):
            system.makedirs(folder, exist_ok=True)
            system.put_file(str(self.local / name), temporary)
            system.mv(temporary, f"{folder}/{last}")

    def sweep(self) -> None:
        """Remove what killed workers left half-written."""
        if not self.is_far:
            prepare_folder(self.local)
            return
        system, root = self._system
        with _Reaching(self.address):
            for path in system.find(root):
                if _TEMPORARY.fullmatch(str(path).rsplit("/", 1)[-1]):
                    system.rm_file(path)


def receipt_name(number: int) -> str:
    """Name of a shard's receipt."""
    return f"{RECEIPTS}/{number:05d}.safetensors"


def receipt_at(
    place: Place, key: str, shard: Shard
) -> tuple[Manifest, dict[Site, RowStatistics]] | None:
    """A shard's receipt; None if the shard is not finished, or a file of it is amiss."""
    name = receipt_name(shard.number)
    if place.size(name) is None:
        return None
    try:
        record, statistics = read_statistics(place.fetch(name))
    except FileFormatError:
        return None
    if record.get("key") != key or record.get("n_rows") != shard.n_rows:
        return None
    for site, n_bytes in record["bytes"].items():
        if place.size(str(shard_path(Path(), site, shard.number))) != n_bytes:
            return None
    return record, statistics


@contextmanager
def place_at(address: PathLike) -> Iterator[Place]:
    """A place to write to; folders are made, and made absolute."""
    if is_address(address):
        with TemporaryDirectory() as folder:
            yield Place(str(address).rstrip("/"), Path(folder))
    else:
        folder = Path(address).absolute()
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield Place(str(folder), folder)


def is_address(address: PathLike) -> bool:
    """Whether this is an address of fsspec, not a path."""
    return "://" in str(address)


def fetched(address: PathLike, folder: PathLike) -> ActivationStore:
    """Copy a finished store into a folder and open it; files that are there are not copied again.

    Args:
        address: Where it lies.
        folder: New, empty, or with a part of the same store.

    Raises:
        FileFormatError: If no finished store lies there, or the folder holds another one.
        SetupError: If fsspec cannot reach the address.
    """
    place = Place(str(address).rstrip("/"), Path(folder))
    if not place.is_far:
        return ActivationStore.open(address)
    place.local.mkdir(parents=True, exist_ok=True)
    known = prepare_folder(place.local)
    if place.size(MANIFEST) is None:
        raise FileFormatError(f"{place.address!r} holds no activation store (no manifest).")
    with TemporaryDirectory() as scratch:
        manifest = read_manifest(Place(place.address, Path(scratch)).fetch(MANIFEST).parent)
    if manifest is None or not manifest["complete"]:
        raise FileFormatError(f"the store at {place.address!r} is not finished: harvest again.")
    if known is not None and known["key"] != manifest["key"]:
        raise FileFormatError(
            f"{str(folder)!r} holds another store than {place.address!r}. Give another folder."
        )
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    for number, record in enumerate(manifest["shards"]):
        for site, n_bytes in record["bytes"].items():
            sizes[str(shard_path(Path(), site, number))] = n_bytes
    for name, n_bytes in sizes.items():
        path = place.local / name
        if not path.is_file() or path.stat().st_size != n_bytes:
            place.fetch(name)
    place.fetch(MANIFEST)
    return ActivationStore.open(place.local)


def _is_ours(name: str) -> bool:
    try:
        return name in (*FILES, STATISTICS, RECEIPTS) or name[0] == "." or bool(Site.parse(name))
    except SiteError:
        return False


def _file_system(address: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        system, root = url_to_fs(address)
    except ImportError as error:
        raise SetupError(
            f"{address!r} cannot be reached: {error}. fsspec and the package for this kind of "
            "address must be installed (s3fs for s3://, gcsfs for gs://)."
        ) from error
    except ValueError as error:
        raise SetupError(f"{address!r} is no address that fsspec knows: {error}.") from error
    return system, str(root).rstrip("/")
