"""A sparse autoencoder of fine-tuned minus base, layer by layer: what adds most to the change.

That is a latent, or the bias where the change is the same on every token.
"""

import torch

from modeldiff._progress import check
from modeldiff.bench.ablation import ablation_row
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, cosine_row
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.latents import bias_direction, latent_direction
from modeldiff.dictionaries.models import sae
from modeldiff.dictionaries.scaling import latent_scaling
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.dictionaries.training import train
from modeldiff.directions import Direction
from modeldiff.sites import Site

TITLE = '`sae(side="difference")`: what adds most to the change'
ALPHA = 0.05
LATENTS, K, STEPS = 16, 1, 300


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score what adds most to the difference, at every layer that differs."""
    written = case.written(budget, seed)
    sites = [Site("resid_post", layer) for layer in range(case.pair.n_layers)]
    acts = case.pair.capture(written.texts[: budget.n_texts], at=sites, on=written.on,
                             cancel=case.cancel)  # fmt: skip
    found: dict[int, Direction] = {}
    for site in sites:
        check(case.cancel)
        rows = torch.stack([acts.base[site], acts.finetuned[site]], 1)
        if not rows[:, 0].equal(rows[:, 1]):
            found[site.layer] = busiest(TensorRows(rows), site, seed)
    return [cosine_row(found, case.truth.direction), ablation_row(case, budget, seed, found)]


def busiest(rows: TensorRows, site: Site, seed: int) -> Direction:
    """The latent that adds most to the difference, in mean length over the rows, or the bias."""
    made = sae(rows.d_model, LATENTS, side="difference", k=K, site=str(site), seed=seed)
    batch = min(256, rows.n_rows)
    train(made, rows, TrainConfig(steps=STEPS, batch_size=batch, lr=3e-3, seed=seed))
    seen, always = latent_scaling(made, rows), bias_direction(made)
    share = seen.n_active / seen.n_rows
    added = (seen.mean * share * made.decoder().norm(dim=1)).nan_to_num()
    if always.scale > float(added.max()):
        return always
    return latent_direction(made, int(added.argmax()), strength=seen)
