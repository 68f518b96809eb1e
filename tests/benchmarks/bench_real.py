"""The audit on a real model, stories260K, with an adapter that is trained on Shakespeare here.

Run: ``MODELDIFF_REAL=FOLDER python -m tests.benchmarks.bench_real``. The folder holds the model
``stories260K`` (karpathy's tinyllamas as safetensors), ``tinyshakespeare.txt`` and
``tinystories_2MiB.txt``. Trains a rank-1 rsLoRA on layer 2 in about 15 s, then audits it.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from modeldiff.audit import Audit
from modeldiff.models import ModelPair
from modeldiff.seeds import seeded
from tests.benchmarks.timing import show

LAYER, STEPS, ROWS, WIDTH = 2, 300, 8, 128


def train(folder, out):
    """Train the adapter on Shakespeare; returns its folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "stories260K")
    base = AutoModelForCausalLM.from_pretrained(folder / "stories260K", dtype=torch.float32)
    text = (folder / "tinyshakespeare.txt").read_text()[:400_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    settings = LoraConfig(r=1, lora_alpha=16, use_rslora=True, target_modules=["down_proj"],
                          layers_to_transform=[LAYER])  # fmt: skip
    with seeded(0):
        tuned = get_peft_model(base, settings)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - WIDTH, (ROWS,), generator=draw).tolist()
        rows = torch.stack([ids[start : start + WIDTH] for start in starts])
        rows[:, 0] = tokenizer.bos_token_id
        optimizer.zero_grad()
        tuned(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    tuned.save_pretrained(out)
    return out


def main():
    """Train, audit, and print the findings and effects."""
    torch.set_num_threads(1)
    folder = Path(os.environ["MODELDIFF_REAL"])
    stories = (folder / "tinystories_2MiB.txt").read_text().split("<|endoftext|>")[:96]
    texts = [" ".join(story.split())[:400] for story in stories if len(story) > 200]
    with tempfile.TemporaryDirectory() as out:
        pair = ModelPair.load(folder / "stories260K", adapter=train(folder, Path(out)))
        report = Audit(pair, texts=texts).run()
    for finding in report.findings:
        sys.stdout.write(f"{finding.holds}: {finding.claim}. {finding.evidence}\n")
    for name in ("effects", "effects_given"):
        frame = report.table(name)
        kl = dict(zip(frame["cell"], frame["kl_to_base"].round(4), strict=True))
        show(name, {"kl_to_base": kl, "n_texts": int(frame["n_texts"].iloc[0])})


if __name__ == "__main__":
    main()
