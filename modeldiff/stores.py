"""`ActivationStore`: paired activations on disk, read at the speed of memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeldiff._files import PathLike, digest, file_digest
from modeldiff._shapes import Float, Int
from modeldiff.dictionaries.configs import Normaliser
from modeldiff.dictionaries.sources import Rows
from modeldiff.errors import FileFormatError, MismatchError, SiteError
from modeldiff.sites import Site
from modeldiff.store_files import (
    DTYPES,
    N_MODELS,
    STATISTICS,
    STORED,
    Manifest,
    read_manifest,
    read_statistics,
    shard_path,
    wrong_sizes,
)
from modeldiff.store_reading import BLOCK, POOL, SiteFiles, as_tensor, shuffled
from modeldiff.store_statistics import RowStatistics
from modeldiff.store_texts import Corpus, StoredText, corpus_in_files


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """Activations of a base model and its fine-tune at some sites, one row per kept token.

    Rows are in the order of the texts and of the tokens in them. Any number of processes may read
    a store at once; pickling it sends its folder, not its rows.

    Args:
        folder: Where it lies.
        manifest: What `modeldiff.harvesting.harvest` wrote about it.
        corpus: The texts.
    """

    folder: Path
    manifest: Manifest
    corpus: Corpus
    _mapped: "dict[Site, dict[int, np.ndarray]]" = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: PathLike) -> "ActivationStore":
        """Open a finished store; files are checked by size, `verify` checks their content.

        Raises:
            FileFormatError: If there is no store, it is not finished, or a file is missing, cut
                short, or of something else; names all that are.
        """
        where = Path(folder)
        manifest = read_manifest(where)
        if manifest is None:
            raise FileFormatError(f"{str(where)!r} holds no activation store (no manifest).")
        if not manifest["complete"]:
            raise FileFormatError(
                f"the store in {str(where)!r} is not finished: the harvest was stopped. Harvest "
                "again with the same arguments; it goes on after the last finished shard. "
                "('modeldiff train --follow' trains while a harvest still writes.)"
            )
        sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
        wrong = [
            each
            for number, record in enumerate(manifest["shards"])
            for each in wrong_sizes(where, number, record)
        ]
        if wrong:
            raise FileFormatError(
                f"the store in {str(where)!r} is damaged: {'; '.join(wrong[:5])}"
                f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Harvest again with "
                "the same arguments: only what is missing is made."
            )
        return cls(where, manifest, corpus_in_files(where, manifest["texts"], sizes))

    def __reduce__(self) -> tuple[Any, ...]:
        return ActivationStore.open, (str(self.folder),)

    def __len__(self) -> int:
        return self.corpus.n_rows

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} x {self.d_model(site)}" for site in self.sites)
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"ActivationStore({str(self.folder)!r}: {len(self):,} tokens of {self.n_documents:,} "
            f"texts, both sides, {sites}, {dtype})"
        )

    @property
    def key(self) -> str:
        """Hash of everything the rows depend on: models, texts, sites, mask, dtype, version."""
        return self.manifest["key"]

    @property
    def depends_on(self) -> dict[str, Any]:
        """What the key is made of, by name."""
        return self.manifest["depends_on"]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Stored sites, in forward order."""
        return tuple(sorted(map(Site.parse, self.manifest["widths"])))

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored rows."""
        return DTYPES[self.manifest["dtype"]]

    @property
    def n_documents(self) -> int:
        """Texts, also those of which nothing was kept."""
        return len(self.corpus)

    def d_model(self, site: "str | Site") -> int:
        """Width of the rows of a site."""
        return self.manifest["widths"][str(self._known(site))]

    def document(self, number: int) -> StoredText:
        """One text: all its tokens with their roles, and which of them have rows."""
        return self.corpus.document(number)

    @cached_property
    def token_ids(self) -> Int[Tensor, " row"]:
        """Token of each row."""
        return self.corpus.origins(slice(None))[0]

    @cached_property
    def documents(self) -> Int[Tensor, " row"]:
        """Text of each row."""
        return self.corpus.origins(slice(None))[1]

    @cached_property
    def positions(self) -> Int[Tensor, " row"]:
        """Position of each row's token in its text."""
        return self.corpus.origins(slice(None))[2]

    def rows(
        self, site: "str | Site", index: "Int[Tensor, ' chosen'] | np.ndarray | list[int] | slice"
    ) -> Float[Tensor, "chosen model d_model"]:
        """Rows by number, in the order asked for, in the storage dtype; base first.

        Raises:
            SiteError: If the site is not stored.
            MismatchError: If a number lies outside the store.
        """
        files, at = self.files(site), self._known(site)
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        wanted = np.asarray(index, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= -len(self) and wanted.max() < len(self)):
            raise MismatchError(
                f"rows {wanted.min()} to {wanted.max()} of a store with {len(self)} rows."
            )
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        return as_tensor(files.gather(wanted, self._mapped.setdefault(at, {})))

    def source(self, site: "str | Site | None" = None, *, pool_rows: int = POOL) -> "StoreRows":
        """A source of one site's rows, for training and analysis.

        Args:
            site: Which; not needed if there is one alone.
            pool_rows: Rows in the pool from which shuffled batches are drawn.

        Raises:
            SiteError: If the site is not stored, or there are several and none is named.
        """
        if site is None and len(self.sites) != 1:
            raise SiteError(
                f"the store has the sites {', '.join(map(str, self.sites))}: say which."
            )
        return StoreRows(self, self._known(self.sites[0] if site is None else site), pool_rows)

    @cached_property
    def _statistics(self) -> dict[Site, RowStatistics]:
        return read_statistics(self.folder / STATISTICS)[1]

    def statistics(self, site: "str | Site") -> RowStatistics:
        """Count, mean and spread of all rows of a site, float64, as they are stored.

        Raises:
            FileFormatError: If the file is missing or damaged.
        """
        return self._statistics[self._known(site)]

    def normaliser(self, site: "str | Site") -> Normaliser:
        """The normaliser of a site's rows; nothing is read but the statistics."""
        found, width = self.statistics(site), self.d_model(site)
        return Normaliser(found.mean.float(), (width**0.5 / found.rms).float())

    def verify(self) -> None:
        """Read every file and compare it with the hash that was taken when it was written.

        Raises:
            FileFormatError: Naming every file that was changed.
        """
        hashes = {name: facts["digest"] for name, facts in self.manifest["files"].items()}
        for number, record in enumerate(self.manifest["shards"]):
            for site, expected in record["digests"].items():
                path = shard_path(self.folder, site, number)
                hashes[str(path.relative_to(self.folder))] = expected
        paths = {name: self.folder / name for name in hashes}
        wrong = [
            name
            for name, path in paths.items()
            if not path.is_file() or file_digest(path) != hashes[name]
        ]
        if wrong:
            raise FileFormatError(
                f"the store in {str(self.folder)!r} is damaged: {', '.join(wrong[:5])} differ from "
                f"what was written ({len(wrong)} of {len(hashes)} files). Delete them and harvest "
                "again with the same arguments: only they are made."
            )

    def files(self, site: "str | Site") -> SiteFiles:
        """Where the rows of a site lie."""
        at = self._known(site)
        shards = self.manifest["shards"]
        return SiteFiles(
            paths=tuple(shard_path(self.folder, at, n) for n in range(len(shards))),
            ends=np.cumsum([record["n_rows"] for record in shards]),
            shape=(N_MODELS, self.d_model(at)),
            kind=STORED[self.manifest["dtype"]],
        )

    def _known(self, site: "str | Site") -> Site:
        at = Site.parse(site)
        if at not in self.sites:
            have = ", ".join(map(str, self.sites))
            raise SiteError(f"{at}: the store in {str(self.folder)!r} has {have}.")
        return at


