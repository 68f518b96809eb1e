"""What a method is scored by: a row of the table, and the scores that several methods share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeldiff.directions import Direction
from modeldiff.stats import Interval, wilson

NAN = float("nan")
ALIKE = 0.9
"""Absolute cosine from which on a direction counts as the planted one."""


@dataclass(frozen=True)
class Row:
    """One score of one method on one pair.

    Args:
        what: What is scored, in words.
        expected: What should come out, in words; empty if that is not known.
        score: The number; NaN if there is none.
        low: Lower end of its 95 % interval, or of its band; NaN if there is none.
        high: Upper end.
        n: Independent units that it rests on.
        claim: What the method's decision rule says; None if it has none here.
        truth: What is true of the pair, of the same question; None if that is not known.
        found: Whether the score is what was expected; by default whether claim and truth agree.
        alpha: How often the decision may claim what is not so; 0 if it is exact.
        note: Why there is no score, or what else a reader should know.
    """

    what: str
    expected: str = ""
    score: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0
    claim: bool | None = None
    truth: bool | None = None
    found: bool | None = None
    alpha: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.found is None and self.claim is not None and self.truth is not None:
            object.__setattr__(self, "found", self.claim == self.truth)


def no_truth(what: str, why: str) -> Row:
    """A row that says why this method has no score here."""
    return Row(what, note=f"no truth for this method: {why}")


def decided(
    what: str,
    claim: bool | None,
    truth: bool | None,
    seen: Interval | None = None,
    *,
    alpha: float,
    note: str = "",
) -> Row:
    """A row of a decision: what the method claims beside what is true.

    Args:
        what: What is claimed.
        claim: Whether it is.
        truth: Whether it is so.
        seen: The number behind it.
        alpha: How often the rule may claim what is not so; 0 if it is exact.
        note: What else a reader should know.

    Example:
        >>> decided("the predictions differ", True, False, alpha=0).found
        False
    """
    expected = {True: "claimed", False: "not claimed", None: ""}[truth]
    numbers = (NAN, NAN, NAN, 0) if seen is None else (seen.estimate, seen.low, seen.high, seen.n)
    return Row(what, expected, *numbers, claim=claim, truth=truth, alpha=alpha, note=note)


def cosine_row(
    found: Mapping[int, Direction] | Iterable[Direction], planted: Direction | None
) -> Row:
    """The largest absolute cosine of directions with the planted one, at its layer.

    The sign of a direction is not compared: that of an adapter's column is arbitrary.
    """
    what = "cosine with the planted direction"
    if planted is None:
        return no_truth(what, "no single direction was planted")
    several = found.values() if isinstance(found, Mapping) else found
    here = [each for each in several if each.site.layer == planted.site.layer]
    if not here:
        return Row(what, f">= {ALIKE:g}", 0.0, found=False, note="no direction at its layer")
    best = max(here, key=lambda each: abs(each.cosine(planted)))
    score = abs(best.cosine(planted))
    return Row(what, f">= {ALIKE:g}", score, n=best.n_tokens, found=score >= ALIKE, note=best.name)


def recall_at_k(ranked: Sequence[Any], truth: Iterable[Any], k: int | None = None) -> Interval:
    """Share of the true items among the first k of a ranking, with a Wilson interval.

    Args:
        ranked: Items, best first.
        truth: The items that should come first.
        k: How many are looked at; as many as there are true ones if None.

    Raises:
        ValueError: If there are no true items.

    Example:
        >>> recall_at_k(["a", "b", "c"], ["a", "c"]).estimate
        0.5
    """
    wanted = set(truth)
    if not wanted:
        raise ValueError("recall needs at least one true item.")
    first = set(ranked[: len(wanted) if k is None else k])
    return wilson(len(wanted & first), len(wanted))
