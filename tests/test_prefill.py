"""A kept prefill changes nothing but the work: logits bit for bit, layers counted."""

# pyright: reportArgumentType=false

import gc
import weakref

import pytest
import torch

from modeldiff import generation
from modeldiff.directions import Direction
from modeldiff.hooks import count_hooks
from modeldiff.interventions import Ablate, Clamp, Plan, Replace, ScaleAdapter, Steer
from modeldiff.prefill import Prefill
from tests.families import FAMILIES, N_LAYERS, WIDTH, build, build_adapter_pair

PROMPTS = ["the cat sat on", "a small bird sang of rain and sun over"]


def direction(layer, kind="resid_post"):
    generator = torch.Generator().manual_seed(layer)
    return Direction.of(torch.randn(WIDTH, generator=generator), f"{kind}.{layer}", f"d{layer}")


@pytest.fixture
def seen(monkeypatch):
    """Every logits row that a token was drawn from."""
    kept = []

    class Recording(generation.Sampler):
        def __call__(self, input_ids, scores):
            kept.append(scores.clone())
            return super().__call__(input_ids, scores)

    monkeypatch.setattr(generation, "Sampler", Recording)
    return kept


def logits_of(pair, seen, prefill, prompts=PROMPTS, **options):
    seen.clear()
    found = pair.generate(prompts, max_new_tokens=4, n=2, prefill=prefill, **options)
    return list(seen), [answer.ids for answer in found.answers]


def check_equal(pair, seen, prefill, **options):
    plain = logits_of(pair, seen, None, **options)
    kept = logits_of(pair, seen, prefill, **options)
    assert plain[1] == kept[1]
    assert len(plain[0]) == len(kept[0])
    assert all(torch.equal(*both) for both in zip(plain[0], kept[0], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_bit_for_bit_and_lower_layers_are_not_run(family, seen):
    modules = {"gpt2": "mlp.c_proj", "gpt_neox": "dense_4h_to_h"}.get(family, "down_proj")
    pair, prefill = build_adapter_pair(family=family, modules=(modules,)), Prefill()
    hooks = count_hooks(pair.sides.roots[0])
    for coefficient in (1.0, 2.5, -3.0):
        do = {"a": Steer(direction(2), coefficient), "b": Ablate(direction(3), layers=None)}
        check_equal(pair, seen, prefill, do=do)
        if coefficient == 1.0:
            assert prefill.n_reused == 0
        else:
            assert prefill.n_reused == N_LAYERS - 1  # an output's edit comes after its layer
    assert count_hooks(pair.sides.roots[0]) == hooks
    assert not any("forward" in module.__dict__ for module in pair.sides.roots[0].modules())


@pytest.mark.parametrize(
    ("edit", "reused"),
    [
        (Steer(direction(1), 2.0, where="new"), N_LAYERS),
        (Clamp(direction(1, "resid_pre"), 3.0), 1),
        (Steer(direction(1, "mlp_out"), 3.0, where="prompt"), 1),
        (Plan((Steer(direction(3), 1.0), Ablate(direction(0)))), 1),
        (Ablate(direction(2), layers="all"), 1),
        (Replace("resid_post.1", "base", where="prompt"), 2),
        (ScaleAdapter(0.5), 1),
    ],
    ids=lambda each: str(each)[:20],
)
def test_what_an_edit_reaches_is_run_again(edit, reused, seen):
    pair, prefill = build_adapter_pair(family="llama"), Prefill()
    options = {"do": {"edited": edit}, "models": ("finetuned",)}
    for _ in range(2):
        check_equal(pair, seen, prefill, **options)
    assert prefill.n_reused == reused


def test_a_lower_edit_uses_less_and_a_higher_one_adds_to_what_is_kept(seen):
    pair, prefill = build("llama"), Prefill()
    found = []
    for layer in (1, 2, 0, 2):
        check_equal(pair, seen, prefill, do={"x": Steer(direction(layer), 1.5)}, models=["base"])
        found.append(prefill.n_reused)
    assert found == [0, 2, 1, 3]


def test_other_prompts_cells_sides_and_models_are_not_mixed_up(seen):
    pair, other, prefill = build_adapter_pair(family="llama"), build("llama"), Prefill()
    for each in (pair, other, pair, other):
        check_equal(each, seen, prefill, models=["base"])
        check_equal(each, seen, prefill, models=["finetuned"])
        check_equal(each, seen, prefill, prompts=PROMPTS[:1])
    check_equal(pair, seen, prefill, prompts=["why"])
    assert prefill.n_reused == 0


def test_a_window_that_slides_is_not_kept_wrongly(seen):
    pair, prefill = build("mistral"), Prefill()
    long = ["the cat sat on the mat and the dog ran to the old house by the river " * 5]
    for _ in range(2):
        check_equal(pair, seen, prefill, prompts=long, do={"x": Steer(direction(3), 2.0)})


def test_what_is_kept_is_bounded_and_let_go():
    pair, prefill = build("llama"), Prefill(n_batches=2)
    for prompt in ("the", "cat", "sat", "on"):
        pair.generate([prompt], models=["base"], max_new_tokens=1, prefill=prefill)
        assert len(prefill._kept) <= 2
    root = weakref.ref(pair.sides.roots[0])
    del pair, prefill
    gc.collect()
    assert root() is None
