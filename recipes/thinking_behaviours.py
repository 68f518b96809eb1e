# modeldiff run thinking_behaviours [--smoke] [--out DIR] [--set key=value]
# The settings are in thinking_behaviours.toml. In a notebook the cells run one by one.
"""A direction of every label of annotated reasoning, and the layer at which it matters."""

# %%
from modeldiff.backtracking_scan import cue_probe, probe_grid
from modeldiff.recipes import annotated, load_pair, started
from modeldiff.thinking import label_directions
from modeldiff.thinking_layers import choose_layer
from modeldiff.thinking_spans import label_fractions

run = started("thinking_behaviours")
recipe, data, how = run.recipe, run.recipe.data, run.recipe.directions
pair = load_pair(recipe.models.pairs[0], recipe.models.device)

# %% Annotated reasoning: one part to find directions on, one to measure them on.
texts, sentences = annotated(pair, data.train, data.n_train, recipe.seed, run.cancel)
others, asked = annotated(pair, data.train, data.n_held_out, recipe.seed + 1, run.cancel)
run.say(f"{len(texts)} and {len(others)} chains")
run.show("labels", label_fractions(sentences, seed=recipe.seed))

# %% Directions at every layer, in both models; the base's is the null of the texts.
sites = [f"resid_post.{layer}" for layer in range(pair.n_layers)]
found = label_directions(
    pair, texts, sentences, sites, longest=how.longest, models=("base", "finetuned"),
    table=dict(how.replaced), seed=recipe.seed, cancel=run.cancel,
)  # fmt: skip
run.show("directions", found.table())
directions = found.of(how.label)

# %% The layer: gradient times direction before such sentences, checked against real steps.
# Measured is the loss of such a sentence's first token, whose gradient is not zero.
skip = set(range(pair.n_layers)) - set(recipe.sites.layers) if recipe.sites.layers else ()
table = choose_layer(
    pair, others, asked, how.label, directions, n=1,
    n_random=19 if run.smoke else 99, skip=skip, seed=recipe.seed,
)  # fmt: skip
layer, r = table.attrs["layer"], table.attrs["r"]
run.show("layers", table, 4)
run.say(f"\nlayer {layer}; estimates and real steps correlate at {r}")

# %% The effect there: the probability of the cue before sentences with other labels.
probe = cue_probe(pair, others, asked, label=how.label, words=how.cue.split("|"))
grid = probe_grid(
    pair, probe, {how.label: directions[layer]}, how.coefficients, n_random=how.n_random,
    where=recipe.sites.where, seed=recipe.seed, cancel=run.cancel,
)  # fmt: skip
run.show("probability of the cue", grid[["side", "coefficient", "rate", "low", "high", "plain",
                                         "ratio", "random_low", "random_high"]])  # fmt: skip

# %%
ratio = grid.set_index(["side", "coefficient"])["ratio"]
run.outcome("layer that matters most", layer)
run.outcome("its effect, chance (p)", table.set_index("layer").loc[layer, "p"])
run.outcome("estimates and real steps, correlation", r.estimate)
run.outcome("probability of the cue under the direction, times",
            ratio[("finetuned", how.coefficients[-1])])  # fmt: skip
