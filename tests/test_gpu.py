"""The same numbers on a CUDA device as on the CPU; ``pytest -m gpu`` where there is one."""

import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.interventions import Ablate, Cell, Plan, Replace, ScaleAdapter, Steer
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from tests.families import model, peft_model, tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS = ["the cat sat on the mat", "a small bird sang of rain and sun over", "why"]
SITE = Site("resid_post", 2)


def pairs(device):
    peft = peft_model().to(device)
    return {
        "adapter": ModelPair.of(peft, None, tokenizer()),
        "two": ModelPair.of(model("llama").to(device), model("llama", 1).to(device), tokenizer()),
    }


@pytest.fixture(scope="module", params=["adapter", "two"])
def both(request):
    """The same pair on the CPU and on the GPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return pairs("cpu")[request.param], pairs("cuda")[request.param]


def direction():
    return Direction.of(torch.randn(32, generator=torch.Generator().manual_seed(0)), SITE, "d")


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_forward_with_edits(both, engine):
    do = Steer(direction(), 0.7) + Ablate(direction(), where="last")
    here, there = (pair.run(TEXTS, do=do, reads=SITE, engine=engine) for pair in both)
    torch.testing.assert_close(there.logits.cpu(), here.logits, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(there.acts[SITE].cpu(), here.acts[SITE], atol=1e-4, rtol=1e-3)


def test_captures_and_output_diffs(both):
    here, there = (pair.capture(TEXTS, SITE) for pair in both)
    torch.testing.assert_close(there.finetuned[SITE], here.finetuned[SITE], atol=1e-4, rtol=1e-3)
    here, there = (pair.output_diff(TEXTS).tokens["kl_ft_base"].to_numpy() for pair in both)
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), atol=1e-4, rtol=1e-3)


def test_generation_of_the_grid(both):
    do = {"steered": Steer(direction(), 2.0, where="new"), "patched": Ablate(direction())}
    here, there = (pair.generate(TEXTS, do=do, n=2, max_new_tokens=6) for pair in both)
    same = [a.ids == b.ids for a, b in zip(here.answers, there.answers, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # a draw may fall between two roundings


def test_effects_and_patches(both):
    cells = [Cell("finetuned"), Cell("finetuned", "base", Plan((Replace("resid_post.3", "base"),)))]
    here, there = (effects(pair.sides, TEXTS, cells)["kl"].to_numpy() for pair in both)
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), atol=1e-4, rtol=1e-3)


def test_the_silenced_adapter_is_the_base_to_the_bit_in_bf16():
    pair = ModelPair.of(peft_model().to("cuda", torch.bfloat16), None, tokenizer())
    off = pair.run(TEXTS, do=ScaleAdapter(0.0)).logits
    base = pair.run(TEXTS, side="base").logits
    torch.testing.assert_close(off, base, atol=0, rtol=0)
