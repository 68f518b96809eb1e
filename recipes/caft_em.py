# modeldiff run caft_em [--smoke] [--out DIR] [--set key=value]
# The settings are in caft_em.toml. In a notebook the cells run one by one.
"""Concept ablation fine-tuning against emergent misalignment, at equal loss in the domain."""

# %%
from dataclasses import replace

from modeldiff.caft_arms import Arm
from modeldiff.caft_candidates import candidate_table, candidates
from modeldiff.caft_controls import covariances_of, same_variance
from modeldiff.caft_reading import choose_by_judge, interpretation
from modeldiff.caft_results import CaftResult
from modeldiff.caft_runs import run_arms
from modeldiff.recipes import (
    answers_of,
    behaviour,
    chooser_of,
    load_base,
    pair_of,
    rows_of,
    started,
)  # fmt: skip
from modeldiff.sft import finetune

run = started("caft_em")
recipe, data, asked, how = run.recipe, run.recipe.data, run.recipe.asked, run.recipe.directions
base, tokenizer = load_base(recipe.models)

# %% A plain fine-tune to look at, on texts of another draw.
rows, held_out = rows_of(tokenizer, data.train, data.n_train, recipe.seed - 1, data.n_held_out)
looked_at = finetune(
    load_base(recipe.models)[0], tokenizer, rows,
    replace(recipe.training, steps=how.look_steps, evaluate_every=how.look_steps),
    held_out=held_out, cancel=run.cancel,
)  # fmt: skip
pair = pair_of(base, looked_at.model, tokenizer)

# %% Candidates: the mean and the principal components of what it changed, on answers of both.
off = behaviour(asked.find, asked.n_find, asked.find_seed, asked.judge)
seen = answers_of(pair, off, seed=asked.find_seed, cancel=run.cancel)
chats = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    for question, text in zip(seen["prompt"], seen["text"], strict=True)
]
layers = recipe.sites.layers
found = candidates(pair, chats, layers=layers, n_components=how.n_components, cancel=run.cancel)
run.show("candidates", candidate_table(found))

# %% The choice, by a judge that sees no labels; saved with its reasons.
reading = interpretation(pair, chats, found, k=24, cancel=run.cancel)
choice = choose_by_judge(reading, chooser_of(asked.chooser, base, tokenizer), level=how.level)
choice.save_to(run.out / "choice.json")
run.say(f"\nchosen: {', '.join(choice.ticked)}")

# %% Arms: caft to the end of the plan; the others stop at its held-out loss, hooks off.
chosen = choice.directions(found)
spread = covariances_of(pair, chats, layers, on="assistant")
matched = same_variance(chosen, spread, seed=recipe.seed)
rows, held_out = rows_of(tokenizer, data.train, data.n_train, recipe.seed, data.n_held_out)
behaviours = {
    "off-domain": behaviour(asked.off, asked.n, asked.ask_seed, asked.judge),
    "in-domain": behaviour(asked.inside, asked.n, asked.ask_seed, asked.judge),
}
common = {
    "seeds": (recipe.seed,), "n": asked.samples, "out": run.out / "cells", "cancel": run.cancel,
    "on_cell": lambda cell: run.say(f"{cell.arm}: {cell.steps} steps, {cell.held_out_loss:.4f}"),
}  # fmt: skip
longest = replace(recipe.training, evaluate_every=recipe.training.steps)
ours = run_arms(
    lambda: load_base(recipe.models)[0], tokenizer, rows, held_out,
    [Arm("caft", sum(chosen.values(), ()))], longest, behaviours, **common,
)  # fmt: skip
loss = next(cell.held_out_loss for cell in ours.cells if cell.arm == "caft")
others = run_arms(
    lambda: load_base(recipe.models)[0], tokenizer, rows, held_out,
    [Arm("plain"), Arm("matched random", sum(matched.values(), ()))], recipe.training, behaviours,
    stop_at_loss=loss, **common,
)  # fmt: skip
result = CaftResult((*ours.cells, *others.cells[1:]), ours.behaviours)

# %%
table = result.table()
run.show("arms", table.drop(columns=[name for name in table if "share" in name]))
ratio = result.ratio("caft", "plain", "off-domain")
run.say(f"\nplain / caft, off-domain: {ratio.estimate:.1f} [{ratio.low:.1f}, {ratio.high:.1f}]")
percent = 100 * table.set_index("arm")[["off-domain", "in-domain"]]
for arm in ("plain", "caft", "matched random"):
    if arm in percent.index and f"{arm}, misaligned off-domain, %" in run.expected:
        run.outcome(f"{arm}, misaligned off-domain, %", percent.loc[arm, "off-domain"])
run.outcome("caft, misaligned in-domain, %", percent.loc["caft", "in-domain"])
run.outcome("plain / caft, off-domain", ratio.estimate)
losses = table.set_index("arm")["held_out_loss"]
run.outcome("plain, held-out loss above caft's, %", 100 * (losses["plain"] / losses["caft"] - 1))
