"""Where in the layers the two models differ, by the size of the difference."""

from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, decided, no_truth, recall_at_k
from modeldiff.stats import Interval
from modeldiff.survey import survey

TITLE = "`survey`: relative difference of every layer"
ALPHA = 0.0


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the first layer that differs, and the layers ranked by how much each adds."""
    written = case.written(budget, seed)
    seen = survey(case.pair.sides, written.texts, written.labels, on=written.on, seed=seed,
                  cancel=case.cancel)  # fmt: skip
    table = seen.layers(seed)
    size = [float(each) for each in table["relative_difference"]]
    most = max(range(len(size)), key=size.__getitem__)
    largest = Interval(size[most], float(table["low"][most]), float(table["high"][most]),
                       case.pair.n_layers, 0.95)  # fmt: skip
    rows = [decided("some layer differs", size[most] > 0, case.truth.changed, largest, alpha=0)]
    layers = case.truth.layers
    if layers is None:
        return [*rows, no_truth("recall of the changed layers", "no layer is the changed one")]
    differing = [layer for layer, each in enumerate(size) if each > 0]
    first = differing[0] if differing else -1
    rows.append(Row("layers from the first that was changed to the first that differs", "0",
                    float(first - min(layers)), n=len(written.texts),
                    found=first == min(layers)))  # fmt: skip
    added = [now - before for now, before in zip(size, [0.0, *size], strict=False)]
    ranked = sorted(range(len(size)), key=lambda layer: -added[layer])
    recall = recall_at_k(ranked, layers)
    note = f"changed: {list(layers)}; found: {ranked[: len(layers)]}"
    rows.append(Row("recall of the changed layers, by what each adds", "1", recall.estimate,
                    recall.low, recall.high, recall.n, found=recall.estimate == 1,
                    note=note))  # fmt: skip
    return rows
