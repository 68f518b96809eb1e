"""How fast *Compare* feels: first new token after a coefficient moved, and cancelling.

Headless, from the change of the stack of edits to the first message to the browser with new text,
and from Stop to the end of the job. Run: ``python -m tests.benchmarks.bench_panels [n]``
"""

import statistics
import sys
import time

import modeldiff as md
from modeldiff_widgets import new_edit
from modeldiff_widgets.compare import Compare


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 40
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
