"""Weight diffs of planted fine-tunes, from files and from memory; nothing in null pairs."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modeldiff.errors import FileFormatError, MismatchError, SetupError, SiteError
from modeldiff.organisms.nulls import null_pair
from modeldiff.organisms.planted import planted_weights, tiny_llama
from modeldiff.weight_extraction import extract_adapter
from modeldiff.weights import head_diff, tensors_of, weight_diff
from tests.families import build, build_adapter_pair, model


def saved(root, folder, **options):
    root.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planted_edits_are_recovered_from_files(tmp_path, rank, dtype):
    """Exactly the changed modules, the rank and every vector; also where all is bfloat16."""
    made = planted_weights(5, rank=rank, relative=0.3, seed=rank, d_model=64)
    folders = [saved(root.to(dtype), tmp_path / str(i), max_shard_size="200KB")
               for i, root in enumerate(made.pair.sides.roots)]  # fmt: skip
    found = weight_diff(*folders, rank=8)
    edits = {f"{edit.module}.weight": edit for edit in made.edits}
    assert set(found.changed()["name"]) == set(edits)
    assert found.only_in == ((), ())
    for name, edit in edits.items():
        row: Any = found.table.set_index("name").loc[name]
        assert row["n_above"] == rank
        assert row["dtype"] == str(dtype).removeprefix("torch.")
        assert row["relative"] == pytest.approx(0.3, rel=0.02)
        assert not row["below_floor"]
        assert row["energy"] > (0.999 if dtype == torch.float32 else 0.98)
        spectrum = found.spectra[name]
        cosines = (spectrum.left[:, :rank].double() * edit.left).sum(0).abs()
        assert cosines.min() >= 0.99
        assert ((spectrum.right[:, :rank].double() * edit.right).sum(0).abs() >= 0.99).all()
        beside = found.spectrum(name)
        assert beside["above_edge"].tolist() == [i < rank for i in range(8)]
        assert beside["noise"].max() < beside["signal"][0]


def test_norms_are_the_dense_ones_and_memory_agrees_with_files(tmp_path):
    base, tuned = (root for root in build("llama").sides.roots)
    folders = [saved(base, tmp_path / "a"), saved(tuned, tmp_path / "b")]
    found, memory = weight_diff(*folders), weight_diff(base, tuned)
    states = base.state_dict(), tuned.state_dict()
    for _, row in found.table.iterrows():
        a, b = (state[row["name"]].double() for state in states)
        assert row["norm"] == pytest.approx(float(a.norm()))
        assert row["change"] == pytest.approx(float((b - a).norm()))
        assert row["symmetric"] == pytest.approx(float((b - a).norm() / (a.norm() + b.norm())))
        assert row["share_changed"] == pytest.approx(float((a != b).double().mean()))
    columns = ["norm", "change", "relative", "top", "stable_rank"]
    left, right = (each.table.set_index("name")[columns] for each in (found, memory))
    assert (left - right.loc[left.index]).abs().fillna(0).to_numpy().max() < 1e-4


def test_symmetric_norms_do_not_care_which_side_is_the_base():
    base, tuned = build("qwen2").sides.roots
    one, other = weight_diff(base, tuned, rank=0), weight_diff(tuned, base, rank=0)
    assert one.table["symmetric"].to_numpy() == pytest.approx(other.table["symmetric"].to_numpy())
    assert "top" not in one.table


def test_small_changes_in_bfloat16_are_warned_of():
    for relative, warned in ((1e-3, True), (1e-2, False)):
        made = planted_weights(1, relative=relative, d_model=64)
        roots: Any = made.pair.sides.roots
        base, tuned = (root.to(torch.bfloat16) for root in roots)
        row = weight_diff(base, tuned).changed().iloc[0]
        assert row["below_floor"] == warned
        assert row["floor"] == 3e-3


def test_tensors_are_read_in_blocks_of_rows(monkeypatch):
    base, tuned = build("llama").sides.roots
    want = weight_diff(base, tuned, rank=0)
    monkeypatch.setattr("modeldiff.weights._BLOCK", 100)
    found = weight_diff(base, tuned, rank=0)
    assert found.table["change"].to_numpy() == pytest.approx(want.table["change"].to_numpy())
    assert found.peak_bytes < want.peak_bytes / 20


@pytest.mark.parametrize("kind", ["identical", "inert"])
def test_null_pairs_that_are_the_same_function_have_no_change(kind):
    base = tiny_llama(3)
    sides = null_pair(kind, 0, base).pair.sides
    assert len(weight_diff(*sides.roots).changed()) == 0
    assert (head_diff(*sides.roots)["change"] == 0).all()


@pytest.mark.slow
def test_rounding_noise_is_never_called_signal():
    """Twenty null pairs, the base rounded to bfloat16: no singular value is above the edge."""
    alarms = n = 0
    for seed in range(20):
        base, _ = tiny_llama(seed, n_layers=1)
        same: Any = tiny_llama(seed, n_layers=1)[0]
        table = weight_diff(base, same.to(torch.bfloat16), rank=4).table
        decomposed = table.dropna(subset="n_above")
        alarms += int((decomposed["n_above"] > 0).sum())
        n += len(decomposed)
    assert n == 140
    assert alarms == 0


def test_heads_are_found_under_grouped_queries():
    """A change of one key-value head shows in the two query heads that share it, and there only."""
    base, tuned = model("llama"), model("llama")
    tuned.model.layers[2].self_attn.v_proj.weight[8:16] += 0.1
    tuned.model.layers[1].self_attn.q_proj.weight[8:16] += 0.1
    found = head_diff(base, tuned)
    hit = found[found["change"] > 0]
    assert [tuple(r) for r in hit[["layer", "head", "circuit"]].to_numpy().tolist()] == [
        (1, 1, "QK"), (2, 2, "OV"), (2, 3, "OV")]  # fmt: skip
    assert (hit["stable_rank"] < 1.01).all()
    norm = tuned.model.layers[0].input_layernorm.weight
    norm.mul_(2.0)
    found: Any = head_diff(base, tuned, layers=[0]).set_index("circuit")
    assert found.loc["OV", "relative"].to_numpy() == pytest.approx(1.0)
    assert found.loc["QK", "relative"].to_numpy() == pytest.approx(3.0)
    with pytest.raises(SiteError, match="built like Llama"):
        head_diff(*build("gpt2").sides.roots)


def test_moving_a_matrix_between_factors_changes_no_circuit():
    base, tuned = model("llama"), model("llama")
    attention = tuned.model.layers[1].self_attn
    attention.v_proj.weight.mul_(2.0)
    attention.o_proj.weight.mul_(0.5)
    assert len(weight_diff(base, tuned, rank=0).changed()) == 2
    assert (head_diff(base, tuned)["relative"] < 1e-6).all()


def test_what_cannot_be_compared_says_why(tmp_path):
    base = model("llama")
    with pytest.raises(MismatchError, match="cannot be compared"):
        weight_diff(base, model("gpt2"))
    with pytest.raises(MismatchError, match="embed_tokens"):
        weight_diff(base, tiny_llama()[0])
    with pytest.raises(SetupError, match="no safetensors"):
        weight_diff(base, tmp_path)
    with pytest.raises(SetupError, match="no folder here"):
        weight_diff(base, "nobody/has-this-model")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + b"\0" * 20)
    with pytest.raises(FileFormatError, match="again"):
        weight_diff(base, tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with tensors_of(tmp_path) as tensors:
        assert dict(tensors.shapes) == {"x": (2,)}
    with pytest.raises(SiteError, match=r"config\.json"):
        head_diff(tmp_path, tmp_path)


def test_damaged_and_missing_weights_are_errors(tmp_path):
    """A tensor with NaN has no change: it would be left out of what changed in silence."""
    base, tuned = model("llama"), model("llama", 1)
    for side, index in (("base", 0), ("fine-tune", 1)):
        roots = [copy.deepcopy(root) for root in (base, tuned)]
        weight = roots[index].model.layers[1].mlp.down_proj.weight
        weight.requires_grad_(False)[3, 2] = torch.nan
        for compare in (partial(weight_diff, rank=0), partial(extract_adapter, rank=1)):
            with pytest.raises(MismatchError, match=f"down_proj.weight of the {side} holds"):
                compare(*roots)
    tuned.save_pretrained(tmp_path, max_shard_size="50KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    tables = [weight_diff(base, each, rank=0).table for each in (tmp_path, tuned)]
    assert len(tables[0]) == len(tables[1])
    parts[1].unlink()
    with pytest.raises(SetupError, match=f"lacks 1 of {len(parts)} files.*{parts[1].name}"):
        weight_diff(base, tmp_path)


def test_a_head_that_is_zero_has_an_infinite_relative_change():
    base, tuned = model("llama"), model("llama", 1)
    base.model.layers[0].self_attn.o_proj.weight.zero_()
    found = head_diff(base, tuned, layers=[0])
    changed = found[found["circuit"] == "OV"]
    assert (changed["norm"] == 0).all()
    assert np.isinf(changed["relative"]).all()
    same = head_diff(base, base, layers=[0])
    assert (same["relative"] == 0).all()


def test_an_adapters_base_is_read_without_the_adapter():
    pair = build_adapter_pair()
    found = weight_diff(model("llama"), pair.sides.roots[0])
    assert found.only_in == ((), ())
    assert len(found.changed()) == 0
