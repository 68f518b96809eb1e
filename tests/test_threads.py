"""Threads: one model serves several at once, one after the other, and can be told to stop."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.errors import Cancelled
from modeldiff.hooks import count_hooks
from modeldiff.interventions import Ablate, ScaleAdapter, Steer
from modeldiff.loading import lock_of
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from tests.families import WIDTH, build, model, peft_model, tokenizer

TEXTS = ["the cat sat on", "a small bird sang of rain and sun over", "why"]
POST = Site("resid_post", 2)


def direction(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Direction.of(torch.randn(WIDTH, generator=generator), "resid_post.1", f"d{seed}")


def two_adapters():
    peft = peft_model()
    peft.add_adapter("other", peft.peft_config["tuned"])
    generator = torch.Generator().manual_seed(7)
    for name, parameter in peft.named_parameters():
        if ".other." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return peft.eval().requires_grad_(False)


def jobs_of(pair, engine):
    """Calls of every kind, each returning something that can be compared."""
    plan = Steer(direction(), 2.0) + Ablate(direction(1), layers=3)
    jobs = [
        lambda: pair.run(TEXTS, side="base", engine=engine).logits,
        lambda: pair.run(TEXTS, engine=engine).logits,
        lambda: pair.run(TEXTS, do=plan, reads=POST, logits=False, engine=engine).acts[POST],
        lambda: pair.run(TEXTS, side="base", do=plan, engine=engine).logits,
        lambda: [
            a.ids
            for a in pair.generate(TEXTS, do=plan, max_new_tokens=3, seed=1, engine=engine).answers
        ],
        lambda: pair.capture(TEXTS, "resid_post.2").finetuned[POST],
        lambda: pair.capture(TEXTS, "resid_post.2").base[POST],
    ]
    if pair.kind == "adapter":
        jobs.append(lambda: pair.run(TEXTS, do=ScaleAdapter(0.5), engine=engine).logits)
    return jobs


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def hammer(jobs, n_threads=4, rounds=3):
    """Run all jobs in every thread at once, each thread in another order."""
    expected = [job() for job in jobs]
    start = threading.Barrier(n_threads)

    def work(number):
        start.wait()
        wrong = []
        for round_ in range(rounds):
            for step in range(len(jobs)):
                index = (step * (number + 1) + round_ + number) % len(jobs)
                if not equal(jobs[index](), expected[index]):
                    wrong.append(index)
        return wrong

    with ThreadPoolExecutor(n_threads) as pool:
        assert [f for wrong in pool.map(work, range(n_threads)) for f in wrong] == []


@pytest.mark.parametrize("kind", ["adapter", "two"])
def test_four_threads_on_one_pair_and_both_engines(kind):
    pair = ModelPair.of(peft_model(), None, tokenizer()) if kind == "adapter" else build("llama")
    before = [count_hooks(root) for root in pair.sides.roots]
    hammer(jobs_of(pair, "hooks") + jobs_of(pair, "nnsight"), rounds=1)
    assert [count_hooks(root) for root in pair.sides.roots] == before


def test_two_adapters_of_one_base_in_many_threads():
    pair = ModelPair.of(two_adapters(), None, tokenizer(), adapter="tuned")
    other = pair.with_adapter("other")
    assert not torch.equal(pair.run(TEXTS).logits, other.run(TEXTS).logits)
    hammer(
        jobs_of(pair, "hooks") + jobs_of(other, "hooks") + jobs_of(other, "nnsight")[:3], rounds=1
    )


def test_pairs_over_one_base_share_the_lock():
    peft = two_adapters()
    first = ModelPair.of(peft, None, tokenizer(), adapter="tuned")
    second = ModelPair.of(peft, None, tokenizer(), adapter="other")
    assert lock_of(first.sides.roots[0]) is lock_of(second.sides.roots[1])
    assert lock_of(first.sides.roots[0]) is lock_of(first.with_adapter("other").sides.roots[0])
    base = model("llama")
    pairs = [ModelPair.of(base, model("llama", seed), tokenizer()) for seed in (1, 2)]
    assert lock_of(pairs[0].sides.roots[0]) is lock_of(pairs[1].sides.roots[0])
    assert lock_of(pairs[0].sides.roots[1]) is not lock_of(pairs[1].sides.roots[1])
    hammer(jobs_of(first, "nnsight")[:4] + jobs_of(second, "nnsight")[:4], rounds=1)


def test_a_side_is_held_while_another_thread_waits():
    pair = ModelPair.of(peft_model(), None, tokenizer())
    expected = pair.run(TEXTS).logits
    entered, finished = threading.Event(), threading.Event()
    got = []

    def run():
        entered.set()
        got.append(pair.run(TEXTS).logits)
        finished.set()

    with pair.sides.on("base"):
        thread = threading.Thread(target=run)
        thread.start()
        entered.wait()
        assert not finished.wait(0.2), "another thread ran while this one held the model"
    thread.join(timeout=20)
    assert torch.equal(got[0], expected)


def test_the_lock_is_reentrant():
    pair = ModelPair.of(peft_model(), None, tokenizer())
    tuned = pair.run(TEXTS).logits
    with pair.sides.on("finetuned") as root:
        inner = pair.run(TEXTS, side="base").logits
        ids = pair.run(TEXTS).batch
        assert torch.equal(
            root(
                input_ids=ids.ids, attention_mask=ids.attention_mask, position_ids=ids.position_ids
            ).logits,
            tuned,
        ), "the outer side was lost"
    assert not torch.equal(inner, tuned)


def test_streams_of_one_pair_interleave():
    """A stream that is consumed slowly does not hold the model between its batches."""
    from modeldiff.activations import stream

    pair = ModelPair.of(peft_model(), None, tokenizer())
    expected = pair.run(TEXTS, side="base").logits
    texts = pair.texts(TEXTS)
    for _ in stream(pair.sides, texts, (POST,), max_tokens=1):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: pair.run(TEXTS, side="base").logits)
            assert torch.equal(waiting.result(timeout=20), expected)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_cancelling_from_another_thread(engine):
    pair = ModelPair.of(peft_model(), None, tokenizer())
    clean = [a.ids for a in pair.generate(TEXTS, max_new_tokens=3).answers]
    stop, running, steps = threading.Event(), threading.Event(), []

    def on_step(rows):
        steps.append(len(rows))
        running.set()
        time.sleep(0.005)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            pair.generate,
            TEXTS,
            max_new_tokens=100,
            n=8,
            on_step=on_step,
            cancel=stop,
            engine=engine,
        )
        assert running.wait(timeout=20)
        stop.set()
        seen = len(steps)
        with pytest.raises(Cancelled) as raised:
            future.result(timeout=20)
    assert len(steps) <= seen + 2
    assert len(raised.value.partial) == 0
    assert [a.ids for a in pair.generate(TEXTS, max_new_tokens=3).answers] == clean


def test_end_tokens_are_known_while_another_thread_generates():
    """Generation sets the model's own settings aside; its end tokens must not go with them."""
    pair = ModelPair.of(peft_model(), None, tokenizer())
    pair.sides.roots[0].generation_config.eos_token_id = list(range(2, 30))
    options = {"n": 4, "max_new_tokens": 10, "temperature": 3.0}
    expected = [a.ids for a in pair.generate(TEXTS, **options).answers]
    assert len({len(ids) for ids in expected}) > 3

    def work(_):
        return [[a.ids for a in pair.generate(TEXTS, **options).answers] for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        assert all(ids == expected for several in pool.map(work, range(4)) for ids in several)
