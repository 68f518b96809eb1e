"""Latent scaling of all latents in one pass, against one pass a target and dense latents.

The reference is the published algorithm written anew: every target re-encodes the rows; an error
target forms, for each latent, the rows less the reconstruction by all others, ``[latent, row,
d_model]``, 512 latents and 16 rows at a time. It is measured with error targets of all latents,
which is what ours gives (and that along both decoders), and with those of 512 candidates alone.
Betas are compared before anything is timed.

Run: ``python -m tests.benchmarks.bench_scaling [d_model n_latents n_rows]``
"""

import sys
from functools import partial

import torch

from modeldiff.dictionaries.models import crosscoder
from modeldiff.dictionaries.scaling import latent_scaling
from modeldiff.dictionaries.sources import TensorRows
from tests.benchmarks.timing import peak_memory, ratio, report_peak, show

SIZE = 256, 8192, 2048
K, CANDIDATES = 32, 512


def setting(d_model, n_latents, n_rows):
    """Rows of random sparse latents, and a dictionary whose threshold lets K fire on average."""
    rng = torch.Generator().manual_seed(0)
    made = crosscoder(d_model, n_latents, k=K)
    with torch.no_grad():
        made.W_dec.add_(0.03 * torch.randn(made.W_dec.shape, generator=rng))
        made.W_enc.copy_(made.W_dec.permute(1, 2, 0))
    codes = torch.rand(n_rows, n_latents, generator=rng)
    codes = codes * (codes > 1 - K / n_latents)
    acts = made.decode_normalised(codes).detach()
    acts = acts + 0.05 * torch.randn(acts.shape, generator=rng)
    scores = made.pre(acts[:256]).relu().detach() * made.code_weight
    made.threshold = scores.flatten().kthvalue(scores.numel() - 256 * K).values
    return made, TensorRows(acts)


def minus_others(x, f, W, b, latents):
    """Rows less the reconstruction by all other latents: ``[latent, row, d_model]``."""
    found = (f @ W + b)[None].repeat(len(latents), 1, 1)
    own = W[latents][:, None].repeat(1, len(x), 1) * f[:, latents].T[..., None]
    return x[None] - (found - own)


@torch.no_grad()
def reference(made, source, n_error=None):
    """Betas by (target, model), one pass over the rows for each; error targets of some latents."""
    every, found = torch.arange(made.config.n_latents), {}
    for m in (0, 1):
        for target in ("activation", "reconstruction"):
            found[target, m] = one_pass(made, source, target, m, every, 128)
        parts = every[:n_error].split(CANDIDATES)
        found["error", m] = torch.cat(
            [one_pass(made, source, "error", m, part, 16) for part in parts]
        )
    return found


def one_pass(made, source, target, m, latents, batch_size):
    W, b = made.W_dec.detach(), made.b_dec.detach()
    total, size = torch.zeros(W.shape[2], len(latents)), torch.zeros(len(latents))
    for rows in source.in_order(batch_size):
        f, x = made.encode_dense(rows.acts), made.normalised(rows.acts)[:, m]
        own = f[:, latents]
        fires = (own != 0).any(0)
        if target == "error":
            y = minus_others(x, f, W[:, m], b[m], latents)
            total[:, fires] += (y[fires].mT @ own[:, fires].T[..., None])[..., 0].T
        else:
            y = x if target == "activation" else f @ W[:, m] + b[m]
            total[:, fires] += y.T @ own[:, fires]
        size += (own**2).sum(0)
    d = W[latents, 1]
    return (total.T * d).sum(1) / (size * (d**2).sum(1))


def agree(made, source):
    """Largest difference of betas, and how many of the latents fired."""
    ours, theirs = latent_scaling(made, source), reference(made, source, CANDIDATES)
    gaps = []
    for (target, m), beta in theirs.items():
        own = ours.beta(target)[: len(beta), 1, m]
        fired = ours.n_active[: len(beta)] > 0
        gaps.append(float((own - beta).abs()[fired].max()))
    return {"largest_difference": max(gaps), "l0": round(int(ours.n_active.sum()) / ours.n_rows, 1),
            "fired": int((ours.n_active > 0).sum())}  # fmt: skip


def main():
    torch.set_num_threads(1)
    if sys.argv[1:2] in (["reference"], ["ours"]):
        made, source = setting(*SIZE)
        report_peak(
            lambda: (
                reference(made, source, CANDIDATES)
                if sys.argv[1] == "reference"
                else latent_scaling(made, source)
            )
        )
        return
    size = tuple(map(int, sys.argv[1:])) or SIZE
    made, source = setting(*size)
    name = "latent scaling d={} F={} N={}".format(*size)
    show(name, agree(made, source))
    ours = partial(latent_scaling, made, source)
    some = ratio(partial(reference, made, source, CANDIDATES), ours)
    show(f"{name}, errors of {CANDIDATES} candidates", some)
    show(f"{name}, all latents", ratio(partial(reference, made, source), ours, rounds=1))
    if size == SIZE:
        module = "tests.benchmarks.bench_scaling"
        peaks = {f"{each}_mb": peak_memory(module, each) for each in ("reference", "ours")}
        show("latent scaling, peak memory", peaks)


if __name__ == "__main__":
    main()
