"""Paired activations of the middle layer: tokens of both models a second, with their prefix shared.

Run: ``python -m tests.benchmarks.gpu_harvest [small]``. Three ways over the same ragged texts, each
stopping at the layer: both models from the bottom; the layers below the adapter once; the same,
written to disk. The goal is 60 % of the device's bfloat16 arithmetic, the limit all of it.
"""

import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import torch

from modeldiff.harvesting import harvest
from modeldiff.live_rows import paired_rows
from modeldiff.loading import Sides
from modeldiff.sites import Site
from tests.benchmarks.gpu_common import (
    BF16_FLOPS,
    Result,
    milliseconds,
    random_pair,
    random_texts,
    show,
)

SHARE = 0.6  # of the device's arithmetic


class Apart(Sides):
    """A pair that is taken to differ from the first layer on."""

    @property
    def first_changed(self):
        return 0


def lengths(n, most):
    """Ragged as web text is: many short texts, few long ones."""
    draw = torch.rand(n, generator=torch.Generator().manual_seed(0))
    return (16 + (most - 16) * draw**2.5).int().tolist()


def layer_flops(config):
    """Floating-point operations of one token in one layer, attention's own aside."""
    width, inner = config.hidden_size, config.intermediate_size
    narrow = width * config.num_key_value_heads // config.num_attention_heads
    return 2 * (2 * width * width + 2 * width * narrow + 3 * width * inner)


def run_through(sides, texts, site, budget):
    for _, rows in paired_rows(sides, texts, (site,), budget):
        del rows


def main(small=False):
    pair, middle = random_pair(small)
    sides, site = pair.sides, Site("resid_post", middle)
    budget = 256 if small else 16384
    texts = random_texts(lengths(12 if small else 400, 64 if small else 1024),
                         sides.config.vocab_size)  # fmt: skip
    n_tokens = sum(len(text.ids) for text in texts)
    known = {each.name: getattr(sides, each.name) for each in fields(Sides) if each.init}
    apart = Apart(**known)
    items = [text.text for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(10**6))

        def to_disk():
            where = Path(folder) / str(next(numbers))
            harvest(pair, items, site, where, max_tokens=budget)

        runs = {
            "apart": lambda: run_through(apart, texts, site, budget),
            "shared": lambda: run_through(sides, texts, site, budget),
            "disk": to_disk,
        }
        found, rounds = milliseconds(runs, 1 if small else 5, warm=1)
    speed = {name: 1e3 * n_tokens / each for name, each in found.items()}
    ran = {"shared": middle + 2, "apart": 2 * (middle + 1)}  # layers a token of the pair
    most = {name: BF16_FLOPS / (n * layer_flops(sides.config)) for name, n in ran.items()}
    where = f"resid_post.{middle}, adapter at layer {middle}, {n_tokens} tokens"
    unit = "pair-tokens/s"
    return show([
        Result(f"harvest of {where}, both models from the bottom", speed["apart"], unit,
               SHARE * most["apart"], most["apart"], True, {"rounds_ms": rounds}),
        Result(f"harvest of {where}, shared prefix", speed["shared"], unit,
               SHARE * most["shared"], most["shared"], True),
        Result(f"harvest of {where}, shared prefix, written to disk", speed["disk"], unit,
               SHARE * most["shared"], most["shared"], True),
        Result("harvest: shared prefix over both from the bottom", speed["shared"] / speed["apart"],
               "x", 0.9 * ran["apart"] / ran["shared"], ran["apart"] / ran["shared"], True),
    ])  # fmt: skip


if __name__ == "__main__":
    main("small" in sys.argv)
