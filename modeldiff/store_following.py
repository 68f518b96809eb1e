"""Rows of a store that a harvest is still writing: training beside harvesting.

A harvest plans first: how many rows there will be, and in which shard each lies, is known before
the first shard is. So the order of the rows is a function of the plan and a seed, whatever comes
when; a reader that is ahead of the harvest waits. In the first epoch shards are taken in their
order, and rows are shuffled within the pool alone; all later ones shuffle the whole store.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import numpy as np

from modeldiff._files import PathLike, digest
from modeldiff.dictionaries.sources import Rows
from modeldiff.errors import Cancelled, FileFormatError, SetupError, SiteError, StoreError
from modeldiff.harvesting import planned_shards
from modeldiff.sites import Site
from modeldiff.store_files import (
    DTYPES,
    MANIFEST,
    N_MODELS,
    RECEIPTS,
    STORED,
    Manifest,
    Shard,
    prepare_folder,
    read_manifest,
    shard_path,
)
from modeldiff.store_places import Place, is_address, receipt_at
from modeldiff.store_reading import BLOCK, POOL, SiteFiles, as_tensor, shuffled
from modeldiff.store_texts import FILES, Corpus

_TICK = 1.0  # seconds between two looks


@dataclass(frozen=True)
class Patience:
    """How long to wait for a harvest.

    Args:
        minutes: Without any new shard, after which it is taken for dead.
        cancel: Event that ends the waiting.
    """

    minutes: float = 30.0
    cancel: Event | None = None

    def rest(self, since: float, what: str) -> None:
        """Wait a little; ``since`` is when the harvest last did something.

        Raises:
            StoreError: If it has done nothing for too long.
            Cancelled: If the event is set.
        """
        if time.monotonic() - since > 60 * self.minutes:
            raise StoreError(
                f"waited {self.minutes:g} minutes for {what}, and nothing new came: has the "
                "harvest ended? Harvest again with the same arguments (it goes on), then train "
                "again (it goes on too)."
            )
        if (self.cancel or Event()).wait(_TICK):
            raise Cancelled(f"cancelled while waiting for {what}.")


@dataclass(frozen=True, eq=False)
class FollowedRows:
    """One site's rows, as far as they are there; a `modeldiff.dictionaries.sources.Source`.

    Args:
        place: Where the store grows.
        plan: Its manifest, finished or not.
        corpus: Its texts.
        shards: How their rows are cut.
        site: Which of its sites.
        patience: How long to wait.
        pool_rows: Rows in the pool from which shuffled batches are drawn.
    """

    place: Place
    plan: Manifest
    corpus: Corpus
    shards: tuple[Shard, ...]
    site: Site
    patience: Patience = Patience()
    pool_rows: int = POOL
    _there: set[int] = field(default_factory=set)

    @property
    def n_rows(self) -> int:
        """Rows in all, when the harvest will have ended."""
        return self.corpus.n_rows

    @property
    def key(self) -> str:
        """Hash of the content, and of its coming in turn."""
        return digest(self.plan["key"], str(self.site), "in turn")

    @property
    def d_model(self) -> int:
        """Width of the rows; known from the first shard, which is waited for."""
        return self._width

    @cached_property
    def _width(self) -> int:
        record = self._await(self.shards[0])
        each = N_MODELS * DTYPES[self.plan["dtype"]].itemsize * self.shards[0].n_rows
        return record["bytes"][str(self.site)] // each

    def shuffled(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """Batches without end, in the storage dtype, as `modeldiff.store_reading.shuffled`.

        Raises:
            StoreError: If the harvest does not go on.
            Cancelled: If the event is set meanwhile.
        """
        starts = range(0, self.n_rows, BLOCK)
        spans = [(start, min(start + BLOCK, self.n_rows)) for start in starts]
        return shuffled(
            [stop - start for start, stop in spans],
            lambda blocks: self._read([spans[block] for block in blocks]),
            batch_size, pool_rows=self.pool_rows, seed=seed, start=start, first_in_turn=True,
        )  # fmt: skip

    def in_order(self, batch_size: int) -> Iterator[Rows]:
        """Every row once; the last batch may be short."""
        for start in range(0, self.n_rows, batch_size):
            yield self._read([(start, min(start + batch_size, self.n_rows))])

    @cached_property
    def _files(self) -> SiteFiles:
        return SiteFiles(
            paths=tuple(shard_path(self.place.local, self.site, s.number) for s in self.shards),
            ends=np.cumsum([shard.n_rows for shard in self.shards]),
            shape=(N_MODELS, self.d_model),
            kind=STORED[self.plan["dtype"]],
        )

    def _read(self, spans: list[tuple[int, int]]) -> Rows:
        files, done = self._files, 0
        which = np.concatenate([np.arange(start, stop) for start, stop in spans])
        for number in np.unique(np.searchsorted(files.ends, which, side="right")).tolist():
            if number not in self._there:
                self._fetch(self.shards[number])
        out = np.empty((len(which), *files.shape), files.kind)
        for start, stop in spans:
            files.read(start, stop, out[done : done + stop - start])
            done += stop - start
        return Rows(as_tensor(out), *self.corpus.origins(which))

    def _fetch(self, shard: Shard) -> None:
        n_bytes = self._await(shard)["bytes"][str(self.site)]
        name = str(shard_path(Path(), self.site, shard.number))
        path = self.place.local / name
        if not path.is_file() or path.stat().st_size != n_bytes:
            self.place.fetch(name)
        self._there.add(shard.number)

    def _await(self, shard: Shard) -> Manifest:
        """The record of a shard, once it is finished; any new shard is a sign of life."""
        since, seen = time.monotonic(), -1
        self.place.refresh()
        while (found := receipt_at(self.place, self.plan["key"], shard)) is None:
            if (n := len(self.place.listed(RECEIPTS))) != seen:
                since, seen = time.monotonic(), n
            what = f"shard {shard.number} of {len(self.shards)} of {self.place.address!r}"
            self.patience.rest(since, what)
            self.place.refresh()
        return found[0]


def followed(
    address: PathLike,
    site: "str | Site | None" = None,
    *,
    copy: PathLike | None = None,
    minutes: float = 30.0,
    cancel: Event | None = None,
) -> FollowedRows:
    """Rows of a store that is being harvested, or will be, or is finished.

    Args:
        address: A folder, or an address of fsspec.
        site: Which; not needed if the harvest is of one.
        copy: Folder here for what lies at an address.
        minutes: How long the harvest may do nothing before it is taken for dead.
        cancel: Event that ends the waiting.

    Raises:
        SetupError: If an address comes without a folder to copy to.
        FileFormatError: If the folder holds another store, or no store lies there.
        SiteError: If the harvest is not of this site, or of several and none is named.
        StoreError: If no harvest begins.
        Cancelled: If the event is set meanwhile.
    """
    far = is_address(address)
    if minutes <= 0 or (far and copy is None):
        raise SetupError(
            f"minutes={minutes:g}, {str(address)!r}: give a time to wait above 0, and for an "
            "address a folder here to copy it to."
        )
    local = Path(copy if far and copy is not None else address)
    place, patience = Place(str(address).rstrip("/"), local), Patience(minutes, cancel)
    since = time.monotonic()
    while place.size(MANIFEST) is None:
        patience.rest(since, f"a harvest to begin at {place.address!r}")
        place.refresh()
    if far:
        _copy_plan(place)
    plan = read_manifest(local)
    assert plan is not None, "it was just seen"
    corpus, shards = planned_shards(local, plan)
    return FollowedRows(place, plan, corpus, shards, _chosen(plan, site, place), patience)


def _copy_plan(place: Place) -> None:
    """Copy the manifest and the texts here, unless another store is here."""
    place.local.mkdir(parents=True, exist_ok=True)
    known = prepare_folder(place.local)
    with TemporaryDirectory() as scratch:
        plan = read_manifest(Place(place.address, Path(scratch)).fetch(MANIFEST).parent)
    if known is not None and plan is not None and known["key"] != plan["key"]:
        raise FileFormatError(
            f"{str(place.local)!r} holds another store than {place.address!r}. Give another folder."
        )
    for name in (*FILES, MANIFEST):
        place.fetch(name)


def _chosen(plan: Manifest, site: "str | Site | None", place: Place) -> Site:
    have = list(map(Site.parse, plan["depends_on"]["sites"]))
    found = [each for each in have if site is None or each == Site.parse(site)]
    if len(found) != 1:
        raise SiteError(
            f"{site or 'no site named'}: the harvest at {place.address!r} is of "
            f"{', '.join(map(str, have))}; name one of them."
        )
    return found[0]
