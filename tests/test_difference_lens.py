"""Traces in the first tokens of unrelated texts: planted ones, and none in equal models."""

from typing import Any

import pytest
import torch

from modeldiff.difference_lens import KINDS, difference_lens, difference_trace, random_differences
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MaskError, SiteError
from modeldiff.models import ModelPair
from modeldiff.organisms.planted import planted_shift, tiny_llama
from tests.families import tokenizer
from tests.planted import STRENGTH, TEXTS, WORD, planted_pair


@pytest.fixture(scope="module")
def planted():
    pair, truth = planted_pair()
    return pair, truth, difference_trace(pair.sides, TEXTS, n_random=9)


def test_a_planted_shift_is_the_difference_at_every_position(planted):
    pair, truth, trace = planted
    assert str(trace.site) == "resid_post.2"  # half of 4 layers
    assert trace.n_texts == len(TEXTS)
    for position in range(5):
        found = trace.direction(position)
        assert found.cosine(truth) == pytest.approx(1.0, abs=1e-5)
        assert found.scale == pytest.approx(STRENGTH, rel=1e-4)
        assert found.split_half == pytest.approx(1.0, abs=1e-6)
        assert found.models == pair.digests
    assert ["artefact" in " ".join(trace.direction(i).notes) for i in (0, 1)] == [True, False]
    assert trace.table()["flagged"].tolist()[0]


def test_the_trace_is_the_mean_of_captured_differences_text_by_text():
    made = planted_shift(1, characters="aeiou")
    texts = [f"{'aeixyz'[i % 6]}b{i} letters and so on" for i in range(11)]
    trace = difference_trace(made.pair.sides, texts, layer=3, n_positions=4, n_random=3, seed=5)
    acts = made.pair.capture(texts, "resid_post.3", skip_first=0)
    delta, base = acts.difference(acts.site), acts.base[acts.site]
    for position in range(4):
        mine = acts.position == position
        assert trace.difference[position] == pytest.approx(delta[mine].mean(0), abs=1e-5)
        assert trace.norm_base[position] == pytest.approx(float(base[mine].norm(dim=-1).mean()))
        like = Direction.of(torch.ones(32), trace.site, "like")
        for mine_, theirs in zip(
            random_differences(base[mine], like, 3, seed=5), trace.controls[:, position],
            strict=True,
        ):  # fmt: skip
            if float(theirs.norm()) > 1e-4:
                cosine = torch.nn.functional.cosine_similarity(mine_.unit, theirs, dim=0)
                assert float(cosine) == pytest.approx(1.0, abs=1e-4)


def test_the_word_is_promoted_first_and_no_control_shows_it_so(planted):
    pair, _, trace = planted
    lens = difference_lens(pair.sides, trace, k=5)
    word: Any = tokenizer().convert_tokens_to_ids(WORD)
    top = lens.tokens[(lens.tokens["rank"] == 0) & (lens.tokens["end"] == "promoted")]
    assert set(top[top["kind"] == "difference"]["token_id"]) == {word}
    counts = lens.tokens.groupby(["kind", "position", "end"]).size().unstack("kind")
    assert counts[list(KINDS)].drop_duplicates().to_numpy().tolist() == [[5, 45, 45]]
    assert set(lens.reach["p_random"]) == {0.1}
    words = lens.words(3)
    assert words["difference"][0].startswith("the")
    assert set(words.columns) == {"position", "end", *KINDS}


def test_the_opposite_trace_swaps_the_ends(planted):
    pair, _, trace = planted
    lens = difference_lens(pair.sides, trace, k=3)
    ends = lens.tokens[(lens.tokens["kind"] == "difference") & (lens.tokens["position"] == 1)]
    logits = ends.set_index(["end", "rank"])["logit"]
    assert logits["promoted", 0] > 0 > logits["suppressed", 0]


def test_controls_have_the_length_of_the_difference_and_are_seeded(planted):
    pair, _, trace = planted
    controls = trace.random_differences(2)
    assert len(controls) == 9
    assert {control.scale for control in controls} == {trace.direction(2).scale}
    again = difference_trace(pair.sides, TEXTS, n_random=9)
    assert torch.equal(again.controls, trace.controls)
    other = difference_trace(pair.sides, TEXTS, n_random=9, seed=1)
    assert not torch.equal(other.controls, trace.controls)
    assert other.difference == pytest.approx(trace.difference, abs=1e-5)


def test_equal_models_leave_no_trace():
    base, own = tiny_llama(1)
    pair = ModelPair.of(base, base, own, allow_identical=True)
    trace = difference_trace(pair.sides, TEXTS)
    assert trace.positions == ()
    assert trace.table()["norm"].tolist() == [0.0] * 5
    with pytest.raises(DirectionError, match="do not differ"):
        trace.direction(1)
    lens = difference_lens(pair.sides, trace)
    assert len(lens.tokens) == 0
    assert len(lens.reach) == 0


def test_too_little_text_is_refused(planted):
    pair = planted[0]
    with pytest.raises(MaskError, match="0 of 3 texts have 5 tokens"):
        difference_trace(pair.sides, ["a"] * 3)
    with pytest.raises(SiteError):
        difference_trace(pair.sides, TEXTS, layer=9)
    with pytest.raises(MaskError, match="halved"):
        random_differences(torch.ones(3, 4), planted[1], 2, seed=0)
