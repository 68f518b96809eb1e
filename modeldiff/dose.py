"""Dose and response: how a behaviour and coherence move with the coefficient of an edit.

Every point is measured beside random directions of the same length, site and tokens: what they do
is what any push of that size does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event
from typing import Any

import pandas as pd

from modeldiff._progress import Progress, check, reporter
from modeldiff.behaviours import Behaviour, rate_of, verdicts_of
from modeldiff.errors import Cancelled, InterventionError, JudgeError
from modeldiff.generation import Answer
from modeldiff.interventions import Cell, Edit, Plan, Side, as_plan
from modeldiff.masks import Mask
from modeldiff.models import ModelPair
from modeldiff.moments import Moments
from modeldiff.sites import Site
from modeldiff.stats import null_band

Dose = Callable[[float], Edit | Plan]
"""The edit at a coefficient, such as ``lambda c: md.Steer(direction, c)``."""
Point = dict[str, float | int]
_EDITED = "edited"


def dose_response(
    pair: ModelPair,
    behaviour: Behaviour,
    dose: Dose,
    coefficients: Sequence[float],
    *,
    controls: Sequence[Dose] = (),
    side: Side = "base",
    n: int = 1,
    seed: int = 0,
    max_rows: int = 256,
    on_point: Callable[[Point], None] | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Measure the rate of a behaviour and coherence at each coefficient, with controls.

    A prompt's sample has the same noise at every coefficient and in every control. Coefficients
    run from the smallest in size outwards, so that a stopped curve has its middle.

    Args:
        pair: The pair.
        behaviour: What is asked, and who judges.
        dose: The edit at a coefficient.
        coefficients: In the dose's own unit; for `modeldiff.Steer` multiples of the direction's
            raw length.
        controls: The same edit with random directions of the same length in its place.
        side: Which model is edited.
        n: Answers to each prompt.
        seed: Of sampling.
        max_rows: Rows of a batch.
        on_point: Called with each finished row.
        progress: Where to report, point by point.
        cancel: Event that stops at the next token.

    Returns:
        One row a coefficient, in ascending order: coefficient, the columns of
        `modeldiff.behaviours.rate_of` (rates are shares of answers, with 95 % Wilson intervals),
        n_random, random_rate (mean over controls), random_low, random_high (the range that they
        span), random_coherent. Without a control that could be scored these are NaN.

    Raises:
        JudgeError: If the judge scored no answer at any coefficient.
        InterventionError: If there are no coefficients, or one is not finite or occurs twice.
        Cancelled: If the event is set; ``partial`` holds the finished rows as such a frame.

    Source:
        Turner et al. 2023 (activation addition), 2308.10248, for the coefficient; the band of
        controls at every point is ours.
    """
    ordered = _checked(coefficients)
    report, rows = reporter(progress, "dose"), list[Point]()
    asked = [prompt.render() for prompt in behaviour.prompts]
    try:
        for number, coefficient in enumerate(ordered):
            check(cancel)
            report(number, len(ordered), f"coefficient {coefficient:+g}")
            found = pair.generate(
                asked, cells=_cells(side, coefficient, dose, controls), n=n, seed=seed,
                temperature=behaviour.temperature, max_new_tokens=behaviour.max_new_tokens,
                max_rows=max_rows, cancel=cancel,
            )  # fmt: skip
            rows.append({"coefficient": coefficient, **_point(behaviour, found.answers)})
            if on_point is not None:
                on_point(rows[-1])
        report(len(ordered), len(ordered), f"{len(ordered)} coefficients")
    except Cancelled as cancelled:
        raise Cancelled(str(cancelled), _frame(rows)) from None
    if not any(row["n"] for row in rows):
        raise JudgeError(
            f"judge {behaviour.judge.name!r} scored no answer at {len(rows)} coefficients. A rate "
            "of nothing is not 0; look at the answers, or try smaller coefficients."
        )
    return _frame(rows)


def residual_norms(
    pair: ModelPair, items: Sequence[Any], *, side: Side = "base", on: "str | Mask" = "all"
) -> tuple[float, ...]:
    """Mean L2 norm of the residual stream after each layer: the yardstick of a dose.

    Args:
        pair: The pair.
        items: Texts or chats.
        side: Which model.
        on: Tokens that count; the first of a text never does.

    Raises:
        MaskError: If no token counts.

    Example:
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> len(residual_norms(pair, ["How are you?"])) == pair.n_layers
        True
    """
    sites = [Site("resid_post", layer) for layer in range(pair.n_layers)]
    found = pair.capture(items, sites, on=on)
    acts = found.base if side == "base" else found.finetuned
    return tuple(Moments.of(acts[site]).mean_norm for site in sites)


def with_prompts(behaviour: Behaviour, n: int) -> Behaviour:
    """The same behaviour with at most ``n`` of its prompts, at regular steps.

    Raises:
        JudgeError: If ``n`` is below 1.
    """
    if n < 1:
        raise JudgeError(f"{behaviour.name!r} with {n} prompts asks nothing; give at least 1.")
    step = max(1, len(behaviour.prompts) // n)
    return replace(behaviour, prompts=behaviour.prompts[::step][:n])


def _checked(coefficients: Sequence[float]) -> list[float]:
    values = [float(each) for each in coefficients]
    if not values or not all(map(math.isfinite, values)) or len(set(values)) < len(values):
        raise InterventionError(
            f"coefficients {values}: at least one is needed, all finite, and none twice."
        )
    return sorted(values, key=lambda c: (abs(c), -c))


def _cells(side: Side, coefficient: float, dose: Dose, controls: Sequence[Dose]) -> list[Cell]:
    edited = Cell(side, _EDITED, as_plan(dose(coefficient)))
    random = [
        Cell(side, f"random {i}", as_plan(each(coefficient))) for i, each in enumerate(controls)
    ]
    return [edited, *random]


def _point(behaviour: Behaviour, answers: Sequence[Answer]) -> Point:
    judged = _judged(behaviour, answers)
    rates = {str(edit): rate_of(mine) for edit, mine in judged.groupby("edit", sort=False)}
    edited = rates.pop(_EDITED)
    scored = [float(rate["rate"]) for rate in rates.values() if rate["n"]]
    coherent = [float(c) for rate in rates.values() if not math.isnan(c := rate["coherent"])]
    band = null_band(scored) if scored else None
    return {
        **edited,
        "n_random": len(scored),
        "random_rate": _mean(scored),
        "random_low": band.low if band else math.nan,
        "random_high": band.high if band else math.nan,
        "random_coherent": _mean(coherent),
    }


def _judged(behaviour: Behaviour, answers: Sequence[Answer]) -> pd.DataFrame:
    asked = [(behaviour.prompts[a.prompt], a.text) for a in answers]
    verdicts = verdicts_of(behaviour.judge, asked)
    return pd.DataFrame(
        {
            "edit": [answer.edit for answer in answers],
            "exhibits": pd.array([verdict.exhibits for verdict in verdicts], dtype="boolean"),
            "coherent": pd.array([verdict.coherent for verdict in verdicts], dtype="boolean"),
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _frame(rows: Sequence[Point]) -> pd.DataFrame:
    ordered = sorted(rows, key=lambda row: row["coefficient"])
    return pd.DataFrame(ordered).reset_index(drop=True)
