"""A fine-tune as an adapter: its logits, its energy, and what it leaves out."""

import copy
from typing import Any

import pytest
import torch

from modeldiff.errors import MismatchError
from modeldiff.forward import run
from modeldiff.models import ModelPair
from modeldiff.organisms.planted import planted_weights
from modeldiff.weight_extraction import extract_adapter
from modeldiff.weights import weight_diff
from tests.families import build, model, tokenizer

TEXTS = ["the cat sat on the mat and the dog ran to the old house"]


def logits(pair, side) -> Any:
    return run(pair.sides, TEXTS, side=side).logits


def folders(pair, tmp_path):
    made = []
    for side, root in zip(("base", "tuned"), pair.sides.roots, strict=True):
        root.save_pretrained(tmp_path / side)
        pair.tokenizer.save_pretrained(tmp_path / side)
        made.append(tmp_path / side)
    return made


@pytest.mark.parametrize("rank", [1, 4])
def test_a_planted_fine_tune_is_reproduced_through_files(tmp_path, rank):
    made = planted_weights(4, rank=rank, seed=rank)
    base, tuned = folders(made.pair, tmp_path)
    found = extract_adapter(base, tuned, rank, folder=tmp_path / "adapter")
    assert found.energy == pytest.approx(1, abs=1e-6)
    assert {f"{p}.weight" for p in found.adapter.modules} == set(found.table["name"])
    again = ModelPair.load(base, adapter=tmp_path / "adapter", device="cpu")
    want = logits(made.pair, "finetuned")
    assert torch.allclose(logits(again, "finetuned"), want, atol=1e-3 * float(want.abs().max()))
    assert torch.equal(logits(again, "base"), logits(made.pair, "base"))


def dense_fine_tune(seed=0, size=0.02):
    """Every linear weight moved by a decaying spectrum: no rank holds it all."""
    base, generator = model("llama"), torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(base)
    for name, weight in tuned.named_parameters():
        if name.endswith("proj.weight"):
            k = min(weight.shape)
            left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator)).Q
                           for n in weight.shape)  # fmt: skip
            values = 0.7 ** torch.arange(k)
            weight += size * weight.norm() * (left * values) @ right.T / values.norm()
    return ModelPair.of(base, tuned, tokenizer())


def test_more_rank_holds_more_energy_and_brings_logits_nearer(tmp_path):
    pair = dense_fine_tune()
    base, _ = folders(pair, tmp_path)
    want, start = logits(pair, "finetuned"), logits(pair, "base")
    left_out, energies = [], []
    for rank in (1, 2, 4, 8, 16):
        found = extract_adapter(*pair.sides.roots, rank, folder=tmp_path / str(rank))
        again = ModelPair.load(base, adapter=tmp_path / str(rank), device="cpu")
        gap = (logits(again, "finetuned") - want).norm() / (start - want).norm()
        left_out.append(float(gap))
        energies.append(found.energy)
        closed = 1 - 0.49**rank  # of the geometric spectrum
        assert found.energy == pytest.approx(closed, abs=0.01)
        assert 0.3 < gap / (1 - found.energy) ** 0.5 < 2  # what is left moves logits in proportion
    assert energies == sorted(energies)
    assert left_out == sorted(left_out, reverse=True)
    assert left_out[-1] < 0.01


def test_what_is_outside_linear_modules_is_named_and_counted():
    base, tuned = model("llama"), model("llama")
    tuned.model.layers[1].mlp.up_proj.weight[0] += 1.0
    tuned.model.norm.weight += 1.0
    found = extract_adapter(base, tuned, 2)
    table: Any = found.table.set_index("name")
    assert table.loc["model.norm.weight", ["rank", "energy"]].tolist() == [0, 0.0]
    assert table.loc["model.layers.1.mlp.up_proj.weight", "energy"] == pytest.approx(1)
    assert found.energy == pytest.approx(0.5)
    with pytest.raises(MismatchError, match="nothing to make"):
        extract_adapter(base, base, 2)


def test_gpt2_keeps_weights_the_other_way_round(tmp_path):
    pair = build("gpt2")
    base, _ = folders(pair, tmp_path)
    tuned: Any = copy.deepcopy(pair.sides.roots[0])
    weight = tuned.transformer.h[1].mlp.c_fc.weight
    weight += torch.outer(torch.arange(32.0) / 32, torch.linspace(-1, 1, weight.shape[1]))
    found = extract_adapter(pair.sides.roots[0], tuned, 1, folder=tmp_path / "adapter")
    assert found.energy == pytest.approx(1, abs=1e-6)
    again = ModelPair.load(base, adapter=tmp_path / "adapter", device="cpu")
    want = ModelPair.of(pair.sides.roots[0], tuned, tokenizer())
    assert torch.allclose(logits(again, "finetuned"), logits(want, "finetuned"), atol=1e-3)


def test_the_rounding_floor_is_said():
    made = planted_weights(2, relative=1e-3, d_model=64)
    roots: Any = made.pair.sides.roots
    base, tuned = (root.to(torch.bfloat16) for root in roots)
    assert extract_adapter(base, tuned, 1).table["below_floor"].all()
    assert not weight_diff(base, base).table["below_floor"].any()
