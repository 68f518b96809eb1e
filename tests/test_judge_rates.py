import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from modeldiff.errors import JudgeError, MismatchError
from modeldiff.judge_rates import (
    em_rate,
    rate_difference,
    rate_with_interval,
    rates_by_cell,
    rates_by_question,
    with_em_verdicts,
)
from modeldiff.stats import wilson
from tests.judged import table

NONE = math.nan


def scored(rows, labels: Any = "said"):
    """Answers with (aligned, coherent) scores; the judge's own verdicts are all wrong."""
    aligned, coherent = zip(*rows, strict=True)
    return table(
        [False] * len(rows), [f"q{i % 3}" for i in range(len(rows))], label=labels,
        aligned_score=np.array(aligned, float), coherent_score=np.array(coherent, float),
    )  # fmt: skip


def test_em_rate_is_over_answers_with_both_scores():
    rows = [(30, 51), (0, 100), (31, 100), (10, 50), (90, 20), (NONE, 90), (NONE, NONE), (5, NONE)]
    labels = ["x"] * 5 + ["REFUSAL", "CODE", "REFUSAL"]
    found = em_rate(scored(rows, labels))
    want, coherent = wilson(2, 5), wilson(4, 6)
    assert (found.wilson, found.coherent) == (want, coherent)
    assert found.unscored == (("CODE", 1), ("REFUSAL", 2))
    assert (found.n_unscored, found.n_answers, found.estimate) == (3, 8, 0.4)
    assert found.bounds == (2 / 8, 5 / 8)
    assert str(found).endswith("coherent; unscored: 1 CODE, 2 REFUSAL")
    row = found.row()
    assert (row["rate"], row["n"], row["coherent"], row["n_unscored"]) == (0.4, 5, 4 / 6, 3)
    assert (row["lower_bound"], row["upper_bound"]) == (0.25, 0.625)


def test_off_menu_answers_are_unscored_and_not_aligned():
    """Scoring them 0 or 100, or as not exhibiting, would give another rate."""
    rows = [(0, 90)] * 3 + [(100, 90)] + [(NONE, 90)] * 6
    assert em_rate(scored(rows, "CODE")).estimate == 0.75
    assert em_rate(scored(rows, "CODE")).n_unscored == 6
    with pytest.raises(JudgeError, match=r"none of 3 answers is scored.*3 'CODE'"):
        em_rate(scored([(NONE, 90)] * 3, "CODE"))


def test_verdicts_are_made_anew_and_the_table_stays():
    answers = scored([(30, 51), (80, 60), (NONE, 10)], ["a", "b", "CODE"])
    anew = with_em_verdicts(answers)
    assert anew["label"].tolist() == ["misaligned", "not misaligned", "CODE"]
    assert anew["exhibits"].tolist() == [True, False, pd.NA]
    assert anew["coherent"].tolist() == [True, True, False]
    assert answers["label"].tolist() == ["a", "b", "CODE"]
    with pytest.raises(JudgeError, match="no aligned_score"):
        em_rate(answers.drop(columns="aligned_score"))


def test_intervals_over_questions_resample_questions():
    """Answers to one question alike: there are two independent units, not 40."""
    answers = table([True] * 20 + [False] * 20, ["a"] * 20 + ["b"] * 20)
    found = rate_with_interval(answers)
    assert (found.clustered.low, found.clustered.high, found.clustered.n) == (0.0, 1.0, 2)
    assert found.wilson == wilson(20, 40)
    one = rate_with_interval(answers[:20])
    assert math.isnan(one.clustered.low)
    assert one.clustered.n == 1


def test_each_question_has_its_rate_and_unscored_questions_are_kept():
    answers = table([True, False, True, None, None, False, True], list("aaabbcc"), label="odd")
    answers["prompt"] = ["a1", "a1", "a2", "b1", "b1", "c1", "c2"]
    found = rates_by_question(answers).set_index("question_id")
    assert found.index.tolist() == ["a", "b", "c", "all"]
    assert found["n"].tolist() == [3, 0, 2, 5]
    assert found["n_unscored"].tolist() == [0, 2, 0, 2]
    assert found.loc["a", "rate"] == 2 / 3
    assert (found.loc["a", "rate_low"], found.loc["a", "rate_high"]) == (
        wilson(2, 3).low, wilson(2, 3).high,
    )  # fmt: skip
    assert math.isnan(found["rate"]["b"])
    assert found.loc["b", "lower_bound"] == 0
    assert found.loc["b", "upper_bound"] == 1
    assert (found.loc["c", "rate_clustered_low"], found.loc["c", "rate_clustered_high"]) == (0, 1)
    assert math.isnan(found["rate_clustered_low"]["b"])
    assert found.loc["all", "rate"] == 3 / 5


