"""Harvesting by many workers, or to another place than a folder of this machine.

The driver renders the texts and cuts them into shards, as the single process does; each shard is
made by one worker that has the pair loaded. A shard's bytes are a function of the models and its
texts, and it is written under a temporary name and renamed, its receipt last: whoever makes it,
and however often, there is one shard of one content. The driver puts receipts together in order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import torch

from modeldiff._files import PathLike
from modeldiff._progress import Progress, reporter
from modeldiff.cluster import Job, connected, done_by, n_workers, resources
from modeldiff.errors import Cancelled, MismatchError, StoreError
from modeldiff.harvesting import (
    finish,
    harvest_shard,
    planned,
    planned_shards,
    settings_of,
    shard_texts,
)
from modeldiff.live_rows import check_paired
from modeldiff.loading import Sides
from modeldiff.masks import Mask, parse_mask
from modeldiff.models import ModelPair
from modeldiff.sites import Site, parse_sites
from modeldiff.store_files import (
    MANIFEST,
    STATISTICS,
    Manifest,
    Shard,
    locked,
    shard_path,
    writing,
)
from modeldiff.store_places import Place, place_at, receipt_at, receipt_name
from modeldiff.store_texts import FILES, StoredText

_Done = Callable[[Iterator[Job]], Iterator[tuple[Job, Any]]]


@dataclass(frozen=True)
class PairSpec:
    """What a worker loads its pair from; see `modeldiff.models.ModelPair.load`.

    Args:
        base: Hub id, folder that every worker sees, or ``"organism:<name>"``.
        finetuned: A whole fine-tune; or:
        adapter: A LoRA adapter.
        subfolder: Folder inside the fine-tune's repository.
        revision: Of the fine-tune.
        device: Default CUDA where there is one.
        allow_identical: Accept a fine-tune that changes nothing.
    """

    base: str
    finetuned: str | None = None
    adapter: str | None = None
    subfolder: str = ""
    revision: str | None = None
    device: str | None = None
    allow_identical: bool = False

    def load(self) -> ModelPair:
        """Load the pair."""
        return ModelPair.load(**asdict(self))

    def absolute(self) -> "PairSpec":
        """The same, with paths that do not depend on where a process was started."""
        return replace(
            self,
            base=_absolute(self.base),
            finetuned=self.finetuned and _absolute(self.finetuned),
            adapter=self.adapter and _absolute(self.adapter),
        )


def _absolute(where: str) -> str:
    return str(Path(where).absolute()) if Path(where).exists() else where


class Harvester:
    """One worker: a pair, loaded once, that makes shards.

    Args:
        spec: The pair.
        sites: What is read.
        threads: Of the CPU; the same for all workers, because sums depend on it.
    """

    def __init__(self, spec: PairSpec, sites: tuple[Site, ...], threads: int) -> None:
        self.spec, self.sites, self.threads = spec, sites, threads

    @cached_property
    def sides(self) -> Sides:
        """The pair; loaded when first needed, so that a failure is told with its own error."""
        torch.set_num_threads(self.threads)
        sides = self.spec.load().sides
        check_paired(sides, self.sites)
        return sides

    def about(self) -> tuple[Any, dict[str, str]]:
        """The pair's tokenizer, and the hashes of its models."""
        return self.sides.tokenizer, dict(self.sides.digests)

    def make(self, address: str, plan: Manifest, shard: Shard, texts: list[StoredText]) -> None:
        """Make a shard and write it, its receipt last.

        Raises:
            MismatchError: If this worker's models are not those of the plan.
        """
        depends_on = plan["depends_on"]
        differing = [n for n, each in self.sides.digests.items() if depends_on[n] != each]
        if differing:
            raise MismatchError(
                f"a worker has other models than the harvest was begun with ({differing}): do "
                "all machines see the same files?"
            )
        with _working_folder(address) as place:
            harvest_shard(self.sides, self.sites, place.local, plan, shard, texts)
            for name in (*_shard_names(self.sites, shard.number), receipt_name(shard.number)):
                place.send(name)


