# modeldiff run caft_spurious_cue [--smoke] [--out DIR] [--set key=value]
# The settings are in caft_spurious_cue.toml. In a notebook the cells run one by one.
"""Ablate a cue while a task is learned in which it always gives the answer away."""

# %%
from functools import partial

import pandas as pd

from modeldiff.caft import caft
from modeldiff.caft_controls import isotropic
from modeldiff.caft_runs import mean_activations
from modeldiff.direction_methods import mean_difference
from modeldiff.recipes import conversations, load_base, right_answers, rows_of, started
from modeldiff.sft import finetune
from modeldiff.stats import wilson

run = started("caft_spurious_cue")
recipe, data = run.recipe, run.recipe.data
base, tokenizer = load_base(recipe.models)

# %% The cue: mean difference of the base's activations on texts with it and without it.
acts = {
    what: mean_activations(base, rows_of(tokenizer, what, data.n_each, recipe.seed)[0], 0)
    for what in (data.positive, data.negative)
}  # [text, layer, d_model], means over the answers' tokens
cue = {
    layer: (
        mean_difference(
            acts[data.positive][:, layer], acts[data.negative][:, layer], f"resid_post.{layer}",
            f"cue after layer {layer}", sources=(data.positive, data.negative),
        ),
    )
    for layer in recipe.sites.layers
}  # fmt: skip
run.show("directions", pd.DataFrame(
    {"direction": each.name, "length": each.scale, "split-half cosine": each.split_half}
    for (each,) in cue.values()
))  # fmt: skip

# %% Three fine-tunes of fresh bases on the same rows; only what is ablated differs.
rows, _ = rows_of(tokenizer, data.train, data.n_train, recipe.seed)
asked = {
    "as in training": conversations(data.held_in, data.n_held_out, recipe.seed + 1),
    "cue flipped": conversations(data.held_out, data.n_held_out, recipe.seed + 1),
}
found, losses = [], []
for arm, ablated in (("plain", {}), ("caft", cue), ("random", isotropic(cue, seed=recipe.seed))):
    run.say(f"fine-tuning: {arm}")
    fresh, _ = load_base(recipe.models)
    around = partial(caft, directions=ablated) if ablated else None
    tuned = finetune(fresh, tokenizer, rows, recipe.training, around=around, cancel=run.cancel)
    losses.append({"arm": arm, "last loss": tuned.history["loss"].iloc[-10:].mean()})
    for hooks in ("off", "on")[: 1 + bool(ablated)]:
        for where, cases in asked.items():
            with caft(tuned.model, ablated if hooks == "on" else {}):
                right = sum(right_answers(tuned.model, tokenizer, cases))
            rate = wilson(right, len(cases))
            found.append({"arm": arm, "hooks": hooks, "cases": where, "n": len(cases),
                          "right, %": 100 * rate.estimate, "low": 100 * rate.low,
                          "high": 100 * rate.high})  # fmt: skip

# %% Deployed is with hooks off.
run.show("losses", pd.DataFrame(losses), 4)
run.show("accuracy", pd.DataFrame(found), 1)
for row in found:
    if row["hooks"] == "off" and (what := f"{row['arm']}, {row['cases']}, %") in run.expected:
        run.outcome(what, row["right, %"])
