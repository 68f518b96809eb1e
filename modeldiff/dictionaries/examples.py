"""Where latents fire: their strongest examples, and a fair sample of all the others.

One pass over the rows in order, with memory that depends on the number of latents and examples
alone. A text is an example of a latent once, at its strongest token, however often it occurs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Bool, Float, Int
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Rows, Source, checked
from modeldiff.errors import MismatchError
from modeldiff.tokens import token_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers takes a second to import

NO_TOKEN = -1
_PRIME, _MIX = 6364136223846793005, 1442695040888963407  # of a 64-bit linear congruence


@dataclass(frozen=True)
class Example:
    """A latent at its strongest token of one text, ready for a token heat.

    Args:
        latent: Which.
        kind: "max", or "sample" for one of the fair sample.
        rank: Its place among the examples of its kind, 0 the strongest.
        value: The latent at the peak.
        document: Number of the text.
        position: Place of the peak in the text.
        peak: Index of the peak in the window.
        token_ids: The window: rows of the text around the peak. Tokens that the source left out
            (BOS, masked ones) are not in it.
        tokens: Their strings; empty without a tokenizer.
        activations: The latent at each of them.
    """

    latent: int
    kind: Literal["max", "sample"]
    rank: int
    value: float
    document: int
    position: int
    peak: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    def __str__(self) -> str:
        """The value, and the window with the peak in brackets."""
        words = [*(self.tokens or map(str, self.token_ids))]
        words[self.peak] = f"[{words[self.peak]}]"
        return f"{self.value:8.3f}  {('' if self.tokens else ' ').join(words)}"


@dataclass(frozen=True, eq=False)
class Kept:
    """The examples of one kind, for all latents; unused places have value 0."""

    value: Float[Tensor, "latent place"]
    document: Int[Tensor, "latent place"]
    position: Int[Tensor, "latent place"]
    token_ids: Int[Tensor, "latent place window"]
    acts: Float[Tensor, "latent place window"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of several latents.

    Args:
        latents: Which, rising.
        strongest: The strongest texts of each.
        sampled: A fair sample of the texts in which it fires, strongest first.
        before: Tokens shown before a peak.
        n_texts: Number of texts in which each latent fires, repeated ones counted.
    """

    latents: Int[Tensor, " latent"]
    strongest: Kept
    sampled: Kept
    before: int
    n_texts: Int[Tensor, " latent"]

    def of(self, latent: int, tokenizer: Tokenizer | None = None) -> list[Example]:
        """All examples of one latent: the strongest ones, then the sample.

        Raises:
            MismatchError: If the latent was not looked at.
        """
        at = (self.latents == latent).nonzero()
        if not len(at):
            raise MismatchError(f"latent {latent} is not among the {len(self.latents)} looked at.")
        index = int(at[0])
        return [
            self._example(latent, kind, rank, kept, index, tokenizer)
            for kind, kept in (("max", self.strongest), ("sample", self.sampled))
            for rank in range(int((kept.value[index] > 0).sum()))
        ]

    def quantiles(
        self, latent: int, n: int = 4, tokenizer: Tokenizer | None = None
    ) -> list[list[Example]]:
        """The sample of one latent in ``n`` equal groups, strongest first."""
        sample = [each for each in self.of(latent, tokenizer) if each.kind == "sample"]
        cuts = [round(i * len(sample) / n) for i in range(n + 1)]
        return [sample[a:b] for a, b in pairwise(cuts)]

    def table(self) -> pd.DataFrame:
        """One row an example: latent, kind, rank, value, document, position."""
        rows = []
        for kind, kept in (("max", self.strongest), ("sample", self.sampled)):
            at, rank = (kept.value > 0).nonzero(as_tuple=True)
            part = {"latent": self.latents[at], "rank": rank}
            for name in ("value", "document", "position"):
                part[name] = getattr(kept, name)[at, rank]
            made = pd.DataFrame({name: each.numpy() for name, each in part.items()})
            made.insert(1, "kind", kind)
            rows.append(made)
        return pd.concat(rows).sort_values(["latent", "kind", "rank"]).reset_index(drop=True)

    def _example(
        self, latent: int, kind: Any, rank: int, kept: Kept, index: int, tokenizer: Tokenizer | None
    ) -> Example:
        ids, acts = kept.token_ids[index, rank], kept.acts[index, rank]
        real = ids != NO_TOKEN
        known = tuple(ids[real].tolist())
        return Example(
            latent=latent,
            kind=kind,
            rank=rank,
            value=float(kept.value[index, rank]),
            document=int(kept.document[index, rank]),
            position=int(kept.position[index, rank]),
            peak=int(real[: self.before].sum()),
            token_ids=known,
            tokens=() if tokenizer is None else tuple(token_names(tokenizer, known)),
            activations=tuple(acts[real].tolist()),
        )


