"""Copies from a GPU to memory that run beside the computation.

A plain ``.cpu()`` waits until all work on the GPU is done, and copies through a buffer that the
system must pin first. Here each copy goes into one of two buffers that stay pinned, on a stream of
its own, after the computation that made its rows: while one copy runs, or what it brought is
written to disk, the GPU computes the next batch.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
K = TypeVar("K")
_ALIGNED = 256  # bytes, so that any dtype can view its part of a buffer


@dataclass(frozen=True, eq=False)
class HostCopy:
    """A copy under way.

    Args:
        tensors: Where it arrives; read them through `wait` alone.
        events: Recorded after the copies of each GPU.
    """

    tensors: Mapping[Any, Tensor]
    events: tuple[Any, ...] = ()

    def wait(self) -> Mapping[Any, Tensor]:
        """Wait for the copy alone, not for the GPU's other work; return tensors in memory."""
        for event in self.events:
            event.synchronize()
        return self.tensors


class HostCopies:
    """Two pinned buffers, used in turn.

    What a copy brought is overwritten by the second `start` after it: be done with it before.
    Tensors that are in memory already are passed through, without a copy.

    Example:
        >>> copies = HostCopies()
        >>> copies.start({"rows": torch.ones(2)}).wait()
        {'rows': tensor([1., 1.])}
    """

    def __init__(self) -> None:
        self._buffers = [_nothing(), _nothing()]
        self._streams: dict[torch.device, Any] = {}
        self._turn = 0

    def start(self, tensors: Mapping[Key, Tensor]) -> HostCopy:
        """Queue copies of tensors, after the work that is queued on their devices now."""
        far = {key: tensor for key, tensor in tensors.items() if tensor.is_cuda}
        if not far:
            return HostCopy({key: tensor.cpu() for key, tensor in tensors.items()})
        self._turn = 1 - self._turn
        places = self._places(far)
        streams = {tensor.device: self._stream(tensor.device) for tensor in far.values()}
        for device, stream in streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for key, tensor in far.items():
            with torch.cuda.stream(streams[tensor.device]):
                places[key].copy_(tensor, non_blocking=True)
            tensor.record_stream(streams[tensor.device])  # its memory is not given away before
        events = tuple(stream.record_event() for stream in streams.values())
        arrived = {key: places[key] if key in far else tensors[key].cpu() for key in tensors}
        return HostCopy(arrived, events)

    def _places(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Parts of this turn's buffer, of the tensors' shapes and dtypes."""
        parts, end = {}, 0
        for key, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            parts[key] = slice(end, end + size)
            end += -(-size // _ALIGNED) * _ALIGNED
        if len(self._buffers[self._turn]) < end:
            self._buffers[self._turn] = _pinned(end)
        buffer = self._buffers[self._turn]
        return {
            key: buffer[parts[key]].view(tensor.dtype).view(tensor.shape)
            for key, tensor in tensors.items()
        }

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def one_behind(
    batches: Iterator[tuple[K, Mapping[Key, Tensor]]],
) -> Iterator[tuple[K, Mapping[Key, Tensor]]]:
    """Bring each batch's tensors to memory while the next batch is computed.

    The next batch is asked for before a batch is handed out, so that what is done with it (a
    write to disk) falls into the time in which the GPU works on the next.

    Args:
        batches: Something, and tensors by name; computed when asked for.

    Yields:
        The same, in order, with tensors in memory, to be used before the next is asked for.
    """
    copies, waiting = HostCopies(), None
    for about, tensors in batches:
        started = about, copies.start(tensors)
        del tensors
        if waiting is not None:
            yield waiting[0], waiting[1].wait()
        waiting = started
    if waiting is not None:
        yield waiting[0], waiting[1].wait()


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _pinned(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
