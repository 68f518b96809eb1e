"""The same contrast of answers in the base: a control that owes nothing to the fine-tune."""

from modeldiff.audit_answers import NORMAL, SHOWS
from modeldiff.audit_stages import MIN_ANSWERS
from modeldiff.bench.ablation import ablation_row, nothing_found
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row
from modeldiff.survey import base_directions, data_directions, survey

TITLE = "`base_directions`: the base's contrast of the same answers (a control)"
ALPHA = 0.05


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the control by its ablation, and how much of the fine-tune's contrast it is."""
    written = case.written(budget, seed)
    control = case.truth.behaviours[:1] != (False,)  # where nothing changed, nothing may be claimed
    few = [name for name in (SHOWS, NORMAL) if written.labels.count(name) < MIN_ANSWERS]
    if few:
        why = f"fewer than {MIN_ANSWERS} answers: {' and '.join(few)}"
        return [nothing_found(case, why, control=control)]
    seen = survey(case.pair.sides, written.texts, written.labels, on=written.on, seed=seed,
                  cancel=case.cancel)  # fmt: skip
    found = base_directions(seen, SHOWS, NORMAL, "base contrast")
    tuned = data_directions(seen, SHOWS, NORMAL, "contrast")
    alike = [abs(found[layer].cosine(tuned[layer])) for layer in found]
    cosine = Row("cosine with the fine-tune's contrast, mean over layers",
                 score=sum(alike) / len(alike), low=min(alike), high=max(alike), n=len(alike),
                 note="smallest and largest layer in place of an interval")  # fmt: skip
    return [cosine, ablation_row(case, budget, seed, found, control=control)]
