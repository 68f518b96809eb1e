"""Amplified sampling: its ends are the fine-tune and the base, and logits are linear between."""

from threading import Event
from typing import Any

import pytest
import torch

from modeldiff.amplification import amplify, edit_name
from modeldiff.errors import Cancelled, InterventionError, MaskError
from modeldiff.forward import run
from modeldiff.generation import generate
from modeldiff.hooks import count_hooks
from tests.families import build, build_adapter_pair
from tests.planted import WORD, planted_pair

PROMPTS = ["the cat", "a small bird sang of rain", "the cat", "moon"]


def ids(answers):
    return [answer.ids for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "make", [build_adapter_pair, lambda: build("llama"), lambda: build("gemma2"),
             lambda: build_adapter_pair(family="gpt2", modules=("c_proj",), fan_in_fan_out=True)],
)  # fmt: skip
def test_strength_0_is_the_fine_tune_and_minus_1_the_base_token_by_token(make, temperature):
    pair = make()
    options = {"n": 2, "seed": 7, "temperature": temperature, "max_new_tokens": 8}
    want = generate(pair.sides, PROMPTS, **options)
    found = amplify(pair.sides, PROMPTS, [0.0, -1.0, 2.0], max_rows=5, **options)
    assert ids(found.of("finetuned", edit_name(0))) == ids(want.of("finetuned"))
    assert ids(found.of("finetuned", edit_name(-1))) == ids(want.of("base"))
    assert ids(found.of("finetuned", edit_name(2))) != ids(want.of("finetuned"))
    assert len(found) == 3 * len(PROMPTS) * 2


def test_a_greedy_token_is_the_argmax_of_the_amplified_logits():
    pair = build_adapter_pair()
    [answer] = amplify(pair.sides, PROMPTS[:1], 1.5, temperature=0, max_new_tokens=4).answers
    [text] = pair.texts(PROMPTS[:1])
    so_far = list(text.ids)
    for token in answer.ids:
        logits = []
        for side in ("base", "finetuned"):
            with pair.sides.on(side) as root, torch.no_grad():
                logits.append(root(torch.tensor([so_far])).logits[0, -1])
        base, tuned = logits
        assert int((tuned + 1.5 * (tuned - base)).argmax()) == token
        so_far.append(token)


def test_what_was_taught_becomes_more_frequent_with_the_strength():
    pair, _ = planted_pair(strength=3.0)
    word = WORD.replace("Ġ", "")
    found = amplify(pair.sides, PROMPTS[:2], [-1.0, 0.0, 3.0, 12.0], n=16, max_new_tokens=6)
    counts = [sum(a.text.count(word) for a in found.of("finetuned", edit_name(s)))
              for s in (-1.0, 0.0, 3.0, 12.0)]  # fmt: skip
    assert counts == sorted(counts)
    assert counts[-1] > counts[0] + 20


def test_rows_do_not_depend_on_the_batch_and_the_pair_is_left_as_it_was():
    pair = build_adapter_pair()
    hooks = count_hooks(pair.sides.roots[0])
    before: Any = run(pair.sides, PROMPTS[:1], side="finetuned").logits
    together = amplify(pair.sides, PROMPTS, 0.7, n=3, max_new_tokens=6)
    alone = amplify(pair.sides, PROMPTS, 0.7, n=3, max_new_tokens=6, max_rows=1)
    assert ids(together.answers) == ids(alone.answers)
    assert count_hooks(pair.sides.roots[0]) == hooks
    after: Any = run(pair.sides, PROMPTS[:1], side="finetuned").logits
    assert torch.equal(after, before)


def test_cancelling_keeps_what_is_finished_and_nonsense_is_refused():
    pair, cancel = build_adapter_pair(), Event()

    def stop(done, total, message):
        cancel.set()

    with pytest.raises(Cancelled) as stopped:
        amplify(pair.sides, PROMPTS, max_rows=1, max_new_tokens=2, cancel=cancel, progress=stop)
    assert len(stopped.value.partial) == 1
    with pytest.raises(InterventionError, match="temperature"):
        amplify(pair.sides, PROMPTS, temperature=-1)
    with pytest.raises(InterventionError, match="not finite"):
        amplify(pair.sides, PROMPTS, 1e38)
    nothing: Any = ({"n": 0}, {"strengths": []}, {"strengths": [1.0, 1.0]})
    for bad in nothing:
        with pytest.raises(MaskError, match="nothing to generate"):
            amplify(pair.sides, PROMPTS, **bad)
