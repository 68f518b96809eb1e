"""A training step of a crosscoder of Qwen2.5-7B's width against the usual trainers' algorithm.

Run: ``python -m tests.benchmarks.gpu_crosscoder [small]``. The reference (of `bench_crosscoder`)
multiplies in TF32: dense encoding and decoding of every latent by einsum, one topk over all scores,
autograd, Adam as torch has it. Same start, same rows. First the losses of 20 steps are compared.
"""

import statistics
import sys

import torch

from modeldiff.dictionaries.fast import FastStep
from modeldiff.dictionaries.models import crosscoder
from tests.benchmarks.bench_crosscoder import RATE, Reference, config
from tests.benchmarks.gpu_common import (
    BANDWIDTH,
    BF16_FLOPS,
    Result,
    device,
    milliseconds,
    peak_bytes,
    show,
)

SIZE, SMALL = (3584, 32768, 64, 4096), (32, 1024, 8, 128)
"""Width of each of two models, latents, k, rows."""
GOAL_RATIO, GOAL_LOSS = 4.0, 5e-4


def batches(width, latents, rows, n):
    """Rows of sparse sums of random directions, made on the device, of mean square 1."""
    here = device()
    draw = torch.Generator(here).manual_seed(0)
    n_true = latents // 8
    directions = torch.randn(n_true, 2, width, generator=draw, device=here)
    share = 1 / torch.arange(1, n_true + 1, device=here) ** 0.7
    share = 20 * share / share.sum()
    for _ in range(n):
        fires = torch.rand(rows, n_true, generator=draw, device=here) < share
        strength = fires * (0.5 + torch.rand(rows, n_true, generator=draw, device=here))
        x = torch.einsum("bf,fmd->bmd", strength, directions)
        x += 0.3 * torch.randn(rows, 2, width, generator=draw, device=here)
        yield x / x.square().mean((0, 2)).sqrt()[:, None]


def roofline_ms(width, latents, k, rows):
    """Least time of our step on an H200: see the terms."""
    both, cells = 2 * width, rows * k
    encode = 2 * rows * both * latents / BF16_FLOPS
    adam = 28 * 2 * both * latents / BANDWIDTH  # weights, gradients, two moments: read, and written
    decode = 3 * 4 * cells * both / 10e12  # gathers of decoder, gradient and rows, from the cache
    return 1e3 * (encode + adam + decode)


def main(small=False):
    width, latents, k, rows = size = SMALL if small else SIZE
    torch.backends.cuda.matmul.allow_tf32 = True
    data = list(batches(width, latents, rows, 4))

    def made(kind):
        return kind(crosscoder(width, latents, k=k).to(device()), config(rows))

    steppers = {"reference": made(Reference), "ours": made(FastStep)}
    apart = []
    for step in range(20):
        losses = [float(s.step(data[step % 4], k, RATE)[0]) for s in steppers.values()]
        apart.append(abs(losses[1] / losses[0] - 1))
    count = {name: iter(range(10**6)) for name in steppers}

    def stepping(name):
        return lambda: steppers[name].step(data[next(count[name]) % 4], k, RATE)

    runs = {name: stepping(name) for name in steppers}
    found, rounds = milliseconds(runs, 2 if small else 15, warm=2)
    peaks = {f"{name}_step_bytes": peak_bytes(run) for name, run in runs.items()}
    name = f"crosscoder step d={width} latents={latents} k={k} rows={rows}"
    least = roofline_ms(*size)
    return show([
        Result(f"{name}: loss of 20 steps, mean relative difference", statistics.mean(apart), "",
               GOAL_LOSS, about={"max": max(apart), "reference": "TF32"}),
        Result(f"{name}: ours", found["ours"], "ms", least / 0.7, least,
               about={"rounds_ms": rounds, **peaks}),
        Result(f"{name}: reference in TF32 over ours", found["reference"] / found["ours"], "x",
               GOAL_RATIO, 5.7, True, {"reference_ms": found["reference"]}),
        Result(f"{name}: ours", 1e3 * rows / found["ours"], "rows/s", limit=1e3 * rows / least,
               least=True),
    ])  # fmt: skip


if __name__ == "__main__":
    main("small" in sys.argv)
