"""A crosscoder of two real models that were trained independently.

Run: ``MODELDIFF_REAL=FOLDER python -m tests.benchmarks.bench_real_dictionary``. The folder holds
``stories260K`` (karpathy's tinyllamas), ``llama2xs-500it`` (another model of its size, with the
same tokenizer) and ``tinystories_2MiB.txt``. They share no weights, so that most latents may well
be of one model alone; the null beside it pairs stories260K with itself.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from modeldiff.dictionaries import (
    TrainConfig,
    classify,
    crosscoder,
    evaluate,
    latent_scaling,
    train,
)
from modeldiff.dictionaries.matching import match
from modeldiff.harvesting import harvest
from modeldiff.models import ModelPair
from tests.benchmarks.timing import show

SITE, LATENTS, K = "resid_post.2", 512, 16


def fitted(pair, texts, folder, seed=0):
    """Harvest, train, and what came of it."""
    store = harvest(pair, texts, SITE, folder)
    source = store.source(SITE)
    made = crosscoder(pair.d_model, LATENTS, k=K, site=SITE, seed=seed)
    made.set_normaliser(store.normaliser(SITE))
    train(made, source, TrainConfig(steps=2000, batch_size=1024, seed=seed))
    measured = evaluate(made, source)
    table = classify(made, latent_scaling(made, source))
    counts = {str(k): int(v) for k, v in table["class"].value_counts().items() if v}
    heavy = table["relative_decoder_norm"]
    return made, {
        "tokens": len(store),
        "fve": [round(each, 4) for each in measured.fve],
        "l0": round(measured.l0, 2),
        "dead": round(measured.dead, 4),
        "classes": counts,
        "norm above .9 or below .1": int(((heavy > 0.9) | (heavy < 0.1)).sum()),
    }


def main():
    """Both pairs, and how alike two seeds are."""
    torch.set_num_threads(1)
    folder = Path(os.environ["MODELDIFF_REAL"])
    stories = (folder / "tinystories_2MiB.txt").read_text().split("<|endoftext|>")[:600]
    texts = [" ".join(story.split())[:600] for story in stories if len(story) > 200]
    one, other = folder / "stories260K", folder / "llama2xs-500it"
    with tempfile.TemporaryDirectory() as scratch:
        pair = ModelPair.load(one, other)
        made, result = fitted(pair, texts, Path(scratch) / "two")
        show("stories260K against llama2xs-500it", result)
        again, _ = fitted(pair, texts, Path(scratch) / "two", seed=1)
        show("two seeds of it", {"novel share": round(match(made, again).novel_share, 3)})
        same = ModelPair.load(one, one, allow_identical=True)
        _, null = fitted(same, texts, Path(scratch) / "same")
        show("stories260K against itself", null)
    if any(null["classes"].get(each) for each in ("base-only", "finetuned-only")):
        sys.exit("a latent of the null pair is called exclusive")


if __name__ == "__main__":
    main()