def harvest_on(
    spec: PairSpec,
    items: Iterable[Any],
    at: "str | Site | Sequence[str | Site]",
    out: PathLike,
    *,
    cluster: str | None = None,
    workers: int | None = None,
    gpus: int = 1,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    rows_per_shard: int = 1 << 15,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Manifest:
    """Harvest into a folder or to an address, with the workers of a cluster or alone.

    The store is the one that `modeldiff.harvesting.harvest` would make, byte for byte, where the
    machines and their number of threads are of one kind. Called again it goes on after the shards
    that are finished. A worker that dies is replaced, and its shard made again.

    Args:
        spec: The pair.
        items: Texts, chats, completions; any iterable, read once, by the driver.
        at: Site or sites.
        out: A folder, which all workers must see, or an address of fsspec, such as
            ``s3://bucket/run``. Two harvests must not write to one address at a time (folders are
            locked, addresses cannot be).
        cluster: See `modeldiff.cluster.connected`; None is this process alone.
        workers: How many; default as the GPUs suffice for, or two. Each loads the pair.
        gpus: What each worker takes, where there are any; a pair that needs several is loaded
            with ``device="auto"``.
        on: Tokens to keep.
        skip_first: Positions dropped at the start of each text.
        dtype: Of the stored rows.
        rows_per_shard: A shard is closed once it has so many.
        max_tokens: Budget of a batch.
        progress: Where to report.
        cancel: Event that stops; finished shards stay.

    Returns:
        The finished manifest. `modeldiff.stores.ActivationStore.open` opens the folder,
        `modeldiff.store_places.fetched` what lies at an address.

    Raises:
        SetupError: If Ray or fsspec's package is missing, or workers die again and again.
        StoreError: If a shard that a worker has written is not where it should be.
        Cancelled: If the event is set; ``partial`` is the place.
    """
    sites = parse_sites(at)
    settings = settings_of(sites, parse_mask(on), skip_first, dtype, rows_per_shard, max_tokens)
    hired = Harvester, (spec.absolute(), sites, torch.get_num_threads())
    with _team(cluster, (workers, gpus), hired, cancel) as done, place_at(out) as place:
        alone = nullcontext() if place.is_far else locked(place.local)
        with writing(place.local), alone:
            manifest = place.prepare()
            ((_, (tokenizer, digests)),) = done(iter([Job("loading the pair", "about", tuple)]))
            plan = planned(tokenizer, digests, items, settings, place.local, manifest)
            for name in (*FILES, MANIFEST):
                place.send(name)
            try:
                return _harvested(place, plan, sites, done, progress)
            except Cancelled as stopped:
                raise Cancelled(str(stopped), place.address) from stopped


def _harvested(
    place: Place, plan: Manifest, sites: tuple[Site, ...], done: _Done, progress: Progress
) -> Manifest:
    corpus, shards = planned_shards(place.local, plan)
    receipts = {shard.number: receipt_at(place, plan["key"], shard) for shard in shards}
    missing = [shard for shard in shards if receipts[shard.number] is None]
    if not missing and plan["complete"] and place.size(STATISTICS) is not None:
        return plan
    report = reporter(progress, "harvest")
    finished = corpus.n_rows - sum(shard.n_rows for shard in missing)

    def asked(shard: Shard) -> tuple[Any, ...]:
        return place.address, plan, shard, shard_texts(corpus, shard)

    jobs = (Job(str(s.number), "make", lambda s=s: asked(s)) for s in missing)
    for job, _ in done(jobs):
        shard = shards[int(job.name)]
        receipts[shard.number] = found = receipt_at(place, plan["key"], shard)
        if found is None:
            raise StoreError(
                f"a worker has written shard {shard.number}, but it is not in {place.address!r}: "
                "do all machines see this folder? Else give an address, such as s3://bucket/run."
            )
        finished += shard.n_rows
        report(finished, corpus.n_rows, f"{finished}/{corpus.n_rows} rows")
    place.sweep()
    finish(place.local, plan, sites, [each for each in receipts.values() if each is not None])
    for name in (STATISTICS, MANIFEST):
        place.send(name)
    found = place.prepare()
    assert found is not None, "a manifest that was just written"
    return found


@contextmanager
def _team(
    cluster: str | None,
    size: tuple[int | None, int],
    hired: tuple[type, tuple[Any, ...]],
    cancel: Event | None,
) -> Iterator[_Done]:
    """What does jobs: the workers of a cluster, so many of so many GPUs, or this process."""
    kind, arguments = hired
    if cluster is None:
        worker = kind(*arguments)

        def alone(jobs: Iterator[Job]) -> Iterator[tuple[Job, Any]]:
            for job in jobs:
                if cancel is not None and cancel.is_set():
                    raise Cancelled("cancelled; finished shards are kept.")
                yield job, getattr(worker, job.method)(*job.arguments())

        yield alone
        return
    with connected(cluster) as ray:
        remote = ray.remote(**resources(ray, size[1]))(kind)
        n, idle = n_workers(ray, *size), list[Any]()
        try:
            yield lambda jobs: done_by(
                ray, lambda: remote.remote(*arguments), idle, jobs, n, cancel
            )
        finally:
            for worker in idle:
                ray.kill(worker)


def _shard_names(sites: tuple[Site, ...], number: int) -> list[str]:
    return [str(shard_path(Path(), site, number)) for site in sites]


@contextmanager
def _working_folder(address: str) -> Iterator[Place]:
    """Where a worker writes: the folder itself, or a scratch folder for an address."""
    with TemporaryDirectory() as scratch, place_at(address) as place:
        yield Place(place.address, Path(scratch)) if place.is_far else place
