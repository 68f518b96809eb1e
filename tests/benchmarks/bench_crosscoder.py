"""The fast training step of a BatchTopK crosscoder against the algorithm of the usual trainers.

Run: ``OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_crosscoder [equality|step|memory]``, all
three without an argument; one line of JSON a result. The reference is written here: every latent is
encoded and decoded by einsum over the models, the batch's top ``k * rows`` are found by one topk
over all scores, autograd makes dense gradients, and Adam is torch's default. Same start, same rows,
same loss, same clipping. Ratios are of process CPU time on one thread, in interleaved rounds.
"""

import sys

import torch

from modeldiff.dictionaries import fast
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.fast import FastStep
from modeldiff.dictionaries.models import crosscoder
from modeldiff.dictionaries.training import PlainStep
from tests.benchmarks.timing import peak_memory, ratio, report_peak, show

SIZES = {"d512": (512, 16384, 64, 2048), "d256": (256, 8192, 32, 2048)}
"""Width, latents, k, rows; two models."""
EQUALITY, STEPS = (256, 4096, 32, 1024), 300
RATE = 1e-3


def config(rows):
    return TrainConfig(steps=STEPS, batch_size=rows, lr=RATE)


class Reference:
    """One training step as the usual trainers have it."""

    def __init__(self, dictionary, config):
        d = dictionary
        self.W_enc, self.b_enc = d.W_enc.detach().clone(), d.b_enc.detach().clone()
        self.W_dec = d.W_dec.detach().permute(1, 0, 2).contiguous()  # [model latent d_model]
        self.b_dec = d.b_dec.detach().clone()
        self.weights = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        for each in self.weights:
            each.requires_grad_()
        self.config = config
        self.adam = torch.optim.Adam(self.weights, lr=RATE, betas=config.betas, eps=config.eps)

    def step(self, x, k, lr, dead=None):
        del dead
        latents = (torch.einsum("bmd,mdf->bf", x, self.W_enc) + self.b_enc).relu()
        scores = latents * self.W_dec.norm(dim=-1).sum(0).detach()
        best = scores.flatten().topk(k * len(x), sorted=False)
        kept = torch.zeros_like(scores).flatten().scatter_(0, best.indices, 1.0)
        latents = latents * kept.view_as(scores)
        made = torch.einsum("bf,mfd->bmd", latents, self.W_dec) + self.b_dec
        mse = (x - made).square().mean((0, 2))
        self.adam.zero_grad()
        mse.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        l0 = (latents > 0).sum() / len(x)
        return mse.mean().detach(), mse.detach(), l0, best.values.min().detach()


def batches(width, latents, rows, n):
    """Rows of sparse sums of random directions, some of one model alone, of mean square 1."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(latents // 4, 2, width, generator=draw)
    directions[: latents // 32, 0], directions[-(latents // 32) :, 1] = 0.0, 0.0
    share = 1 / torch.arange(1, latents // 4 + 1) ** 0.7  # some are frequent, most are rare
    share = 20 * share / share.sum()
    for _ in range(n):
        fires = torch.rand(rows, latents // 4, generator=draw) < share
        strength = fires * (0.5 + torch.rand(rows, latents // 4, generator=draw))
        x = torch.einsum("bf,fmd->bmd", strength, directions)
        x = x + 0.3 * torch.randn(rows, 2, width, generator=draw)
        yield x / x.square().mean((0, 2)).sqrt()[:, None]


def made(kind, size):
    """A stepper from the common start, and a call that takes its next step."""
    width, latents, k, rows = size
    stepper = kind(crosscoder(width, latents, k=k), config(rows))
    data, count = list(batches(width, latents, rows, 4)), iter(range(10**6))
    return stepper, lambda: stepper.step(data[next(count) % 4], k, RATE)


def equality():
    """Losses of the same steps, then FVE and L0 of the last tenth."""
    torch.set_num_threads(1)
    width, latents, k, rows = EQUALITY
    pair = [kind(crosscoder(width, latents, k=k), config(rows)) for kind in (Reference, FastStep)]
    apart, fve, l0 = [], ([], []), ([], [])
    for i, x in enumerate(batches(width, latents, rows, STEPS)):
        rate = config(rows).rate(i, latents)
        a, b = (each.step(x, k, rate) for each in pair)
        apart.append(abs(float(b[0]) / float(a[0]) - 1))
        for side, got in enumerate((a, b)):
            fve[side].append(1 - float((got[1] / (x - x.mean(0)).square().mean((0, 2))).mean()))
            l0[side].append(float(got[2]))
    last = slice(-STEPS // 10, None)
    mean = [round(sum(each[last]) / len(each[last]), 5) for each in (*fve, *l0)]
    show("crosscoder: loss of the fast step against the reference's", {
        "steps": STEPS, "size": EQUALITY,
        "mean_relative_difference": float(f"{sum(apart) / STEPS:.2e}"),
        "max_relative_difference": float(f"{max(apart):.2e}"),
        "fve_reference": mean[0], "fve_ours": mean[1], "l0_reference": mean[2], "l0_ours": mean[3],
        "selection": selection(),
    })  # fmt: skip


def selection():
    return "bfloat16" if fast.half_pays("cpu") else "float32"


def step():
    """Ratios, with what this machine selects by, and with float32 whatever it is good at."""
    chosen = selection()
    for name, size in SIZES.items():
        _, reference = made(Reference, size)
        show(f"crosscoder step {name} {size}", ratio(reference, made(FastStep, size)[1])
             | {"selection": chosen})  # fmt: skip
        del reference
        show(f"plain step over fast step {name}", ratio(made(PlainStep, size)[1],
                                                        made(FastStep, size)[1]))  # fmt: skip
    _, reference = made(Reference, SIZES["d256"])
    pays, fast.half_pays = fast.half_pays, lambda device: False
    show(
        "crosscoder step d256, selection in float32",
        ratio(reference, made(FastStep, SIZES["d256"])[1]),
    )
    fast.half_pays = pays
    for dead in (134, 1024):
        revive(dead)


def revive(n):
    """What the auxiliary loss of some dead latents costs: with it over without it."""
    width, latents, k, rows = SIZES["d256"]
    stepper, without = made(FastStep, SIZES["d256"])
    dead = torch.arange(latents) >= latents - n
    data, count = list(batches(width, latents, rows, 4)), iter(range(10**6))
    show(f"auxiliary loss of {n} dead latents, with over without (d256)", ratio(
        lambda: stepper.step(data[next(count) % 4], k, RATE, dead), without, rounds=9
    ))  # fmt: skip


def memory():
    for name in SIZES:
        peaks = {
            kind: peak_memory("tests.benchmarks.bench_crosscoder", f"{kind} {name}")
            for kind in ("reference", "ours")
        }
        show(f"peak memory of two steps {name}, MB above the rows", peaks)


def peak(kind, name):
    """Print the peak of building a stepper and taking two steps."""
    torch.set_num_threads(1)
    width, latents, k, rows = SIZES[name]
    data = list(batches(width, latents, rows, 2))

    def work():
        maker = Reference if kind == "reference" else FastStep
        stepper = maker(crosscoder(width, latents, k=k), config(rows))
        for x in data:
            stepper.step(x, k, RATE)

    report_peak(work)


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    if " " in wanted:
        peak(*wanted.split())
    else:
        for each in (equality, step, memory):
            if wanted in ("all", each.__name__):
                each()