@torch.no_grad()
def max_activating(
    dictionary: Dictionary,
    source: Source,
    latents: Sequence[int] | None = None,
    *,
    k: int = 20,
    n_sample: int = 0,
    window: tuple[int, int] = (16, 8),
    seed: int = 0,
    batch_size: int = 1024,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Examples:
    """Find texts in which latents fire: the strongest, and a sample drawn from all of them.

    Args:
        dictionary: Whose latents.
        source: Rows, with their tokens and texts.
        latents: Which; all by default.
        k: Strongest texts of each latent.
        n_sample: Texts sampled for each latent, every text with the same chance: what
            `Examples.quantiles` divides.
        window: Tokens shown before and after the peak.
        seed: Of the sample.
        batch_size: Rows encoded at once.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        Examples on the CPU. Memory is ``len(latents) * (k + n_sample) * sum(window)`` numbers.

    Raises:
        MismatchError: If a latent does not exist, or there are no rows.
        Cancelled: If the event is set; ``partial`` has the examples of the rows so far.
    """
    chosen = _chosen(dictionary, latents)
    strongest, sampled = _Places(chosen, k, window), _Places(chosen, n_sample, window)
    n_texts = torch.zeros(len(chosen), dtype=torch.int64)
    report, done, texts = reporter(progress, "examples"), 0, 0

    def so_far() -> Examples:
        return Examples(chosen, strongest.kept(), sampled.kept(), window[0], n_texts)

    index = torch.full((dictionary.config.n_latents,), -1)
    index[chosen] = torch.arange(len(chosen))
    for block in whole_documents(checked(source).in_order(batch_size)):
        if cancel is not None and cancel.is_set():
            check(cancel, so_far())
        fired = _Fired(encode_cpu(dictionary, block), block, index, texts)
        n_texts += fired.slot.bincount(minlength=len(n_texts))
        strongest.offer(fired, fired.value)
        sampled.offer(fired, _lottery(chosen[fired.slot], fired.text, seed))
        done, texts = done + len(block), texts + fired.n_texts
        report(done, source.n_rows, f"{done:,} rows")
    return so_far()


def encode_cpu(dictionary: Dictionary, rows: Rows) -> Codes:
    """Latents of rows, brought to the CPU."""
    codes = dictionary.encode(rows.acts)
    return Codes(
        codes.offsets.cpu(), codes.latent.cpu(), codes.value.float().cpu(), codes.n_latents
    )


def starts(rows: Rows) -> Bool[Tensor, " row"]:
    """Rows that begin a text: another document, or a position that does not rise."""
    found = torch.ones(len(rows), dtype=torch.bool)
    found[1:] = (rows.document.diff() != 0) | (rows.position.diff() <= 0)
    return found


def whole_documents(batches: Iterator[Rows], limit: int = 1 << 16) -> Iterator[Rows]:
    """Regroup batches so that no text is cut, unless it has more than ``limit`` rows."""
    held: Rows | None = None
    for batch in batches:
        rows = batch if held is None else _joined(held, batch)
        last = int(starts(rows).nonzero()[-1])
        if last == 0 and len(rows) < limit:
            held = rows
            continue
        cut = last or len(rows)
        yield _part(rows, slice(0, cut))
        held = _part(rows, slice(cut, None)) if cut < len(rows) else None
    if held is not None:
        yield held


def _part(rows: Rows, which: slice) -> Rows:
    return Rows(rows.acts[which], rows.token_id[which], rows.document[which], rows.position[which])


def _joined(a: Rows, b: Rows) -> Rows:
    pairs = ((getattr(a, name), getattr(b, name)) for name in
             ("acts", "token_id", "document", "position"))  # fmt: skip
    return Rows(*map(torch.cat, pairs))


def _chosen(dictionary: Dictionary, latents: Sequence[int] | None) -> Int[Tensor, " latent"]:
    n = dictionary.config.n_latents
    chosen = torch.arange(n) if latents is None else torch.tensor(sorted(set(latents))).long()
    wrong = [j for j in chosen.tolist() if not 0 <= j < n]
    if wrong or not len(chosen):
        raise MismatchError(f"latents {wrong[:5] or 'none'} asked for; there are 0 to {n - 1}.")
    return chosen


class _Fired:
    """Peaks of a block of whole texts: each text's strongest row for each latent that fires in it.

    ``slot`` is the latent's place among those chosen, ``text`` the key of the text.
    """

    def __init__(self, codes: Codes, rows: Rows, index: Tensor, first: int) -> None:
        self.rows, self.text_of = rows, starts(rows).cumsum(0) - 1
        self.n_latents, self.n_texts = codes.n_latents, int(self.text_of[-1]) + 1
        row, slot = codes.row, index[codes.latent]
        self._place, self._value = row * codes.n_latents + codes.latent, codes.value  # rising
        wanted = (slot >= 0) & (codes.value > 0)
        row, slot, value = row[wanted], slot[wanted], codes.value[wanted]
        text = self.text_of[row]
        order = torch.from_numpy(np.lexsort((row, -value, text, slot)))
        fresh = torch.ones(len(order), dtype=torch.bool)
        pair = slot[order] * self.n_texts + text[order]
        fresh[1:] = pair.diff() != 0
        peaks = order[fresh]
        self.slot, self.value, self.row = slot[peaks], value[peaks], row[peaks]
        self.text = text_keys(rows, self.text_of, first)[text[peaks]]

    def windows(
        self, row: Int[Tensor, " n"], latent: Int[Tensor, " n"], window: tuple[int, int]
    ) -> tuple[Int[Tensor, "n window"], Float[Tensor, "n window"]]:
        """Token ids and activations around some rows, within their texts."""
        near = row[:, None] + torch.arange(-window[0], window[1] + 1)
        inside = (near >= 0) & (near < len(self.rows))
        near = near.clamp(0, len(self.rows) - 1)
        inside &= self.text_of[near] == self.text_of[row][:, None]
        wanted = near * self.n_latents + latent[:, None]
        at = torch.searchsorted(self._place, wanted).clamp(max=len(self._place) - 1)
        found = inside & (self._place[at] == wanted)
        return self.rows.token_id[near].where(inside, NO_TOKEN), self._value[at] * found


class _Places:
    """The texts of highest score for each latent, each text once."""

    def __init__(self, latents: Tensor, k: int, window: tuple[int, int]) -> None:
        n, width = len(latents), sum(window) + 1
        self.latents, self.k, self.window = latents, k, window
        self.score = torch.zeros(n, k, dtype=torch.float64)
        self.text = torch.zeros(n, k, dtype=torch.int64)
        self.value = torch.zeros(n, k)
        self.document = torch.zeros(n, k, dtype=torch.int64)
        self.position = torch.zeros(n, k, dtype=torch.int64)
        self.token_ids = torch.full((n, k, width), NO_TOKEN, dtype=torch.int32)
        self.acts = torch.zeros(n, k, width)

    def offer(self, fired: _Fired, score: Float[Tensor, " peak"]) -> None:
        """Take the peaks that belong among the best."""
        if not self.k:
            return
        score = score.double()
        better = (score > self.score[fired.slot, -1]).nonzero()[:, 0]
        if not len(better):
            return
        slots = fired.slot[better].unique()
        at, place = (self.score[slots] > 0).nonzero(as_tuple=True)
        slot = torch.cat([slots[at], fired.slot[better]])
        text = torch.cat([self.text[slots[at], place], fired.text[better]])
        merged = torch.cat([self.score[slots[at], place], score[better]])
        kept, rank = _best(slot, text, merged, self.k)
        old, new = kept < len(at), kept >= len(at)
        was = slots[at[kept[old]]], place[kept[old]]
        peak = better[kept[new] - len(at)]
        around = fired.windows(fired.row[peak], self.latents[fired.slot[peak]], self.window)
        row = fired.row[peak]
        fresh = {
            "score": score[peak], "text": fired.text[peak], "value": fired.value[peak],
            "document": fired.rows.document[row], "position": fired.rows.position[row],
            "token_ids": around[0].int(), "acts": around[1],
        }  # fmt: skip
        for name, values in fresh.items():
            own = getattr(self, name)
            moved = own[was]
            own[slots] = NO_TOKEN if name == "token_ids" else 0
            own[slot[kept[old]], rank[old]] = moved
            own[slot[kept[new]], rank[new]] = values

    def kept(self) -> Kept:
        """What is kept so far, strongest first."""
        order = self.value.argsort(dim=1, descending=True, stable=True)
        rows = torch.arange(len(order))[:, None]
        names = ("value", "document", "position", "token_ids", "acts")
        return Kept(**{name: getattr(self, name)[rows, order] for name in names})


def _best(slot: Tensor, text: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the k best of each slot, each text once, and their ranks."""
    order = torch.from_numpy(np.lexsort((-score, text, slot)))
    other = torch.ones(len(order), dtype=torch.bool)
    other[1:] = (slot[order].diff() != 0) | (text[order].diff() != 0)
    once = order[other]
    once = once[torch.from_numpy(np.lexsort((text[once], -score[once], slot[once])))]
    _, counts = slot[once].unique_consecutive(return_counts=True)
    rank = torch.arange(len(once)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return once[rank < k], rank[rank < k]


def text_keys(rows: Rows, text: Int[Tensor, " row"], first: int) -> Int[Tensor, " text"]:
    """One number for each text of some rows: equal for equal tokens, its own if none are known.

    Args:
        rows: Whole texts.
        text: Which text of these rows each row belongs to, from 0.
        first: Number of texts before these rows.
    """
    n = int(text[-1]) + 1
    if not rows.token_id.any():
        return _scramble(torch.arange(first, first + n))
    mixed = _scramble(_scramble(rows.token_id.long()) + rows.position * _PRIME)
    return torch.zeros(n, dtype=torch.int64).index_add_(0, text, mixed)


def _scramble(x: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """A fixed pseudo-random function of 64-bit numbers; sums wrap around."""
    for shift in (31, 27, 33):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _PRIME + _MIX
    return x


def _lottery(latent: Tensor, text: Tensor, seed: int) -> Float[Tensor, " peak"]:
    """A number in (0, 1] that depends on latent, text and seed alone."""
    drawn = _scramble(text ^ _scramble(latent * _PRIME + _scramble(torch.tensor(seed))))
    return ((drawn >> 11) & ((1 << 53) - 1)).double().add(1) / float(1 << 53)
