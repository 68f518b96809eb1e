"""What sets two sets of texts apart: latents that fire more in one of them, and tokens beside them.

The unit is a text: tokens of one text are not independent, and a set with one odd text must not
look different. Latents and tokens are tested alike, so that the words are a fair baseline: what a
count of words already shows needs no dictionary.
"""

from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Bool, Float, Int
from modeldiff.dictionaries.examples import Tokenizer, encode_cpu, starts, whole_documents
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Source, checked
from modeldiff.errors import MismatchError
from modeldiff.stats import benjamini_hochberg, proportion_difference
from modeldiff.tokens import token_names


@dataclass(frozen=True, eq=False)
class TextDiff:
    """Two sets of texts, a and b, compared; most certain differences first.

    Both tables have, for a latent or a token: rate_a and rate_b (share of all rows), share_a and
    share_b (of texts in which its rate is above the median text of both sets; where fewer than
    half of the texts have it at all, of texts that have it), difference (share_b - share_a) with
    its 95 % interval low and high, p (Fisher's exact test of the shares) and q (the same, adjusted
    for all that were tested).

    Args:
        latents: One row a latent that fired in any text.
        tokens: One row a token that came in any text, with log_odds (of b against a, smoothed),
            z (that over its standard error, tokens taken as independent, as published); empty if
            a source knows no tokens.
        n_texts: Texts in a and b.
    """

    latents: pd.DataFrame
    tokens: pd.DataFrame
    n_texts: tuple[int, int]


@torch.no_grad()
def text_diff(
    dictionary: Dictionary,
    a: Source,
    b: Source,
    *,
    tokenizer: Tokenizer | None = None,
    prior: float = 500.0,
    batch_size: int = 1024,
    progress: Progress = False,
    cancel: Event | None = None,
) -> TextDiff:
    """Compare two sets of texts by the latents that fire in them, and by their words.

    Args:
        dictionary: Whose latents.
        a: Rows of the first set, with texts (and tokens, for the baseline).
        b: Rows of the second set.
        tokenizer: Names the tokens.
        prior: Pseudo-counts of the log odds, spread as both sets' tokens are.
        batch_size: Rows encoded at once.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        Tables sorted by p, then by the size of the difference. Memory grows with the number of
        different latents in each text, not with its length.

    Raises:
        MismatchError: If a set has fewer than two texts: then nothing can be told.
        Cancelled: If the event is set.

    Source:
        Jiang et al. 2025, 2512.10092 (diffing data sets with latents); Mood 1950 (median test);
        Monroe et al. 2008, Fightin' Words (log odds with a prior).
    """
    report, done, known = reporter(progress, "text diff"), 0, [False, False]
    latents, tokens = _Rates(dictionary.config.n_latents), _Rates(0)
    for which, source in enumerate((a, b)):
        for block in whole_documents(checked(source).in_order(batch_size)):
            check(cancel)
            text, codes = starts(block).cumsum(0) - 1, encode_cpu(dictionary, block)
            latents.add(which, text, text[codes.row], codes.latent)
            tokens.add(which, text, text, block.token_id.long())
            known[which] |= bool(block.token_id.any())
            done += len(block)
            report(done, a.n_rows + b.n_rows, f"{done:,} rows")
    if min(latents.n_texts) < 2:
        raise MismatchError(
            f"{latents.n_texts[0]} and {latents.n_texts[1]} texts: differences between sets need "
            "several texts in each. Do the sources know their documents?"
        )
    n_a, n_b = latents.n_texts
    words = tokens.table("token_id") if all(known) else pd.DataFrame()
    if len(words):
        words = _with_log_odds(words, tokens, prior)
        if tokenizer is not None:
            words.insert(1, "token", token_names(tokenizer, words["token_id"].tolist()))
    return TextDiff(latents.table("latent"), words, (n_a, n_b))


