"""Processes that work on one thing (torch.distributed): who is who, sums, shared checkpoints."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modeldiff._files import PathLike
from modeldiff._shapes import Float
from modeldiff.dictionaries.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from modeldiff.errors import FileFormatError, MismatchError, SetupError

_HALF = 16  # bits of a float32 that are counted at once


def launched() -> bool:
    """Whether ``torchrun``, or a cluster, started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True)
class World:
    """All processes, and which of them this one is. Every method must be called by all of them.

    Args:
        rank: This process, from 0.
        size: Processes.
        device: Where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    def total(self, each: Tensor) -> Tensor:
        """Sum over the processes; the same on all, to the bit."""
        made = each.detach().clone()
        dist.all_reduce(made)
        return made

    def mean(self, each: Tensor) -> Tensor:
        """Mean over the processes."""
        return self.total(each) / self.size

    def highest(self, each: Tensor) -> Tensor:
        """Largest over the processes, entry by entry."""
        made = each.detach().clone()
        dist.all_reduce(made, dist.ReduceOp.MAX)
        return made

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes into tensors, such as gradients."""
        waiting = [dist.all_reduce(each, async_op=True) for each in tensors]
        for each, handle in zip(tensors, waiting, strict=True):
            assert handle is not None, "asked for"
            handle.wait()
            each.div_(self.size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.highest(torch.tensor(int(flag))))  # on the CPU: nobody waits for a GPU

    def gathered(self, each: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape, in their order."""
        made = [torch.empty_like(each) for _ in range(self.size)]
        dist.all_gather(made, each.detach().contiguous())
        return made

    def objects(self, each: Any) -> list[Any]:
        """Small things of all processes, in their order."""
        made: list[Any] = [None] * self.size
        dist.all_gather_object(made, each)
        return made

    def agree(self, what: str, value: object) -> None:
        """Verify that all processes have the same value.

        Raises:
            MismatchError: With the values, on all of them.
        """
        values = self.objects(value)
        if any(each != values[0] for each in values):
            raise MismatchError(
                f"the processes differ in {what}: {values}. Start all of them with the same "
                "arguments, on the same files."
            )

    def kth_largest(self, scores: Float[Tensor, "*some"], k: int) -> Float[Tensor, ""]:
        """The k-th largest of all processes' positive scores together; the least, if they are few.

        Exact, and what is sent does not grow with the scores: bits of positive float32 order as
        the numbers do, so that the upper halves of the bits are counted, then the lower halves of
        those in the bin where the k-th lies.

        Returns:
            The score; 0 if none is positive.
        """
        flat = scores.detach().float().flatten()
        bits = flat[flat > 0].view(torch.int32)
        upper, left = bits >> _HALF, torch.tensor(k, device=bits.device)
        high, left = _bin_of(self.total(_counts(upper)), left)
        if int(left) == 0:
            return flat.new_zeros(())
        low, _ = _bin_of(self.total(_counts(bits[upper == high] & ((1 << _HALF) - 1))), left)
        return ((high << _HALF) + low).to(torch.int32).view(torch.float32)


def _counts(numbers: Tensor) -> Tensor:
    return torch.bincount(numbers, minlength=1 << _HALF)


def _bin_of(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The bin with the k-th largest, or the least one; and which of its numbers, from the top."""
    at_least = counts.flip(0).cumsum(0).flip(0)
    k = torch.minimum(k, at_least[0])
    found = ((at_least >= k).sum() - 1).clamp_min(0)
    return found, k - (at_least[found] - counts[found])


@contextmanager
def joined(minutes: float = 30.0) -> Iterator[World]:
    """Meet the other processes that ``torchrun`` started, and part from them afterwards.

    A process group that is there is used and stays. GPUs talk by NCCL, CPUs by gloo.

    Args:
        minutes: How long to wait for a process that does not come.

    Raises:
        SetupError: If this process was not started as one of several, or they do not meet.
    """
    if dist.is_initialized():
        yield _world()
        return
    if not launched():
        raise SetupError(
            "this process is not one of several (RANK and WORLD_SIZE are not set). Start it with "
            "torchrun --nproc-per-node N."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        kind = backend(torch.cuda.is_available())
        dist.init_process_group(kind, timeout=timedelta(minutes=minutes))
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"the processes did not meet: {error}.") from error
    try:
        yield _world()
    finally:
        dist.destroy_process_group()


def backend(gpus: bool) -> str:
    """What processes talk by; with GPUs two, so that flags need not wait for them."""
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def _world() -> World:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def broadcast(found: Checkpoint | None, world: World) -> Checkpoint | None:
    """Give rank 0's checkpoint to all."""
    about: list[Any] = [None]
    if found is not None:
        shapes = {name: (each.shape, each.dtype) for name, each in found.tensors.items()}
        about = [(found.run, found.start, found.step, list(found.logs), shapes)]
    dist.broadcast_object_list(about)
    if about[0] is None:
        return None
    run, start, step, logs, shapes = about[0]
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        tensors[name] = torch.empty(shape, dtype=dtype) if found is None else found.tensors[name]
        dist.broadcast(tensors[name], 0)
    return Checkpoint(run, start, step, tensors, logs)


def read_part(where: PathLike, world: World) -> Checkpoint | None:
    """Read this process's part of the last checkpoint of which all parts are there.

    Raises:
        FileFormatError: If the folder's parts are of another number of processes, or do not go
            together, or are damaged.
    """
    folder = Path(where)
    own = _parts(folder, world)
    others = [path.name for path in folder.glob("part-*") if f"-of-{world.size}" not in path.name]
    if others:
        raise FileFormatError(
            f"{str(folder)!r} holds parts of another number of processes ({others[0]}). Start "
            f"as many, not {world.size}, or give another folder."
        )
    known = [set(each) for each in world.objects(list(own))]
    common = set.intersection(*known)
    if any(known) and not common:
        raise FileFormatError(
            f"{str(folder)!r} holds no step of which all {world.size} parts are there. Do all "
            "processes see the same folder?"
        )
    return read_checkpoint(own[max(common)]) if common else None


def write_part(where: PathLike, checkpoint: Checkpoint, world: World) -> None:
    """Write this process's part; the one before is removed once all have written theirs."""
    folder = Path(where)
    own = folder / f"part-{world.rank}-of-{world.size}"
    write_checkpoint(own / f"{checkpoint.step:08d}", checkpoint)
    world.any(False)  # all have written theirs
    for step, path in _parts(folder, world).items():
        if step != checkpoint.step:
            shutil.rmtree(path)


def _parts(folder: Path, world: World) -> dict[int, Path]:
    """This process's parts by step."""
    own = folder / f"part-{world.rank}-of-{world.size}"
    return {int(p.parent.name): p.parent for p in own.glob("[0-9]*/checkpoint.safetensors")}
