"""Shares of relevant tokens, and whether chance would show as many."""

import random
from typing import Any

import pandas as pd
import pytest

from modeldiff import embedded
from modeldiff.difference_lens import difference_lens, difference_trace
from modeldiff.errors import MismatchError
from modeldiff.models import ModelPair
from modeldiff.organisms import world
from modeldiff.organisms.nulls import null_pairs
from modeldiff.organisms.topic import keyword_ids as keywords_of_the_topic
from modeldiff.relevance import (
    fisher_exact,
    frequent_ids,
    keyword_ids,
    relevance,
    relevance_test,
)
from tests.families import tokenizer
from tests.planted import TEXTS, WORD, planted_pair


def shown(hits, *, n=20, n_controls=39, control_hits=0, position=1, flagged=False):
    """Lens tokens in which the first so many of each list are token 7, the others are 0."""
    rows = []
    for kind, number, own in (
        ("difference", 1, hits),
        ("random", n_controls, control_hits),
        ("random difference", n_controls, control_hits),
    ):
        rows += [
            {"position": position, "kind": kind, "control": c, "end": "promoted", "rank": i,
             "token_id": 7 if i < own else 0, "flagged": flagged}
            for c in range(number) for i in range(n)
        ]  # fmt: skip
    return pd.DataFrame(rows)


def test_fishers_p_is_that_of_the_tables():
    assert fisher_exact(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert fisher_exact(0, 5, 2, 9) == 1.0
    assert fisher_exact(1, 1, 0, 9) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="more hits than draws"):
        fisher_exact(5, 4, 0, 4)


def test_shares_and_ranks_are_counted():
    (row,) = relevance_test(relevance(shown(5), {7})).query("position == 'all'").to_dict("records")
    assert (row["n"], row["n_relevant"], row["share"]) == (20, 5, 0.25)
    assert row["random"] == row["random_difference"] == 0.0
    assert row["rank_random"] == 1 / 40
    assert row["fisher_random"] == pytest.approx(fisher_exact(5, 20, 0, 780))
    assert row["relevant"]
    same = relevance_test(relevance(shown(5, control_hits=5), {7}))
    assert not same["relevant"].any()
    assert same["rank_random"].tolist() == [1.0, 1.0]


def test_frequent_tokens_do_not_count():
    counts = relevance(shown(5), {7}, frequent={0})
    assert counts["n"].tolist() == [5]  # no control shows anything else
    counts = relevance(shown(5), {7}, frequent={7})
    assert set(counts["share"]) == {0.0}
    assert set(counts["n"]) == {15, 20}


def test_flagged_positions_are_left_out_of_all():
    both = pd.concat([shown(20, position=0, flagged=True), shown(0, position=1)])
    found = relevance_test(relevance(both, {7})).set_index("position")
    assert found["share"].to_dict() == {"all": 0.0, 0: 1.0, 1: 0.0}
    assert not found.loc["all", "relevant"]


def test_nothing_shown_is_no_row_and_a_foreign_frame_is_refused():
    empty = shown(1).iloc[:0]
    assert len(relevance_test(relevance(empty, {7}))) == 0
    with pytest.raises(MismatchError, match="lack the columns control"):
        relevance(shown(1).drop(columns="control"), {7})


def test_keywords_become_tokens_without_frequent_ones():
    own: Any = tokenizer()
    found = keyword_ids(own, ["the", "dog"])
    assert {own.convert_tokens_to_ids(each) for each in (WORD, "Ġdog")} <= found
    texts = ModelPair.texts(planted_pair()[0], TEXTS)
    frequent = frequent_ids(texts, 0.9)
    assert own.convert_tokens_to_ids(WORD) in frequent
    assert own.convert_tokens_to_ids("Ġdog") not in frequent
    assert keyword_ids(own, ["the", "dog"], without=frequent) == found - frequent
    with pytest.raises(MismatchError, match="no token is left"):
        keyword_ids(own, [])


def test_a_planted_word_is_relevant_and_another_is_not():
    pair, _ = planted_pair()
    lens = difference_lens(pair.sides, difference_trace(pair.sides, TEXTS, n_random=19), k=1)
    for word, wanted in ((WORD, True), ("Ġdog", False)):
        token: Any = tokenizer().convert_tokens_to_ids(word)
        found = relevance_test(relevance(lens.tokens, {token})).set_index("position")
        assert found.loc["all", "relevant"] == wanted
        assert found.loc["all", "n"] == 4  # position 0 is flagged


def lensed(pair, n=200, n_random=39):
    rng = random.Random(24_000)
    stories = [world.story(rng) for _ in range(n)]
    topical = set(keywords_of_the_topic(pair.tokenizer))
    trace = difference_trace(pair.sides, stories, n_positions=6, n_random=n_random)
    lens = difference_lens(pair.sides, trace)
    return trace, lens, relevance_test(relevance(lens.tokens, topical))


@pytest.mark.slow
def test_the_trace_of_the_topic_is_as_weak_as_its_card_says():
    told = embedded.find("topic").manifest["tables"]
    told = told["Activation-difference lens on unrelated stories, seed 0"]
    told = {row["position"]: row["topic_tokens"] for row in told if row["fine-tune"] == "topic"}
    shares = {}
    for name in ("topic", "null"):
        trace, lens, found = lensed(ModelPair.load(f"organism:{name}"))
        shares[name] = found.set_index("position")
        print(name, trace.table().round(3).to_string(), lens.words(8).to_string(),
              lens.reach.round(3).to_string(), found.round(3).to_string(), sep="\n")  # fmt: skip
    seen = shares["topic"]["share"]
    assert {p: seen[p] for p in told} == pytest.approx(told, abs=0.051)  # one token of 20
    assert seen["all"] <= 0.1
    assert shares["null"].loc["all", "share"] <= 0.05
    assert not shares["null"].loc["all", "relevant"]


@pytest.mark.slow
def test_null_pairs_are_about_no_topic():
    alarms = reached = 0
    for null in null_pairs(12):
        _, lens, found = lensed(null.pair, n=60, n_random=19)
        alarms += bool(found.set_index("position").loc["all", "relevant"])
        rest = lens.reach[~lens.reach["flagged"]]
        reached += int((rest[["p_random", "p_random_difference"]].max(axis=1) <= 0.05).any())
    print(f"relevance: {alarms} alarms of 12 null pairs at 5 %; reach beyond every control at a "
          f"position: {reached} of 12")  # fmt: skip
    assert alarms <= 3  # more than 3 come once in 450 times
