"""``capture`` and ``output_diff`` against a straightforward implementation with two models.

Run: ``python -m tests.benchmarks.bench_pair``. The reference loads base and fine-tune apart (the
adapter merged), registers a hook, pads texts in the order they come in batches of 12, and runs both
models to the end; ``early exit`` stops after the layer that is captured. Its output diff makes the
logits of a batch for both models and compares them in float32. Both compute the same numbers, which
is checked before anything is timed.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from modeldiff.divergence import compare
from modeldiff.hooks import stopping
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from tests.benchmarks.timing import peak_memory, ratio, report_peak, show
from tests.families import tokenizer

LAYERS, ADAPTED, READ = 12, 6, 7
N_TEXTS, BATCH = 24, 12


def models(vocab=8_000, width=384):
    """A random 12-layer pair: an adapter of rank 8 from layer 6 on, and the same thing merged."""
    torch.random.default_generator.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    settings = LoraConfig(r=8, lora_alpha=64, target_modules=["down_proj"],
                          layers_to_transform=list(range(ADAPTED, LAYERS)))  # fmt: skip
    import copy

    plain = copy.deepcopy(base)
    peft = get_peft_model(base, settings).eval()
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft.requires_grad_(False)
    merged = copy.deepcopy(peft).merge_and_unload().eval()
    return ModelPair.of(peft, None, tokenizer()), plain, merged


def texts(pair, seed=0):
    """Ragged texts: lengths from 16 to 192 tokens, mean near 65, as web text has them."""
    g = torch.Generator().manual_seed(seed)
    (seedling,) = pair.texts(
        ["the cat sat on the mat and the dog ran to the old house by the river"]
    )
    lengths = (16 + 176 * torch.rand(N_TEXTS, generator=g) ** 2.5).int().tolist()
    from dataclasses import replace

    made = []
    for n in lengths:
        ids = tuple(torch.randint(3, pair.sides.config.vocab_size, (n,), generator=g).tolist())
        made.append(
            replace(
                seedling, ids=ids, offsets=((0, 0),) * n, roles=("text",) * n,
                special=(False,) * n, labels=("",) * n, n_prompt=n, text="",
            )
        )  # fmt: skip
    return tuple(made)


def padded(several):
    """Batches in the order the texts come, padded to the longest."""
    for start in range(0, len(several), BATCH):
        chunk = several[start : start + BATCH]
        width = max(text.n_tokens for text in chunk)
        ids = torch.zeros(len(chunk), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(chunk):
            ids[row, : text.n_tokens] = torch.tensor(text.ids)
            mask[row, : text.n_tokens] = 1
        yield ids, mask


@torch.no_grad()
def reference_capture(plain, merged, several, early):
    """Both models one after the other, a hook at the layer, boolean mask."""
    rows = []
    for model in (plain, merged):
        kept = []
        handle = model.model.layers[READ].register_forward_hook(
            lambda m, a, out, k=kept: k.append(out)
        )
        for ids, mask in padded(several):
            if early:
                with stopping(model, f"model.layers.{READ}"):
                    model(input_ids=ids, attention_mask=mask, use_cache=False)
            else:
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            keep = mask.bool().clone()
            keep[:, 0] = False
            kept[-1] = kept[-1][keep]
        handle.remove()
        rows.append(torch.cat(kept))
    return rows


@torch.no_grad()
def reference_outputs(plain, merged, several, k=10):
    """Logits of a whole batch for both models, then the same metrics on all its tokens."""
    kls = []
    for ids, mask in padded(several):
        both = [
            m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (plain, merged)
        ]
        keep = mask[:, 1:].bool()
        base, tuned = (logits[:, :-1][keep].float() for logits in both)
        found = compare(base, tuned, ids[:, 1:][keep], k)
        found.log_ratio.topk(k, -1), found.log_ratio.topk(k, -1, largest=False)
        found.log_ratio.sum(0), found.moved.sum(0)
        kls.append(found.kl_fb)
    return torch.cat(kls)


def main(variant=""):
    """Check equality, then print ratios and peaks as lines of JSON."""
    torch.set_num_threads(1)
    pair, plain, merged = models()
    several = texts(pair)
    site = Site("resid_post", READ)
    jobs = {
        "capture": lambda: pair.capture(several, site, on="all"),
        "capture_reference": lambda: reference_capture(plain, merged, several, early=False),
        "capture_early": lambda: reference_capture(plain, merged, several, early=True),
        "outputs": lambda: pair.output_diff(several),
        "outputs_reference": lambda: reference_outputs(plain, merged, several),
    }
    if variant:
        report_peak(jobs[variant])
        return
    ours, theirs = jobs["capture"](), jobs["capture_reference"]()
    worst = max(float((a - b).abs().max()) for a, b in
                zip((ours.base[site], ours.finetuned[site]), theirs, strict=True))  # fmt: skip
    n_tokens = sum(text.n_tokens for text in several)
    common = {"n_texts": N_TEXTS, "n_tokens": n_tokens, "max_difference": worst}
    for name in ("capture_reference", "capture_early"):
        result = ratio(jobs[name], jobs["capture"])
        memory = {"peak_mb": peak_memory(__spec__.name, "capture"),
                  "reference_peak_mb": peak_memory(__spec__.name, name)}  # fmt: skip
        show(f"capture vs {name}", result | common | memory)
    mine, dense = (
        jobs["outputs"]().tokens["kl_ft_base"].mean(),
        float(jobs["outputs_reference"]().mean()),
    )
    result = ratio(jobs["outputs_reference"], jobs["outputs"])
    memory = {"peak_mb": peak_memory(__spec__.name, "outputs"),
              "reference_peak_mb": peak_memory(__spec__.name, "outputs_reference")}  # fmt: skip
    show("output_diff vs reference", result | memory | {"mean_kl": [float(mine), dense]})


if __name__ == "__main__":
    main(*sys.argv[1:])
