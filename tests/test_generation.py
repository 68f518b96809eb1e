"""Generation: against transformers itself, row by row; shared noise; ends, cancelling, edits."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

from collections import defaultdict
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, InterventionError, MaskError
from modeldiff.generation import Row
from modeldiff.hooks import count_hooks
from modeldiff.interventions import (
    Ablate,
    Cell,
    Clamp,
    Plan,
    Replace,
    ScaleAdapter,
    Steer,
    grid,
)
from modeldiff.masks import Regex
from modeldiff.models import ModelPair
from modeldiff.sampling import choose, noise
from tests.families import FAMILIES, WIDTH, build, build_adapter_pair, model, peft_model, tokenizer

PROMPTS = ["the cat sat on", "a small bird sang of rain and sun over", "why"]
ENGINES = ("hooks", "nnsight")


def direction(seed=0, site="resid_post.1", width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return Direction.of(torch.randn(width, generator=generator), site, f"d{seed}")


STEER = Steer(direction(), 2.0)
EDITS = {
    "steer": STEER,
    "new": Steer(direction(1), 3.0, where="new"),
    "prompt": Clamp(direction(2), 4.0, where="prompt"),
    "ablate": Ablate([direction(3), direction(4)]),
}


def ids_of(generations):
    return {(a.side, a.edit, a.prompt, a.sample): a.ids for a in generations.answers}


WORDS = tokenizer()


def transformers_greedy(root, prompt, n_new):
    """What plain transformers answers to one prompt."""
    ids = torch.tensor([WORDS(prompt).input_ids])
    with torch.no_grad():
        out = root.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n_new,
        )
    return tuple(out[0, ids.shape[1] :].tolist())


# ---------------------------------------------------------------- the right answers


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_plain_transformers(family_pairs, family, engine):
    pair = family_pairs[family]
    out = pair.generate(PROMPTS, temperature=0, max_new_tokens=8, engine=engine)
    for answer in out.answers:
        truth = transformers_greedy(pair.sides.root(answer.side), PROMPTS[answer.prompt], 8)
        assert answer.ids == truth
        assert answer.text == WORDS.decode(truth, skip_special_tokens=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_of_a_mixed_adapter_batch_equals_peft(adapter_pair, engine):
    """Base and fine-tuned rows share one batch."""
    out = adapter_pair.generate(PROMPTS, temperature=0, max_new_tokens=8, engine=engine)
    truth = {"base": model("llama"), "finetuned": peft_model()}
    for answer in out.answers:
        assert answer.ids == transformers_greedy(truth[answer.side], PROMPTS[answer.prompt], 8)


ADAPTERS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize(
    ("modules", "engine"),
    [
        ("mlp", "hooks"),
        ("mlp", "nnsight"),
        ("attention", "hooks"),
        ("attention", "nnsight"),
    ],
)
def test_a_mixed_batch_is_exact_whatever_is_adapted(modules, engine):
    options = {"modules": ADAPTERS[modules], "layers": (0, 1, 2, 3)}
    pair = build_adapter_pair(**options)
    out = pair.generate(PROMPTS, temperature=0, max_new_tokens=5, engine=engine)
    truth = {"base": model("llama"), "finetuned": peft_model(**options)}
    for answer in out.answers:
        assert answer.ids == transformers_greedy(truth[answer.side], PROMPTS[answer.prompt], 5)


@pytest.mark.parametrize(
    ("kind", "temperature"), [("adapter", 0.0), ("adapter", 0.9), ("gpt2", 0.9), ("gemma2", 0.0)]
)
def test_a_row_is_the_same_alone_and_in_a_batch(family_pairs, adapter_pair, kind, temperature):
    pair = adapter_pair if kind == "adapter" else family_pairs[kind]
    do = {**EDITS, "adapter": ScaleAdapter(-0.5)} if kind == "adapter" else EDITS
    cells = [c for c in grid(do) if not (c.name == "adapter" and c.side == "base")]
    options = {"temperature": temperature, "max_new_tokens": 6, "seed": 5}
    together = pair.generate(PROMPTS, cells=cells, n=2, **options)
    assert len(together) == len(cells) * len(PROMPTS) * 2
    for cell in cells:
        for index, prompt in enumerate(PROMPTS):
            alone = pair.generate([prompt], cells=[cell], n=2, **options)
            here = [a.ids for a in together.of(cell.side, cell.name) if a.prompt == index]
            assert [a.ids for a in alone.answers] == here
    assert len(set(ids_of(together).values())) > len(cells), "cells that cannot be told apart"


def test_mixed_batches_equal_batches_of_one_side(adapter_pair):
    options = {"do": EDITS, "n": 3, "max_new_tokens": 6, "temperature": 0.9}
    mixed = ids_of(adapter_pair.generate(PROMPTS, **options))
    apart = {}
    for side in ("base", "finetuned"):
        apart.update(ids_of(adapter_pair.generate(PROMPTS, models=(side,), **options)))
    assert mixed == apart


def test_the_prompt_is_not_in_the_answer(adapter_pair):
    out = adapter_pair.generate(PROMPTS, n=4, max_new_tokens=5)
    for answer in out.answers:
        prompt = out.prompts[answer.prompt]
        assert len(answer.ids) <= 5
        assert answer.ids[: prompt.n_tokens] != prompt.ids
        assert prompt.text not in answer.text
    table = out.table()
    assert list(table["prompt"]) == [PROMPTS[a.prompt] for a in out.answers]
    assert list(table["text"]) == [a.text for a in out.answers]
    assert table["n_tokens"].between(1, 5).all()


def test_chats_are_rendered_ready_for_the_answer(adapter_pair):
    out = adapter_pair.generate([[{"role": "user", "content": "why"}]], max_new_tokens=2)
    assert out.prompts[0].text == "<bos><|user|>why<eos><|assistant|>"


def test_one_string_is_one_prompt(adapter_pair):
    assert len(adapter_pair.generate("why", max_new_tokens=1)) == 2


# ---------------------------------------------------------------- common random numbers


def test_the_same_seed_gives_the_same_answers_and_another_does_not(adapter_pair):
    first, again, other = (
        ids_of(adapter_pair.generate(PROMPTS, n=2, seed=seed, max_new_tokens=6))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert sum(first[key] == other[key] for key in first) < len(first) / 2


def test_identical_cells_give_identical_answers(adapter_pair, family_pairs):
    for pair in (adapter_pair, family_pairs["llama"]):
        cells = [Cell("finetuned", "a", STEER + Plan()), Cell("finetuned", "b", Plan() + STEER)]
        out = pair.generate(PROMPTS, cells=cells, n=3, max_new_tokens=6)
        assert [a.ids for a in out.of("finetuned", "a")] == [
            a.ids for a in out.of("finetuned", "b")
        ]
        zero = [Cell("base"), Cell("base", "zero", Plan((Steer(direction(), 0.0),)))]
        out = pair.generate(PROMPTS, cells=zero, n=3, max_new_tokens=6)
        assert [a.ids for a in out.of("base")] == [a.ids for a in out.of("base", "zero")]


def test_samples_differ_and_repeated_prompts_are_more_samples(adapter_pair):
    many = adapter_pair.generate([PROMPTS[0]], n=4, max_new_tokens=6).of("base")
    assert len({a.ids for a in many}) == 4
    twice = adapter_pair.generate([PROMPTS[0]] * 2, n=2, max_new_tokens=6).of("base")
    assert [a.ids for a in twice] == [a.ids for a in many]


@pytest.mark.parametrize("max_rows", [1, 3, 5, 256])
def test_order_of_prompts_and_size_of_batches_do_not_matter(adapter_pair, max_rows):
    options = {"do": STEER, "n": 2, "max_new_tokens": 6, "temperature": 0.9}
    reference = adapter_pair.generate(PROMPTS, **options)
    backwards = adapter_pair.generate(PROMPTS[::-1], max_rows=max_rows, **options)
    turned = {
        (side, edit, len(PROMPTS) - 1 - prompt, sample): ids
        for (side, edit, prompt, sample), ids in ids_of(backwards).items()
    }
    assert turned == ids_of(reference)


def test_answers_come_ordered_by_cell_prompt_and_sample(adapter_pair):
    out = adapter_pair.generate(PROMPTS, do={"s": STEER}, n=2, max_new_tokens=1, max_rows=4)
    cells = [("base", "none"), ("finetuned", "none"), ("base", "s"), ("finetuned", "s")]
    assert [(a.side, a.edit, a.prompt, a.sample) for a in out.answers] == [
        (*cell, prompt, sample) for cell in cells for prompt in range(3) for sample in range(2)
    ]


def test_noise_is_uniform_and_independent():
    drawn = torch.stack([noise(0, [1, 2], sample, 50) for sample in range(400)])
    assert drawn.dtype == torch.float64
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 43.8, "the 0.999 quantile of chi-square with 19 degrees of freedom"
    correlations = torch.corrcoef(drawn.T) - torch.eye(50)
    assert float(correlations.abs().max()) < 0.25
    assert not torch.equal(noise(0, [1, 2], 0, 3), noise(0, [1, 3], 0, 3))
    assert not torch.equal(noise(0, [1, 2], 0, 3), noise(1, [1, 2], 0, 3))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_tokens_follow_the_softmax_with_temperature(temperature):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 12, generator=generator) * 2
    n = 40_000
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    drawn = choose(scores.expand(n, -1), uniform, temperature)
    counts = torch.bincount(drawn, minlength=12).double()
    expected = n * torch.softmax(scores[0].double() / temperature, -1)
    likely = expected > 5
    chi_square = float(((counts - expected)[likely] ** 2 / expected[likely]).sum())
    assert chi_square < 31.3, "the 0.999 quantile with 11 degrees of freedom"


def test_sampled_answers_follow_the_models_distribution(adapter_pair):
    """End to end: first tokens of many samples against the softmax of the logits."""
    n = 600
    for side in ("base", "finetuned"):
        logits = adapter_pair.run([PROMPTS[0]], side=side).logits[0, -1].double()
        expected = torch.softmax(logits / 0.7, -1)
        out = adapter_pair.generate(
            [PROMPTS[0]], n=n, temperature=0.7, max_new_tokens=1, max_rows=1000
        )
        drawn = torch.tensor([a.ids[0] for a in out.of(side)])
        counts = torch.bincount(drawn, minlength=len(expected)).double()
        top = expected.topk(10).indices
        z = (counts[top] - n * expected[top]) / (n * expected[top] * (1 - expected[top])).sqrt()
        assert float(z.abs().max()) < 4
        assert float(counts.sum()) == n


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-30, 30) | st.just(-torch.inf), min_size=2, max_size=8),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_token_of_no_probability_is_never_drawn(scores, uniform):
    row = torch.tensor([scores])
    if torch.isinf(row).all():
        return
    chosen = choose(row, torch.tensor([uniform], dtype=torch.float64), 1.0)
    assert torch.isfinite(row[0, chosen[0]])


def test_temperature_zero_is_greedy():
    scores = torch.tensor([[0.0, 3.0, 2.9], [5.0, 0.0, 0.0]])
    assert choose(scores, torch.tensor([0.99, 0.99]), 0).tolist() == [1, 0]


def test_a_negative_temperature_is_refused(adapter_pair):
    with pytest.raises(InterventionError, match="temperature"):
        adapter_pair.generate(PROMPTS, temperature=-1.0)
    with pytest.raises(InterventionError, match="max_new_tokens=0"):
        adapter_pair.generate(PROMPTS, max_new_tokens=0)


# ---------------------------------------------------------------- ends and defaults


@pytest.mark.parametrize("engine", ENGINES)
def test_settings_of_the_model_do_not_leak_in(engine):
    """Published models carry sampling defaults and penalties; comparisons must not have them."""
    from transformers import GenerationConfig

    pair = build("qwen2")
    expected = ids_of(pair.generate(PROMPTS, max_new_tokens=8, engine=engine))
    carried = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=5.0,
        no_repeat_ngram_size=1, min_new_tokens=8, suppress_tokens=[5, 6, 7, 260], num_beams=3,
        max_length=2, return_dict_in_generate=True, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    for root in pair.sides.roots:
        root.generation_config = carried
    assert ids_of(pair.generate(PROMPTS, max_new_tokens=8, engine=engine)) == expected
    assert all(root.generation_config is carried for root in pair.sides.roots)
    with pytest.raises(ZeroDivisionError):
        pair.generate(PROMPTS, max_new_tokens=8, on_step=lambda rows: 1 / 0, engine=engine)
    assert all(root.generation_config is carried for root in pair.sides.roots)


@pytest.mark.parametrize("engine", ENGINES)
def test_several_end_tokens_of_either_side_end_an_answer(engine):
    pair = build("llama")
    pair.sides.roots[0].generation_config.eos_token_id = [2, 300]
    pair.sides.roots[1].generation_config.eos_token_id = 310
    free = pair.generate(PROMPTS, n=20, max_new_tokens=20, temperature=3.0, engine=engine)
    ends = {2, 300, 310}
    seen = set()
    for answer in free.answers:
        inner = set(answer.ids[:-1])
        assert not inner & ends
        assert answer.finished == (answer.ids[-1] in ends)
        assert answer.finished or len(answer.ids) == 20
        seen |= {(answer.side, answer.ids[-1])} if answer.finished else set()
    assert {end for _, end in seen} == ends
    assert len(seen) > 3, "an end of one side ends answers of the other"


def test_an_ended_row_is_the_same_as_alone(adapter_pair):
    """Rows that ended wait for the others, as padding."""
    options = {"n": 4, "max_new_tokens": 16, "temperature": 3.0}
    adapter_pair.sides.roots[0].generation_config.eos_token_id = list(range(2, 30))
    try:
        together = adapter_pair.generate(PROMPTS, **options)
        assert 0 < sum(a.finished for a in together.answers) < len(together)
        assert len({len(a.ids) for a in together.answers}) > 4
        alone = adapter_pair.generate(PROMPTS, max_rows=1, **options)
        assert ids_of(alone) == ids_of(together)
    finally:
        adapter_pair.sides.roots[0].generation_config.eos_token_id = 2


# ---------------------------------------------------------------- streaming and cancelling


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["adapter", "two"])
def test_streaming_gives_exactly_the_answers(kind, engine):
    pair = build_adapter_pair() if kind == "adapter" else build("llama")
    pair.sides.roots[0].generation_config.eos_token_id = list(range(2, 30))
    got = defaultdict(list)

    def on_step(rows):
        for row, token in rows:
            got[row].append(token)

    cells = grid({"s": STEER})
    out = pair.generate(
        PROMPTS, cells=cells, n=3, max_new_tokens=12, temperature=3.0, max_rows=7,
        on_step=on_step, engine=engine,
    )  # fmt: skip
    names = {(cell.side, cell.name): index for index, cell in enumerate(cells)}
    expected = {Row(names[a.side, a.edit], a.prompt, a.sample): list(a.ids) for a in out.answers}
    assert dict(got) == expected
    assert 0 < sum(a.finished for a in out.answers) < len(out)


@pytest.mark.parametrize("engine", ENGINES)
def test_cancelling_midway_keeps_finished_batches_and_stops_within_a_token(engine):
    pair = build_adapter_pair()
    clean = pair.generate(PROMPTS, max_new_tokens=6)
    before = count_hooks(pair.sides.roots[0])
    stop, steps = Event(), []

    def on_step(rows):
        steps.append(len(rows))
        if len(steps) == 6 + 2:
            stop.set()

    with pytest.raises(Cancelled) as raised:
        pair.generate(
            PROMPTS, max_new_tokens=6, max_rows=2, on_step=on_step, cancel=stop, engine=engine
        )
    assert len(steps) == 6 + 2
    partial = ids_of(raised.value.partial)
    assert len(partial) == 2
    assert partial.items() <= ids_of(clean).items()
    assert count_hooks(pair.sides.roots[0]) == before
    assert ids_of(pair.generate(PROMPTS, max_new_tokens=6, engine=engine)) == ids_of(clean)


def test_cancelled_before_it_starts(adapter_pair):
    stop = Event()
    stop.set()
    with pytest.raises(Cancelled) as raised:
        adapter_pair.generate(PROMPTS, cancel=stop, on_step=lambda rows: 1 / 0)
    assert len(raised.value.partial) == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_in_a_callback_leaves_nothing_behind(engine):
    pair = build_adapter_pair()
    clean = pair.generate(PROMPTS, max_new_tokens=4)
    before = count_hooks(pair.sides.roots[0])

    def on_step(rows):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pair.generate(PROMPTS, do=STEER, max_new_tokens=4, on_step=on_step, engine=engine)
    assert count_hooks(pair.sides.roots[0]) == before
    assert torch.equal(
        pair.run(PROMPTS, side="base").logits, build_adapter_pair().run(PROMPTS, side="base").logits
    )
    assert ids_of(pair.generate(PROMPTS, max_new_tokens=4, engine=engine)) == ids_of(clean)


def test_progress_counts_batches(adapter_pair):
    seen = []
    adapter_pair.generate(
        PROMPTS, max_new_tokens=1, max_rows=2, progress=lambda *report: seen.append(report[:2])
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


# ---------------------------------------------------------------- edits


def stepwise(pair, side, prompt, plans, n_new):
    """Greedy decoding without a cache, through run(): `plans(step)` are the edits of each pass."""
    text = pair.texts([prompt])[0]
    ids = []
    from modeldiff.tokens import with_response

    for step in range(n_new):
        longer = with_response(text, ids, pair.tokenizer) if ids else text
        run = pair.run([longer], side=side, do=plans(step))
        ids.append(int(run.logits[0, -1].argmax()))
    return tuple(ids)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["new", "prompt", "all", "last"])
@pytest.mark.parametrize("kind", ["adapter", "gpt2"])
def test_edits_reach_the_tokens_they_say(family_pairs, adapter_pair, kind, where, engine):
    """With a cache, token by token, as in full passes over the text written so far."""
    pair = adapter_pair if kind == "adapter" else family_pairs[kind]
    edit = Steer(direction(), 4.0, layers=(1, 2), where=where)
    out = pair.generate(PROMPTS, do={"e": edit}, temperature=0, max_new_tokens=6, engine=engine)
    for side in ("base", "finetuned"):
        for answer in out.of(side, "e"):
            plans = lambda step: None if where == "new" and step == 0 else edit  # noqa: E731
            truth = stepwise(pair, side, PROMPTS[answer.prompt], plans, 6)
            assert answer.ids == truth[: len(answer.ids)]
    if where != "last":
        assert [a.ids for a in out.of("base", "e")] != [a.ids for a in out.of("base")]


def test_an_edit_on_new_tokens_leaves_the_first_token_alone(adapter_pair):
    edit = Steer(direction(), 50.0, where="new")
    out = adapter_pair.generate(PROMPTS, do={"e": edit}, n=4, max_new_tokens=4, seed=2)
    for side in ("base", "finetuned"):
        pairs = list(zip(out.of(side), out.of(side, "e"), strict=True))
        assert all(a.ids[0] == b.ids[0] for a, b in pairs)
        assert sum(a.ids[1:] != b.ids[1:] for a, b in pairs) > len(pairs) / 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("max_rows", [1, 256])
def test_replacing_the_prompt_with_the_base(adapter_pair, engine, max_rows):
    """Every layer's prompt from the base, in a batch of several lengths: the base's first token."""
    patch = Replace(tuple(f"resid_post.{layer}" for layer in range(4)), "base", where="prompt")
    out = adapter_pair.generate(
        PROMPTS,
        cells=[Cell("base"), Cell("finetuned"), Cell("finetuned", "patched", Plan((patch,)))],
        temperature=0, max_new_tokens=4, engine=engine, max_rows=max_rows,
    )  # fmt: skip
    first = {
        name: [a.ids[0] for a in out.of(side, edit)]
        for name, side, edit in (
            ("base", "base", "none"),
            ("tuned", "finetuned", "none"),
            ("patched", "finetuned", "patched"),
        )
    }
    assert first["patched"] == first["base"] != first["tuned"]
    for answer in out.of("finetuned", "patched"):
        truth = stepwise(adapter_pair, "finetuned", PROMPTS[answer.prompt], lambda step: patch, 4)
        assert answer.ids == truth


@pytest.mark.parametrize("where", ["all", "new"])
def test_replacing_generated_tokens_is_refused(adapter_pair, where):
    with pytest.raises(InterventionError, match="Use where='prompt'"):
        adapter_pair.generate(
            PROMPTS, models=("finetuned",), do=Replace("resid_post.1", "base", where=where)
        )


def test_replacing_from_a_tensor_is_refused_in_generation(adapter_pair):
    """Rows of a batch are sorted and repeated; a tensor's rows could not be told apart."""
    acts = adapter_pair.run(PROMPTS, side="base", reads="resid_post.1").acts
    (tensor,) = acts.values()
    with pytest.raises(InterventionError, match="tensor"):
        adapter_pair.generate(
            PROMPTS, models=("finetuned",), do=Replace("resid_post.1", tensor, where="prompt")
        )


