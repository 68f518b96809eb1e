"""KL of two models over a vocabulary of 152k: time, peak memory, and error against float64.

Run: ``python -m tests.benchmarks.gpu_kl [small]``. The reference makes the logits of all tokens of
both models and compares them in float32. States are random, and so near each other that the mean
KL is about 2e-3 nats, where rounding shows. The limit is the time of the two unembeddings alone.
"""

import sys

import torch

from modeldiff.divergence import kl_and_loss, logits_of
from tests.benchmarks.gpu_common import Result, device, milliseconds, peak_bytes, show

SIZE, SMALL = (4096, 3584, 152064), (64, 64, 1024)
"""Tokens, width, vocabulary."""
CHECKED = 256  # tokens that are compared in float64
BUDGET = 256 << 20
GOAL_ERROR, GOAL_LEAST, GOAL_BYTES = 5e-3, -1e-6, 0.3e9


def naive(head, h, reference):
    """Both models' logits of all tokens in float32."""
    p, q = (head(each).float().log_softmax(-1) for each in (h, reference))
    return (p.exp() * (p - q)).sum(-1)


def exact(weight, h, reference):
    """In float64 from the weights on, a few tokens at a time."""
    found = []
    for rows, others in zip(h.split(16), reference.split(16), strict=True):
        p, q = ((each.double() @ weight.double().T).log_softmax(-1) for each in (rows, others))
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


def measured(n, width, vocab, dtype, small):
    here = device()
    draw = torch.Generator(here).manual_seed(0)
    head = torch.nn.Linear(width, vocab, bias=False, device=here, dtype=dtype)
    head.weight.normal_(std=1.2 / width**0.5, generator=draw)
    reference = torch.randn(n, width, generator=draw, device=here)
    h = reference + 0.05 * torch.randn(n, width, generator=draw, device=here)
    reference, h = reference.to(dtype), h.to(dtype)
    came = torch.zeros(n, dtype=torch.long, device=here)

    def unembed(x):
        return logits_of(head, x, None)

    runs = {
        "ours": lambda: kl_and_loss(h, reference, unembed, unembed, came, BUDGET),
        "naive": lambda: naive(head, h, reference),
        "unembeddings": lambda: [head(each) for each in (h, reference)],
    }
    found, rounds = milliseconds(runs, 1 if small else 7, warm=1)
    ours = runs["ours"]()[0]
    checked = slice(min(n, CHECKED))
    truth = exact(head.weight, h[checked], reference[checked])
    error = float(((ours[checked].double() - truth).abs() / truth.mean()).max())
    mean = abs(float(ours[checked].double().mean() / truth.mean()) - 1)
    peaks = {name: peak_bytes(runs[name]) for name in ("ours", "naive")}
    kind = f"KL of {n} tokens, vocabulary {vocab}, {str(dtype).removeprefix('torch.')}"
    results = [
        Result(f"{kind}: ours", found["ours"], "ms", limit=found["unembeddings"],
               about={"rounds_ms": rounds}),
        Result(f"{kind}: naive over ours", found["naive"] / found["ours"], "x", least=True),
        Result(f"{kind}: error of the mean against float64", mean, "relative", GOAL_ERROR,
               about={"mean_nats": float(truth.mean()), "worst_token_over_mean": error}),
        Result(f"{kind}: least", float(ours.min()), "nats", GOAL_LEAST, least=True),
    ]  # fmt: skip
    if peaks["ours"] is not None:
        results.append(
            Result(f"{kind}: peak", peaks["ours"], "bytes", GOAL_BYTES, about={"peaks": peaks})
        )
    return results


@torch.no_grad()
def main(small=False):
    torch.backends.cuda.matmul.allow_tf32 = False
    size = SMALL if small else SIZE
    return show([each for dtype in (torch.bfloat16, torch.float32)
                 for each in measured(*size, dtype, small)])  # fmt: skip


if __name__ == "__main__":
    main("small" in sys.argv)
