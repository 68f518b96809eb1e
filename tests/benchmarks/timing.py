"""Interleaved ratios of process CPU time on one thread; wall time on shared cores lies."""

import ctypes
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch


def ratio(reference, ours, rounds=3):
    """Run both in turn; median over rounds of reference / ours, and the medians in seconds.

    Both run once before the clock starts.
    """
    torch.set_num_threads(1)
    reference(), ours()
    times = []
    for _ in range(rounds):
        pair = []
        for run in (reference, ours):
            start = time.process_time()
            run()
            pair.append(time.process_time() - start)
        times.append(pair)
    return {
        "ratio": round(statistics.median(a / b for a, b in times), 2),
        "ratio_min": round(min(a / b for a, b in times), 2),
        "ratio_max": round(max(a / b for a, b in times), 2),
        "reference_s": round(statistics.median(a for a, _ in times), 4),
        "ours_s": round(statistics.median(b for _, b in times), 4),
        "rounds": rounds,
    }


def peak_memory(module, variant):
    """Peak resident memory in MB that ``python -m module variant`` reports for its own work."""
    out = subprocess.run(
        [sys.executable, "-m", module, variant], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout.strip().splitlines()[-1])["extra_mb"]


def report_peak(work):
    """Print how far resident memory rose above its start during ``work``, in MB.

    Freed memory is given back first, and the level is sampled a thousand times a second.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    levels, done = [_resident()], threading.Event()

    def watch():
        while not done.wait(0.001):
            levels.append(_resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    sys.stdout.write(json.dumps({"extra_mb": round((max(levels) - levels[0]) / 1e6, 1)}) + "\n")


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def show(name, result):
    """Print one result as a line of JSON, with the machine."""
    machine = f"{platform.machine()}, torch {torch.__version__}, 1 thread"
    sys.stdout.write(json.dumps({"benchmark": name, **result, "machine": machine}) + "\n")