@pytest.mark.parametrize("max_rows", [1, 256])
def test_whether_an_edit_fired_does_not_depend_on_batches(adapter_pair, max_rows):
    """A pattern that only some prompts contain has fired; one that none contains has not."""
    edit = Steer(direction(), 3.0, where=Regex("cat"))
    out = adapter_pair.generate(PROMPTS, do={"e": edit}, max_new_tokens=3, max_rows=max_rows)
    same = [a.ids == b.ids for a, b in zip(out.of("base"), out.of("base", "e"), strict=True)]
    assert same[1:] == [True, True]
    nowhere = Steer(direction(), 3.0, where=Regex("zebra"))
    with pytest.raises(InterventionError, match="did not fire"):
        adapter_pair.generate(PROMPTS, do={"e": nowhere}, max_new_tokens=3, max_rows=max_rows)


def test_an_adapter_edit_on_the_base_is_refused_before_anything_runs(adapter_pair):
    with pytest.raises(InterventionError, match="needs a side with a LoRA adapter"):
        adapter_pair.generate(PROMPTS, do=ScaleAdapter(0.0), on_step=lambda rows: 1 / 0)


def test_removing_the_adapter_gives_the_base(adapter_pair):
    out = adapter_pair.generate(
        PROMPTS, cells=[Cell("base"), Cell("finetuned", "off", Plan((ScaleAdapter(0.0),)))], n=3
    )
    assert [a.ids for a in out.of("base")] == [a.ids for a in out.of("finetuned", "off")]


