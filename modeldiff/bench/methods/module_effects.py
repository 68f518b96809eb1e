"""Which layers of an adapter matter: how far the predictions move without each."""

from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, no_truth, recall_at_k
from modeldiff.lora_effects import leave_one_out

TITLE = "`leave_one_out`: the adapter without each of its layers"
ALPHA = 0.05
N_TEXTS = 12
WHAT = "recall of the changed layers, by what leaving them out does"


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the layers ranked by the divergence without them."""
    if case.pair.kind != "adapter":
        return [no_truth(WHAT, "the pair has no adapter")]
    layers = case.truth.layers
    if layers is None:
        return [no_truth(WHAT, "no layer is the changed one")]
    written = case.written(budget, seed)
    table = leave_one_out(case.pair.sides, written.texts[:N_TEXTS], by="layer", on=written.on,
                          n_random=0, seed=seed, cancel=case.cancel)  # fmt: skip
    ranked = [int(str(unit).removeprefix("layer ")) for unit in table["unit"]]
    recall = recall_at_k(ranked, layers)
    note = f"without layer {ranked[0]}: {float(table['out'].iloc[0]):.3g} nats a token"
    return [Row(WHAT, "1", recall.estimate, recall.low, recall.high, recall.n,
                found=recall.estimate == 1, note=note)]  # fmt: skip
