"""Paired rows as the models compute them: batch by batch, and as a source without a disk."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeldiff._files import digest
from modeldiff._shapes import Float
from modeldiff._version import __version__
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch
from modeldiff.dictionaries.sources import Rows
from modeldiff.errors import MismatchError, SiteError
from modeldiff.forward import PairRun, check_sites, device_of, run_pair
from modeldiff.loading import Sides
from modeldiff.masks import Mask, parse_mask
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from modeldiff.store_files import DTYPES
from modeldiff.store_reading import POOL, fills, rebatched, shuffled
from modeldiff.store_texts import Corpus, StoredText, corpus_in_memory


def sides_of(pair: "ModelPair | Sides") -> Sides:
    """The sides of a pair."""
    return pair.sides if isinstance(pair, ModelPair) else pair


def check_paired(sides: Sides, sites: tuple[Site, ...]) -> None:
    """Verify that sites exist on both sides.

    Raises:
        SiteError: Naming those that do not.
    """
    alone = [str(site) for site in sites if site.kind == "lora"]
    if alone or not sites:
        raise SiteError(
            f"{', '.join(alone) or 'no site'}: rows are pairs, so a site must exist on both sides; "
            "lora sites exist on the fine-tuned side alone (capture() reads them)."
        )
    check_sites(sites, sides.shape("base"))


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in which rows are kept.

    Raises:
        MismatchError: If it is another.
    """
    name = next((name for name, each in DTYPES.items() if each == dtype), None)
    if name is None:
        raise MismatchError(f"dtype={dtype}: rows are stored as {' or '.join(DTYPES)}.")
    return name


def paired_rows(
    sides: Sides, texts: Sequence[StoredText], sites: tuple[Site, ...], max_tokens: int
) -> Iterator[tuple[list[int], dict[Site, Float[Tensor, "row model d_model"]]]]:
    """Run both sides and yield the kept rows of each batch, text by text.

    Batches are halved where memory runs out; what fitted before is not remembered, so that rows
    depend on the arguments (and the machine) alone.

    Args:
        sides: The pair.
        texts: Each with at least one kept token.
        sites: What to read.
        max_tokens: Budget of a batch.

    Yields:
        Which texts, and their rows one text after the other, by site, in the model's dtype and on
        its device; base first.

    Raises:
        SetupError: If memory runs out on a single text.
    """

    def work(batch: Batch) -> dict[Site, Tensor]:
        kept = [texts[i].kept for i in batch.order]
        row = torch.tensor([r for r, each in enumerate(kept) for _ in each])
        position = torch.tensor([p for each in kept for p in each])
        keep = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        keep[row, position] = True
        if device.type == "cuda":  # before the run: copies to a GPU wait for what it computes
            row, position = row.to(device), position.to(device)
        run = run_pair(sides, batch, sites, keep=keep)
        return {site: _pairs(run, site, row, position) for site in sites}

    device = device_of(sides.roots[0])
    several = [text.text for text in texts]
    sides.check_lengths([text.n_tokens for text in several])
    for batch, rows in each_batch(sides, several, max_tokens, work, what="harvest", remember=False):
        yield list(batch.order), rows


def _pairs(
    run: PairRun, site: Site, row: Tensor, position: Tensor
) -> Float[Tensor, "row model d_model"]:
    both = run.base[site], run.finetuned[site]
    device = both[0].device
    return torch.stack(
        [acts[row.to(acts.device), position.to(acts.device)].to(device) for acts in both], 1
    )


def streamed(
    pair: "ModelPair | Sides",
    items: Iterable[Any],
    at: "str | Site",
    *,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    pool_rows: int = POOL,
    max_tokens: int = 4096,
) -> "LiveRows":
    """A source of one site's rows that runs the models when rows are needed; nothing on disk.

    The tokens of all texts are held in memory, activations only those of the pool.

    Args:
        pair: The pair; it is not copied, so do not train it meanwhile.
        items: Texts, chats, completions; read once, now.
        at: The site.
        on: Tokens to keep.
        skip_first: Positions dropped at the start of each text.
        dtype: Of the rows.
        pool_rows: Rows in the pool, at least; it ends with a whole text.
        max_tokens: Budget of a batch.

    Raises:
        MaskError: If no token is kept.
        SiteError: If the site does not exist, or not on both sides.
    """
    sides, mask = sides_of(pair), parse_mask(on)
    (site,) = sites = (Site.parse(at),)
    check_paired(sides, sites)
    items = [items] if isinstance(items, str) else items
    corpus = corpus_in_memory(sides, items, mask, skip_first)
    settings = [str(site), mask.to_json(), skip_first, dtype_name(dtype), max_tokens]
    key = digest("streamed", sides.digests, corpus.key, __version__, pool_rows, settings)
    return LiveRows(sides, corpus, site, key, dtype, pool_rows, max_tokens)


@dataclass(frozen=True, eq=False)
class LiveRows:
    """Rows that are computed when they are read; see `streamed`.

    Which texts share the pool, and so a batch of the models, depends on seed and epoch alone: the
    same batches come whatever the start.

    Args:
        sides: The pair.
        corpus: The texts.
        site: What is read.
        key: Hash of the content.
        dtype: Of the rows.
        pool_rows: Rows in the pool, at least.
        max_tokens: Budget of a batch of the models.
    """

    sides: Sides
    corpus: Corpus
    site: Site
    key: str
    dtype: torch.dtype
    pool_rows: int
    max_tokens: int

    @property
    def d_model(self) -> int:
        """Width of the rows of residual sites; of others one text is run to know it."""
        if self.site.kind in ("z", "mlp_act"):
            return self._read([int(np.flatnonzero(self.corpus.counts)[0])]).acts.shape[2]
        return self.sides.shape("base").d_model

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return self.corpus.n_rows

    def shuffled(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """Batches without end, on the model's device; texts are in random order."""
        return shuffled(
            self.corpus.counts, self._read, batch_size,
            pool_rows=self.pool_rows, seed=seed, start=start,
        )  # fmt: skip

    def in_order(self, batch_size: int) -> Iterator[Rows]:
        """Every row once, in the order of the texts; the last batch may be short."""
        groups = fills(np.arange(len(self.corpus)), self.corpus.counts, self.pool_rows)
        pools = (self._read(units.tolist()) for units in groups)
        return rebatched(((pool, torch.arange(len(pool))) for pool in pools), batch_size)

    def _read(self, units: Sequence[int]) -> Rows:
        """Rows of some texts, one text after the other."""
        numbers = [i for i in units if self.corpus.counts[i]]
        texts = [self.corpus.document(i) for i in numbers]
        starts = [0, *accumulate(len(text.kept) for text in texts)]
        acts = torch.empty(0)
        for which, rows in paired_rows(self.sides, texts, (self.site,), self.max_tokens):
            made = rows[self.site].to(self.dtype)
            if not len(acts):
                acts = made.new_empty((starts[-1], *made.shape[1:]))
            spans = [torch.arange(starts[i], starts[i + 1]) for i in which]
            acts[torch.cat(spans).to(acts.device)] = made.to(acts.device)
        first = [np.arange(t.first_row, t.first_row + len(t.kept)) for t in texts]
        return Rows(acts, *self.corpus.origins(np.concatenate(first)))
