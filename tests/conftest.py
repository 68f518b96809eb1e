import os

import beartype  # noqa: F401  first: nnsight mounts `.save` on `object`, which breaks beartype's import

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; two threads stall on shared cores

import socket

import pytest
import torch

from tests.families import FAMILIES, build


def pytest_xdist_auto_num_workers(config):
    """Take no workers for a few files or with ``-s``, else one a core, at most 4."""
    few = config.args_source == config.ArgsSource.ARGS and len(config.args) < 8
    if few or config.option.capture == "no":
        return 0
    return min(4, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def seeded_and_offline(monkeypatch, request):
    """Start every test from the same random state, and let none reach beyond this machine."""
    torch.random.default_generator.manual_seed(0)
    real = socket.socket.connect

    def local_only(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise AssertionError(f"a test reached for {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def family_pairs():
    """Two-model pairs of every supported family, made once."""
    return {family: build(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def adapter_pair():
    """A Llama pair with a rank-2 adapter on two modules of layers 1 and 2."""
    from tests.families import build_adapter_pair

    return build_adapter_pair()
