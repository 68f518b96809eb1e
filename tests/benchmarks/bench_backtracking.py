"""Backtracking on the organism: base and fine-tune under the base's direction, and the scans.

    python -m tests.benchmarks.bench_backtracking --out backtracking.json

Reasoning is what the fine-tune writes. Sentences that open with "wait" are labelled by that word
alone; directions are the mean before them minus the mean before all sentences, at the last token
before the sentence. The probability of "wait" is measured before the sentences of other texts that
do not open with it. Goals: the fine-tune at least 5 times its plain probability, the base below
1.2 times, the scan's peak at the planted token, -1.

The recipe takes all sentences; "first" takes those alone that follow a step said for the first
time. The base never says "wait" after its first words, a grade or a step that was taken back, so a
difference from all places holds "here is a step", which both models read. Last comes what is
generated: after one right step, steering its last token; and in walks, steering every token.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from modeldiff._files import atomic_write
from modeldiff.backtracking import window_directions
from modeldiff.backtracking_scan import cue_probe, probe_grid, window_scan
from modeldiff.backtracking_text import held_out_grid, steering_grid
from modeldiff.behaviours import Behaviour, Prompt, Verdict, organism_behaviours
from modeldiff.models import ModelPair
from modeldiff.organisms import backtrack, steps, tokens
from modeldiff.thinking_spans import cue_sentences, sentences_after
from modeldiff.tokens import with_response

FIRST_TIME = r"\. \w+day \w+ \w+ is \w+day\."
DOSES = (0.5, 1.0, 1.5)
WINDOWS = [(k, k) for k in range(-6, 1)]
SHOWN = ["vector", "side", "coefficient", "rate", "low", "high", "plain", "ratio", "random_low",
         "random_high"]  # fmt: skip
WRITTEN = ["vector", "side", "coefficient", "per_100", "low", "high", "random_low", "random_high",
           "distinct", "repetition", "perplexity", "rate", "coherent"]  # fmt: skip


@dataclass(frozen=True)
class FirstWord:
    """Whether what follows a right step opens with the cue, and reads as a walk."""

    name: str = "opens with wait"

    def __call__(self, prompt, answer):
        """Read the walk on from the step that was given."""
        whole = steps.coherent("Begin. " + answer.removeprefix("Wait, ").strip())
        return Verdict("", steps.says_cue(answer[:8]), whole)


def traces(pair, n, seed):
    """What the fine-tune writes."""
    asked = [[{"role": "user", "content": each}] for each in steps.prompts(n, seed)]
    made = pair.generate(asked, models=("finetuned",), seed=seed, max_new_tokens=96)
    return [with_response(made.prompts[a.prompt], a.ids, pair.tokenizer) for a in made.answers]


def after_a_right_step(n, seed):
    """Prompts that end with a right step, for the model to go on."""
    rng, prompts = random.Random(f"one step {seed}"), []
    for _ in range(n):
        messages = steps.bare(steps.walk(rng, 2, 0.0))
        written = tokens.render(messages).removeprefix("<|bos|>").rstrip().removesuffix("<|end|>")
        prompts.append(Prompt(written))
    return Behaviour("goes back", "takes a right step back", tuple(dict.fromkeys(prompts)),
                     FirstWord(), 1.0, 24)  # fmt: skip


def of_sentences(pair, found, other, keep, n_random, n_shuffled):
    """Directions, 2x2 and scan from some of the sentences."""
    sentences, asked = (
        cue_sentences(texts) if keep is None else sentences_after(texts, cue_sentences(texts), keep)
        for texts in (found, other)
    )
    site = backtrack.SITE
    directions = window_directions(pair, found, sentences, site, window=(-1, -1))
    vectors = {"base": directions.base[site], "finetuned": directions.finetuned[site]}
    probe = cue_probe(pair, other, asked)
    grid = probe_grid(pair, probe, vectors, DOSES, where=backtrack.STEP, n_random=n_random)
    scan = window_scan(pair, found, sentences, WINDOWS, probe, site, where=backtrack.STEP,
                       n_shuffled=n_shuffled)  # fmt: skip
    return directions, vectors, grid, scan


def one(pair, seed, n_random, n_shuffled, say):
    """Everything for one seed of prompts."""
    found, other = traces(pair, 112, 2 * seed), traces(pair, 56, 2 * seed + 1)
    record, chosen = {"seed": seed}, {}
    for name, keep in (("first", FIRST_TIME), ("all", None)):
        directions, vectors, grid, scan = of_sentences(
            pair, found, other, keep, n_random, n_shuffled
        )
        chosen = chosen or vectors
        at = grid[grid["vector"] == "base"].set_index(["side", "coefficient"])["ratio"]
        say(f"\nseed {seed}, {name} sentences: {directions.n_windows} of {directions.n_all}")
        say(directions.table().round(3).to_string(index=False))
        say(grid[SHOWN].round(3).to_string(index=False))
        say(scan.round(4).to_string(index=False))
        ratios = {side: round(float(at[side, 1.0]), 2) for side in ("finetuned", "base")}
        say(f"fine-tune x{ratios['finetuned']} (goal >= 5), base x{ratios['base']} (goal < 1.2), "
            f"peak {scan.attrs['peak']} (planted (-1, -1))")  # fmt: skip
        record[name] = {
            "ratios": ratios, "peak": list(scan.attrs["peak"]), "n": directions.n_windows,
            "grid": grid.to_dict("records"), "scan": scan.to_dict("records"),
        }  # fmt: skip
    held = held_out_grid(pair, after_a_right_step(60, seed), chosen, [0.5, 1.0, 1.5, 2.0], n=2,
                         where="last", n_random=5, seed=seed, perplexity=True)  # fmt: skip
    say(f"\nafter one right step, its last token steered; coefficient {held.coefficient:g} chosen "
        "on half of the prompts, below the other half")  # fmt: skip
    say(held.curve[WRITTEN].round(2).to_string(index=False))
    say(held.grid[WRITTEN].round(2).to_string(index=False))
    (walks,) = organism_behaviours("backtrack", 5, seed)
    free = steering_grid(pair, walks, {"base": chosen["base"]}, [0.25, 0.5, 1.0], where="new",
                         n_random=5, seed=seed, perplexity=True)  # fmt: skip
    say("\nwalks, every generated token steered")
    say(free[WRITTEN].round(2).to_string(index=False))
    record |= {"held_out": held.grid.to_dict("records"), "coefficient": held.coefficient,
               "walks": free.to_dict("records")}  # fmt: skip
    return record


def main():
    """Run the seeds and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_backtracking")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the prompts")
    parser.add_argument("--controls", type=int, default=20, help="random directions")
    parser.add_argument("--shuffles", type=int, default=10, help="of the labels, in scans")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    pair, started = ModelPair.load("organism:backtrack"), time.perf_counter()
    records = [one(pair, seed, given.controls, given.shuffles, print) for seed in given.seeds]
    sys.stderr.write(f"{time.perf_counter() - started:.0f} s\n")
    if given.out:
        with atomic_write(given.out) as temporary:
            temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
