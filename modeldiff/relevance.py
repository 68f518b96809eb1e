"""Whether the tokens that a lens shows are about a topic, more than those of its controls."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from modeldiff.errors import MismatchError
from modeldiff.stats import empirical_p, wilson
from modeldiff.tokens import Text

_COLUMNS = {"kind", "control", "end", "token_id", "flagged", "position"}


def keyword_ids(
    tokenizer: Any, keywords: Iterable[str], *, without: Collection[int] = ()
) -> frozenset[int]:
    """List the tokens that keywords are written with, with and without a space before them.

    Args:
        tokenizer: The pair's.
        keywords: Words of the topic, as written and capitalised.
        without: Tokens to leave out, such as those of `frequent_ids`: a piece that any text holds
            says nothing of a topic.

    Raises:
        MismatchError: If no token is left.
    """
    words = [form for word in keywords for form in (word, word.capitalize())]
    written = [before + word for word in words for before in (" ", "")]
    rows = tokenizer(written, add_special_tokens=False).input_ids if written else []
    found = frozenset(each for row in rows for each in row) - frozenset(without)
    if not found:
        raise MismatchError(
            f"no token is left of {len(words) // 2} keywords without {len(without)} frequent ones."
        )
    return found


def frequent_ids(texts: Sequence[Text], share: float = 0.05) -> frozenset[int]:
    """List the tokens that at least a share of unrelated texts hold."""
    held = Counter(each for text in texts for each in set(text.ids))
    return frozenset(token for token, n in held.items() if n >= share * len(texts))


def relevance(
    tokens: pd.DataFrame, relevant: Collection[int], *, frequent: Collection[int] = ()
) -> pd.DataFrame:
    """Count the relevant tokens that each difference and each control shows.

    Args:
        tokens: `modeldiff.difference_lens.DifferenceLens.tokens`, or a frame with its columns.
        relevant: Tokens of the topic, see `keyword_ids`.
        frequent: Tokens that do not count at all, relevant or not.

    Returns:
        One row a position, kind, control and end: these, flagged, n (tokens that count),
        n_relevant, share.

    Raises:
        MismatchError: If columns are missing.
    """
    if missing := _COLUMNS - set(tokens.columns):
        raise MismatchError(f"these tokens lack the columns {', '.join(sorted(missing))}.")
    counted = tokens[~tokens["token_id"].isin(list(frequent))]
    counted = counted.assign(hit=counted["token_id"].isin(list(relevant)))
    keys = ["position", "kind", "control", "end", "flagged"]
    found = counted.groupby(keys, sort=False)["hit"].agg(n="size", n_relevant="sum").reset_index()
    return found.assign(share=found["n_relevant"] / found["n"])


def relevance_test(
    counts: pd.DataFrame, *, end: str = "promoted", alarm_rate: float = 0.05
) -> pd.DataFrame:
    """Test whether the differences show more of the topic than their controls do.

    The first row takes all positions that are not flagged together, and is the one to quote; each
    control is taken over the same positions. The others are single positions, for looking at.

    Args:
        counts: From `relevance`.
        end: "promoted" or "suppressed".
        alarm_rate: Level of ``relevant``.

    Returns:
        One row for "all" and for each position: position, n, n_relevant, share with its 95 %
        Wilson interval (low, high); for both kinds of control their mean share
        (random, random_difference), Fisher's one-sided p (fisher_*, which takes tokens as
        independent) and the share of controls that reach the difference's (rank_*, never 0, which
        does not); and relevant: whether both ranks are at most ``alarm_rate``. Without a
        difference, as in a pair of equal models, the frame is empty.
    """
    here = counts[counts["end"] == end]
    rows = []
    for position in ("all", *sorted(here["position"].unique())):
        part = here[~here["flagged"]] if position == "all" else here[here["position"] == position]
        own = part[part["kind"] == "difference"]
        if len(own):
            rows.append({"position": position, **_tested(own, part, alarm_rate)})
    return pd.DataFrame(rows)


def _tested(own: pd.DataFrame, part: pd.DataFrame, alarm_rate: float) -> dict[str, Any]:
    n, hits = int(own["n"].sum()), int(own["n_relevant"].sum())
    interval = wilson(hits, n)
    row: dict[str, Any] = {"n": n, "n_relevant": hits, "share": interval.estimate,
                           "low": interval.low, "high": interval.high}  # fmt: skip
    for kind in ("random", "random difference"):
        sums = part[part["kind"] == kind].groupby("control")[["n", "n_relevant"]].sum()
        shares, name = (sums["n_relevant"] / sums["n"]).to_numpy(float), kind.replace(" ", "_")
        drawn, seen = int(sums["n"].sum()), int(sums["n_relevant"].sum())
        row[name] = float(np.mean(shares)) if len(shares) else math.nan
        row[f"fisher_{name}"] = fisher_exact(hits, n, seen, drawn)
        row[f"rank_{name}"] = empirical_p(interval.estimate, shares, tail="upper") if n else 1.0
    row["relevant"] = max(row["rank_random"], row["rank_random_difference"]) <= alarm_rate
    return row


def fisher_exact(hits: int, n: int, other_hits: int, other_n: int) -> float:
    """One-sided p of Fisher's exact test: as many hits or more, were all drawn from one pool.

    Raises:
        ValueError: If there are more hits than draws.

    Source:
        Fisher 1935, The Design of Experiments.

    Example:
        >>> round(fisher_exact(3, 4, 1, 4), 4)
        0.2429
    """
    if not (0 <= hits <= n and 0 <= other_hits <= other_n):
        raise ValueError(f"{hits} hits of {n} and {other_hits} of {other_n}: more hits than draws.")
    total, successes = n + other_n, hits + other_hits
    ways = sum(
        math.comb(successes, k) * math.comb(total - successes, n - k)
        for k in range(hits, min(n, successes) + 1)
    )
    return ways / math.comb(total, n)
