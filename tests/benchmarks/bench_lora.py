"""The LoRA lab against straightforward implementations that give the same numbers.

Run: ``python -m tests.benchmarks.bench_lora``. One line of JSON each:

- leave one out and leave one in of every module of an adapter, many variants a batch with shared
  layers run once, against one run of the whole batch per module and way;
- the decomposition of ``scale * B A`` from thin factors, and the randomised one of a dense change,
  against the dense singular value decomposition;
- the streamed weight diff against loading both models and subtracting.

Equality is checked before anything is timed. ``python -m tests.benchmarks.bench_lora seven_b``
prints the peak memory on matrices of a 7B model (2.5 GB of temporary files).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from modeldiff.batching import mask_tensor
from modeldiff.divergence import kl_and_loss, unembedding
from modeldiff.forward import batched, final_states
from modeldiff.interventions import Plan, ScaleAdapter
from modeldiff.lora_variants import Variant, variant_kl
from modeldiff.models import ModelPair
from modeldiff.weight_spectra import factored_svd, randomized_svd
from modeldiff.weights import weight_diff
from tests.benchmarks.timing import peak_memory, ratio, report_peak, show
from tests.families import tokenizer

LAYERS, VOCAB, WIDTH = 12, 4_000, 256
TEXT = "the cat sat on the mat and the dog ran to the old house by the river"


def config():
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip


def model(seed=0):
    torch.random.default_generator.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config()).eval().requires_grad_(False)


def adapter_pair():
    """A rank-1 adapter on the down projection of every layer."""
    settings = LoraConfig(r=1, lora_alpha=16, target_modules=["down_proj"])
    peft = get_peft_model(model(), settings).eval().requires_grad_(False)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return ModelPair.of(peft, None, tokenizer())


def texts(pair, n_texts=4, n_tokens=24):
    """Short answers, as leave-one-out is run on."""
    generator = torch.Generator().manual_seed(0)
    words = TEXT.split()
    made = []
    for _ in range(n_texts):
        order = torch.randint(len(words), (n_tokens,), generator=generator).tolist()
        made.append(" ".join(words[i] for i in order))
    return pair.texts(made)


def variants(n):
    """Every module left out, then every module alone on the base."""
    eye = np.eye(n)
    return [Variant(tuple(row)) for row in [*(1 - eye).tolist(), *eye.tolist()]]


@torch.no_grad()
def one_run_each(pair, several):
    """One run of the batch per variant, from the first layer on, with ordinary edits."""
    sides = pair.sides
    head = unembedding(sides.roots[1], sides.site_map)
    n = len(sides.lora)
    out = np.full((2, n, len(several)), np.nan)
    for batch in batched(sides, several, 4096):
        keep = mask_tensor(batch, "all")
        keep[:, 0] = False
        row, column = keep.nonzero(as_tuple=True)

        def predicting(side, plan, batch=batch, row=row, column=column):
            return final_states(sides, batch, side, plan)[row, column - 1]

        full, base = predicting("finetuned", Plan()), predicting("base", Plan())
        owner, came = torch.tensor(batch.order)[row], batch.ids[keep]
        for number, variant in enumerate(variants(n)):
            off = [site for site, f in zip(sides.lora, variant.factors, strict=True) if f == 0]
            edits = [ScaleAdapter(0.0, layers=s.layer, modules=(s.module,)) for s in off]
            mine = predicting("finetuned", Plan(tuple(edits)))
            p, q = (full, mine) if number < n else (mine, base)
            kl, _ = kl_and_loss(p, q, head, head, came, 256 << 20)
            for text in batch.order:
                out[int(number >= n), number % n, text] = float(kl[owner == text].mean())
    return out[0], out[1]


def leave_one_out(variant=""):
    pair = adapter_pair()
    several, n = texts(pair), LAYERS
    jobs = {
        "ours": lambda: variant_kl(pair.sides, several, variants(n), on="all"),
        "reference": lambda: one_run_each(pair, several),
    }
    if variant:
        report_peak(jobs[variant])
        return
    from_full, to_base = jobs["ours"]()
    removed, alone = jobs["reference"]()
    gaps = (from_full[:n] - removed, to_base[n:] - alone)
    worst = max(float(np.abs(each).max()) for each in gaps)
    result = ratio(jobs["reference"], jobs["ours"])
    facts = {"variants": 2 * n, "texts": len(several), "max_difference": worst}
    show("leave-one-out and -in vs one run each", result | facts | memory("leave_one_out"))


def memory(name):
    return {f"{which}_peak_mb": peak_memory(__spec__.name, f"{name}:{which}")
            for which in ("ours", "reference")}  # fmt: skip


def spectra():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 2048, generator=generator), torch.randn(1024, 8, generator=generator)
    found = factored_svd(a, b, 2.0)
    dense = torch.linalg.svdvals(2.0 * b.double() @ a.double())[:8]
    worst = float((found.singular - dense).abs().max() / dense[0])
    result = ratio(lambda: torch.linalg.svd((2.0 * b @ a).double(), full_matrices=False),
                   lambda: factored_svd(a, b, 2.0))  # fmt: skip
    show("factored vs dense SVD, rank 8 of 1024 x 2048", result | {"max_relative_error": worst})
    change = b @ a / 50 + 0.05 * torch.randn(1024, 2048, generator=generator)
    found = randomized_svd(change, 16)
    dense = torch.linalg.svdvals(change)[:16]
    worst = float(((found.singular - dense).abs() / dense)[:8].max())
    result = ratio(lambda: torch.linalg.svd(change, full_matrices=False),
                   lambda: randomized_svd(change, 16))  # fmt: skip
    show("randomised vs dense SVD, 16 of 1024 x 2048 (noisy)",
         result | {"max_relative_error_of_first_8": worst})  # fmt: skip


def folders(at):
    for seed, name in ((0, "a"), (1, "b")):
        if not (at / name).exists():
            model(seed).to(torch.bfloat16).save_pretrained(at / name, max_shard_size="20MB")
    return at / "a", at / "b"


def load_both(base, tuned):
    """Both models in memory, all differences in float32."""
    one, other = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (base, tuned))
    changes = {name: other[name].float() - one[name].float() for name in one}
    return {name: float(change.norm()) for name, change in changes.items()}


def weight_norms(variant="", folder=""):
    if not folder:
        with tempfile.TemporaryDirectory() as made:
            weight_norms("", made)
        return
    at = Path(folder)
    base, tuned = folders(at)
    jobs = {
        "ours": lambda: weight_diff(base, tuned, rank=0),
        "reference": lambda: load_both(base, tuned),
    }
    if variant:
        report_peak(jobs[variant])
        return
    found = jobs["ours"]()
    table, dense = found.table.set_index("name"), jobs["reference"]()
    worst = max(
        abs(row["change"] - dense[name]) / (dense[name] or 1) for name, row in table.iterrows()
    )
    size = sum(path.stat().st_size for path in at.glob("*/*.safetensors"))
    peaks = {f"{w}_peak_mb": peak_memory(__spec__.name, f"weight_norms:{w}:{at}") for w in jobs}
    facts = {
        "both_files_mb": round(size / 1e6, 1),
        "counted_peak_mb": round(found.peak_bytes / 1e6, 1),
        "max_relative_error": worst,
    }
    result = ratio(jobs["reference"], jobs["ours"])
    show("weight diff vs both models in memory (norms)", result | peaks | facts)


def seven_b():
    """Peak memory of the diff with spectra on the largest matrices of a 7B model, in bfloat16."""
    from safetensors.torch import save_file

    shapes = {"model.embed_tokens.weight": (152064, 3584),
              "model.layers.0.mlp.down_proj.weight": (3584, 18944)}  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        for seed, name in enumerate("ab"):
            generator = torch.Generator().manual_seed(seed)
            (Path(made) / name).mkdir()
            save_file(
                {n: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                 for n, s in shapes.items()},
                Path(made) / name / "model.safetensors",
            )  # fmt: skip
        report_peak(lambda: weight_diff(Path(made) / "a", Path(made) / "b"))


def main(variant=""):
    torch.set_num_threads(1)
    name, *rest = variant.split(":")
    if variant:
        jobs = {"leave_one_out": leave_one_out, "weight_norms": weight_norms, "seven_b": seven_b}
        jobs[name](*rest)
        return
    leave_one_out()
    spectra()
    weight_norms()


if __name__ == "__main__":
    main(*sys.argv[1:])
