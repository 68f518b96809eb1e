"""What a piece of work costs: processor time, wall time and the rise of resident memory."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATM = Path("/proc/self/statm")
_EVERY = 0.002  # seconds between two looks at the memory


@dataclass
class Cost:
    """Costs of a block; filled in when it ends.

    Args:
        cpu_s: Processor time of this process, all threads, in seconds.
        wall_s: Time on the clock, in seconds.
        peak_mb: How far resident memory rose above its start, in units of 1e6 bytes; NaN where
            the system does not tell.
    """

    cpu_s: float = float("nan")
    wall_s: float = float("nan")
    peak_mb: float = float("nan")


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a block of work.

    Freed memory is given back to the system first where that is possible, since memory that is
    used again does not raise the level.

    Example:
        >>> with measured() as cost:
        ...     _ = bytearray(1000)
        >>> cost.cpu_s < 10
        True
    """
    cost, levels, done = Cost(), [_settled()], threading.Event()

    def watch() -> None:
        while not done.wait(_EVERY):
            levels.append(_resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield cost
    finally:
        cost.cpu_s = time.process_time() - cpu
        cost.wall_s = time.perf_counter() - wall
        levels.append(_resident())
        done.set()
        watcher.join()
        cost.peak_mb = (max(levels) - levels[0]) / 1e6


def _settled() -> float:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)
    return _resident()


def _resident() -> float:
    if not _STATM.exists():
        return float("nan")
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