# ---------------------------------------------------------------- the grid


def test_grid_names_its_cells():
    named = grid({"up": STEER, "down": Steer(direction(), -1.0)}, models=("finetuned",))
    assert [(c.side, c.name) for c in named] == [
        ("finetuned", "none"),
        ("finetuned", "up"),
        ("finetuned", "down"),
    ]
    assert [(c.side, c.name) for c in grid(STEER)][2:] == [
        ("base", "steer +2x d0"),
        ("finetuned", "steer +2x d0"),
    ]
    assert [len(c.plan) for c in grid(STEER)] == [0, 0, 1, 1]
    assert len(grid(Plan())) == len(grid()) == 2


def test_an_edit_cannot_be_called_none():
    with pytest.raises(InterventionError, match="'none'"):
        grid({"none": STEER})
    assert len(grid({"none": None})) == 2


def test_a_missing_cell_is_an_error_that_lists_the_cells(adapter_pair):
    out = adapter_pair.generate(PROMPTS, do={"up": STEER}, max_new_tokens=1)
    with pytest.raises(KeyError, match=r"\('finetuned', 'upp'\).*'up'"):
        out.of("finetuned", "upp")


def test_nothing_to_generate_is_an_error(adapter_pair):
    for options in (
        {"prompts": []},
        {"prompts": PROMPTS, "cells": []},
        {"prompts": PROMPTS, "n": 0},
    ):
        with pytest.raises(MaskError, match="nothing to generate"):
            adapter_pair.generate(**options)


def test_a_prompt_without_tokens_is_an_error(adapter_pair):
    with pytest.raises(MaskError, match=r"\[1\]"):
        adapter_pair.generate(["why", ""])


def test_the_pair_is_usable_with_its_peft_model_in_training():
    peft = peft_model(lora_dropout=0.5)
    pair = ModelPair.of(peft, None, tokenizer())
    expected = ids_of(pair.generate(PROMPTS, max_new_tokens=4))
    peft.train()
    assert ids_of(pair.generate(PROMPTS, max_new_tokens=4)) == expected
    assert peft.training


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_nan_logits_are_an_error_and_leave_the_model_as_it_was(engine):
    pair = build_adapter_pair()
    before = pair.generate(PROMPTS, temperature=0, max_new_tokens=3)
    blown = Steer(Direction.of(torch.randn(32), "resid_post.1", "d"), float("inf"))
    with pytest.raises(InterventionError, match="are NaN at generated token 0"):
        pair.generate(PROMPTS, do=blown, models=("finetuned",), max_new_tokens=3, engine=engine)
    assert pair.generate(PROMPTS, temperature=0, max_new_tokens=3).answers == before.answers
