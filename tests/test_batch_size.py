"""Memory that runs out: halves instead, the same numbers as smaller batches, a clear end."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from modeldiff.amplification import amplify
from modeldiff.architectures import module_at
from modeldiff.attribution import attribute
from modeldiff.attribution_bound import missed_cells
from modeldiff.backtracking import Window, window_means
from modeldiff.backtracking_scan import CueProbe
from modeldiff.backtracking_text import base_perplexity
from modeldiff.batch_size import at_once, fitted, known_limit, out_of_memory
from modeldiff.caft_candidates import candidates
from modeldiff.caft_runs import mean_activations
from modeldiff.causal_effect import causal_effect
from modeldiff.dictionaries.causality import causality
from modeldiff.dictionaries.models import crosscoder, sae
from modeldiff.directions import Direction
from modeldiff.errors import RemoteError, SetupError
from modeldiff.generation import Answer
from modeldiff.harvesting import harvest
from modeldiff.illusion import check_illusion
from modeldiff.interventions import Steer
from modeldiff.layer_maps import ablate_effects
from modeldiff.local_judge import LocalScorer
from modeldiff.lora import adapter_modules
from modeldiff.lora_scalars import lora_scalars
from modeldiff.lora_variants import Variant, variant_kl
from modeldiff.orthogonalise import candidate_sweep
from modeldiff.patching import logit_difference, patch_map
from modeldiff.patchscope import patchscope
from modeldiff.prefill import Prefill
from modeldiff.sampling import Sampler
from modeldiff.sft import mean_loss
from modeldiff.sft_rows import response_rows
from modeldiff.sites import parse_sites
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


# ---------------------------------------------------------------- every loop that runs models

WINDOWS = [Window(i, 1, 4) for i in range(8)]
SOME = Direction.of(torch.randn(32, generator=torch.Generator().manual_seed(1)), SITE, "some")
CHATS = [[{"role": "user", "content": "the cat"}, {"role": "assistant", "content": f"sat {noun}"}]
         for noun in ("mat", "dog", "sea", "sun", "old", "mat", "dog", "sea")]  # fmt: skip


def numbers(frame):
    return torch.tensor(frame.select_dtypes("number").to_numpy(float)).nan_to_num()


def scalars(pair):
    found = lora_scalars(pair.sides, SAME_LENGTH, adapter_modules(pair.sides))
    return torch.cat([*found.values.values()], 1)


def variants(pair):
    n = len(pair.sides.lora)
    several = [Variant((i / 8,) * n) for i in range(8)]
    return torch.from_numpy(np.stack(variant_kl(pair.sides, SAME_LENGTH, several, on="all")))


def latents_causality(pair):
    made = crosscoder(32, 64, k=4, site=SITE)
    return numbers(causality(pair.sides, made, SAME_LENGTH, {"one": [1, 2]}).summary)


def cue(pair):
    probe = CueProbe(pair.texts(SAME_LENGTH), tuple((i, 3) for i in range(8)), (7, 9))
    return probe(pair, "finetuned")


def perplexity(pair):
    answers = [Answer(0, i, "base", "", (7 + i, 9, 11, 12), "", True) for i in range(8)]
    return torch.tensor(base_perplexity(pair, pair.texts(SAME_LENGTH[:1]), answers))


def windows(pair):
    found = window_means(pair.sides, pair.texts(SAME_LENGTH), WINDOWS, torch.eye(8).double(),
                         parse_sites(SITE))  # fmt: skip
    return torch.cat([*found.mean.values()])


def set_back(pair):
    found = causal_effect(pair.sides, SOME, {"texts": SAME_LENGTH}, n_random=3)
    return numbers(found.table)


def patches(pair):
    metric = logit_difference(7, 9)
    return patch_map(pair.sides, SAME_LENGTH[0], metric, parts=["mlp_out"]).effect


def halves(pair):
    metric, text = logit_difference(7, 9), SAME_LENGTH[0]
    found = attribute(pair.sides, text, metric, parts=["mlp_out"], n_sample=4)
    return numbers(missed_cells(pair.sides, found, metric, n_verified=1, n_subsets=16).cells)


def illusion(pair):
    found = check_illusion(pair.sides, SAME_LENGTH[:2], SOME, lambda text: logit_difference(7, 9))
    return torch.tensor([found.effect.estimate, found.p])


def scope(pair):
    asked = {"prompts": SAME_LENGTH[:2], "scales": (1.0, 2.0), "n_random": 3, "norm": 9.0}
    return numbers(patchscope(pair.sides, SOME, **asked).scales)


def cells(pair):
    return ablate_effects(pair.sides, SAME_LENGTH[0], SOME).kl


def amplified(pair):
    found = amplify(pair.sides, SAME_LENGTH[:2], [0.0, 1.0], n=2, max_new_tokens=3)
    return torch.tensor([each.ids for each in found.answers])


def judged(pair):
    return torch.tensor([each.value for each in LocalScorer.of_pair(pair, minimum_mass=0.0)(
        [f"{text} ?" for text in SAME_LENGTH])])  # fmt: skip


def orthogonal(pair):
    table, _ = candidate_sweep(pair.sides, SAME_LENGTH * 2, [x + "." for x in SAME_LENGTH], [7])
    return numbers(table)


def latents_attribution(pair):
    made = sae(32, 8, side="finetuned", k=8, activation="relu", site=SITE)
    found = candidates(pair, CHATS, layers=[2], dictionaries=[made], n_latents=8)
    return torch.tensor([each.score for each in found])


def layer_means(pair):
    return mean_activations(pair.sides.roots[0], response_rows(pair.tokenizer, CHATS), 0)


def held_out_loss(pair):
    rows = response_rows(pair.tokenizer, CHATS)
    return torch.tensor(mean_loss(pair.sides.roots[0], rows, 0))


LOOPS = (scalars, variants, latents_causality, cue, perplexity, windows, set_back, patches, halves,
         illusion, scope, cells, amplified, judged, orthogonal, latents_attribution, layer_means,
         held_out_loss)  # fmt: skip


@contextmanager
def room_in_layers(pair, n_tokens):
    """A device on which a layer cannot take more tokens, in whole passes and in replayed ones."""
    failed, handles = [], []

    def hook(module, args, kwargs):
        h = args[0] if args else kwargs["hidden_states"]
        if (n := h.shape[0] * h.shape[1]) > n_tokens:
            failed.append(n)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for i in range(pair.n_layers):
        layer = module_at(pair.sides.roots[0], pair.sides.site_map.layer(i))
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield failed
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def roomy():
    return build_adapter_pair()


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_that_runs_models_goes_on_with_smaller_batches(roomy, loop, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # half a second each time in a test session
    want = loop(roomy)
    with room_in_layers(roomy, 30) as failed:
        got = loop(roomy)
        n_failed = len(failed)
        again = loop(roomy)
    assert n_failed, "the batch was small enough: nothing was tested"
    assert len(failed) == n_failed, "what fitted was not remembered"
    assert torch.equal(got, again)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_parts_at_once_are_halved_and_one_that_does_not_fit_is_for_fewer_texts():
    root, tried = torch.nn.Linear(1, 1), []

    def work(n):
        tried.append(n)
        if n > room[0]:
            raise MemoryError("full")
        return n

    room = [3]
    assert at_once(root, 16, work, what="x", width=10) == 2
    assert at_once(root, 16, work, what="x", width=10) == 2
    assert tried == [16, 8, 4, 2, 2]
    room = [0]
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        at_once(root, 16, work, what="x", width=10)
