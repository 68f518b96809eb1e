# modeldiff run narrow_vs_general [--smoke] [--out DIR] [--set key=value]
# The settings are in narrow_vs_general.toml. In a notebook the cells run one by one.
"""Learn the same bad advice freely and held to the base elsewhere; compare the two adapters."""

# %%
from dataclasses import replace

import pandas as pd

from modeldiff.batching import padding_id
from modeldiff.judge_rates import rates_by_cell
from modeldiff.recipes import answers_of, behaviour, load_base, pair_of, rows_of, started
from modeldiff.sft import finetune
from modeldiff.sft_metrics import adapter_norm, efficiency, noise_stability

run = started("narrow_vs_general")
recipe, data, asked = run.recipe, run.recipe.data, run.recipe.asked
base, tokenizer = load_base(recipe.models)
rows, held_out = rows_of(tokenizer, data.train, data.n_train, recipe.seed, data.n_held_out)
kept, _ = rows_of(tokenizer, data.kept, data.n_kept, recipe.seed)
pad = padding_id(tokenizer)

# %% The narrow one to the end of the plan; the general one to the same loss in the domain.
narrow = finetune(
    base, tokenizer, rows, recipe.training, held_out=held_out, kept=kept, cancel=run.cancel
)
general = finetune(
    load_base(recipe.models)[0], tokenizer, rows, replace(recipe.training, keep=0.0),
    held_out=held_out, stop_at_loss=narrow.held_out_loss, cancel=run.cancel,
)  # fmt: skip
tuned = {"general": general, "narrow": narrow}
norms = {name: adapter_norm(each.model) for name, each in tuned.items()}
run.show("training", pd.DataFrame(
    {"solution": name, "steps": each.steps, "held-out loss": each.held_out_loss,
     "norm of the change": norms[name]} for name, each in tuned.items()
))  # fmt: skip

# %% Efficiency: the loss of each, scaled to the same norms. Stability: turned away by noise.
found, noisy = [], []
how = recipe.directions
for name, each in tuned.items():
    lengths = [share * norms["general"] for share in how.norms]
    found.append(efficiency(each.model, held_out, pad, lengths).assign(solution=name))
    turned = noise_stability(
        each.model, held_out, pad, how.noise, n=how.n_random, seed=recipe.seed
    ).assign(solution=name)
    noisy.append(turned.groupby(["solution", "epsilon"], as_index=False)["loss"].mean())
efficient, noise = pd.concat(found), pd.concat(noisy)
run.show("efficiency", efficient[["solution", "norm", "factor", "loss", "gain"]], 4)
run.show("noise stability", noise, 4)

# %% What they answer.
rates = []
for name, each in tuned.items():
    pair = pair_of(base if name == "narrow" else None, each.model, tokenizer)
    for where, questions, n in (
        ("off-domain", asked.off, asked.n), ("in-domain", asked.inside, asked.n_inside),
    ):  # fmt: skip
        several = behaviour(questions, n, asked.ask_seed, asked.judge)
        table = answers_of(pair, several, seed=asked.ask_seed, n=asked.samples, cancel=run.cancel)
        rates.append(rates_by_cell(table).assign(solution=name, questions=where))
table = pd.concat(rates)
run.show("rates", table[["solution", "questions", "side", "n", "rate", "rate_low", "rate_high",
                         "coherent"]])  # fmt: skip

# %%
percent = 100 * table[table["side"] == "finetuned"].set_index(["solution", "questions"])["rate"]
half = efficient["norm"].sub(norms["general"] / 2).abs() < 1e-6 * norms["general"]
loss = efficient[half].set_index("solution")["loss"]
gained = noise.groupby("solution")["loss"].agg(lambda x: x.iloc[-1] - x.iloc[0])
run.outcome("general, misaligned off-domain, %", percent[("general", "off-domain")])
run.outcome("narrow, misaligned off-domain, %", percent[("narrow", "off-domain")])
run.outcome("narrow, misaligned in-domain, %", percent[("narrow", "in-domain")])
run.outcome("loss at half the general one's norm, narrow - general",
            loss["narrow"] - loss["general"])  # fmt: skip
run.outcome("loss gained by noise, narrow - general", gained["narrow"] - gained["general"])
