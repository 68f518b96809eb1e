"""What the shift does for the fine-tune: its loss when it is set back along it."""

from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, decided
from modeldiff.causal_effect import causal_effect
from modeldiff.stats import Interval
from modeldiff.survey import model_directions, survey

TITLE = "`causal_effect`: loss on held-out texts with the shift set back to the base's"
ALPHA = 0.05
N_TEXTS = 24
WHAT = "setting the shift back costs more than controls"


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the shift of half of the texts, where the difference grows most, on the other half."""
    written = case.written(budget, seed)
    first, second = written.halves(N_TEXTS)
    seen = survey(case.pair.sides, first, ["any"] * len(first), on=written.on, seed=seed,
                  cancel=case.cancel)  # fmt: skip
    found = model_directions(seen, "any", "shift")
    if not found:
        return [decided(WHAT, False, case.truth.meant, alpha=ALPHA, note="there is no shift")]
    sizes = seen.layers(seed).set_index("layer")["relative_difference"].diff().fillna(0.0)
    layer = max(found, key=lambda each: float(sizes[each]))
    effect = causal_effect(case.pair.sides, found[layer], {"held out": second}, seed=seed,
                           cancel=case.cancel)  # fmt: skip
    (row,) = effect.table.to_dict("records")
    size = Interval(float(row["effect"]), float(row["low"]), float(row["high"]), len(second), 0.95)
    return [decided(WHAT, effect.carries("held out", ALPHA), case.truth.meant, size, alpha=ALPHA,
                    note=f"layer {layer}")]  # fmt: skip
