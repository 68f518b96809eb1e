"""Copies to memory: what arrives, in which order, and that the next batch is asked for first."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from contextlib import nullcontext

import torch

from modeldiff import host_copies
from modeldiff.host_copies import HostCopies, one_behind


class Far(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self):  # pyright: ignore
        return True

    def record_stream(self, s):
        s.log.append("recorded")


class Stream:
    """A stream that notes what is asked of it."""

    def __init__(self, *_):
        self.log = []

    def wait_stream(self, other):
        self.log.append("waited for the computation")

    def record_event(self):
        log = self.log
        return type("Event", (), {"synchronize": lambda self: log.append("synchronised")})()


def far(value, dtype=torch.bfloat16):
    return torch.full((3, 2), value, dtype=dtype).as_subclass(Far)


def pretend_a_gpu(monkeypatch):
    monkeypatch.setattr(host_copies, "_pinned", lambda n: torch.empty(n, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


def test_tensors_in_memory_are_passed_through():
    rows = torch.randn(4, 2)
    assert HostCopies().start({"rows": rows}).wait()["rows"] is rows
    assert list(one_behind(iter([]))) == []


def test_batches_come_in_order_and_the_next_is_asked_for_first():
    log = []

    def computed():
        for i in range(3):
            log.append(f"compute {i}")
            yield i, {"x": torch.tensor(i)}

    for number, tensors in one_behind(computed()):
        assert int(tensors["x"]) == number
        log.append(f"write {number}")
    assert log == ["compute 0", "compute 1", "write 0", "compute 2", "write 1", "write 2"]


def test_two_buffers_are_used_in_turn_and_streams_keep_the_order(monkeypatch):
    pretend_a_gpu(monkeypatch)
    copies = HostCopies()
    first = copies.start({"a": far(1.0), "b": far(2.0, torch.float64)})
    second = copies.start({"a": far(3.0), "here": torch.tensor(7)})
    got = first.wait()
    assert got["a"].dtype == torch.bfloat16
    assert got["b"].dtype == torch.float64
    assert [float(got[k].float().mean()) for k in "ab"] == [1.0, 2.0]  # not overwritten yet
    assert float(second.wait()["a"].float().mean()) == 3.0
    assert int(second.wait()["here"]) == 7
    kept = got["a"]
    copies.start({"a": far(9.0)})
    assert float(kept.float().mean()) == 9.0  # the third copy takes the first one's buffer
    (stream,) = copies._streams.values()
    assert stream.log[:4] == [
        "waited for the computation", "recorded", "recorded", "waited for the computation",
    ]  # fmt: skip
    assert stream.log.count("synchronised") == 3


def test_one_behind_is_safe_with_reused_buffers(monkeypatch):
    pretend_a_gpu(monkeypatch)
    batches = ((i, {"x": far(float(i))}) for i in range(5))
    for number, tensors in one_behind(batches):
        assert tensors["x"].float().unique().tolist() == [float(number)]
