"""Answers of both models: time to the first token, and 40 tokens x 4 samples x 2 models.

Run: ``python -m tests.benchmarks.gpu_generate [small]``. The reference makes one call of
transformers' ``generate`` a model, four samples each. The limit is one reading of all weights a
step. What a static cache and CUDA graphs would gain is measured with transformers' own compiled
step (``compiled``), on one model without edits; it takes a minute to compile and is left out unless
it is asked for: ``python -m tests.benchmarks.gpu_generate compiled``.
"""

import sys

import torch

from tests.benchmarks.gpu_common import (
    BANDWIDTH,
    Result,
    device,
    milliseconds,
    random_pair,
    random_texts,
    show,
)

PROMPT, TOKENS, SAMPLES = 32, 40, 4
GOAL_MS = 350.0


def reference(pair, ids, n_tokens, **options):
    """One call of transformers' generate a model."""
    rows = torch.tensor([ids] * SAMPLES, device=device())
    for side in ("base", "finetuned"):
        with pair.sides.on(side) as root, torch.no_grad():
            root.generate(
                input_ids=rows, attention_mask=torch.ones_like(rows), do_sample=True,
                max_new_tokens=n_tokens, min_new_tokens=n_tokens, pad_token_id=0, **options,
            )  # fmt: skip


def main(small=False, compiled=False):
    pair, _ = random_pair(small)
    tokens = 4 if small else TOKENS
    (made,) = random_texts([PROMPT], pair.sides.config.vocab_size)
    ids, text = list(made.ids), made.text
    base = {id(p): p.nbytes for p in pair.sides.roots[0].parameters()}
    floor = 1e3 * sum(base.values()) / BANDWIDTH
    runs = {
        "first": lambda: pair.generate([text], n=SAMPLES, max_new_tokens=1),
        "answers": lambda: pair.generate([text], n=SAMPLES, max_new_tokens=tokens),
        "reference": lambda: reference(pair, ids, tokens),
    }
    if compiled:
        runs["compiled"] = lambda: reference(pair, ids, tokens, cache_implementation="static")
    found, rounds = milliseconds(runs, 1 if small else 7, warm=1 if small else 3)
    shape = f"{tokens} tokens x {SAMPLES} samples x 2 models, prompt {PROMPT}"
    results = [
        Result("first token of both models", found["first"], "ms", limit=floor),
        Result(
            shape, found["answers"], "ms", GOAL_MS, floor * tokens, about={"rounds_ms": rounds}
        ),
        Result(
            f"{shape}: two calls of transformers over ours",
            found["reference"] / found["answers"], "x", least=True,
            about={"reference_ms": found["reference"]},
        ),
    ]  # fmt: skip
    if compiled:
        about = {"note": "static cache, compiled step, no edits, two calls"}
        results.append(Result(f"{shape}: compiled", found["compiled"], "ms", about=about))
    return show(results)


if __name__ == "__main__":
    main("small" in sys.argv, "compiled" in sys.argv)
