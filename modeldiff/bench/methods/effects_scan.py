"""Where ablating the shift brings the predictions back to the base's, and how far.

How far is not known beforehand, even where the direction is: the base's own component goes too.
"""

from modeldiff.audit_findings import distance_closed
from modeldiff.audit_proof import cells_of_ablation, random_sets, scan_cells
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, decided, no_truth, recall_at_k
from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.interventions import Cell
from modeldiff.stats import Interval, bootstrap_mean
from modeldiff.survey import model_directions, survey
from modeldiff.tokens import Text

TITLE = "`effects`: distance to the base after ablation"
ALPHA = 0.05
CLOSES = "ablation closes the distance"


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the layer of the scan, on half of the texts, and the distance closed on the others."""
    written = case.written(budget, seed)
    halves = written.halves(budget.n_texts)
    labels = ["any"] * len(halves[0])
    seen = survey(case.pair.sides, halves[0], labels, on=written.on, seed=seed, cancel=case.cancel)
    found = model_directions(seen, "any", "shift")
    if not found:
        truth = False if case.truth.changed is False else None
        note = "the activations do not differ"
        return [decided(CLOSES, False, truth, alpha=ALPHA, note=note)]
    cells = scan_cells(found, budget.n_scan, seed)
    table = effects(case.pair.sides, halves[0], cells, on=written.on, cancel=case.cancel)
    kl = table.groupby("edit")["kl"].mean()
    ranked = sorted(found, key=lambda layer: float(kl[f"layer {layer}"]))
    return [
        _layer_row(case, ranked),
        _closed_row(case, budget, seed, found, ranked[0], halves[1], written.on),
    ]


def _layer_row(case: Case, ranked: list[int]) -> Row:
    layers = case.truth.layers
    if layers is None:
        return no_truth("recall of the changed layers", "no layer is the changed one")
    recall = recall_at_k(ranked, layers)
    return Row(
        "recall of the changed layers, by the distance that ablation leaves", "1",
        recall.estimate, recall.low, recall.high, recall.n, found=recall.estimate == 1,
        note=f"changed: {list(layers)}; found: {ranked[: len(layers)]}",
    )  # fmt: skip


def _closed_row(
    case: Case,
    budget: Budget,
    seed: int,
    found: dict[int, Direction],
    layer: int,
    texts: tuple[Text, ...],
    on: str,
) -> Row:
    drawn = random_sets(found, budget.n_random, seed)
    cells = [Cell("finetuned"), cells_of_ablation("ablated", found, [layer])]
    cells += [cells_of_ablation(f"random {i}", one, [layer]) for i, one in enumerate(drawn)]
    table = effects(case.pair.sides, texts, cells, on=on, cancel=case.cancel)
    kl = table.pivot_table(index="text", columns="edit", values="kl")
    controls = kl[[f"random {i}" for i in range(budget.n_random)]].mean().to_numpy(float)
    finding = distance_closed(table, controls, f"layer {layer}", seed)[0]
    share = bootstrap_mean(1 - (kl["ablated"] / kl["none"].mean()).to_numpy(float), seed=seed)
    seen = Interval(share.estimate, share.low, share.high, share.n, share.level)
    return decided(CLOSES, bool(finding.holds), None, seen, alpha=ALPHA, note=finding.evidence)
