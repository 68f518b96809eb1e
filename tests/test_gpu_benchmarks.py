"""The GPU benchmarks run, in shapes for a CPU, and write what they say."""

import json

import pytest

from tests.benchmarks import gpu_all
from tests.benchmarks.gpu_common import Result


def test_a_result_knows_whether_its_goal_is_reached(monkeypatch):
    import torch

    from tests.benchmarks import gpu_common

    monkeypatch.setattr(gpu_common, "device", lambda: torch.device("cuda"))
    assert Result("a", 1.0, "ms", goal=2.0).reached is True
    assert Result("a", 1.0, "x", goal=2.0, least=True).reached is False
    assert Result("a", 1.0, "x").reached is None
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert Result("a", 1.0, "ms", goal=2.0).reached is None  # goals are for a GPU


def test_a_benchmark_that_fails_does_not_lose_the_others(tmp_path, monkeypatch):
    def broken(small):
        raise RuntimeError("CUDA out of memory.")

    mains = {"kl": broken, "harvest": lambda small: [Result("fine", 1.0, "x")]}
    monkeypatch.setattr(gpu_all, "MAINS", mains)
    gpu_all.run(tmp_path / "results.json", small=True, only="kl")
    found = gpu_all.run(tmp_path / "results.json", small=True)
    assert "out of memory" in found["failed"]["kl"]
    assert found["results"][0]["name"] == "fine"


@pytest.mark.slow
def test_all_run_small_and_are_written(tmp_path):
    path = tmp_path / "results.json"
    gpu_all.run(path, small=True)
    found = json.loads(path.read_text())
    assert found["failed"] == {}
    assert found["device"]
    assert {each["benchmark"] for each in found["results"]} == set(gpu_all.MAINS)
    by_name = {each["name"]: each for each in found["results"]}
    assert all(each["value"] == each["value"] and each["unit"] is not None
               for each in by_name.values())  # fmt: skip
    errors = {name: each["value"] for name, each in by_name.items() if "error" in name}
    assert max(errors.values()) < 0.05
    assert min(errors.values()) < 1e-3  # in float32
    (loss,) = [each["value"] for name, each in by_name.items() if "loss of 20" in name]
    assert loss < 5e-4
