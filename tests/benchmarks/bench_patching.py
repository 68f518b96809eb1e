"""Patch sweep against one run per patch, and attribution patching against the sweep.

Run: ``python -m tests.benchmarks.bench_patching`` (add ``nulls`` for false alarms on null pairs).
The references run the whole fine-tune once for every cell: ``whole`` with the patch as a hook, as a
notebook would; ``prefix`` from the patched layer on, one copy at a time. All compute the same
numbers, which is checked before anything is timed.
"""

import sys

import torch

from modeldiff.attribution import attribute
from modeldiff.directions import Direction
from modeldiff.illusion import check_illusion
from modeldiff.interventions import Replace
from modeldiff.layer_attribution import layer_attribution
from modeldiff.masks import Positions
from modeldiff.organisms.nulls import null_pairs
from modeldiff.organisms.planted import tiny_llama
from modeldiff.patching import logit_difference, patch_map, patch_texts
from tests.benchmarks.bench_pair import models
from tests.benchmarks.timing import ratio, show
from tests.planted import TEXTS

TEXT = "the cat sat on the mat and the dog ran to the old house by the river"
PARTS = ("attn_out", "mlp_out")
METRIC = logit_difference(7, 9)


def whole(pair):
    """One run of the fine-tune for each cell, from the embeddings on."""
    (text,) = pair.texts([TEXT])
    own = pair.run([text], side="finetuned").logits[0, -1]
    own = float(own[7] - own[9])
    sites = tuple(f"{part}.{layer}" for layer in range(12) for part in PARTS)
    base = pair.run([text], side="base", reads=sites, logits=False).acts
    found = torch.zeros(len(sites), text.n_tokens)
    for row, (site, value) in enumerate(base.items()):
        for position in range(text.n_tokens):
            do = Replace(site, value, where=Positions((position,)))
            scores = pair.run([text], side="finetuned", do=do).logits[0, -1]
            found[row, position] = float(scores[7] - scores[9]) - own
    return found


def ours(pair, **options):
    return patch_map(pair.sides, TEXT, METRIC, parts=PARTS, **options).effect


def attributed(pair, n_sample=0):
    return attribute(pair.sides, TEXT, METRIC, parts=PARTS, n_sample=n_sample)


def sweeps():
    pair, _, _ = models(vocab=2_000, width=128)
    expected, found = whole(pair), ours(pair)
    assert float((expected - found).abs().max()) < 1e-4
    cells = {"cells": expected.numel(), "layers": 12, "tokens": expected.shape[1]}
    show("patch sweep / one run per cell", {**ratio(lambda: whole(pair), lambda: ours(pair)),
                                            **cells})  # fmt: skip
    show(
        "patch sweep / the sweep one copy at a time from the patched layer on",
        ratio(lambda: ours(pair, max_tokens=1), lambda: ours(pair)),
    )
    estimate = attributed(pair).estimate
    r = float(torch.corrcoef(torch.stack([estimate.flatten(), found.flatten()]))[0, 1])
    checked = attributed(pair, 32).r
    show(
        "attribution without its check / patch sweep",
        {**ratio(lambda: ours(pair), lambda: attributed(pair)), "r_all_cells": round(r, 4)},
    )
    show(
        "attribution with its check of 32 cells / patch sweep",
        {**ratio(lambda: ours(pair), lambda: attributed(pair, 32)), "r_of_the_check": str(checked)},
    )


def nulls(n=24):
    base = tiny_llama()
    counts = {"patch_texts carries": [0, 0], "layer attribution p": [0, 0],
              "illusion flagged": [0, 0]}  # fmt: skip
    exact = {"patch_map": 0.0, "attribute": 0.0}
    for null in null_pairs(n, kind="inert", base=base):
        sides = null.pair.sides
        exact["patch_map"] += float(patch_map(sides, TEXT, METRIC, parts=PARTS).effect.abs().sum())
        exact["attribute"] += float(attribute(sides, TEXT, METRIC).estimate.abs().sum())
    show("inert null pairs: sum of all absolute effects", {**exact, "pairs": n})
    for null in null_pairs(n, kind="noise", base=base):
        sides, draw = null.pair.sides, torch.Generator().manual_seed(500 + null.seed)
        table = patch_texts(sides, TEXTS[:12], lambda text: METRIC, parts=PARTS)
        _count(counts["patch_texts carries"], table.carries.any())
        at = Direction.of(torch.randn(32, generator=draw), "resid_post.2", "random")
        rows = layer_attribution(sides, TEXTS[:4], {2: at}, lambda text: METRIC, n_check=1)
        _count(counts["layer attribution p"], rows.p[0] <= 0.05)
        neurons = Direction.of(torch.randn(64, generator=draw), "mlp_act.2", "random")
        checked = check_illusion(sides, TEXTS[:4], neurons, lambda text: METRIC)
        _count(counts["illusion flagged"], checked.flagged)
    for name, (alarms, of) in counts.items():
        show(f"noise null pairs: {name}", {"alarms": alarms, "pairs": of, "rate": alarms / of})


def _count(pair, alarm):
    pair[0] += bool(alarm)
    pair[1] += 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    nulls() if "nulls" in sys.argv[1:] else sweeps()