@dataclass(frozen=True, eq=False)
class StoreRows:
    """The rows of one site of a store, as a `modeldiff.dictionaries.sources.Source`.

    Args:
        store: The store.
        site: Which of its sites.
        pool_rows: Rows in the pool from which shuffled batches are drawn.
    """

    store: ActivationStore
    site: Site
    pool_rows: int = POOL

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        return self.store.d_model(self.site)

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return len(self.store)

    @property
    def key(self) -> str:
        """Hash of the content."""
        return digest(self.store.key, str(self.site))

    def shuffled(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """Batches without end, in the storage dtype; see `modeldiff.store_reading.shuffled`.

        Blocks of 512 consecutive rows are read in random order into the pool.
        """
        starts = range(0, self.n_rows, BLOCK)
        spans = [(start, min(start + BLOCK, self.n_rows)) for start in starts]
        pool = self._empty(min(self.n_rows, self.pool_rows + BLOCK))
        return shuffled(
            [stop - start for start, stop in spans],
            lambda blocks: self._read([spans[block] for block in blocks], pool),
            batch_size, pool_rows=self.pool_rows, seed=seed, start=start,
        )  # fmt: skip

    def in_order(self, batch_size: int) -> Iterator[Rows]:
        """Every row once, in the storage dtype; the last batch may be short."""
        for start in range(0, self.n_rows, batch_size):
            stop = min(start + batch_size, self.n_rows)
            yield self._read([(start, stop)], self._empty(stop - start))

    def _empty(self, n_rows: int) -> np.ndarray:
        files = self.store.files(self.site)
        return np.empty((n_rows, *files.shape), files.kind)

    def _read(self, spans: list[tuple[int, int]], out: np.ndarray) -> Rows:
        """Read spans of rows one after the other into the beginning of an array."""
        files, done = self.store.files(self.site), 0
        for start, stop in spans:
            files.read(start, stop, out[done : done + stop - start])
            done += stop - start
        which = np.concatenate([np.arange(start, stop) for start, stop in spans])
        return Rows(as_tensor(out[:done]), *self.store.corpus.origins(which))
