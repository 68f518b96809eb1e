# modeldiff run backtracking [--smoke] [--out DIR] [--set key=value]
# The settings are in backtracking.toml. In a notebook the cells run one by one.
"""The base's direction before a step back: its effect in base and fine-tune, by window and dose."""

# %%
from modeldiff.backtracking import window_directions
from modeldiff.backtracking_scan import cue_probe, probe_grid, window_scan
from modeldiff.backtracking_text import steering_grid
from modeldiff.masks import Regex, parse_mask
from modeldiff.recipes import behaviour, load_pair, started, written
from modeldiff.thinking_spans import cue_sentences, sentences_after

run = started("backtracking")
recipe, how = run.recipe, run.recipe.directions
pair = load_pair(recipe.models.pairs[0], recipe.models.device)
site = recipe.sites.site
table = dict(how.replaced)
where = recipe.sites.where
if recipe.sites.pattern:
    where = parse_mask(where) & Regex(recipe.sites.pattern)

# %% What the fine-tune writes; sentences that open with the cue take something back.
texts, sentences = [], []
for questions, n, seed in (
    (recipe.asked.find, recipe.asked.n_find, recipe.asked.find_seed),  # to find directions on
    (recipe.asked.off, recipe.asked.n, recipe.asked.ask_seed),  # to measure on
):
    asked = behaviour(questions, n, seed, "own")
    part = written(pair, asked, n=recipe.asked.samples, seed=seed, cancel=run.cancel)
    found = cue_sentences(part, how.cue, label=how.label)
    texts.append(part)
    sentences.append(sentences_after(part, found, how.after) if how.after else found)
    run.say(f"{len(part)} texts, {len(sentences[-1])} sentences")

# %% Directions: the mean in a window before such sentences, less that before all sentences.
directions = window_directions(
    pair, texts[0], sentences[0], site, label=how.label, window=recipe.sites.window, table=table,
    seed=recipe.seed, cancel=run.cancel,
)  # fmt: skip
run.show("directions", directions.table())
(of_base,), (of_tuned,) = directions.base.values(), directions.finetuned.values()
vectors = {"base": of_base, "finetuned": of_tuned}

# %% The 2x2: either direction, in either model, beside random directions of the same length.
probe = cue_probe(pair, texts[1], sentences[1], label=how.label, words=how.cue.split("|"))
grid = probe_grid(
    pair, probe, vectors, how.coefficients, where=where, n_random=how.n_random,
    seed=recipe.seed, cancel=run.cancel,
)  # fmt: skip
shown = ["vector", "side", "coefficient", "rate", "low", "high", "plain", "ratio", "random_low"]
run.show("probability of the cue", grid[[*shown, "random_high"]])

# %% Where before the sentence it is.
scan = window_scan(
    pair, texts[0], sentences[0], recipe.sites.scan, probe, site, label=how.label,
    where=where, n_shuffled=how.n_random, table=table, seed=recipe.seed,
    cancel=run.cancel,
)  # fmt: skip
run.show("window scan", scan, 4)

# %% What is written under it: a text that collapses into the cue is no success.
asked = behaviour(recipe.asked.off, recipe.asked.n, recipe.asked.ask_seed, "own")
free = steering_grid(
    pair, asked, {"base": of_base}, [each / 2 for each in how.coefficients], cue=how.cue,
    where="new", n_random=min(2, how.n_random), seed=recipe.seed, cancel=run.cancel,
)  # fmt: skip
run.show("written", free[["vector", "side", "coefficient", "per_100", "low", "high", "random_high",
                          "distinct", "repetition", "coherent"]])  # fmt: skip

# %%
dose = how.coefficients[1]
ratios = grid[grid["vector"] == "base"].set_index(["side", "coefficient"])["ratio"]
run.outcome("fine-tune under the base's direction, times", ratios[("finetuned", dose)])
run.outcome("base under its own direction, times", ratios[("base", dose)])
run.outcome("window with the largest effect, last token", scan.attrs["peak"][1])
