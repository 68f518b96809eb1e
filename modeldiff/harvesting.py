"""Harvesting: paired activations of many texts, to disk.

Both sides run on the same batches, and the layers below the first adapted one once for both. Texts
are batched by length, but only among the texts of one shard, so that memory does not grow with the
corpus and a shard is the same whenever it is made.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modeldiff._files import PathLike, atomic_write, digest, file_digest
from modeldiff._progress import Progress, check, reporter
from modeldiff._version import __version__
from modeldiff.errors import MismatchError
from modeldiff.host_copies import one_behind
from modeldiff.live_rows import check_paired, dtype_name, paired_rows, sides_of
from modeldiff.loading import Sides
from modeldiff.masks import Mask, mask_from_json, parse_mask
from modeldiff.models import ModelPair
from modeldiff.sites import Site, parse_sites
from modeldiff.store_files import (
    DTYPES,
    STATISTICS,
    Manifest,
    Shard,
    file_facts,
    locked,
    plan_shards,
    prepare_folder,
    read_receipt,
    shard_files,
    write_at,
    write_manifest,
    write_receipt,
    write_statistics,
    writing,
)
from modeldiff.store_statistics import RowStatistics
from modeldiff.store_texts import (
    FILES,
    Corpus,
    StoredText,
    corpus_in_files,
    write_texts,
)
from modeldiff.stores import ActivationStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_Stored = tuple[list[int], dict[Site, Tensor]]


def harvest(
    pair: "ModelPair | Sides",
    items: Iterable[Any],
    at: "str | Site | Sequence[str | Site]",
    folder: PathLike,
    *,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    rows_per_shard: int = 1 << 15,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> ActivationStore:
    """Write both sides' activations on the same tokens into a folder, shard by shard.

    Whatever stops it (a key, the event, a full disk, ``kill -9``), finished shards stay; called
    again with the same arguments it goes on after them, and the result is the same byte for byte
    as if it had never stopped (on the same machine). A finished store is returned at once; one
    that lacks a file gets it again.

    Args:
        pair: The pair.
        items: Texts, chats, completions; any iterable, read once, never held as a whole.
        at: Site or sites.
        folder: New, empty, or of the same harvest.
        on: Tokens to keep.
        skip_first: Positions dropped at the start of each text (BOS carries massive activations).
            Padding is never kept.
        dtype: Of the stored rows, bfloat16 or float32.
        rows_per_shard: A shard is closed once it has so many; texts are not split.
        max_tokens: Budget of a batch, padding included; halved within a shard where memory runs
            out.
        progress: Where to report.
        cancel: Event that stops between batches; ``Cancelled.partial`` is the folder.

    Raises:
        MaskError: If no token is kept.
        SiteError: If a site does not exist, or not on both sides.
        MismatchError: If the folder holds a harvest of something else, and what differs; or an
            argument is out of its range.
        FileFormatError: If the folder holds anything else.
        StoreError: If the disk is full or refuses, or another process harvests into the folder.
        SetupError: If memory runs out on a single text.
        Cancelled: If the event is set.
    """
    sides, sites, mask = sides_of(pair), parse_sites(at), parse_mask(on)
    check_paired(sides, sites)
    settings = settings_of(sites, mask, skip_first, dtype, rows_per_shard, max_tokens)
    where = Path(folder)
    with writing(where):
        where.mkdir(parents=True, exist_ok=True)
        with locked(where):
            manifest = prepare_folder(where)
            plan = planned(sides.tokenizer, sides.digests, items, settings, where, manifest)
            _harvest_shards(sides, sites, where, plan, progress, cancel)
    return ActivationStore.open(where)


def settings_of(
    sites: Sequence[Site],
    mask: Mask,
    skip_first: int,
    dtype: torch.dtype,
    rows_per_shard: int,
    max_tokens: int,
) -> Manifest:
    """What of a harvest's arguments its content depends on.

    Raises:
        MismatchError: If an argument is out of its range.
    """
    if min(rows_per_shard, max_tokens) < 1 or skip_first < 0:
        raise MismatchError(
            f"rows_per_shard={rows_per_shard}, max_tokens={max_tokens}, skip_first={skip_first}: "
            "give 1 or more, the last 0 or more."
        )
    layout = {"rows_per_shard": rows_per_shard, "max_tokens": max_tokens}
    return {"sites": list(map(str, sites)), "mask": mask.to_json(), "skip_first": skip_first,
            "dtype": dtype_name(dtype), **layout}  # fmt: skip


def planned(
    tokenizer: "PreTrainedTokenizerFast",
    digests: Mapping[str, str],
    items: Iterable[Any],
    settings: Manifest,
    folder: Path,
    manifest: Manifest | None,
) -> Manifest:
    """Write the texts and the manifest of an unfinished store; compare with what is there.

    Args:
        tokenizer: Renders the items.
        digests: Of the models, see `modeldiff.loading.Sides.digests`.
        items: Texts, chats, completions; read once.
        settings: See `settings_of`.
        folder: Where the store is to lie.
        manifest: The folder's, if it has one.

    Raises:
        MaskError: If no token is kept.
        MismatchError: If the folder holds a harvest of something else.
    """
    items = [items] if isinstance(items, str) else items
    mask, skip_first = mask_from_json(settings["mask"]), settings["skip_first"]
    with ExitStack() as stack:
        paths = [stack.enter_context(atomic_write(folder / name)) for name in FILES]
        with ExitStack() as opened:
            streams = [opened.enter_context(path.open("wb")) for path in paths]
            texts = write_texts(tokenizer, items, mask, skip_first, streams)
        depends_on = {**digests, "texts": texts, "modeldiff": __version__, **settings}
        if manifest is not None:
            _check_same(depends_on, manifest, folder)
    if manifest is not None and manifest["complete"]:
        return manifest
    plan = {
        "key": digest(depends_on),
        "depends_on": depends_on,
        "models": ["base", "finetuned"],
        "dtype": settings["dtype"],
        "texts": texts,
        "files": {name: file_facts(folder, name) for name in FILES},
        "complete": False,
    }
    write_manifest(folder, plan)
    return plan


def _check_same(depends_on: Manifest, manifest: Manifest, folder: Path) -> None:
    old = manifest["depends_on"]
    differing = [name for name in sorted({*old, *depends_on})
                 if old.get(name) != depends_on.get(name)]  # fmt: skip
    if differing:
        said = "; ".join(
            f"{n}: {old.get(n)!r} there, {depends_on.get(n)!r} here" for n in differing
        )
        raise MismatchError(
            f"{str(folder)!r} holds another harvest ({said}). Nothing was written; choose another "
            "folder, or delete this one."
        )


def _harvest_shards(
    sides: Sides,
    sites: tuple[Site, ...],
    folder: Path,
    plan: Manifest,
    progress: Progress,
    cancel: Event | None,
) -> None:
    corpus, shards = planned_shards(folder, plan)
    report, receipts, made = reporter(progress, "harvest"), [], False
    for shard in shards:
        found = read_receipt(folder, plan["key"], shard)
        if found is None:
            texts = shard_texts(corpus, shard)
            harvest_shard(sides, sites, folder, plan, shard, texts, cancel)
            found, made = read_receipt(folder, plan["key"], shard), True
        assert found is not None, "a receipt that was just written"
        receipts.append(found)
        done = shard.first_row + shard.n_rows
        report(done, corpus.n_rows, f"{done}/{corpus.n_rows} rows")
    if made or not plan["complete"] or not (folder / STATISTICS).is_file():
        finish(folder, plan, sites, receipts)


def planned_shards(folder: Path, plan: Manifest) -> tuple[Corpus, tuple[Shard, ...]]:
    """The texts of a planned store, and how they are cut."""
    sizes = {name: facts["bytes"] for name, facts in plan["files"].items() if name in FILES}
    corpus = corpus_in_files(folder, plan["texts"], sizes)
    return corpus, plan_shards(corpus.counts, plan["depends_on"]["rows_per_shard"])


def shard_texts(corpus: Corpus, shard: Shard) -> list[StoredText]:
    """Those texts of a shard of which anything is kept."""
    return [corpus.document(i) for i in range(*shard.documents) if corpus.counts[i]]


def finish(
    folder: Path,
    plan: Manifest,
    sites: tuple[Site, ...],
    receipts: Sequence[tuple[Manifest, dict[Site, RowStatistics]]],
) -> None:
    """Write the statistics and the manifest of a finished store.

    Args:
        folder: Of the store.
        plan: From `planned`.
        sites: Harvested.
        receipts: Of all shards, in their order.
    """
    statistics = {site: RowStatistics.joined(each[site] for _, each in receipts) for site in sites}
    write_statistics(folder, statistics)
    summary = {
        str(site): {"n": s.n, "rms": s.rms.tolist(), "norm_of_mean": s.mean.norm(dim=1).tolist()}
        for site, s in statistics.items()
    }
    write_manifest(folder, plan | {
        "complete": True,
        "widths": {str(site): s.mean.shape[1] for site, s in statistics.items()},
        "shards": [{name: record[name] for name in ("documents", "n_rows", "bytes", "digests")}
                   for record, _ in receipts],
        "statistics": summary,
        "files": plan["files"] | {STATISTICS: file_facts(folder, STATISTICS)},
    })  # fmt: skip


def harvest_shard(
    sides: Sides,
    sites: tuple[Site, ...],
    folder: Path,
    plan: Manifest,
    shard: Shard,
    texts: Sequence[StoredText],
    cancel: Event | None = None,
) -> None:
    """Write one shard's files, then its receipt; a function of its arguments, to the byte.

    Args:
        sides: The pair.
        sites: What to read.
        folder: Where to write.
        plan: From `planned`.
        shard: Which.
        texts: Its texts, see `shard_texts`.
        cancel: Event that stops between batches.

    Raises:
        Cancelled: If the event is set; nothing of the shard is left then.
    """
    settings, parts = plan["depends_on"], {site: [] for site in sites}
    dtype = DTYPES[settings["dtype"]]
    check(cancel, folder)

    def computed() -> Iterator[tuple[_Stored, Mapping[Site, Tensor]]]:
        for which, rows in paired_rows(sides, texts, sites, settings["max_tokens"]):
            check(cancel, folder)
            stored = {site: rows[site].to(dtype) for site in sites}
            yield (which, stored), stored

    with shard_files(folder, shard.number, sites) as files:
        for (which, stored), here in one_behind(computed()):
            starts = [texts[i].first_row - shard.first_row for i in which]
            lengths = [len(texts[i].kept) for i in which]
            for site in sites:
                _write_texts_rows(files[site][0], here[site], starts, lengths)
                parts[site].append(RowStatistics.of(stored[site]))
        for handle, _ in files.values():
            os.fsync(handle)
        record = {
            "key": plan["key"],
            "documents": list(shard.documents),
            "n_rows": shard.n_rows,
            "bytes": {str(site): path.stat().st_size for site, (_, path) in files.items()},
            "digests": {str(site): file_digest(path) for site, (_, path) in files.items()},
        }
    joined = {site: RowStatistics.joined(each) for site, each in parts.items()}
    write_receipt(folder, shard.number, record, joined)


def _write_texts_rows(
    handle: int, rows: Tensor, starts: Sequence[int], lengths: Sequence[int]
) -> None:
    """Write the rows of each text of a batch where they belong in the shard."""
    values = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
    done = 0
    for start, n in zip(starts, lengths, strict=True):
        write_at(handle, values[done : done + n], start * values[0].nbytes)
        done += n
