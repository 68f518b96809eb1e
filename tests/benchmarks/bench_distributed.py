"""The fused step of two processes against the plain one, divided by latents and by rows.

Run: ``OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_distributed``; one line of JSON a
division. Two gloo processes of one thread each on this machine; ratios of rank 0's CPU time a
step, in interleaved rounds, and how far the loss of the fused step is from the plain one's.
"""

import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.models import crosscoder
from modeldiff.distributed import joined
from modeldiff.distributed_training import ByLatents, ByRows, share_of
from tests.benchmarks.bench_crosscoder import batches
from tests.benchmarks.timing import show

WIDTH, LATENTS, K, ROWS = 256, 8192, 32, 2048
WARM, ROUNDS, EACH = 8, 3, 2
RATE = 1e-3


def steppers(world, by):
    """The plain and the fused step on dictionaries that are alike, and how they divide rows."""
    whole = crosscoder(WIDTH, LATENTS, k=K)
    config = TrainConfig(1000, ROWS, RATE)
    split = ByRows(world) if by == "rows" else ByLatents(world, whole.config)
    made = []
    for fast in (False, True):
        mine = crosscoder(WIDTH, LATENTS, k=K)
        mine = mine if by == "rows" else share_of(mine, world.rank, world.size)
        made.append(split.stepper(mine, config, fast))
    return made, split


def process(rank, folder):
    """What one of the processes does."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "meeting"), 2)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=2,
                            timeout=timedelta(minutes=10))  # fmt: skip
    rows = list(batches(WIDTH, LATENTS, ROWS, WARM))
    with joined() as world:
        for by in ("latents", "rows"):
            both, split = steppers(world, by)
            losses, times = ([], []), ([], [])
            for number in range(WARM + ROUNDS * EACH):
                x = split.part(rows[number % WARM])
                for which, each in enumerate(both):
                    start = time.process_time()
                    losses[which].append(float(each.step(x, K, RATE).loss))
                    times[which].append(time.process_time() - start)
            plain, fused = (median(each[WARM:]) for each in times)
            apart = [abs(b - a) / a for a, b in zip(*losses, strict=True)]
            if rank == 0:
                size = f"d{WIDTH} F{LATENTS} k{K} B{ROWS}, 2 gloo processes"
                show(f"fused step by {by}, {size}", {
                    "ratio": round(plain / fused, 2), "reference_s": round(plain, 4),
                    "ours_s": round(fused, 4), "loss_max_rel": max(apart), "steps": len(apart),
                })  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        torch.multiprocessing.start_processes(process, (Path(made),), nprocs=2,
                                              start_method="spawn")  # fmt: skip
