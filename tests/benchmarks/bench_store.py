"""``harvest`` and ``ActivationStore`` against straightforward implementations.

Run: ``python -m tests.benchmarks.bench_store``. The reference harvest loads base and fine-tune
apart (the adapter merged), runs each over texts padded in the order they come, drops BOS and
padding with a boolean mask, keeps running statistics in float64 (Welford) and writes bfloat16
memory maps, one folder a model; ``early`` stops each pass after the layer that is captured. The
reference reader is a data set that is indexed row by row, in torch's ``DataLoader``. What both read
and write is compared before anything is timed.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from modeldiff.harvesting import harvest
from modeldiff.hooks import stopping
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from modeldiff.stores import ActivationStore
from tests.benchmarks.bench_pair import ADAPTED, models, padded, texts
from tests.benchmarks.timing import peak_memory, ratio, report_peak, show
from tests.families import tokenizer

SITE = Site("resid_post", ADAPTED)
WIDTH, N_ROWS, BATCH, N_BATCHES = 1024, 100_000, 2048, 48


class Welford:
    """Mean and sum of squared deviations, batch after batch, in float64."""

    def __init__(self):
        self.n, self.mean, self.m2 = 0, torch.zeros(()), torch.zeros(())

    def update(self, rows):
        rows = rows.double()
        gap = rows - self.mean
        self.n += len(rows)
        self.mean = self.mean + gap.sum(0) / self.n
        self.m2 = self.m2 + (gap * (rows - self.mean)).sum(0)


@torch.no_grad()
def reference_harvest(plain, merged, several, folder, early):
    """Both models one after the other; their rows and statistics."""
    found = []
    for name, model in (("base", plain), ("finetuned", merged)):
        kept: list[Any] = []
        handle = model.model.layers[ADAPTED].register_forward_hook(
            lambda m, a, out, k=kept: k.append(out)
        )
        statistics, rows = Welford(), []
        for ids, mask in padded(several):
            if early:
                with stopping(model, f"model.layers.{ADAPTED}"):
                    model(input_ids=ids, attention_mask=mask, use_cache=False)
            else:
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            keep = mask.bool().clone()
            keep[:, 0] = False
            rows.append(kept.pop()[keep].bfloat16())
            statistics.update(rows[-1])
        handle.remove()
        whole = torch.cat(rows)
        out = np.memmap(
            Path(folder) / f"{name}.bin", np.uint16, mode="w+", shape=tuple(whole.shape)
        )
        out[:] = whole.view(torch.uint16).numpy()
        out.flush()
        found.append((whole, statistics))
    return found


def ours(pair, several):
    """A harvest into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(pair, several, SITE, Path(folder) / "store")
        return store.rows(SITE, slice(None)), store.statistics(SITE)


def theirs(plain, merged, several, early):
    with tempfile.TemporaryDirectory() as folder:
        return reference_harvest(plain, merged, several, folder, early)


def bench_harvest(variant):
    """Time and memory of both harvests."""
    pair, plain, merged = models()
    several = texts(pair)
    jobs = {
        "harvest": lambda: ours(pair, several),
        "harvest_full": lambda: theirs(plain, merged, several, early=False),
        "harvest_early": lambda: theirs(plain, merged, several, early=True),
    }
    if variant:
        _ = pair.digests
        report_peak(jobs[variant])
        return
    (rows, statistics), reference = jobs["harvest"](), jobs["harvest_full"]()
    gaps, stds = [], []
    for side, (dense, welford) in enumerate(reference):
        gap = (rows[:, side].float() - dense.float()).abs() / dense.float().abs().clamp(min=1e-2)
        gaps.append(float(gap.max()))
        std = (welford.m2 / welford.n).sqrt()
        stds.append(float((statistics.std[side] / std - 1).abs().max()))
    assert max(gaps) <= 2**-7, gaps  # one unit in the last place of bfloat16
    about = {"n_rows": len(rows), "worst_relative_gap": max(gaps), "worst_std_gap": max(stds)}
    for name in ("harvest_full", "harvest_early"):
        memory = {"peak_mb": peak_memory(__spec__.name, "harvest"),
                  "reference_peak_mb": peak_memory(__spec__.name, name)}  # fmt: skip
        show(f"harvest vs {name}", ratio(jobs[name], jobs["harvest"], rounds=5) | about | memory)


