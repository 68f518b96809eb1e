"""The whole audit: what it claims of the behaviour and of its direction."""

from modeldiff._progress import check
from modeldiff.audit import Audit
from modeldiff.audit_stages import Settings
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, decided
from modeldiff.report import Report
from modeldiff.stats import Interval, proportion_difference

TITLE = "`Audit`: its findings"
ALPHA = 0.05
CHANGED = "the fine-tune changed the behaviour"


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the findings on behaviour, predictions and direction beside what is true."""
    settings = Settings(
        seed=seed,
        n_random=budget.n_random,
        n_discovery=budget.samples,
        n_scan=budget.n_scan,
        max_new_tokens=32,
    )
    asked, texts = case.behaviours[:1], case.texts[: budget.n_texts]
    report = Audit(case.pair, asked, () if asked else texts, settings).run(cancel=case.cancel)
    if not report.complete:
        check(case.cancel)
    behaviour = case.truth.behaviours[0] if asked else None
    rows = []
    for finding in report.findings:
        claim = finding.claim[0].lower() + finding.claim[1:]
        if claim.startswith(CHANGED):
            rows.append(
                decided(CHANGED, bool(finding.holds), behaviour, _difference(report), alpha=ALPHA)
            )
        elif claim.startswith("the predictions"):
            rows.append(decided(claim, bool(finding.holds), case.truth.changed, alpha=0))
        elif claim.startswith("ablating the direction") and asked:
            what = "ablating the direction lowers the behaviour"
            rows.append(
                decided(what, bool(finding.holds), behaviour, alpha=ALPHA, note=finding.evidence)
            )
        elif claim.startswith("ablating the direction"):
            rows.append(
                decided(claim, bool(finding.holds), None, alpha=ALPHA, note=finding.evidence)
            )
    return rows


def _difference(report: Report) -> Interval | None:
    """Difference of the rates on the discovery prompts, fine-tuned minus base (Newcombe)."""
    rows = report.table("behaviour")
    sides = rows[rows["edit"] == "none"].set_index("side").loc[["base", "finetuned"]]
    counts = [(round(row["rate"] * row["n"]), int(row["n"])) if row["n"] else (0, 0)
              for row in sides.to_dict("records")]  # fmt: skip
    return proportion_difference(*counts[0], *counts[1])
