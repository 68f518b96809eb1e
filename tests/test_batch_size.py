"""Memory that runs out: halves instead, the same numbers as smaller batches, a clear end."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import weakref
from contextlib import contextmanager

import pytest
import torch

from modeldiff.batch_size import fitted, known_limit, out_of_memory
from modeldiff.errors import RemoteError, SetupError
from modeldiff.harvesting import harvest
from modeldiff.interventions import Steer
from modeldiff.prefill import Prefill
from modeldiff.sampling import Sampler
from modeldiff.survey import survey
from tests.families import build_adapter_pair
from tests.test_harvesting import content

SITE = "resid_post.2"
TEXTS = [f"{'the cat sat on the mat and ' * (1 + i % 3)}the dog {i} ran" for i in range(12)]
SAME_LENGTH = ["the cat sat on the mat", "the dog sat on the mat"] * 4


@contextmanager
def room_for(pair, n_tokens):
    """A device on which a forward of more tokens than so many runs out of memory."""
    failed = []

    def hook(module, args, kwargs):
        if (n := kwargs["input_ids"].numel()) > n_tokens:
            failed.append(n)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")

    handle = pair.sides.roots[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield failed
    finally:
        handle.remove()


def test_captures_and_diffs_are_those_of_the_smaller_batches_to_the_bit():
    pair, texts = build_adapter_pair(), SAME_LENGTH
    n = pair.texts(texts)[0].n_tokens
    asked = {"max_tokens": 8 * n}
    with room_for(pair, 2 * n) as failed:
        got = pair.capture(texts, SITE, **asked)
        assert failed == [8 * n, 4 * n]
        assert known_limit(pair.sides.roots[0], "capture") == 2 * n
        table = pair.output_diff(texts, **asked).tokens
        again = pair.capture(texts, SITE, **asked)
        found = survey(pair.sides, pair.texts(texts), ["a", "b"] * 4).per_text
    assert failed == [8 * n, 4 * n] * 2  # what fitted is known the next time, for each work
    clean, small = build_adapter_pair(), {"max_tokens": 2 * n}
    want = clean.capture(texts, SITE, **small)
    for each in (got, again):
        assert torch.equal(each.base[each.site], want.base[want.site])
        assert torch.equal(each.finetuned[each.site], want.finetuned[want.site])
    assert table.equals(clean.output_diff(texts, **small).tokens)
    assert len(found) == 8 * pair.n_layers


def test_ragged_texts_come_in_order_and_nothing_finished_runs_twice():
    pair, seen = build_adapter_pair(), []
    with room_for(pair, 60) as failed:
        got = pair.capture(TEXTS, SITE, max_tokens=400, progress=lambda *r: seen.append(r[0]))
    want = build_adapter_pair().capture(TEXTS, SITE, max_tokens=400)
    assert failed
    assert torch.equal(got.text_index, want.text_index)
    torch.testing.assert_close(got.finetuned[got.site], want.finetuned[want.site])
    assert seen == sorted(set(seen))
    assert seen[-1] == len(TEXTS)


def test_work_is_halved_keeps_order_and_forgets_the_failed_batch():
    root, ran, held = torch.nn.Linear(1, 1), [], []

    def work(items):
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        if len(items) > 3:
            raise RuntimeError("CUDA error: out of memory")
        assert not any(ref() is not None for ref in held[:-1])  # no frame keeps what failed
        ran.extend(items)
        return sum(items)

    parts = list(fitted(root, range(10), work, what="sum", width=lambda i: 1))
    assert [items for items, _ in parts] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert ran == list(range(10))
    free = torch.nn.Linear(1, 1)
    list(fitted(free, range(10), work, what="sum", width=lambda i: 1, remember=False))
    assert known_limit(root, "sum") == 2
    assert known_limit(free, "sum") is None


def test_one_text_that_does_not_fit_says_what_to_do():
    pair = build_adapter_pair()
    n = max(text.n_tokens for text in pair.texts(TEXTS))
    with room_for(pair, 4), pytest.raises(SetupError) as error:
        pair.capture(TEXTS, SITE)
    for part in (f"of {n} tokens", "Tried to allocate 12.00 GiB", "GiB free", "GiB used",
                 "shorter texts", "device_map", "8bit"):  # fmt: skip
        assert part in str(error.value), part


def test_other_errors_are_not_taken_for_full_memory():
    pair, calls = build_adapter_pair(), []

    def hook(module, args, kwargs):
        calls.append(1)
        raise RuntimeError("shapes do not fit")

    handle = pair.sides.roots[0].register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        pair.capture(TEXTS, SITE)
    handle.remove()
    assert len(calls) == 1
    assert not out_of_memory(RemoteError("the job failed: CUDA out of memory."))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))


def test_a_harvest_writes_what_smaller_batches_write(tmp_path):
    pair, texts = build_adapter_pair(), SAME_LENGTH
    n = pair.texts(texts)[0].n_tokens
    with room_for(pair, 4 * n) as failed:
        got = harvest(pair, texts, SITE, tmp_path / "a", max_tokens=8 * n, rows_per_shard=4 * n)
    want = harvest(pair, texts, SITE, tmp_path / "b", max_tokens=4 * n, rows_per_shard=4 * n)
    assert failed
    assert known_limit(pair.sides.roots[0], "harvest") is None
    rows = [{k: v for k, v in content(s.folder).items() if "resid" in k} for s in (got, want)]
    assert rows[0] == rows[1] != {}


def test_generation_halves_its_rows_and_tells_each_token_once(monkeypatch):
    pair, told = build_adapter_pair(), []
    direction = torch.randn(32)
    from modeldiff.directions import Direction

    do = {"steered": Steer(Direction.of(direction, SITE, "d"), 0.3)}
    asked = {"do": do, "n": 2, "max_new_tokens": 5, "seed": 3}
    sampled, failed = Sampler.__call__, []

    def full(self, input_ids, scores):
        if len(scores) > 4 and self._step == 2:  # the cache grew too large: two tokens are out
            failed.append(len(scores))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sampled(self, input_ids, scores)

    monkeypatch.setattr(Sampler, "__call__", full)
    got = pair.generate(SAME_LENGTH[:2], **asked, prefill=Prefill(), on_step=told.extend)
    monkeypatch.undo()
    assert failed == [16, 8]
    want = build_adapter_pair().generate(SAME_LENGTH[:2], **asked, max_rows=4)
    assert got.answers == want.answers
    by_row = {}
    for row, token in told:
        by_row.setdefault(row, []).append(token)
    assert len(by_row) == len(got.answers)
    assert sorted(map(tuple, by_row.values())) == sorted(a.ids for a in got.answers)


def test_one_row_that_cannot_be_generated_says_so():
    pair = build_adapter_pair()
    with room_for(pair, 2), pytest.raises(SetupError, match="fewer max_new_tokens"):
        pair.generate(SAME_LENGTH[:1], max_new_tokens=3)
