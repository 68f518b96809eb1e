"""Which components carry the change: the other side's activations, copied over whole texts."""

from functools import partial

from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, decided, no_truth
from modeldiff.patching import onset_loss, patch_texts
from modeldiff.stats import Interval

TITLE = "`patch_texts`: layers, attention and MLPs exchanged between the sides"
ALPHA = 0.05
N_TEXTS = 12
N_TOKENS = 24
"""Of an answer, whose loss is the metric."""
N_RANDOM = 19
"""Fewer controls than these can show nothing at 5 %."""
LEAST = 0.005
"""Nats a token: a smaller effect may be no chance, and yet hardly a change.

Twice the largest effect of any component, 0.0025, in 8 of the 16 null pairs in which every weight
was trained a little further on the base's own data; in the other 8 the largest is 0.0036.
"""


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score whether anything carries the change, and in which layer the first that does lies."""
    written = case.written(budget, seed)
    texts = written.texts[:N_TEXTS]
    metric = partial(onset_loss, n=N_TOKENS) if written.on == "new" else None
    table = patch_texts(case.pair.sides, texts, metric, n_random=N_RANDOM, seed=seed,
                        cancel=case.cancel)  # fmt: skip
    best = table.iloc[int(table["effect"].abs().to_numpy().argmax())]
    largest = Interval(float(best["effect"]), float(best["low"]), float(best["high"]),
                       len(texts), 0.95)  # fmt: skip
    carrying = table[table["carries"] & (table["effect"].abs() >= LEAST)]
    rows = [decided("some component carries the change", not carrying.empty, case.truth.meant,
                    largest, alpha=ALPHA)]  # fmt: skip
    what = "first layer whose MLP carries it"
    if case.truth.layers is None:
        return [*rows, no_truth(what, "no layer is the changed one")]
    layers = sorted(int(each) for each in carrying[carrying["part"] == "mlp_out"]["layer"])
    first = layers[0] if layers else -1
    wanted = min(case.truth.layers)
    note = f"carrying: {', '.join(carrying['component'].head(6)) or 'none'}"
    rows.append(Row(what, str(wanted), float(first), n=len(texts), found=first == wanted,
                    note=note))  # fmt: skip
    return rows
