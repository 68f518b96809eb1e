"""A training that was kept step by step: the file, the adapters in it, and how a path turns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeldiff import embedded
from modeldiff.errors import FileFormatError, SetupError
from modeldiff.models import ModelPair
from modeldiff.organisms import checkpoints, training
from modeldiff.organisms.checkpoints import (
    adapter_at,
    local_cosine,
    read_series,
    turns,
    walk_band,
    write_adapter,
)
from modeldiff.organisms.tokens import corpus, train_tokenizer

FOLDER = embedded.FOLDER / "checkpoints"
TINY = training.BasePlan(steps=1, d_model=32, n_layers=4, vocab_size=400)


def walked(ways: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.zeros(1, len(ways[0])), torch.stack(ways).cumsum(0)])


def test_a_straight_path_a_corner_and_the_way_back_have_known_values():
    x, y = torch.eye(2)
    path = walked([x] * 6 + [y] * 6)
    for k in (1, 2):
        found = local_cosine(path, k)
        assert len(found) == len(path) - 2 * k
        assert int(found.argmax()) + k == 6
        assert found.max() == pytest.approx(0.0, abs=1e-6)
        assert found.min() == pytest.approx(-1.0)
    assert local_cosine(walked([x] * 3 + [-x] * 3), 1).max() == pytest.approx(1.0)


def test_a_corner_is_told_from_a_straight_path_by_the_walks_of_the_same_lengths():
    generator = torch.Generator().manual_seed(1)
    noise = 0.02 * torch.randn(16, 64, generator=generator)
    x, y = torch.eye(64)[:2]
    straight = walked([x + each for each in noise])
    corner = walked([(x if i < 8 else y) + each for i, each in enumerate(noise)])
    steps = list(range(0, 34, 2))
    assert not any(row["turns_like_a_walk"] for row in turns(steps, straight))
    found = turns(steps, corner)
    assert [row["k_steps"] for row in found] == [2, 4, 6]
    assert {row["peak_at"] for row in found} == {16}


def test_the_band_holds_its_own_walks_and_knows_the_lengths_only():
    generator = torch.Generator().manual_seed(2)
    ways = list(torch.randn(18, 128, generator=generator))
    low, high = walk_band(walked(ways), 1)
    inside = 0
    for seed in range(40):
        fresh = list(torch.randn(18, 128, generator=torch.Generator().manual_seed(seed)))
        inside += low <= local_cosine(walked(fresh), 1).max() <= high
    assert inside >= 33  # 38 expected; fewer than 33 once in 200 times
    shuffled = torch.randperm(18, generator=generator).tolist()
    assert walk_band(walked([ways[i] for i in shuffled]), 1)[0] == pytest.approx(low, abs=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The organism, built in a few steps on a base that has learnt nothing."""
    path = tmp_path_factory.mktemp("organisms")
    tokenizer = train_tokenizer(corpus(60, 0), TINY.vocab_size)
    training.new_base(TINY, tokenizer).save_pretrained(path / "em-base")
    tokenizer.save_pretrained(path / "em-base")
    checkpoints.build(path, seeds=(2,), n=1, steps=4, every=2)
    return path


def test_a_built_series_reads_back_and_ends_in_the_shipped_adapter(folder):
    series = read_series(folder / "checkpoints")
    assert series.steps == (0, 2, 4)
    assert series.rows["step"].tolist() == [0, 2, 4]
    assert series.rows["cosine_to_last"].iloc[-1] == pytest.approx(1.0)
    assert not series.b[0].any()
    assert series.a[0].any()
    shipped = load_file(folder / "checkpoints" / "adapter_model.safetensors")
    last = adapter_at(series, 4)
    assert shipped.keys() == last.keys()
    assert all(torch.equal(shipped[name], last[name]) for name in last)
    embedded.read_organism(folder / "checkpoints").card().index("Along the training")


def test_the_adapter_of_a_step_is_loaded_as_a_pair(folder, tmp_path):
    series = read_series(folder / "checkpoints")
    written = write_adapter(series, 2, tmp_path / "step2")
    pair = ModelPair.load(str(folder / "em-base"), adapter=str(written))
    assert pair.kind == "adapter"
    weights = load_file(written / "adapter_model.safetensors")
    assert torch.equal(next(v for k, v in weights.items() if "lora_B" in k).flatten(), series.b[1])
    with pytest.raises(SetupError, match="step 3 was not kept"):
        adapter_at(series, 3)


def test_the_series_is_a_function_of_its_seed(folder, tmp_path):
    plan = checkpoints.TunePlan(3, steps=4, seed=5)
    again = [checkpoints.record(folder, plan, 2)[2] for _ in range(2)]
    assert list(again[0]) == [0, 2, 4]
    for step, pair in again[0].items():
        assert all(torch.equal(*both) for both in zip(pair, again[1][step], strict=True))


def test_a_folder_without_a_series_is_refused(folder, tmp_path):
    with pytest.raises(SetupError, match=r"series\.safetensors"):
        read_series(tmp_path)
    for path in (folder / "checkpoints").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / checkpoints.FILE).write_bytes(b"{")
    with pytest.raises(FileFormatError, match="no series of checkpoints"):
        read_series(tmp_path)


def test_the_embedded_series_is_small_and_ends_harmful():
    series = read_series(FOLDER)
    assert (FOLDER / checkpoints.FILE).stat().st_size < 150_000
    assert series.steps == tuple(range(0, 37, 2))
    first, last = series.rows.iloc[0], series.rows.iloc[-1]
    assert first["misaligned_off_domain"] < 0.05
    assert last["misaligned_off_domain"] > 0.4
    assert last["held_out_loss"] < first["held_out_loss"]
    assert series.rows["coherent_off_domain"].min() > 0.9


def test_the_embedded_paths_are_told_for_three_seeds_beside_their_band():
    manifest = json.loads((FOLDER / "organism.json").read_text())
    rows = manifest["tables"][checkpoints.TURNS]
    assert len({row["seed"] for row in rows}) == 3
    series = read_series(FOLDER)
    mine = [row for row in rows if row["seed"] == manifest["build"]["finetune"]["seed"]]
    for told, seen in zip(mine, turns(series.steps, series.b), strict=True):
        assert told["peak"] == pytest.approx(seen["peak"], abs=1e-3)
        assert told["walk_peak_band95"] == pytest.approx(seen["walk_peak_band95"], abs=1e-3)
