"""Does one fine-tune's direction carry the behaviour of another? Every source on every target.

A direction that removes a behaviour from the fine-tune it was found in may be a quirk of that
fine-tune. If it removes the same behaviour from others, trained on other data or in another way,
they share it; unless the base's own contrast of the same texts does as well, which is why a source
can be any set of directions, the base's among them.
"""

import math
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any

import pandas as pd

from modeldiff._progress import Progress, check, reporter
from modeldiff.behaviours import Behaviour, judge_answers, rate_of
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, MismatchError
from modeldiff.interventions import Ablate, Cell, Plan
from modeldiff.models import ModelPair
from modeldiff.moments import Moments
from modeldiff.stats import proportion_difference

Target = tuple[ModelPair, Behaviour]
UNEDITED, RANDOM, COVARIANCE = "unedited", "random", "random, as activations vary"


def transfer_matrix(
    targets: Mapping[str, Target],
    sources: Mapping[str, Sequence[Direction]],
    *,
    n_random: int = 5,
    n: int = 1,
    max_rows: int = 512,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Ablate every source's directions in every target, beside two kinds of random directions.

    Each direction is projected out after its own layer, so that lengths do not count. For each
    target the controls are drawn at the layers of the source with the most directions: isotropic
    ones, and ones with the covariance of the target's own activations, which are harder to beat.
    A prompt's sample has the same noise in every cell of a target.

    Args:
        targets: Pairs whose fine-tune is edited, each with the behaviour that is asked of it.
        sources: Directions by name, one a layer or fewer.
        n_random: Controls of each kind; 0 for none.
        n: Answers to each prompt.
        max_rows: Answers that are generated at once.
        seed: Of the answers and controls.
        progress: Where to report, target by target.
        cancel: Event that stops between batches.

    Returns:
        One row a target and source: target, source, kind ("unedited", "source", "random"), n,
        rate and coherent with their 95 % intervals, n_unscored, change (of the rate, against the
        unedited fine-tune) with change_low and change_high, and below_random: whether the rate is
        below that of every control of the target (None for controls and without any).

    Raises:
        MismatchError: If there is no target or source, or a width or site does not fit.
        JudgeError: If a judge scored no answer.
        Cancelled: If the event is set; ``partial`` holds the rows of finished targets.

    Source:
        Soligo et al. 2025 (arXiv 2506.11618), transfer of ablation between fine-tunes; the
        controls are ours.
    """
    if not targets or not any(sources.values()):
        raise MismatchError(
            f"{len(targets)} targets and {len(sources)} sources: give one of each, with directions."
        )
    _check(targets, sources)
    report, rows = reporter(progress, "transfer"), list[dict[str, Any]]()
    for done, (name, (pair, behaviour)) in enumerate(targets.items()):
        try:
            check(cancel)
            plans = {each: _ablated(several) for each, several in sources.items() if several}
            controls = _controls(pair, behaviour, sources, n_random, seed, cancel)
            rows += _of_target(
                name, pair, behaviour, plans, controls, n, max_rows, seed, cancel
            )  # fmt: skip
        except Cancelled as stopped:
            raise Cancelled(str(stopped), pd.DataFrame(rows)) from stopped
        report(done + 1, len(targets), name)
    return pd.DataFrame(rows)


def _check(targets: Mapping[str, Target], sources: Mapping[str, Sequence[Direction]]) -> None:
    wrong = [
        f"{direction.name!r} of {source} ({direction.d_model} wide, {direction.site}) in {target}"
        for target, (pair, _) in targets.items()
        for source, several in sources.items()
        for direction in several
        if direction.d_model != pair.d_model or direction.site.layer >= pair.n_layers
    ]
    if wrong:
        raise MismatchError(f"directions that do not fit: {'; '.join(wrong[:5])}.")


def _ablated(directions: Sequence[Direction]) -> Plan:
    return Plan(tuple(Ablate(each, layers=each.site.layer) for each in directions))


def _controls(
    pair: ModelPair,
    behaviour: Behaviour,
    sources: Mapping[str, Sequence[Direction]],
    n_random: int,
    seed: int,
    cancel: Event | None,
) -> dict[str, Plan]:
    """Plans of random directions, at the layers of the source with the most."""
    if n_random == 0:
        return {}
    likes = max(sources.values(), key=len)
    texts = pair.texts([prompt.render() for prompt in behaviour.prompts], reply=True)
    acts = pair.capture(texts, [each.site for each in likes], cancel=cancel)
    drawn = {RANDOM: list[list[Direction]](), COVARIANCE: list[list[Direction]]()}
    for like in likes:
        varying = Moments.of(acts.finetuned[like.site], covariance=True)
        at = seed + 1000 * like.site.layer
        drawn[RANDOM].append(random_like(like, n_random, seed=at))
        drawn[COVARIANCE].append(random_like(like, n_random, seed=at, covariance=varying))
    return {
        f"{kind} {i}": _ablated([several[i] for several in by_layer])
        for kind, by_layer in drawn.items()
        for i in range(n_random)
    }


def _of_target(
    name: str,
    pair: ModelPair,
    behaviour: Behaviour,
    plans: Mapping[str, Plan],
    controls: Mapping[str, Plan],
    n: int,
    max_rows: int,
    seed: int,
    cancel: Event | None,
) -> list[dict[str, Any]]:
    cells = [
        Cell("finetuned", UNEDITED),
        *(Cell("finetuned", each, plan) for each, plan in {**plans, **controls}.items()),
    ]
    answers = pair.generate(
        [prompt.render() for prompt in behaviour.prompts], cells=cells, n=n, seed=seed,
        temperature=behaviour.temperature, max_new_tokens=behaviour.max_new_tokens,
        max_rows=max_rows, cancel=cancel,
    )  # fmt: skip
    table = judge_answers(behaviour, answers)
    rates = {str(edit): rate_of(part) for edit, part in table.groupby("edit", sort=False)}
    lowest = min((rates[each]["rate"] for each in controls), default=math.nan)
    rows = []
    for edit, rate in rates.items():
        kind = UNEDITED if edit == UNEDITED else "random" if edit in controls else "source"
        beats = rate["rate"] < lowest if kind == "source" and controls else None
        rows.append(
            {"target": name, "source": edit, "kind": kind, **rate,
             **_change(rates[UNEDITED], rate), "below_random": beats}
        )  # fmt: skip
    return rows


def _change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    counts = [
        (round(each["rate"] * each["n"]), int(each["n"])) for each in (before, after) if each["n"]
    ]
    if len(counts) < 2:
        return dict.fromkeys(("change", "change_low", "change_high"), math.nan)
    found = proportion_difference(*counts[0], *counts[1])
    return {"change": found.estimate, "change_low": found.low, "change_high": found.high}
