"""What a CUDA graph does, on a CPU: operations are written down once and repeated without Python.

Every operation is kept with the very tensors it read and wrote. To replay is to execute them again
in order, each result going into the memory of the first one; views need nothing. Whatever Python
decided or counted while the tape ran is fixed, and what would wait for a device is refused.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave", "bincount", "lift_fresh", "lift_fresh_copy",
}  # fmt: skip
"""Operations that read a value of the device, or bring one of the host's to it."""
READS = ("tolist", "numpy", "cpu")
"""Methods that read values without an operation, on a CPU."""


class Refused(RuntimeError):
    """An operation that a CUDA graph cannot hold."""


def memory(tensor):
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Writes down the operations inside its block."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        masked = name.startswith("index") and any(each.dtype == torch.bool for each in read[1:])
        if name in WAITS or masked:
            raise Refused(f"{name}: not permitted while a step is recorded")
        out = func(*args, **kwargs)
        written = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        if func._schema.is_mutable:
            self.operations.append((func, args, kwargs, []))
        elif not {memory(each) for each in written} & {memory(each) for each in read}:
            self.operations.append((func, args, kwargs, written))
        return out

    def replay(self):
        for func, args, kwargs, written in self.operations:
            made = func(*args, **kwargs)
            if written:
                again = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
                for old, new in zip(written, again, strict=True):
                    old.copy_(new)

    def spoil(self):
        """Lose all results: a replay that needs one it does not make again goes wrong."""
        for *_, written in self.operations:
            for each in written:
                each.fill_(torch.nan if each.is_floating_point() else 0)


@contextmanager
def no_reading():
    def refuse(name):
        def method(self, *args, **kwargs):
            raise Refused(f"Tensor.{name}: not permitted while a step is recorded")

        return method

    own = {name: getattr(torch.Tensor, name) for name in READS}
    try:
        for name in READS:
            setattr(torch.Tensor, name, refuse(name))
        yield
    finally:
        for name, method in own.items():
            setattr(torch.Tensor, name, method)


def taped(work, device=None, warm_up=2):
    """`modeldiff.graphs.recorded`, for a CPU."""
    for _ in range(warm_up):
        work()
    tape = Tape()
    with tape, no_reading():
        work()
    tape.spoil()
    return tape.replay
