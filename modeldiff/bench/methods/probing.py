"""Probes: which answers show the behaviour, and which of the two models an activation is from."""

from dataclasses import replace

import torch

from modeldiff.audit_answers import NORMAL, SHOWS
from modeldiff.audit_stages import MIN_ANSWERS
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, cosine_row, decided, no_truth
from modeldiff.probe_texts import ProbeTexts, shuffled
from modeldiff.probes import probe, probe_direction
from modeldiff.sites import Site
from modeldiff.stats import null_band, outside

TITLE = "`probe`, `probe_direction`: held-out AUROC beside shuffled labels"
ALPHA = 0.05
N_SHUFFLES = 19
"""Fewer of these can show nothing at 5 %."""
READ = "the class of an answer can be read off"
WHICH = "it can be read off which of the two models an activation is from"


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score a probe of the answers' classes and one of the models, both after the last layer."""
    written, planted = case.written(budget, seed), case.truth.direction
    last = Site("resid_post", case.pair.n_layers - 1)
    sites = {last, Site("resid_post", planted.site.layer) if planted else last}
    acts = case.pair.capture(written.texts, at=sorted(sites, key=str), on=written.on,
                             cancel=case.cancel)  # fmt: skip
    data = {
        at: ProbeTexts.of(acts, [each == SHOWS for each in written.labels], written.prompts, at)
        for at in sites
    }
    rows = [_classes(case, data[last], written.labels, seed),
            _models(_of_sides(data[last]), case.truth.changed, seed)]  # fmt: skip
    found = []
    if planted is not None:
        at_plant = _of_sides(data[Site("resid_post", planted.site.layer)])
        found = [probe_direction(at_plant, "which model", seed=seed)]
    return [*rows, cosine_row(found, planted)]


def _classes(case: Case, data: ProbeTexts, labels: list[str], seed: int) -> Row:
    """Whether a probe tells the fine-tune's answers that show the behaviour from normal ones."""
    few = [each for each in (SHOWS, NORMAL) if labels.count(each) < MIN_ANSWERS]
    if not case.behaviours or few:
        return no_truth(READ, f"fewer than {MIN_ANSWERS} answers: {' and '.join(few)}")
    return _decision(READ, data, not case.truth.null, seed)


def _of_sides(data: ProbeTexts) -> ProbeTexts:
    """The same texts in both models, labelled by the model; a text is a group."""
    n = len(data.labels)
    rows = torch.cat([data.base, data.finetuned])
    return ProbeTexts(
        rows, rows, torch.cat([data.text_index, data.text_index + n]),
        torch.cat([data.token_ids, data.token_ids]), torch.arange(2 * n) >= n,
        (*data.groups, *data.groups), data.site,
    )  # fmt: skip


def _models(data: ProbeTexts, truth: bool | None, seed: int) -> Row:
    """Claimed is what the interval over prompts says: that the AUROC lies above one half."""
    found = probe(data, seed=seed).auroc
    return decided(WHICH, found.low > 0.5, truth, found, alpha=ALPHA)


def _decision(what: str, data: ProbeTexts, truth: bool | None, seed: int) -> Row:
    """Claimed is that a probe does better than with each of some shufflings of the labels."""
    found = probe(data, method="mean difference", seed=seed)
    band = null_band([
        probe(replace(data, labels=shuffled(data.labels, data.groups, 1000 * seed + i)),
              method="mean difference", seed=seed + i).auroc.estimate
        for i in range(N_SHUFFLES)
    ])  # fmt: skip
    above = outside(band, found.auroc.estimate) and found.auroc.estimate > band.high
    note = f"shuffled labels {band.low:.2f} to {band.high:.2f}"
    return decided(what, above, truth, found.auroc, alpha=ALPHA, note=note)