def stored(folder):
    """A store of wide rows: the embeddings of two random models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    both: list[Any] = []
    for seed in range(2):
        torch.random.default_generator.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=400, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=8,
        )  # fmt: skip
        both.append(LlamaForCausalLM(config).eval().requires_grad_(False))
    pair = ModelPair.of(both[0], both[1], tokenizer())
    (seedling,) = pair.texts(["the cat"])
    g, n = torch.Generator().manual_seed(0), 256
    several = (
        replace(
            seedling, ids=tuple(torch.randint(3, 400, (n,), generator=g).tolist()),
            offsets=((0, 0),) * n, roles=("text",) * n, special=(False,) * n, labels=("",) * n,
            n_prompt=n, text="",
        )
        for _ in range(N_ROWS // (n - 1))
    )  # fmt: skip
    return harvest(pair, several, "resid_pre.0", folder)


class PerRow(Dataset[Any]):
    """Rows one by one, a folder of shards for each model."""

    def __init__(self, store: ActivationStore, folder: Path):
        files = store.files("resid_pre.0")
        self.ends = files.ends.tolist()
        self.sides = []
        for side in range(2):
            shards = []
            for number in range(len(self.ends)):
                shard = files.mapped(number)
                path = folder / f"{side}.{number}.bin"
                if not path.exists():
                    np.ascontiguousarray(shard[:, side]).tofile(path)
                mapped = np.memmap(path, np.uint16, mode="c", shape=(len(shard), WIDTH))
                shards.append(torch.from_numpy(mapped).view(torch.bfloat16))
            self.sides.append(shards)

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, index):
        number = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (self.ends[number - 1] if number else 0)
        return torch.stack([side[number][row] for side in self.sides])


def bench_reading(variant, folder):
    """Time and memory of random batches of 2048 rows, whole epochs."""
    store = ActivationStore.open(folder / "store") if variant else stored(folder / "store")
    data = PerRow(store, folder)
    sampler = torch.Generator().manual_seed(0)

    def forever():
        while True:
            yield from DataLoader(data, BATCH, shuffle=True, generator=sampler, drop_last=True)

    one_by_one, shuffled = forever(), store.source().shuffled(BATCH, seed=0)

    def per_row():
        for _ in range(N_BATCHES):
            assert next(one_by_one).shape == (BATCH, 2, WIDTH)

    def gathered():
        index = torch.randperm(len(store), generator=sampler)[: BATCH * N_BATCHES]
        for each in index.split(BATCH):
            assert store.rows("resid_pre.0", each).shape == (BATCH, 2, WIDTH)

    def pooled():
        for _ in range(N_BATCHES):
            assert next(shuffled).acts.shape == (BATCH, 2, WIDTH)

    jobs = {"per_row": per_row, "gathered": gathered, "pooled": pooled}
    if variant:
        report_peak(jobs[variant])
        return
    index = torch.randperm(len(store), generator=sampler)[:500]
    assert torch.equal(
        store.rows("resid_pre.0", index), torch.stack([data[i] for i in index.tolist()])
    )
    about = {
        "n_rows": len(store),
        "mb": round(store.files("resid_pre.0").row_bytes * len(store) / 1e6),
    }
    for name in ("gathered", "pooled"):
        memory = {"peak_mb": peak_memory(__spec__.name, f"{name}:{folder}"),
                  "reference_peak_mb": peak_memory(__spec__.name, f"per_row:{folder}")}  # fmt: skip
        result = ratio(per_row, jobs[name], rounds=5)
        speed = {"rows_per_s": round(BATCH * N_BATCHES / result["ours_s"])}
        show(f"random read, {name} vs per row", result | speed | about | memory)


def main(variant=""):
    """Check equality, then print ratios and peaks as lines of JSON."""
    torch.set_num_threads(1)
    name, _, where = variant.partition(":")
    if not variant or name.startswith("harvest"):
        bench_harvest(name)
    if where:
        bench_reading(name, Path(where))
    elif not variant:
        with tempfile.TemporaryDirectory() as folder:
            bench_reading("", Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
