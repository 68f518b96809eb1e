"""The CUDA kernels: in Triton's interpreter on the CPU, and on a GPU where there is one.

The first part runs in a process of its own where Triton can be imported: `python -m pytest
tests/dictionaries/test_triton.py`. Triton decides at import whether it interprets.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from modeldiff.dictionaries import triton_kernels
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.fast import FastStep
from modeldiff.dictionaries.kernels import ByLatent, select
from modeldiff.dictionaries.models import crosscoder
from modeldiff.errors import SetupError

TRITON = importlib.util.find_spec("triton") is not None
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def agree(device):
    """Every kernel against plain torch, with sizes that fill no block; raises if one differs."""
    for kind in (torch.float32, torch.bfloat16):
        scores = random(5, 4501).to(device, kind)
        for floor in (0.0, 0.5, 50.0):
            wanted = (scores.float() > floor).flatten().nonzero().squeeze(1)
            assert torch.equal(triton_kernels.candidates(scores, floor), wanted)
    scores, weight = random(5, 4501, device=device), random(4501, seed=1, device=device).abs()
    wanted = (scores * weight > 0.5).flatten().nonzero().squeeze(1)
    assert torch.equal(triton_kernels.candidates(scores, 0.5, weight), wanted)

    pre = random(9, 60)
    pre[3], pre[:, 7] = -1.0, -1.0
    pre[:, 8] = 9.0  # one latent on all rows
    codes, _ = select(pre, torch.ones(60), 100)
    dense = codes.dense().to(device)
    offsets, latent, value = (
        each.to(device) for each in (codes.offsets, codes.latent, codes.value)
    )
    codes = Codes(offsets, latent, value, 60)
    decoder, grad = random(60, 261, seed=1, device=device), random(9, 261, seed=2, device=device)
    out = torch.full((9, 261), torch.nan, device=device)
    triton_kernels.weighted_sum(decoder, offsets, latent, value, out)
    torch.testing.assert_close(out, dense @ decoder, rtol=1e-5, atol=1e-5)
    ones, count = torch.ones(60, 1, device=device), torch.empty(9, 1, device=device)
    triton_kernels.weighted_sum(ones, offsets, latent, value, count)  # as a bias's gradient
    torch.testing.assert_close(count, dense.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)
    by = ByLatent.of(codes)
    out = torch.full((60, 261), torch.nan, device=device)
    triton_kernels.weighted_sum(grad, by.offsets, by.row, value[by.order], out)
    torch.testing.assert_close(out, dense.T @ grad, rtol=1e-5, atol=1e-5)
    dots = triton_kernels.sampled(decoder, grad, by.offsets, by.row)
    wanted = (grad @ decoder.T)[codes.row, codes.latent][by.order]
    torch.testing.assert_close(dots, wanted, rtol=1e-5, atol=1e-4)
    none = torch.zeros(61, dtype=torch.long, device=device)
    assert len(triton_kernels.sampled(decoder, grad, none, none[:0])) == 0


def steps(device, n=3):
    """Losses and weights of a few fast steps."""
    config = TrainConfig(steps=n, batch_size=32, lr=1e-3)
    dictionary = crosscoder(8, 128, k=4).to(device)
    fast, dead = FastStep(dictionary, config), torch.arange(128, device=device) > 110
    losses = [
        float(fast.step(random(32, 2, 8, seed=i, device=device), 4, 1e-3, dead).loss)
        for i in range(n)
    ]
    fast.close()
    return torch.tensor(losses), dictionary.W_dec.detach().cpu()


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_kernels, "triton", None)
    with pytest.raises(SetupError, match="pip install triton"):
        triton_kernels.candidates(torch.zeros(2, 2), 1.0)


@pytest.mark.skipif(not TRITON, reason="Triton is not installed (it comes with torch for CUDA)")
def test_interpreted_kernels_agree_with_plain_torch():
    code = "from tests.dictionaries.test_triton import agree; agree('cpu')"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert made.returncode == 0, made.stderr


@pytest.mark.gpu
@CUDA
def test_kernels_on_the_gpu_agree_with_plain_torch():
    agree("cuda")


@pytest.mark.gpu
@CUDA
def test_fast_steps_on_the_gpu_are_those_on_the_cpu():
    torch.backends.cuda.matmul.allow_tf32 = False
    (here, mine), (there, theirs) = steps("cpu"), steps("cuda")
    torch.testing.assert_close(there, here, rtol=1e-3, atol=0)
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-3)