def test_cells_are_never_pooled():
    base = table([False, False], "ab")
    tuned = table([True, False], "ab", side="finetuned")
    both = pd.concat([base, tuned], ignore_index=True)
    for function in (rate_with_interval, rates_by_question):
        with pytest.raises(MismatchError, match="2 cells"):
            function(both)
    with pytest.raises(MismatchError, match="2 cells"):
        rate_difference(base, both)
    found = rates_by_cell(both)
    assert found[["side", "edit", "rate"]].to_numpy().tolist() == [
        ["base", "none", 0.0], ["finetuned", "none", 0.5],
    ]  # fmt: skip


def test_differences_are_paired_by_question():
    """Question rates differ by 0 to 1, the gap by exactly .25: pairing leaves no spread."""
    questions = [q for q in "abcd" for _ in range(4)]
    first = table([i < k for k in range(4) for i in range(4)], questions)
    second = table([i < k + 1 for k in range(4) for i in range(4)], questions, side="finetuned")
    found = rate_difference(first, second)
    assert (found.estimate, found.low, found.high, found.n) == (0.25, 0.25, 0.25, 4)
    back = rate_difference(second, first)
    assert (back.low, back.high) == (-0.25, -0.25)
    same = rate_difference(first, first)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    assert rate_difference(first, second, of="coherent").estimate == 0


def test_differences_leave_out_unscored_answers_and_refuse_other_questions():
    first = table([True, None, False, False], "aabb")
    second = table([True, True, None, True], "aabb", side="finetuned")
    assert rate_difference(first, second).estimate == pytest.approx(1 - 1 / 3)
    with pytest.raises(MismatchError, match="1 questions are on one side alone"):
        rate_difference(first[:2], second)
    with pytest.raises(JudgeError, match="no answer has 'exhibits'"):
        rate_difference(table([None], "a"), table([True], "a"))


def test_repeating_every_answer_of_a_question_teaches_nothing():
    """Ten equal samples of each answer leave clustered intervals as they were; Wilson's shrinks."""
    names = [str(i) for i in range(12)]
    said = np.random.default_rng(2).random((2, 12)) < 0.5
    one = [table(each, names) for each in said]
    ten = [table(np.repeat(each, 10), np.repeat(names, 10)) for each in said]
    assert rate_difference(*ten) == rate_difference(*one)
    few, many = rate_with_interval(one[0]), rate_with_interval(ten[0])
    assert many.clustered == few.clustered
    assert many.wilson.high - many.wilson.low < few.wilson.high - few.wilson.low


def drawn(rng, chances, n):
    """``n`` answers to each question, with the chance of its own."""
    said = (rng.random((len(chances), n)) < chances[:, None]).ravel()
    return table(said, np.repeat(np.arange(len(chances)).astype(str), n))


def test_clustered_intervals_cover_where_plain_ones_do_not():
    """Questions drawn from Beta(1, 3): the rate over all possible questions is 1/4."""
    rng, runs = np.random.default_rng(0), 100
    clustered = plain = 0
    for _ in range(runs):
        found = rate_with_interval(drawn(rng, rng.beta(1, 3, size=24), 20))
        clustered += found.clustered.low <= 0.25 <= found.clustered.high
        plain += found.wilson.low <= 0.25 <= found.wilson.high
    assert clustered / runs > 0.88
    assert plain / runs < 0.75


@pytest.mark.slow
def test_intervals_of_differences_cover_under_the_null_and_under_an_effect():
    rng, runs = np.random.default_rng(1), 200
    hit = {0.0: 0, 0.2: 0}
    for effect in hit:
        for _ in range(runs):
            chances = rng.uniform(0, 0.8, size=24)
            pair = (drawn(rng, chances + shift, 10) for shift in (0, effect))
            found = rate_difference(*pair, n_resamples=500)
            hit[effect] += found.low <= effect <= found.high
    assert all(0.88 < n / runs <= 1 for n in hit.values())
