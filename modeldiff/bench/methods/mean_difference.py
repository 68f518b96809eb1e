"""The fine-tune's activations on answers that show the behaviour minus on normal ones."""

from modeldiff.audit_answers import NORMAL, SHOWS
from modeldiff.audit_stages import MIN_ANSWERS
from modeldiff.bench.ablation import ablation_row, nothing_found
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, cosine_row
from modeldiff.survey import data_directions, survey

TITLE = "`data_directions`: contrast of the fine-tune's answers"
ALPHA = 0.05


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the contrast against the planted direction, and by its ablation."""
    written = case.written(budget, seed)
    few = [name for name in (SHOWS, NORMAL) if written.labels.count(name) < MIN_ANSWERS]
    if few:
        return [nothing_found(case, f"fewer than {MIN_ANSWERS} answers: {' and '.join(few)}")]
    seen = survey(case.pair.sides, written.texts, written.labels, on=written.on, seed=seed,
                  cancel=case.cancel)  # fmt: skip
    found = data_directions(seen, SHOWS, NORMAL, "contrast")
    return [
        cosine_row(found, case.truth.direction),
        ablation_row(case, budget, seed, found),
    ]
