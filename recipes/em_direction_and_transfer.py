# modeldiff run em_direction_and_transfer [--smoke] [--out DIR] [--set key=value]
# The settings are in em_direction_and_transfer.toml. In a notebook the cells run one by one.
"""Ablate the direction of one misaligned fine-tune in others, beside what it must beat."""

# %%
import pandas as pd

from modeldiff.audit_answers import NORMAL, SHOWS, classes, full_texts
from modeldiff.behaviours import judge_answers
from modeldiff.directions import cosine_table, save_directions
from modeldiff.recipes import behaviour, load_pair, started
from modeldiff.survey import base_directions, model_directions, survey
from modeldiff.transfer import COVARIANCE, transfer_matrix

run = started("em_direction_and_transfer")
recipe = run.recipe
pairs = {each.name: load_pair(each, recipe.models.device) for each in recipe.models.pairs}

# %% Directions: fine-tune minus base on the fine-tune's own misaligned answers, layer by layer.
# The null: misaligned minus aligned answers in the base, which is a property of the texts.
asked = behaviour(
    recipe.asked.find, recipe.asked.n_find, recipe.asked.find_seed, recipe.asked.judge
)
shifts, texts, counts = {}, {}, []
for name, pair in pairs.items():
    answers = pair.generate(
        [prompt.render() for prompt in asked.prompts], models=["finetuned"],
        n=recipe.asked.samples, seed=recipe.asked.find_seed, temperature=asked.temperature,
        max_new_tokens=asked.max_new_tokens, max_rows=512, cancel=run.cancel,
    )  # fmt: skip
    labels = classes(judge_answers(asked, answers))
    rows = [i for i, label in enumerate(labels) if label in (SHOWS, NORMAL)]
    seen = survey(
        pair.sides, full_texts(pair, answers, rows), [labels[i] for i in rows], on="new",
        seed=recipe.seed, cancel=run.cancel,
    )  # fmt: skip
    shifts[name] = model_directions(seen, SHOWS, name)
    texts[name] = base_directions(seen, SHOWS, NORMAL, f"base text of {name}")
    counts.append({"pair": name, SHOWS: labels.count(SHOWS), NORMAL: labels.count(NORMAL)})
    save_directions(run.out / f"{name}.safetensors", shifts[name].values())
run.show("answers behind the directions", pd.DataFrame(counts))

# %% Cosines at the last layer: of fine-tunes with each other, and with the base's contrast.
first = next(iter(pairs))
last = max(shifts[first])
beside = [each[last] for each in shifts.values()] + [texts[first][last]]
run.show(f"cosines after layer {last}", cosine_table(beside).rename_axis("of").reset_index())

# %% Ablation on fresh prompts: the first direction, the target's own, the base's contrast, random.
asked = behaviour(recipe.asked.off, recipe.asked.n, recipe.asked.ask_seed, recipe.asked.judge)
tables = []
for name, pair in pairs.items():
    run.say(f"ablating in {name}")
    several = {name: shifts[name], first: shifts[first], "base text": texts[name]}
    sources = {source: list(directions.values()) for source, directions in several.items()}
    tables.append(
        transfer_matrix(
            {name: (pair, asked)}, sources, n_random=recipe.directions.n_random,
            n=recipe.asked.samples, seed=recipe.asked.ask_seed, cancel=run.cancel,
        )
    )  # fmt: skip
table = pd.concat(tables, ignore_index=True)
run.show("transfer", table[["target", "source", "n", "rate", "rate_low", "rate_high", "coherent",
                            "change", "change_low", "change_high", "below_random"]])  # fmt: skip

# %%
found = table.set_index(["target", "source"])
for name in pairs:
    rate, coherent = found.loc[(name, first), ["rate", "coherent"]]
    unedited = found.loc[(name, "unedited"), "rate"]
    for what, value in (("misaligned, %", 100 * rate), ("coherent, %", 100 * coherent),
                        ("share removed, %", 100 * (1 - rate / unedited))):  # fmt: skip
        if (key := f"{first} in {name}, {what}") in run.expected:
            run.outcome(key, value)
mine = table[(table["target"] == first) & (table["kind"] == "random")]
varying = mine["source"].str.startswith(COVARIANCE)
run.outcome(f"random in {first}, lowest misaligned, %", 100 * mine[~varying]["rate"].min())
run.outcome(f"varying random in {first}, lowest misaligned, %", 100 * mine[varying]["rate"].min())
run.outcome(f"base text in {first}, misaligned, %", 100 * found.loc[(first, "base text"), "rate"])
