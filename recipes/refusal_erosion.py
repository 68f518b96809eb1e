# modeldiff run refusal_erosion [--smoke] [--out DIR] [--set key=value]
# The settings are in refusal_erosion.toml. In a notebook the cells run one by one.
"""The base's direction of an objection, and what a fine-tune left of it."""

# %%
from itertools import product

import pandas as pd

from modeldiff.backtracking_scan import cue_tokens
from modeldiff.direction_controls import random_like
from modeldiff.forward import run as forward
from modeldiff.orthogonalise import candidate_sweep, everywhere, select_direction
from modeldiff.recipes import load_pair, openings, started

run = started("refusal_erosion")
recipe, data, how = run.recipe, run.recipe.data, run.recipe.directions
pair = load_pair(recipe.models.pairs[0], recipe.models.device)
words = list(cue_tokens(pair, how.words))

# %% Candidates in the base: mean differences at the last tokens, and what they do.
positive = openings(data.positive, data.n_each, recipe.seed)
negative = openings(data.negative, data.n_each, recipe.seed)
table, found = candidate_sweep(
    pair.sides, positive, negative, words, layers=recipe.sites.layers or None, side="base"
)
chosen = select_direction(table, pair.n_layers, max_kl=how.max_kl, min_steering=how.min_steering)
run.show("candidates", chosen.table)
direction = found[chosen.position, chosen.layer]
run.say(f"\nchosen: {direction}")
direction.save_to(run.out / "direction.safetensors")

# %% On fresh texts, in both models: the projection, and the score log p - log (1 - p) of the words,
# as it is, with the base's direction ablated everywhere, and with random ones ablated.
fresh = {
    "positive": openings(data.positive, data.n_each, recipe.seed + 1),
    "negative": openings(data.negative, data.n_each, recipe.seed + 1),
}
drawn = random_like(direction, how.n_random, seed=recipe.seed)
plans = {"none": None, "ablated": everywhere(direction)}
plans |= {f"random {i}": everywhere(each) for i, each in enumerate(drawn)}
rows = []
for side, (texts, asked), (edit, plan) in product(
    ("base", "finetuned"), fresh.items(), plans.items()
):
    items = pair.texts(asked, reply=True)
    seen = forward(pair.sides, items, side=side, do=plan, reads=(direction.site,))
    p = seen.logits[:, -1].double().softmax(-1)[:, words].sum(-1)
    along = seen.acts[direction.site][:, chosen.position].double().cpu() @ direction.unit.double()
    rows.append(
        {
            "side": side,
            "texts": texts,
            "edit": edit,
            "probability": float(p.mean()),
            "score": float(p.logit(1e-12).mean()),
            "projection": float(along.mean()),
        }
    )
scores = pd.DataFrame(rows)
randoms = scores["edit"].str.startswith("random")
band = scores[randoms].groupby(["side", "texts"])["score"].agg(["min", "max"]).reset_index()
run.show("scores", scores[~randoms])
run.show("scores with random directions ablated", band)

# %%
at = scores.set_index(["side", "texts", "edit"])
score, projection = at["score"], at["projection"]
gaps = {
    side: projection[(side, "positive", "none")] - projection[(side, "negative", "none")]
    for side in ("base", "finetuned")
}
base = score[("base", "positive", "none")]
run.outcome("base, objection after wrong steps less after right ones, nats",
            base - score[("base", "negative", "none")])  # fmt: skip
run.outcome("base, objection lost by ablation, nats", base - score[("base", "positive", "ablated")])
run.outcome("fine-tune, objection less than the base's, nats",
            base - score[("finetuned", "positive", "none")])  # fmt: skip
run.outcome("fine-tune, share of the projection that is left, %",
            100 * gaps["finetuned"] / gaps["base"])  # fmt: skip