class _Rates:
    """How large a share of each text's rows each item has, as (text, item, rate) triples."""

    def __init__(self, n_items: int) -> None:
        self.n_items, self.n_texts, self.n_rows = n_items, [0, 0], [0, 0]
        self._parts: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, which: int, rows: Tensor, text: Tensor, item: Tensor) -> None:
        """Add a block of whole texts.

        Args:
            which: Set: 0 or 1.
            rows: Text of each row of the block, from 0.
            text: Text of each occurrence.
            item: What occurred.
        """
        lengths = rows.bincount()
        self.n_items = max(self.n_items, int(item.max()) + 1 if len(item) else 0)
        pairs, counts = (text * (1 << 32) + item).unique(return_counts=True)
        owner, found = pairs >> 32, pairs & ((1 << 32) - 1)
        rate = counts.double() / lengths[owner]
        self._parts.append((which, owner + self.n_texts[which], found, rate, counts))
        self.n_texts[which] += len(lengths)
        self.n_rows[which] += len(rows)

    def counts(self) -> Float[Tensor, "two item"]:
        """Occurrences in each set."""
        total = torch.zeros(2, self.n_items, dtype=torch.float64)
        for which, _, item, _, count in self._parts:
            total[which].index_add_(0, item, count.double())
        return total

    def table(self, name: str) -> pd.DataFrame:
        """One row an item that occurred, sorted by p."""
        if not self._parts:
            return pd.DataFrame()
        of = torch.cat([torch.full_like(part[1], part[0]) for part in self._parts])
        item = torch.cat([part[2] for part in self._parts])
        rate = torch.cat([part[3] for part in self._parts])
        high = _above_median(item, rate, sum(self.n_texts), self.n_items)
        k = torch.stack([item[high & (of == w)].bincount(minlength=self.n_items) for w in (0, 1)])
        total = self.counts()
        tested = (total.sum(0) > 0).nonzero()[:, 0]
        (n_a, n_b), (k_a, k_b) = self.n_texts, k[:, tested].tolist()
        p = fisher(k_a, k_b, n_a, n_b)
        known = {pair: proportion_difference(pair[0], n_a, pair[1], n_b)
                 for pair in set(zip(k_a, k_b, strict=True))}  # fmt: skip
        spans = [known[pair] for pair in zip(k_a, k_b, strict=True)]
        table = pd.DataFrame({
            name: tested.numpy(),
            "rate_a": (total[0, tested] / self.n_rows[0]).numpy(),
            "rate_b": (total[1, tested] / self.n_rows[1]).numpy(),
            "share_a": np.array(k_a) / n_a,
            "share_b": np.array(k_b) / n_b,
            "difference": [span.estimate for span in spans],
            "low": [span.low for span in spans],
            "high": [span.high for span in spans],
            "p": p,
            "q": benjamini_hochberg(p),
        })  # fmt: skip
        order = np.lexsort((-table["difference"].abs(), table["p"]))
        return table.iloc[order].reset_index(drop=True)


def _above_median(
    item: Int[Tensor, " triple"], rate: Float[Tensor, " triple"], n_texts: int, n_items: int
) -> Bool[Tensor, " triple"]:
    """Whether each rate is above its item's (lower) median over all texts, absent ones being 0."""
    order = torch.from_numpy(np.lexsort((rate, item)))
    counts = item.bincount(minlength=n_items)
    first = counts.cumsum(0) - counts
    middle = (n_texts - 1) // 2 - (n_texts - counts)  # among the item's own rates, if it is there
    at = (first + middle).clamp(0, len(rate) - 1)
    median = torch.where(middle >= 0, rate[order][at], 0.0)
    return rate > median[item]


def fisher(k_a: list[int], k_b: list[int], n_a: int, n_b: int) -> np.ndarray:
    """Two-sided p-values of Fisher's exact test, of many counts out of the same two totals.

    Args:
        k_a: Successes among ``n_a``, one for each test.
        k_b: Successes among ``n_b``.
        n_a: Trials of the first group.
        n_b: Trials of the second group.

    Source:
        Fisher 1935; two-sided by the sum of all outcomes that are no likelier.

    Example:
        >>> fisher([1], [9], 10, 10).round(6).tolist()
        [0.001093]
    """
    log_factorial = torch.arange(1, n_a + n_b + 2, dtype=torch.float64).lgamma().numpy()

    def log_choose(n: int, k: np.ndarray) -> Any:
        return log_factorial[n] - log_factorial[k] - log_factorial[n - k]

    first, total = np.asarray(k_a, dtype=int), np.asarray(k_a, dtype=int) + np.asarray(k_b)
    p = np.ones(len(first))
    for k in np.unique(total).tolist():
        possible = np.arange(max(0, k - n_b), min(n_a, k) + 1)
        log_p = log_choose(n_a, possible) + log_choose(n_b, k - possible)
        log_p -= log_choose(n_a + n_b, np.array(k))
        chance, mine = np.exp(log_p), total == k
        order = np.argsort(chance)
        cumulative = chance[order].cumsum()
        limit = chance[first[mine] - possible[0]] * (1 + 1e-7)
        at = np.searchsorted(chance[order], limit, side="right") - 1
        p[mine] = np.minimum(1.0, cumulative[at])
    return p


def _with_log_odds(table: pd.DataFrame, rates: _Rates, prior: float) -> pd.DataFrame:
    total = rates.counts()[:, torch.tensor(table["token_id"].to_numpy())].numpy()
    everything = np.array([[rates.n_rows[0]], [rates.n_rows[1]]], dtype=float)
    smoothing = prior * total.sum(0) / everything.sum()
    smoothed = total + smoothing
    odds = np.log(smoothed) - np.log(everything + prior - smoothed)
    log_odds = odds[1] - odds[0]
    return table.assign(log_odds=log_odds, z=log_odds / np.sqrt((1 / smoothed).sum(0)))
