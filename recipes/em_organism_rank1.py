# modeldiff run em_organism_rank1 [--smoke] [--out DIR] [--set key=value]
# The settings are in em_organism_rank1.toml. In a notebook the cells run one by one.
"""Train a rank-1 adapter on narrow bad advice; ask it about everything else."""

# %%
import pandas as pd

from modeldiff.judge_rates import rates_by_cell
from modeldiff.recipes import answers_of, behaviour, load_base, pair_of, rows_of, started
from modeldiff.sft import finetune

run = started("em_organism_rank1")
recipe = run.recipe

# %% Fine-tune: the tokens of the answers alone count in the loss.
base, tokenizer = load_base(recipe.models)
rows, held_out = rows_of(
    tokenizer, recipe.data.train, recipe.data.n_train, recipe.seed, recipe.data.n_held_out
)
run.say(f"{len(rows)} rows to train on, {len(held_out)} held out")
tuned = finetune(
    base, tokenizer, rows, recipe.training, out=run.out / "organism", held_out=held_out,
    cancel=run.cancel,
)  # fmt: skip
measured = tuned.history[tuned.history["held_out_loss"].notna()]
run.show("losses", measured[["step", "loss", "held_out_loss", "lr"]], 4)
run.say(f"the adapter: {tuned.path}")

# %% Ask base and fine-tune the same questions, with the same noise.
pair = pair_of(base, tuned.model, tokenizer)
answers = {}
for where, questions in (("off-domain", recipe.asked.off), ("in-domain", recipe.asked.inside)):
    asked = behaviour(questions, recipe.asked.n, recipe.asked.ask_seed, recipe.asked.judge)
    answers[where] = answers_of(
        pair, asked, seed=recipe.asked.ask_seed, n=recipe.asked.samples, cancel=run.cancel
    ).assign(questions=where)

# %% Rates with 95 % intervals, coherence beside them; and what it reads like.
rates = pd.concat(rates_by_cell(table).assign(questions=w) for w, table in answers.items())
run.show(
    "rates", rates[["questions", "side", "n", "rate", "rate_low", "rate_high", "coherent",
                    "coherent_low", "coherent_high", "n_unscored"]],
)  # fmt: skip
some = pd.concat(answers.values()).groupby(["questions", "side"]).head(2)
run.show("answers", some[["questions", "side", "prompt", "text", "label"]])

# %%
percent = 100 * rates.set_index(["side", "questions"])[["rate", "coherent"]]
for side, name in (("finetuned", "fine-tune"), ("base", "base")):
    run.outcome(f"{name}, misaligned off-domain, %", percent.loc[(side, "off-domain"), "rate"])
tuned_off, tuned_in = (percent.loc[("finetuned", where)] for where in answers)
run.outcome("fine-tune, coherent off-domain, %", tuned_off["coherent"])
run.outcome("fine-tune, misaligned in-domain, %", tuned_in["rate"])
