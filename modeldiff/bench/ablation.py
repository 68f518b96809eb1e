"""What ablating a method's directions does to the behaviour, scored alike for every method.

The place (one layer, or every layer) is chosen on the discovery prompts, as the audit chooses it;
the change of the behaviour is measured on prompts that played no part, beside random directions.
"""

from collections.abc import Mapping

import pandas as pd

from modeldiff.audit_answers import Judged
from modeldiff.audit_proof import (
    behaviour_row,
    candidates,
    cells_of_ablation,
    random_sets,
    sound,
)
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, decided, no_truth
from modeldiff.directions import Direction
from modeldiff.interventions import Cell, grid
from modeldiff.stats import null_band, paired_bootstrap

WHAT = "change of the behaviour when ablated"
ALPHA = 0.05
"""The interval is a 95 % one."""


def ablation_row(
    case: Case, budget: Budget, seed: int, found: Mapping[int, Direction], *, control: bool = False
) -> Row:
    """Score the ablation of directions, one a layer.

    Claimed is that it lowers the behaviour: the 95 % interval of the change, over prompts, lies
    below zero, and the rate below what every random direction leaves (with 39 of them or more:
    below their 95 % band).

    Args:
        case: The pair; without a behaviour there is no score.
        budget: Prompts and random directions.
        seed: Of answers, controls and intervals.
        found: Directions by layer.
        control: Whether these directions are a control, of which nothing is expected.

    Raises:
        Cancelled: If the case's event is set.
    """
    if not case.behaviours or not found:
        return nothing_found(case, "no direction was found", control=control)
    truth = None if control else case.truth.behaviours[0]
    layers, place = _choose(case, seed, found)
    drawn = random_sets(found, budget.n_random, seed)
    names = [f"random {i}" for i in range(budget.n_random)]
    cells = [*grid(), cells_of_ablation("ablated", found, layers)]
    cells += [cells_of_ablation(n, one, layers) for n, one in zip(names, drawn, strict=True)]
    judged = case.asker(seed).judge(case.behaviours[0].split(seed)[1], cells)
    return _scored(judged, names, truth, place, seed)


def nothing_found(case: Case, why: str, *, control: bool = False) -> Row:
    """The row of a method that has no direction to ablate: it claims nothing."""
    if not case.behaviours:
        return no_truth(WHAT, "the pair has no behaviour")
    truth = None if control else case.truth.behaviours[0]
    return decided(WHAT, False, truth, alpha=ALPHA, note=why)


def _choose(case: Case, seed: int, found: Mapping[int, Direction]) -> tuple[tuple[int, ...], str]:
    """The place that leaves the least behaviour on the discovery prompts, if still coherent."""
    places = candidates(found)
    cells = [cells_of_ablation(name, found, layers) for name, layers in places.items()]
    discovery = case.behaviours[0].split(seed)[0]
    tried = case.asker(seed).judge(discovery, [Cell("finetuned"), *cells])
    rows = pd.DataFrame([behaviour_row(tried, "finetuned", c.name, c.name, "edit") for c in cells])
    rows = rows.assign(n_layers=[len(each) for each in places.values()])
    kept = rows[sound(rows, behaviour_row(tried, "finetuned", "none", "fine-tuned", "model"))]
    kept = kept if len(kept) else rows
    place = str(kept.sort_values(["rate", "n_layers"], kind="stable")["cell"].iloc[0])
    return places[place], place


def _scored(judged: Judged, names: list[str], truth: bool | None, place: str, seed: int) -> Row:
    both = [judged.cell("finetuned", edit) for edit in ("none", "ablated")]
    scored = both[0]["exhibits"].notna().to_numpy() & both[1]["exhibits"].notna().to_numpy()
    if not scored.any():
        return decided(WHAT, None, truth, alpha=ALPHA, note="no pair of answers could be scored")
    before, after = (part["exhibits"].to_numpy(object)[scored].astype(float) for part in both)
    prompts = judged.questions(both[0][scored])
    change = paired_bootstrap(before, after, clusters=prompts, seed=seed)
    rates = [judged.cell("finetuned", name)["exhibits"].dropna().mean() for name in names]
    band = null_band([float(rate) for rate in rates if pd.notna(rate)])
    coherent = float(both[1]["coherent"].astype(float).mean())
    return decided(
        WHAT,
        bool(change.high < 0 and after.mean() < band.low),
        truth,
        change,
        alpha=ALPHA,
        note=f"{before.mean():.1%} to {after.mean():.1%}, ablated at {place}; {band.n} random "
        f"directions leave {band.low:.1%} to {band.high:.1%}; {coherent:.1%} coherent",
    )
