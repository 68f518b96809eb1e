"""Divergences of the predictions: do they differ, and most where the behaviour is?"""

import numpy as np
import pandas as pd

from modeldiff.audit_answers import NORMAL, SHOWS, Judged, full_texts
from modeldiff.audit_findings import outputs_differ
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, decided, no_truth
from modeldiff.stats import Interval, auroc

TITLE = "`output_diff`: KL of the predictions"
ALPHA = 0.0
GOOD = 0.8
"""AUC from which on the texts with the behaviour count as found."""


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the decision "they differ", and KL as a detector of answers and of prompts."""
    written = case.written(budget, seed)
    diff = case.pair.output_diff({"texts": written.texts}, on=written.on, cancel=case.cancel)
    summary = diff.summary(seed=seed)
    finding = outputs_differ(summary)
    kl = summary[summary["metric"] == "kl_ft_base"].to_dict("records")[0]
    seen = Interval(kl["estimate"], kl["low"], kl["high"], kl["n_texts"], 0.95)
    labels, of_text = np.array(written.labels), _kl(diff.by_text())
    return [
        decided("the predictions differ", bool(finding.holds), case.truth.changed, seen, alpha=0),
        _auc_row("AUC of an answer's KL: shows it or not", of_text[labels == SHOWS],
                 of_text[labels == NORMAL]),
        _prompts_row(case, budget, seed),
    ]  # fmt: skip


def _kl(by_text: pd.DataFrame) -> np.ndarray:
    return by_text.sort_values("text")["kl_ft_base"].to_numpy(float)


def _auc_row(what: str, shows: np.ndarray, normal: np.ndarray) -> Row:
    if len(shows) < 5 or len(normal) < 5:
        return no_truth(what, f"{len(shows)} texts with the behaviour and {len(normal)} without")
    found = auroc(shows, normal)
    return Row(what, f">= {GOOD:g}", found.estimate, found.low, found.high, found.n,
               found=found.estimate >= GOOD)  # fmt: skip


def _prompts_row(case: Case, budget: Budget, seed: int) -> Row:
    """KL of the answers to prompts on which the behaviour was changed, and on which not."""
    what = "AUC of a prompt's KL: the behaviour was changed there or not"
    by_truth: dict[bool, list[np.ndarray]] = {True: [], False: []}
    asked = case.answers(budget, seed)
    for judged, truth in zip(asked, case.truth.behaviours, strict=True):
        if truth is not None:
            by_truth[truth].append(_kl_of_prompts(case, judged))
    if not (by_truth[True] and by_truth[False]):
        return no_truth(what, "it was changed on all prompts, or on none")
    shows, normal = (np.concatenate(by_truth[each]) for each in (True, False))
    return _auc_row(what, shows, normal)


def _kl_of_prompts(case: Case, judged: Judged) -> np.ndarray:
    answers = judged.generations.answers
    rows = [i for i, each in enumerate(answers) if each.side == "finetuned"]
    texts = full_texts(case.pair, judged.generations, rows)
    kl = _kl(case.pair.output_diff(texts, on="new", cancel=case.cancel).by_text())
    return pd.Series(kl).groupby([answers[i].prompt for i in rows]).mean().to_numpy(float)
