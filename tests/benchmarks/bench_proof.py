"""Everything that is claimed of behaviours, directions and CAFT on the organisms, in one command.

``python -m tests.benchmarks.bench_proof`` runs the three benchmarks one after the other, each with
its defaults and in a process of its own: transfer of directions, backtracking, CAFT. Over an hour
on one core; each alone prints the same.
"""

import subprocess
import sys

PARTS = ("bench_transfer", "bench_backtracking", "bench_caft")


def main() -> None:
    """Run every part and stop at the first that fails."""
    for part in PARTS:
        print(f"\n## {part}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.benchmarks.{part}"], check=True)


if __name__ == "__main__":
    main()
