"""The fine-tune's minus the base's activations on the same texts."""

from modeldiff.audit_answers import SHOWS
from modeldiff.audit_stages import MIN_ANSWERS
from modeldiff.bench.ablation import ablation_row
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, cosine_row, decided
from modeldiff.survey import model_directions, survey

TITLE = "`model_directions`: shift from base to fine-tune"
ALPHA = 0.05


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the shift: is there one, is it the planted direction, and what its ablation does."""
    written = case.written(budget, seed)
    label = SHOWS if written.labels.count(SHOWS) >= MIN_ANSWERS else "any"
    labels = written.labels if label == SHOWS else ["any"] * len(written.texts)
    seen = survey(case.pair.sides, written.texts, labels, on=written.on, seed=seed,
                  cancel=case.cancel)  # fmt: skip
    found = model_directions(seen, label, "shift")
    return [
        decided("the activations differ", bool(found), case.truth.changed, alpha=0),
        cosine_row(found, case.truth.direction),
        ablation_row(case, budget, seed, found),
    ]
