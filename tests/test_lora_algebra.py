"""Adapters as values: every operation against PEFT's own forward or against dense algebra."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, FileFormatError, MismatchError
from modeldiff.forward import run
from modeldiff.interventions import ScaleAdapter
from modeldiff.lora_algebra import (
    Factors,
    LoraAdapter,
    adapter_of,
    added,
    compressed,
    merged_weights,
    read_adapter,
    save_adapter,
    scaled,
    swapped,
    without_directions,
)
from modeldiff.models import ModelPair
from tests.families import build_adapter_pair, model, peft_model, tokenizer

TEXTS = ["the cat sat on the mat and ran"]
MODULES = ("q_proj", "o_proj", "down_proj")


@pytest.fixture(scope="module")
def pair():
    return build_adapter_pair(modules=MODULES, r=3, use_rslora=True)


def dense(adapter):
    return {
        p: each.scale * each.b.double() @ each.a.double() for p, each in adapter.modules.items()
    }


def logits(pair, **options) -> Any:
    return run(pair.sides, TEXTS, side="finetuned", **options).logits


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def loaded(base_folder, adapter, folder):
    """The adapter through its files and PEFT, as a user loads it."""
    save_adapter(adapter, folder)
    return ModelPair.load(base_folder, adapter=folder, allow_identical=True, device="cpu")


def test_files_give_the_same_logits_and_the_same_changes(pair, base_folder, tmp_path):
    adapter = adapter_of(pair.sides)
    again = loaded(base_folder, adapter, tmp_path)
    assert torch.allclose(logits(again), logits(pair), atol=1e-4)
    read = read_adapter(tmp_path)
    assert set(read.modules) == set(adapter.modules)
    for path, change in dense(adapter).items():
        assert torch.allclose(dense(read)[path], change, atol=1e-5)


def test_pefts_own_files_are_read_with_rslora_and_patterns(tmp_path):
    peft = peft_model(r=4, modules=("o_proj", "down_proj"), use_rslora=True,
                      rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": 5})  # fmt: skip
    want = adapter_of(ModelPair.of(peft, None, tokenizer()).sides)
    peft.save_pretrained(tmp_path)
    read = read_adapter(tmp_path / "tuned")
    scales = [{p: f.scale for p, f in each.modules.items()} for each in (read, want)]
    assert scales[0] == scales[1]
    assert {each.scale for each in want.modules.values()} == {5 / 2**0.5, 8 / 4**0.5}
    assert {each.rank for each in read.modules.values()} == {2, 4}


@pytest.mark.parametrize("factor", [-1.5, 0.0, 0.5])
def test_scaling_is_the_edit_that_scales(pair, base_folder, tmp_path, factor):
    adapter = scaled(adapter_of(pair.sides), {"*.1.*": factor})
    edit = ScaleAdapter(factor, layers=1)
    assert torch.allclose(
        logits(loaded(base_folder, adapter, tmp_path)), logits(pair, do=edit), atol=1e-4
    )


def test_sums_are_dense_sums_and_compress_to_the_nearest(pair):
    other = adapter_of(build_adapter_pair(modules=("down_proj", "v_proj"), seed=5).sides)
    first = adapter_of(pair.sides)
    total = added(first, scaled(other, -2.0))
    both, one, two = dense(total), dense(first), dense(other)
    for path, change in both.items():
        want = one.get(path, 0) - 2 * two.get(path, torch.zeros(()))
        assert torch.allclose(change, want, atol=1e-5)
    small = compressed(total, 2)
    for path, change in dense(small).items():
        u, s, vh = torch.linalg.svd(both[path])
        assert torch.allclose(change, (u[:, :2] * s[:2]) @ vh[:2], atol=1e-4)
        assert small.modules[path].rank == 2
    cancelled = added(first, scaled(first, -1.0))
    assert cancelled.norm == pytest.approx(0, abs=1e-4 * first.norm)


def test_nothing_is_written_along_a_direction_taken_out(pair):
    draws = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    out = [Direction.of(draw, "resid_post.1", f"d{i}") for i, draw in enumerate(draws)]
    before = adapter_of(pair.sides)
    after = without_directions(before, out)
    basis = torch.linalg.qr(draws.T.double()).Q
    for path, change in dense(after).items():
        writes = path.endswith(("o_proj", "down_proj"))
        along = (basis.T @ change).norm() / change.norm()
        assert (along < 1e-6) == writes
        want = dense(before)[path]
        want = want - basis @ (basis.T @ want) if writes else want
        assert torch.allclose(change, want, atol=1e-5)
    narrow = Direction.of(torch.ones(7), "resid_post.1", "narrow")
    with pytest.raises(DirectionError, match="another model"):
        without_directions(before, narrow)


def test_swapping_takes_named_modules_from_the_other(pair):
    first = adapter_of(pair.sides)
    other = adapter_of(build_adapter_pair(modules=("down_proj",), layers=(1,), seed=5).sides)
    made = swapped(first, other, "*.down_proj")
    assert (
        made.modules["model.layers.1.mlp.down_proj"]
        is other.modules["model.layers.1.mlp.down_proj"]
    )
    assert "model.layers.2.mlp.down_proj" not in made.modules
    kept = "model.layers.2.self_attn.q_proj"
    assert made.modules[kept] is first.modules[kept]
    with pytest.raises(MismatchError, match="match none"):
        swapped(first, other, "*.gate_proj")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_weights_are_pefts_merge(family):
    options = {"fan_in_fan_out": True} if family == "gpt2" else {"use_rslora": True}
    names = ("c_attn", "c_proj") if family == "gpt2" else MODULES
    made = build_adapter_pair(family=family, modules=names, r=3, **options)
    found = dict(merged_weights(adapter_of(made.sides), made.sides.roots[0]))
    merged = peft_model(family=family, modules=names, r=3, **options).merge_and_unload()
    state = merged.state_dict()
    assert len(found) == len(made.sides.lora)
    for name, weight in found.items():
        assert torch.allclose(weight, state[name], atol=1e-5)


def test_values_that_come_in_stay_as_they_are(pair):
    before = {p: t.clone() for p, t in dense(adapter_of(pair.sides)).items()}
    adapter = adapter_of(pair.sides)
    for make in (lambda: scaled(adapter, 3.0), lambda: added(adapter, adapter)):
        assert set(make().modules) == set(adapter.modules)
    compressed(adapter, 1)
    without_directions(adapter, Direction.of(torch.ones(32), "resid_post.1", "ones"))
    assert all(torch.equal(before[p], t) for p, t in dense(adapter_of(pair.sides)).items())


def test_a_crash_leaves_no_half_file_and_the_config_is_plain(pair, tmp_path, monkeypatch):
    adapter = adapter_of(pair.sides)
    save_adapter(adapter, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(scaled(adapter, 2.0), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3
    assert not config["use_rslora"]


def test_what_is_no_adapter_is_refused(pair, family_pairs, tmp_path):
    with pytest.raises(MismatchError, match="two whole models"):
        adapter_of(family_pairs["llama"].sides)
    with pytest.raises(MismatchError, match="not an adapter"):
        LoraAdapter({"a": Factors(torch.ones(2, 3), torch.ones(3, 1))})
    with pytest.raises(MismatchError, match="got none"):
        added()
    adapter = adapter_of(pair.sides)
    with pytest.raises(MismatchError, match="match none"):
        scaled(adapter, {"*.gate_proj": 2.0})
    save_adapter(adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    from safetensors.torch import save_file

    save_file({k: v for i, (k, v) in enumerate(tensors.items()) if i}, path)
    with pytest.raises(FileFormatError, match="needs A and B"):
        read_adapter(tmp_path)
    path.write_bytes(b"no")
    with pytest.raises(FileFormatError):
        read_adapter(tmp_path)
