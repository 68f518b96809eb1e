"""Answers of both models: time to the first token, and 40 tokens x 4 samples x 2 models.

Run: ``python -m tests.benchmarks.gpu_generate [small]``. The reference makes one call of
transformers' ``generate`` a model, four samples each. The limit is one reading of all weights a
step. Beside it the same answers by a `StaticDecoder`, without and (on a GPU) with CUDA graphs, and
with a steering coefficient that moves at every call. transformers' own compiled step
(``compiled``), on one model without edits, takes a minute to compile and is left out unless it is
asked for: ``python -m tests.benchmarks.gpu_generate compiled``.
"""

import itertools
import statistics
import sys
import time

import torch

from modeldiff.directions import Direction
from modeldiff.interventions import Cell, Plan, Steer
from modeldiff.static_decoding import StaticDecoder
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


def repeated(work, device):
    """Instead of a recording: every step in Python."""
    return work


def arms(pair, text, layer, tokens):
    """The grid through transformers, static and recorded; unedited, and with a moving slider."""
    unit = torch.randn(pair.d_model, generator=torch.Generator().manual_seed(0))
    direction = Direction.of(unit, f"resid_post.{layer}", "slider")
    slider = itertools.count(1)

    def answers(decoder, steered):
        plan = Plan((Steer(direction, 1e-3 * next(slider)),)) if steered else Plan()
        cells = [Cell(side, "steered", plan) for side in ("base", "finetuned")]
        return pair.generate([text], cells=cells, n=SAMPLES, max_new_tokens=tokens, decoder=decoder)

    decoders = {"answers": None, "static": StaticDecoder(record=repeated)}
    if device().type == "cuda":
        decoders["graph"] = StaticDecoder()
    runs = {}
    for name, decoder in decoders.items():
        runs[name] = lambda decoder=decoder: answers(decoder, steered=False)
        runs[f"{name}, slider"] = lambda decoder=decoder: answers(decoder, steered=True)
    return runs, decoders


def processor_ms(runs, rounds=5):
    """Median milliseconds of this process's own time, which others on the machine do not change."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def main(small=False, compiled=False):
    pair, layer = random_pair(small)
    tokens = 4 if small else TOKENS
    (made,) = random_texts([PROMPT], pair.sides.config.vocab_size)
    ids, text = list(made.ids), made.text
    base = {id(p): p.nbytes for p in pair.sides.roots[0].parameters()}
    floor = 1e3 * sum(base.values()) / BANDWIDTH
    ours, decoders = arms(pair, text, layer, tokens)
    runs = {
        "first": lambda: pair.generate([text], n=SAMPLES, max_new_tokens=1),
        **ours,
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
    spent = processor_ms(ours) if device().type == "cpu" else {}
    for name in list(decoders)[1:]:
        for each, plain in ((name, "answers"), (f"{name}, slider", "answers, slider")):
            about = {"ms": found[each], "transformers_ms": found[plain], "processor_ms": spent}
            ratio = (spent or found)[plain] / (spent or found)[each]
            results.append(Result(f"{shape}: transformers over {each}", ratio, "x", about=about))
        recorded = Result(f"{name}: recordings", decoders[name].n_recorded, "steps", goal=2)
        results.append(recorded)  # one unedited, one for all places of the slider
    if compiled:
        about = {"note": "static cache, compiled step, no edits, two calls"}
        results.append(Result(f"{shape}: compiled", found["compiled"], "ms", about=about))
    return show(results)


if __name__ == "__main__":
    main("small" in sys.argv, "compiled" in sys.argv)
