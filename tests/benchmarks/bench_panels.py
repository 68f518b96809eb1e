"""How fast *Compare* feels, and what workbenches leave behind.

Headless. First new token after a coefficient moved: from the change of the stack of edits to the
first message to the browser with new text; cancelling: from Stop to the end of the job. Run:
``python -m tests.benchmarks.bench_panels [n]``

With ``workbenches``, n of them are opened with every panel, used and closed: memory, threads,
widgets and their channels after every tenth. Run:
``python -m tests.benchmarks.bench_panels workbenches [n]``
"""

import gc
import os
import statistics
import sys
import threading
import time
from pathlib import Path

import comm
from ipywidgets.widgets.widget import _instances

import modeldiff as md
from modeldiff_widgets import Workbench, new_edit
from modeldiff_widgets.compare import Compare

PAGE = os.sysconf("SC_PAGE_SIZE")
CHANNELS = getattr(comm.get_comm_manager(), "comms", {})


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["workbenches"]:
        workbenches(int(arguments[1]) if len(arguments) > 1 else 100)
        return
    n = int(arguments[0]) if arguments else 40
    pair = md.ModelPair.load("organism:em-rank1")
    acts = pair.capture(["Hello. How are you?"], at="resid_post.3")
    site = acts.site
    shift = md.mean_difference(acts.finetuned[site], acts.base[site], site, "shift")
    with Compare(pair) as panel:
        panel.state.add_direction(shift)
        panel.state.edits = [new_edit("steer", "shift")]
        panel.run()
        panel.jobs.wait()
        panel.live.value = True
        first, cancelled = [], []
        for i in range(n):
            first.append(first_token(panel, i))
            start = time.perf_counter()
            panel.halt()
            panel.jobs.wait()
            cancelled.append(time.perf_counter() - start)
    show("first new token after a coefficient moved", first)
    show("cancel", cancelled)


def workbenches(n: int) -> None:
    """Open, use and close n workbenches; print what is there after every tenth."""
    pair = md.ModelPair.load("organism:em-rank1")
    for i in range(n + 1):
        if i % 10 == 0:
            left_behind(i)
        start = time.perf_counter()
        with Workbench(pair) as wb:
            opened = time.perf_counter() - start
            wb.panels["Compare"].run()
            wb.panels["Tokens"].run()
            wb.jobs.wait()
            if wb.bar.error[0]:
                raise RuntimeError(wb.bar.error[0])
            if i % 10 == 0:
                print(f"  opened in {opened:.2f} s: {len(_instances)} widgets")


def left_behind(i: int) -> None:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
    print(
        f"after {i}: {resident:.0f} MiB resident, {len(gc.get_objects()):,} objects, "
        f"{threading.active_count()} threads, {len(_instances)} widgets, "
        f"{len(CHANNELS)} channels",
        flush=True,
    )


def first_token(panel: Compare, i: int) -> float:
    came: list[float] = []
    send = panel.view.send

    def note(content, buffers=None):
        if content["kind"] == "text" and not came:
            came.append(time.perf_counter())
        send(content, buffers)

    panel.view.send = note
    start = time.perf_counter()
    panel.state.edits = [new_edit("steer", "shift", coefficient=(i - 20) / 10)]
    while not came and time.perf_counter() < start + 30:
        time.sleep(0.0005)
    panel.view.send = send
    return came[0] - start


def show(what: str, seconds: list[float]) -> None:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    print(
        f"{what}: median {1000 * statistics.median(ordered):.0f} ms, p95 {1000 * p95:.0f} ms, "
        f"n {len(ordered)}"
    )


if __name__ == "__main__":
    main()
