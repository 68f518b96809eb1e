"""The doctor: what is there, what it means, no secrets."""

from types import SimpleNamespace

import pytest
import torch

from modeldiff import cli, doctor


def of(what, findings):
    return next(each for each in findings if each.what == what)


def test_this_installation_is_healthy_and_everything_is_said_once():
    found = doctor.examine()
    names = [each.what for each in found]
    assert len(names) == len(set(names))
    assert doctor.healthy(found)
    assert all(each.found and each.meaning for each in found)
    assert all(each.advice for each in found if each.state == "missing")


def test_the_command_prints_every_line_and_fails_where_something_is_missing(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(each.found in printed for each in doctor.examine())
    monkeypatch.setattr(doctor, "requirements", lambda: [("torch", ">=99", "2.13.0")])
    assert cli.main(["doctor"]) == 1
    assert "torch 2.13.0 (needs >=99)" in capsys.readouterr().out


def test_secrets_are_never_shown(capsys):
    secrets = {"HF_TOKEN": "hf_verysecret", "NDIF_API_KEY": "alsosecret"}
    found = doctor.examine(secrets)
    assert of("NDIF", found).state == "ok"
    assert "token there" in of("hub", found).found
    assert not any(secret in doctor.as_text(found) for secret in secrets.values())


@pytest.mark.parametrize("missing", ["transformers", "nnsight"])
def test_a_package_that_is_not_there_is_missing(monkeypatch, missing):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == missing else real(name))
    found = of("packages", doctor.examine())
    assert found.state == "missing"
    assert f"{missing} is missing" in found.found


def test_without_jupyter_or_a_browser_the_rest_works(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = doctor.examine({"CHROMIUM": "/nowhere"})
    assert "pip install" in of("Jupyter", found).advice
    assert "CHROMIUM" in of("browser", found).advice
    assert doctor.healthy(found)


def test_a_full_or_unwritable_cache_is_said(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    assert "larger disk" in of("hub", doctor.examine({})).advice
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert of("hub", doctor.examine({})).state == "missing"


def test_gpus_are_described(monkeypatch):
    about = SimpleNamespace(name="Some GPU", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = doctor.examine()
    assert "Some GPU, 80 GiB" in of("GPU 1", found).found
    assert "several times slower" in of("triton", doctor.examine()).meaning


@pytest.mark.parametrize(
    ("built", "driver", "visible", "words"),
    [
        (None, "", None, "if there is a GPU"),
        (None, "580.65.06", None, "this torch has no CUDA: pip install"),
        ("13.0", "", None, "is the driver there"),
        ("13.0", "580.65.06", None, "driver 580.65.06 may be too old"),
        ("13.0", "580.65.06", "-1", "CUDA_VISIBLE_DEVICES='-1' hides"),
    ],
)
def test_a_gpu_that_is_not_used_and_what_to_do(
    monkeypatch, tmp_path, built, driver, visible, words
):
    path = tmp_path / "version"
    if driver:
        path.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue Aug")
    monkeypatch.setattr(doctor, "DRIVER", path)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    (found,) = doctor._devices({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    assert words in found.advice
    assert driver in found.found


@pytest.mark.parametrize(
    ("quota", "threads", "state"),
    [("max 100000", 8, "ok"), ("200000 100000", 8, "note"), ("max 100000", 1, "note")],
)
def test_threads_fit_the_processors_of_the_container(monkeypatch, tmp_path, quota, threads, state):
    monkeypatch.setattr(doctor, "QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    (found,) = doctor._processors({})
    assert found.state == state
    assert ("OMP_NUM_THREADS" in found.advice) == (state == "note")


def test_small_shared_memory_and_missing_extras_are_notes(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED", tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = doctor.examine({})
    assert "shm-size" in of("shared memory", found).advice
    for name, extra, _ in doctor.EXTRAS:
        assert f"modeldiff-lab[{extra}]" in of(name, found).advice
    assert of("bitsandbytes", found).state == "note"


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("driver"), IndexError("empty")])
def test_a_probe_that_fails_does_not_hide_the_others(monkeypatch, error):
    def fails(*given):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", fails)
    monkeypatch.setattr(doctor.shutil, "disk_usage", fails)
    found = doctor.examine({})
    assert str(error) in of("devices", found).found
    assert "could not be looked at" in of("hub", found).found
    assert of("organisms", found).state == "ok"
