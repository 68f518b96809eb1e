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
    found = doctor.examine()
    assert "Some GPU, 80 GiB" in of("GPU 1", found).found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver" in of("GPU", doctor.examine()).advice
