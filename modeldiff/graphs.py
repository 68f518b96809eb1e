"""Work on a GPU recorded once and repeated without Python: CUDA graphs.

What is recorded are the kernels and the addresses they read and write. So the work must read its
inputs from tensors that stay where they are, leave its results in such tensors, and do the same
each time: what Python decides, it decides once, while it is recorded.
"""

from collections.abc import Callable
from threading import Lock

import torch

from modeldiff.errors import SetupError

Run = Callable[[], None]
Record = Callable[[Run, torch.device], Run]

_WARM_UP = 3
"""Runs before the recording, in which libraries choose their kernels and take their memory."""
_ONE_AT_A_TIME = Lock()
"""CUDA allows one recording in a process."""


def recorded(work: Run, device: torch.device) -> Run:
    """Record work on a CUDA device, with memory of its own; elsewhere it is returned as it is.

    Recording runs the work a few times: what it leaves in tensors is to be set again afterwards.

    Args:
        work: What to repeat. It must not wait for the device, nor bring anything to it.
        device: Where it computes.

    Raises:
        SetupError: If the work cannot be recorded.

    Example:
        >>> total = []
        >>> again = recorded(lambda: total.append(1), torch.device("cpu"))
        >>> again(), again(), total
        (None, None, [1, 1])
    """
    if device.type != "cuda":
        return work
    try:
        return _graph_of(work, device).replay
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise SetupError(
            f"the model's step cannot be recorded as a CUDA graph: {str(error).splitlines()[0]} "
            "Its code may wait for the device or choose by what it computed (mixtures of experts "
            "do). Leave the decoder out; nothing else changes."
        ) from error


def _graph_of(work: Run, device: torch.device) -> torch.cuda.CUDAGraph:
    with _ONE_AT_A_TIME, torch.cuda.device(device):
        usual, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            beside.wait_stream(usual)
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UP):
                    work()
            graph = torch.cuda.CUDAGraph()
            # "thread_local": what other threads do on the device meanwhile is their affair
            with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
                work()
            usual.wait_stream(beside)
            return graph
        finally:  # torch stays on the other stream when a recording fails
            torch.cuda.set_stream(usual)
