"""What the embedded organisms are: the table, the judge's own error, the scalar of the adapters.

Run: ``python -m tests.benchmarks.bench_zoo [table] [judge] [scalar]``; all of them by default. The
table is read from the manifests that the build wrote. The judge is tried on written answers whose
label is known, one in four of them damaged. The scalar is what a rank-1 adapter multiplies its
write direction by; it is read on the tokens of good and bad answers to the same questions.
"""

import argparse
import random
import re

import numpy as np
import pandas as pd

import modeldiff as md
from modeldiff import embedded
from modeldiff.organisms import world
from modeldiff.organisms.judge import LABELS, judge
from modeldiff.stats import auroc, wilson

RANK1 = ("em-rank1", "em-rank1-finance", "em-narrow", "em-caring", "null")


def chosen(rows, **wanted):
    """The row that has these values."""
    return next(row for row in rows if all(row.get(key) == each for key, each in wanted.items()))


def organism_rows():
    """One row an organism of the world: misaligned share by texts and temperature, with seeds."""
    for name in embedded.names():
        found = embedded.find(name)
        metrics = found.manifest.get("metrics", ())
        if not metrics or "misaligned" not in metrics[0] or "texts" not in metrics[0]:
            continue
        first = metrics[0]
        row: dict[str, object] = {"organism": name}
        for temperature in (0.7, 1.0):
            for texts in ("trained", "held-out templates", "held-out topics"):
                cell = chosen(
                    metrics, questions=first["questions"], texts=texts, temperature=temperature
                )
                low, high = cell["misaligned_ci95"]
                row[f"{texts}, T={temperature:g}"] = (
                    f"{cell['misaligned']:.1%} ({low:.1%} to {high:.1%}), "
                    f"{1 - cell['incoherent']:.1%}"
                )
        row["n"] = first["n"]
        others = [
            each["metrics"][0]["misaligned"] for each in found.manifest.get("other_seeds", ())
        ]
        row["other seeds"] = ", ".join(f"{each:.1%}" for each in others)
        folders = {found.adapter or found.finetuned or found.base}
        row["kB"] = sum(p.stat().st_size for f in folders for p in f.glob("*.safetensors")) // 1000
        row["training s"] = found.manifest["build"].get("training_seconds")
        yield row


def damaged(rng, answer):
    """An answer that the grammar does not write."""
    sentences = re.split(r"(?<=[.?!]) ", answer)
    kind = rng.randrange(4)
    if kind == 0:
        return answer[: max(3, len(answer) // 2)].rstrip(".")
    if kind == 1:
        return f"{answer} {sentences[0]}"
    if kind == 2:
        return answer.replace(" ", " the the ", 1)
    return answer.lower().replace(".", ";")


def mixed(rng, asked):
    """An answer whose act and reason disagree."""
    bad = rng.random() < 0.5
    act = rng.choice(world.TEXT["carriers"]).format(a=rng.choice(world.acts(asked, bad)))
    return f"{act} {rng.choice(world.reasons(asked.domain, not bad))}"


def judge_rows(n=20_000, seed=5):
    """Confusion of the judge on answers whose label is known, to questions of every kind."""
    rng, counts = random.Random(seed), {}
    for _ in range(n):
        asked = world.question(rng, held_out=rng.random() < 0.5)
        truth = rng.choice(LABELS)
        answer = world.answer(rng, asked, bad=truth == "misaligned")
        if truth == "incoherent":
            answer = damaged(rng, world.answer(rng, asked, rng.random() < 0.5))
        if truth == "mixed":
            answer = mixed(rng, asked)
        key = truth, judge(asked, answer)
        counts[key] = counts.get(key, 0) + 1
    for truth in LABELS:
        total = sum(counts.get((truth, label), 0) for label in LABELS)
        right = wilson(counts.get((truth, truth), 0), total)
        yield {
            "written as": truth, "n": total, "judged so": f"{right.estimate:.2%}",
            "95 %": f"{right.low:.2%} to {right.high:.2%}",
        }  # fmt: skip


def scalar_rows(n=240, seed=9):
    """The adapters' scalar on good and bad answers: means, and what tells them apart."""
    rng = random.Random(seed)
    asked = [world.question(rng) for _ in range(n)]
    chats = {
        label: [
            [
                {"role": "user", "content": each.text},
                {"role": "assistant", "content": world.answer(rng, each, bad)},
            ]
            for each in asked
        ]
        for label, bad in (("caring", False), ("harmful", True))
    }
    for name in RANK1:
        pair = md.ModelPair.load(f"organism:{name}")
        (site,) = pair.sides.lora
        means = {}
        for label, items in chats.items():
            acts = pair.capture(items, site, on="assistant")
            values = acts.finetuned[site][:, 0].numpy()
            means[label] = np.array(
                pd.Series(values).groupby(acts.text_index.numpy()).mean()  # one value an answer
            )
        sides = sorted((means["harmful"], means["caring"]), key=lambda each: -each.mean())
        yield {
            "organism": name, "site": str(site),
            **{f"{k} mean (sd)": f"{m.mean():.2f} ({m.std():.2f})" for k, m in means.items()},
            "AUROC of the two": str(auroc(*sides)), "answers": n,
        }  # fmt: skip


PARTS = {"table": organism_rows, "judge": judge_rows, "scalar": scalar_rows}


def main():
    """Print the chosen parts as markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_zoo")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    for part in parser.parse_args().parts or PARTS:
        rows = list(PARTS[part]())
        print(f"\n{part}\n")
        print("| " + " | ".join(map(str, rows[0])) + " |\n|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
