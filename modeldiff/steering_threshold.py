"""How far a model can be steered along a direction before its answers fall apart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import pandas as pd

from modeldiff._progress import Progress, check, reporter
from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, InterventionError, JudgeError
from modeldiff.generation import Answer, generate
from modeldiff.interventions import Cell, Layers, Plan, Side, Steer
from modeldiff.loading import Sides
from modeldiff.masks import Mask
from modeldiff.stats import wilson

Coherent = Callable[[Answer], bool]
"""Judge of one answer: whether it reads as language; `Answer.prompt` says which prompt it had."""
Measure = Callable[[float], tuple[int, int]]
"""From a coefficient to coherent answers and all answers."""


@dataclass(frozen=True, eq=False)
class Threshold:
    """The largest coefficient at which answers stay coherent.

    Args:
        coefficient: Largest that was tried with a share of at least ``target``, all smaller ones
            tried with as much; in multiples of the direction's raw length.
        low: Largest up to which the lower end of every interval is at least ``target``; 0 if of
            none but the unsteered model, or not even of that.
        high: Smallest whose interval lies below ``target``; infinite if of none.
        target: Share of coherent answers that is asked for.
        bounded: Whether incoherence was reached at all; if not, ``coefficient`` is only the largest
            that was tried.
        table: One row a coefficient that was tried, ascending: coefficient, n, coherent, share with
            its 95 % Wilson interval (low, high).
    """

    coefficient: float
    low: float
    high: float
    target: float
    bounded: bool
    table: pd.DataFrame


def steering_threshold(
    sides: Sides,
    direction: Direction,
    prompts: Sequence[Any],
    coherent: Coherent,
    *,
    target: float = 0.75,
    start: float = 1.0,
    largest: float = 1024.0,
    steps: int = 8,
    n: int = 1,
    seed: int = 0,
    side: Side = "finetuned",
    layers: Layers = None,
    where: "str | Mask" = "all",
    temperature: float = 1.2,
    max_new_tokens: int = 64,
    max_rows: int = 256,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Threshold:
    """Search the largest steering coefficient with coherent answers, by doubling and bisection.

    A sample has the same noise at every coefficient, so that the share hardly jumps. The search
    takes it as falling; where it rises again is not looked at.

    Args:
        sides: The pair.
        direction: Along which to steer; turn it around (``-direction``) for the other way.
        prompts: What is asked.
        coherent: Judge of an answer.
        target: Share of coherent answers to keep.
        start: First coefficient; it is doubled until answers fall apart.
        largest: Coefficient beyond which the search gives up.
        steps: Bisections after that.
        n: Answers to each prompt.
        seed: Of sampling.
        side: Which model.
        layers: As for `modeldiff.Steer`.
        where: As for `modeldiff.Steer`.
        temperature: Of sampling.
        max_new_tokens: Where answers are cut.
        max_rows: Rows of a batch.
        progress: Where to report, coefficient by coefficient.
        cancel: Event that stops at the next token.

    Raises:
        JudgeError: If the unsteered model is not coherent enough, or there is nothing to judge.
        InterventionError: If a setting of the search is out of range.
        Cancelled: If the event is set; ``partial`` holds the rows of `Threshold.table` so far.

    Source:
        Minder et al. 2025, arXiv 2510.13900: 12 bisections, 10 samples, 75 % coherent.

    Example:
        >>> import modeldiff as md, torch
        >>> pair = md.ModelPair.load("organism:em-rank1")
        >>> v = Direction.of(torch.ones(pair.d_model), "resid_post.3", "ones")
        >>> steering_threshold(pair.sides, v, ["The sun"], lambda answer: True, largest=2.0).bounded
        False
    """
    report, done = reporter(progress, "steering threshold"), list[dict[str, float]]()

    def measure(coefficient: float) -> tuple[int, int]:
        check(cancel)
        edit = Steer(direction, coefficient, layers=layers, where=where)
        plan = Plan((edit,)) if coefficient else Plan()
        found = generate(
            sides, prompts, cells=[Cell(side, "steered", plan)], n=n, seed=seed,
            temperature=temperature, max_new_tokens=max_new_tokens, max_rows=max_rows,
            cancel=cancel,
        )  # fmt: skip
        good = sum(coherent(answer) for answer in found.answers)
        done.append(_row(coefficient, good, len(found.answers)))
        report(len(done), len(done) + 1, f"{coefficient:g}x: {good}/{len(found.answers)} coherent")
        return good, len(found.answers)

    try:
        return search(measure, target=target, start=start, largest=largest, steps=steps)
    except Cancelled as cancelled:
        raise Cancelled(str(cancelled), pd.DataFrame(done)) from None


def search(
    measure: Measure, *, target: float, start: float, largest: float, steps: int
) -> Threshold:
    """Find where a falling share crosses a target: double from ``start``, then bisect.

    Args:
        measure: Counts at a coefficient.
        target: Share to keep.
        start: First coefficient.
        largest: Where doubling stops.
        steps: Bisections.

    Raises:
        JudgeError: If the share at 0 is below the target, or there is nothing to judge.
        InterventionError: If a setting is out of range.

    Example:
        >>> found = search(
        ...     lambda c: (10 if c < 3 else 0, 10), target=0.75, start=1.0, largest=64.0, steps=10
        ... )
        >>> round(found.coefficient, 2)
        3.0
    """
    if not (0 < start <= largest < math.inf and 0 < target <= 1 and steps >= 0):
        raise InterventionError(
            f"start={start:g}, largest={largest:g}, target={target:g}, steps={steps}: needed are "
            "0 < start <= largest, 0 < target <= 1 and steps of at least 0."
        )
    rows: list[dict[str, float]] = []

    def holds(coefficient: float) -> bool:
        rows.append(_row(coefficient, *measure(coefficient)))
        return rows[-1]["share"] >= target

    if not holds(0.0):
        raise JudgeError(
            f"without steering {rows[0]['coherent']:.0f} of {rows[0]['n']:.0f} answers are "
            f"coherent, and {target:.0%} are asked for: there is nothing to lose. Look at the "
            "answers, lower the temperature, or ask for less."
        )
    good, bad = _doubled(holds, start, largest)
    for _ in range(steps if math.isfinite(bad) else 0):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    table = pd.DataFrame(rows).sort_values("coefficient", ignore_index=True)
    sure = table["coefficient"][(table["low"] >= target).cummin()]
    gone = table["coefficient"][table["high"] < target]
    return Threshold(
        coefficient=good,
        low=float(sure.max()) if len(sure) else 0.0,
        high=float(gone.min()) if len(gone) else math.inf,
        target=target,
        bounded=math.isfinite(bad),
        table=table,
    )


def _doubled(holds: Callable[[float], bool], start: float, largest: float) -> tuple[float, float]:
    """The last coefficient that holds and the first that does not, infinite if all do."""
    good, tried = 0.0, start
    while holds(tried):
        good = tried
        if tried >= largest:
            return good, math.inf
        tried = min(2 * tried, largest)
    return good, tried


def _row(coefficient: float, good: int, n: int) -> dict[str, float]:
    if n == 0:
        raise JudgeError("there are no answers to judge: give prompts, and n of at least 1.")
    found = wilson(good, n)
    return {"coefficient": coefficient, "n": n, "coherent": good, "share": found.estimate,
            "low": found.low, "high": found.high}  # fmt: skip
