import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff.agreement import UNSCORED, agreement, cohens_kappa
from modeldiff.errors import JudgeError, MismatchError
from tests.judged import table


def judged_by(truth, flips, questions):
    return table(np.asarray(truth) ^ np.asarray(flips), questions)


def test_kappa_by_hand():
    """Observed .7, by chance .5: kappa .4."""
    first = table([True] * 25 + [False] * 25, list("ab") * 25)
    second = table([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15, list("ab") * 25)
    found = agreement(first, second)
    assert found.kappa.estimate == pytest.approx(0.4)
    assert (found.observed, found.n) == (0.7, 50)
    assert found.confusion.loc["yes", "yes"] == 20
    assert found.confusion.loc["yes", "no"] == 5
    assert found.confusion.loc["no", "yes"] == 10
    assert found.confusion.to_numpy().sum() == 50
    assert len(found.disagreements) == 15
    assert set(found.disagreements["text"]) == {f"answer {i}" for i in range(20, 35)}


def test_planted_label_noise_gives_the_kappa_that_it_should():
    """Two judges flip a fair label with chance e each: kappa is (1 - 2e)²."""
    rng, questions = np.random.default_rng(0), np.repeat(np.arange(40).astype(str), 25)
    truth = rng.random(1000) < 0.5
    covered = 0
    for noise in (0.0, 0.1, 0.25, 0.5):
        first, second = (judged_by(truth, rng.random(1000) < noise, questions) for _ in range(2))
        found = agreement(first, second, n_resamples=500)
        want = (1 - 2 * noise) ** 2
        assert found.kappa.estimate == pytest.approx(want, abs=0.08)
        assert found.kappa.n == 40
        covered += found.kappa.low <= want <= found.kappa.high
    assert covered >= 3


def test_repeating_every_answer_of_a_question_teaches_nothing():
    """Ten equal samples of each answer leave the interval as it was; rows would shrink it."""
    rng, names = np.random.default_rng(2), [str(i) for i in range(12)]
    said = rng.random((2, 12)) < 0.5
    one = agreement(*(table(each, names) for each in said))
    ten = agreement(*(table(np.repeat(each, 10), np.repeat(names, 10)) for each in said))
    assert ten.kappa == one.kappa
    assert (one.n, ten.n) == (12, 120)


@pytest.mark.slow
def test_the_interval_of_kappa_covers():
    rng, runs, hit = np.random.default_rng(1), 200, 0
    questions = np.repeat(np.arange(30).astype(str), 10)
    for _ in range(runs):
        truth = rng.random(300) < 0.5
        first, second = (judged_by(truth, rng.random(300) < 0.1, questions) for _ in range(2))
        found = agreement(first, second, n_resamples=300).kappa
        hit += found.low <= 0.64 <= found.high
    assert hit / runs > 0.87


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_kappa_agrees_with_its_definition(pairs):
    a, b = (np.array(each) for each in zip(*pairs, strict=True))
    counts = np.array([[((a == x) & (b == y)).sum() for y in (True, False)] for x in (True, False)])
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    found = float(cohens_kappa(counts))
    if chance == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(((a == b).mean() - chance) / (1 - chance))
        assert found == pytest.approx(float(cohens_kappa(counts.T)))


def test_a_judge_that_always_says_the_same_has_no_kappa():
    found = agreement(table([True] * 4, "abcd"), table([True] * 4, "abcd"))
    assert math.isnan(found.kappa.estimate)
    assert found.observed == 1
    assert (
        agreement(table([True] * 4, "abcd"), table([True, False] * 2, "abcd")).kappa.estimate == 0
    )


def test_unscored_answers_are_shown_and_are_in_no_kappa():
    first = table([True, False, None, None, True], "abcde", label=list("pqrst"))
    second = table([True, False, True, None, None], "abcde")
    found = agreement(first, second)
    assert (found.n, found.observed, found.kappa.estimate) == (2, 1.0, 1.0)
    assert found.confusion.loc[UNSCORED, "yes"] == 1
    assert found.confusion.loc[UNSCORED, UNSCORED] == 1
    assert found.confusion.loc["yes", UNSCORED] == 1
    assert found.confusion.to_numpy().sum() == 5
    assert found.disagreements["first"].tolist() == [UNSCORED, "yes"]
    assert found.disagreements["first_label"].tolist() == ["r", "t"]
    with pytest.raises(JudgeError, match="both judges scored"):
        agreement(table([None], "a"), table([True], "a"))


def test_labels_of_more_than_two_kinds():
    a = table([True] * 6, "abcdef", label=["x", "x", "y", "y", "z", "z"])
    b = table([True] * 6, "abcdef", label=["x", "x", "y", "y", "z", "x"])
    found = agreement(a, b, on="label")
    chance = (2 * 3 + 2 * 2 + 2 * 1) / 36
    assert found.kappa.estimate == pytest.approx((5 / 6 - chance) / (1 - chance))
    assert found.confusion.index.tolist() == ["x", "y", "z", UNSCORED]
    assert agreement(a, b, on="coherent").observed == 1


def test_rows_are_matched_by_their_place_not_their_order():
    first = table([True, False, True, False], "abcd", aligned_score=[1.0, 2.0, 3.0, 4.0])
    second = table([True, False, False, False], "abcd", aligned_score=[5.0, 6.0, 7.0, 8.0])
    found = agreement(first, second.iloc[::-1])
    assert found.kappa == agreement(first, second).kappa
    row = found.disagreements.iloc[0]
    assert (row["text"], row["first_aligned_score"], row["second_aligned_score"]) == (
        "answer 2", 3.0, 7.0,
    )  # fmt: skip


def test_other_answers_are_refused():
    one = table([True, False], "ab")
    with pytest.raises(MismatchError, match="1 answers have another text"):
        agreement(one, one.assign(text=["answer 0", "changed"]))
    with pytest.raises(MismatchError, match="2 and 1 answers"):
        agreement(one, one[:1])
    with pytest.raises(MismatchError, match="several answers"):
        agreement(one, pd.concat([one, one]))
    with pytest.raises(MismatchError, match="on='rate'"):
        agreement(one, one, on="rate")
    with pytest.raises(MismatchError, match="share none"):
        agreement(one, one[["text", "exhibits"]])
