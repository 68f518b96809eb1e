"""Mean and principal components of what changed, layer by layer."""

from modeldiff.bench.ablation import ablation_row
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, cosine_row
from modeldiff.direction_components import pca_difference
from modeldiff.directions import Direction
from modeldiff.sites import Site

TITLE = "`pca_difference`: components of the change"
ALPHA = 0.05
COMPONENTS = 3


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the best component (the mean, PC-0, counts) and the ablation of the first centred."""
    written = case.written(budget, seed)
    sites = [Site("resid_post", layer) for layer in range(case.pair.n_layers)]
    acts = case.pair.capture(written.texts[: budget.n_texts], at=sites, on=written.on,
                             cancel=case.cancel)  # fmt: skip
    found: list[Direction] = []
    for site in sites:
        base, tuned = acts.base[site], acts.finetuned[site]
        if not base.equal(tuned):
            found += pca_difference(base, tuned, site, COMPONENTS, name="change")
    first = {each.site.layer: each for each in found if each.name.endswith("PC-1")}
    return [cosine_row(found, case.truth.direction), ablation_row(case, budget, seed, first)]
