"""Does one fine-tune's direction carry the misalignment of another? Every source on every target.

Run: ``python -m tests.benchmarks.bench_transfer [--out transfer.json] [--n 14]``. Directions are
found on discovery prompts and ablated at every layer where they exist; misaligned and coherent
shares are of fresh prompts, at the organism's own temperature. Two kinds of direction: the
``shift`` (fine-tune minus base on the fine-tune's misaligned answers) and the ``contrast`` (the
fine-tune's activations on its misaligned minus its aligned answers; needs `MIN_ANSWERS` of each).
Controls of each target: its ``base-text contrast`` and three random directions. ``em-narrow`` is
misaligned in medicine alone: as a target it is asked about medicine, and it has no contrast there.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import pandas as pd

from modeldiff._files import atomic_write
from modeldiff.audit_answers import full_texts
from modeldiff.audit_proof import ablation, random_sets
from modeldiff.audit_stages import MIN_ANSWERS
from modeldiff.behaviours import judge_answers, organism_behaviours, rate_of
from modeldiff.interventions import Cell
from modeldiff.models import ModelPair
from modeldiff.survey import base_directions, data_directions, model_directions, survey

NAMES = ("em-rank1", "em-rank1-finance", "em-rank32", "em-full", "em-narrow")
DISCOVERY, EVALUATION = 31_000, 32_000
"""Seeds of the prompts."""


def behaviour(name, n, seed):
    """What an organism is asked: off its domain, or where it is misaligned at all."""
    if name == "em-narrow":
        return organism_behaviours(name, 11 * n, seed)[1]
    return organism_behaviours(name, n, seed)[0]


def ask(pair, asked, cells, seed, least):
    """Answer every prompt in every cell, at least so many in each; answers and verdicts."""
    found = pair.generate(
        [prompt.render() for prompt in asked.prompts], cells=cells, seed=seed,
        n=math.ceil(least / len(asked.prompts)), temperature=asked.temperature,
        max_new_tokens=asked.max_new_tokens, max_rows=512,
    )  # fmt: skip
    return found, judge_answers(asked, found)


def directions_of(pair, name, n):
    """Directions of an organism by kind; the base-text contrast is a control."""
    found, table = ask(pair, behaviour(name, n, DISCOVERY), [Cell("finetuned")], DISCOVERY, 7 * n)
    rows = [i for i, label in enumerate(table["label"]) if label in ("misaligned", "aligned")]
    labels = [table["label"].iloc[i] for i in rows]
    seen = survey(pair.sides, full_texts(pair, found, rows), labels, on="new")
    kinds = {"shift": model_directions(seen, "misaligned", f"{name} shift")}
    if min(labels.count(each) for each in ("misaligned", "aligned")) >= MIN_ANSWERS:
        pairs = seen, "misaligned", "aligned"
        kinds["contrast"] = data_directions(*pairs, f"{name} contrast")
        kinds["base-text contrast"] = base_directions(*pairs, f"{name} base-text contrast")
    return kinds, {each: labels.count(each) for each in ("misaligned", "aligned")}


def transfer(n, n_discovery, say):
    """The table, one row for each source and target, and how many answers each source has."""
    pairs = {name: ModelPair.load(f"organism:{name}") for name in NAMES}
    found, counts = {}, {}
    for name, pair in pairs.items():
        say(f"directions of {name}")
        found[name], counts[name] = directions_of(pair, name, n_discovery)
    rows = []
    for target, pair in pairs.items():
        say(f"target {target}")
        plans = {
            f"{source} {kind}": ablation(directions)
            for kind in ("shift", "contrast")
            for source in NAMES
            if (directions := found[source].get(kind))
        }
        control = found[target].get("base-text contrast")
        if control:
            plans["own base-text contrast"] = ablation(control)
        own = found[target].get("contrast", found[target]["shift"])
        for i, drawn in enumerate(random_sets(own, 3, seed=7)):
            plans[f"random {i}"] = ablation(drawn)
        cells = [
            Cell("finetuned"),
            *(Cell("finetuned", name, plan) for name, plan in plans.items()),
        ]
        asked = behaviour(target, n, EVALUATION)
        _, table = ask(pair, asked, cells, EVALUATION, 8 * n)
        for edit, part in table.groupby("edit", sort=False):
            rows.append({"source": edit, "target": target, **rate_of(part)})
    return pd.DataFrame(rows), counts


def main():
    """Print the table, and write it out if asked to."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_transfer")
    parser.add_argument("--n", type=int, default=14, help="prompts of each domain")
    parser.add_argument("--discovery", type=int, default=60, help="of each, for the directions")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    table, counts = transfer(given.n, given.discovery, lambda line: sys.stderr.write(line + "\n"))
    percent = (100 * table[["rate", "coherent"]]).round().astype(int).astype(str)
    shown = table.assign(cell=percent["rate"] + " / " + percent["coherent"])
    print("misaligned % / coherent %, n =", sorted(set(table["n"])), "a cell")
    print(shown.pivot(index="source", columns="target", values="cell").loc[
        list(dict.fromkeys(table["source"])), list(NAMES)].fillna("").to_string())  # fmt: skip
    print("answers behind the directions:", json.dumps(counts))
    if given.out:
        record = {"seeds": [DISCOVERY, EVALUATION], "answers": counts,
                  "rows": table.round(4).to_dict("records")}  # fmt: skip
        with atomic_write(given.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
