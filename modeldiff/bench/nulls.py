"""False alarms: every method that takes a decision, on many pairs with nothing to find."""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event

import pandas as pd

from modeldiff._files import digest
from modeldiff.behaviours import Behaviour, Prompt, Verdict
from modeldiff.bench.cases import Budget, Case, Truth
from modeldiff.organisms import world
from modeldiff.organisms.nulls import KINDS, NullPair
from modeldiff.stats import wilson


@dataclass(frozen=True)
class Coin:
    """A judge who tosses a coin over every answer: a behaviour that no fine-tune has changed.

    The organisms' own behaviour is absent from the base, where a rule that compares rates can
    hardly err. Half of all answers show this one, and what a model answers decides which.
    """

    name: str = "coin"

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Toss; the same answer to the same question always falls the same way."""
        return Verdict("coin", int(digest(prompt.question, answer), 16) % 2 == 0, True)


def coin_behaviour(n: int, seed: int) -> Behaviour:
    """Questions of the organisms' world, judged by a coin.

    Args:
        n: Different questions.
        seed: Which ones.
    """
    asked = dict.fromkeys(
        Prompt((("user", q.text),), q.domain)
        for i in range(1 + n // len(world.DOMAINS))
        for q in world.prompts(2, 1000 * seed + i)
    )
    return Behaviour("falls heads", "the coin of the answer shows heads", tuple(asked)[:n],
                     Coin(), 1.0, 8)  # fmt: skip


def null_case(null: NullPair, budget: Budget, cancel: Event | None = None) -> Case:
    """Ask a null pair about the coin; its prompts are drawn by its seed."""
    truth = Truth(changed=not KINDS[null.kind].same, behaviours=(False,), null=True)
    asked = coin_behaviour(budget.prompts, null.seed)
    return Case(f"null {null.kind} {null.seed}", null.pair, truth, (asked,), cancel=cancel)


def schedule(n_same: int, n_other: int, seed: int) -> Iterator[tuple[str, int]]:
    """Kind and seed of every null pair of a run.

    Args:
        n_same: Pairs of each kind in which both sides are the same function.
        n_other: Pairs of each other kind.
        seed: Of the first; no two are the same, so that alarms are independent.
    """
    made = 0
    for i in range(max(n_same, n_other)):
        for kind, about in KINDS.items():
            if i < (n_same if about.same else n_other):
                yield kind, seed + made
                made += 1


def alarm_table(claims: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """Count how often each decision claimed what is not so, with Wilson intervals.

    Args:
        claims: One row a null pair and decision: method, what, alpha, kind, claim, truth. Rows in
            which the claim would be true are left out, and so are those of unknown truth.
        by: Another column to split by, such as ``"kind"``.

    Returns:
        One row a decision: method, what, alpha, n, alarms, rate, low, high.
    """
    columns = ["method", "what", "alpha", *([by] if by else [])]
    if not len(claims):
        return pd.DataFrame(columns=[*columns, "n", "alarms", "rate", "low", "high"])
    false = claims[(claims["truth"] == False) & claims["claim"].notna()]  # noqa: E712
    rows = []
    for key, part in false.groupby(columns, sort=False, dropna=False):
        alarms = int(part["claim"].astype(bool).sum())
        seen = wilson(alarms, len(part))
        named = dict(zip(columns, key, strict=True))
        rows.append({**named, "n": len(part), "alarms": alarms, "rate": seen.estimate,
                     "low": seen.low, "high": seen.high})  # fmt: skip
    return pd.DataFrame(rows, columns=[*columns, "n", "alarms", "rate", "low", "high"])
