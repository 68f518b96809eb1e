import threading

import pytest

import modeldiff as md
from modeldiff.behaviours import Prompt, Verdict, judge_answers, rate_of
from modeldiff.direction_controls import random_like
from modeldiff.dose import dose_response, residual_norms, with_prompts
from modeldiff.errors import Cancelled, InterventionError, JudgeError
from tests.planted import STRENGTH, behaviour, planted_pair

COEFFICIENTS = (-1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def planted():
    pair, word = planted_pair()
    return pair, word * (STRENGTH / word.scale)


def steered(direction):
    return lambda coefficient: md.Steer(direction, coefficient)


@pytest.fixture(scope="module")
def curve(planted):
    pair, truth = planted
    controls = [steered(each) for each in random_like(truth, 3, seed=1)]
    return dose_response(
        pair, behaviour(16), steered(truth), COEFFICIENTS, controls=controls, seed=5
    )


def test_the_planted_direction_raises_the_rate_and_random_ones_do_not(curve, planted):
    assert curve["coefficient"].tolist() == [-1.0, 0.0, 1.0]
    up, middle = curve.iloc[2], curve.iloc[1]
    assert up["rate_low"] > middle["rate_high"]
    assert up["rate_low"] > up["random_high"]
    assert up["n"] == 16
    assert up["n_random"] == 3
    assert up["random_low"] <= up["random_rate"] <= up["random_high"]


def test_at_zero_nothing_is_done(curve, planted):
    """The rate at 0 is the unedited base's, from its own call, and all controls have it too."""
    pair, _ = planted
    asked = behaviour(16)
    plain = pair.generate(
        [prompt.render() for prompt in asked.prompts], models=["base"], seed=5,
        temperature=asked.temperature, max_new_tokens=asked.max_new_tokens,
    )  # fmt: skip
    want = rate_of(judge_answers(asked, plain))
    row = curve.iloc[1]
    assert {name: row[name] for name in want} == pytest.approx(want)
    assert row["random_low"] == row["random_high"] == row["rate"]


def test_adding_the_planted_direction_to_the_base_gives_the_fine_tunes_answers(curve, planted):
    pair, _ = planted
    asked = behaviour(16)
    tuned = pair.generate(
        [prompt.render() for prompt in asked.prompts], models=["finetuned"], seed=5,
        temperature=asked.temperature, max_new_tokens=asked.max_new_tokens,
    )  # fmt: skip
    assert curve.iloc[2]["rate"] == pytest.approx(rate_of(judge_answers(asked, tuned))["rate"])


def test_points_come_from_the_middle_outwards(planted):
    pair, truth = planted
    seen = []
    dose_response(
        pair, behaviour(2), steered(truth), (-2, -1, 0, 1), on_point=lambda p: seen.append(p)
    )
    assert [point["coefficient"] for point in seen] == [0, 1, -1, -2]


def test_stopping_keeps_what_is_finished(planted):
    pair, truth = planted
    cancel, seen = threading.Event(), []

    def stop(point):
        seen.append(point)
        if len(seen) == 2:
            cancel.set()

    with pytest.raises(Cancelled) as caught:
        dose_response(
            pair, behaviour(2), steered(truth), (-2, -1, 0, 1), on_point=stop, cancel=cancel
        )
    partial = caught.value.partial
    assert partial["coefficient"].tolist() == [0.0, 1.0]
    assert partial.iloc[0].to_dict() == pytest.approx(seen[0], nan_ok=True)


class Silent:
    name = "silent"

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        return Verdict("?", None, None)


class Hears(Silent):
    """Cannot tell what an answer with the planted word is."""

    def __call__(self, prompt, answer):
        return Verdict("word", None, False) if " the" in answer else Verdict("none", False, True)


def test_a_judge_that_scores_nothing_is_an_error_and_no_rate(planted):
    pair, truth = planted
    with pytest.raises(JudgeError, match="scored no answer"):
        dose_response(pair, behaviour(2, Silent()), steered(truth), (0.0, 1.0))


def test_a_point_that_could_not_be_scored_is_nan_with_the_whole_interval(planted):
    pair, truth = planted
    found = dose_response(pair, behaviour(4, Hears()), steered(truth), (0.0, 8.0))
    last = found.iloc[1]
    assert last["n"] == 0
    assert last["n_unscored"] == 4
    assert last["rate"] != last["rate"]
    assert (last["rate_low"], last["rate_high"]) == (0.0, 1.0)
    assert last["coherent"] == 0.0


@pytest.mark.parametrize("wrong", [(), (1.0, 1.0), (float("nan"),), (float("inf"), 0.0)])
def test_coefficients_that_make_no_curve_are_refused(planted, wrong):
    pair, truth = planted
    with pytest.raises(InterventionError, match="coefficients"):
        dose_response(pair, behaviour(2), steered(truth), wrong)


def test_residual_norms_are_the_mean_norms_of_the_tokens(planted):
    pair, _ = planted
    items = ["the cat sat on the mat", "a dog ran"]
    norms = residual_norms(pair, items)
    acts = pair.capture(items, [f"resid_post.{i}" for i in range(pair.n_layers)])
    want = [float(acts.base[site].norm(dim=-1).mean()) for site in acts.sites]
    assert norms == pytest.approx(want, rel=1e-5)
    tuned = residual_norms(pair, items, side="finetuned")
    assert tuned[:2] == pytest.approx(norms[:2])  # the adapter writes at layer 2
    assert abs(tuned[2] - norms[2]) > 1


def test_fewer_prompts_are_spread_over_all():
    asked = behaviour(24)
    some = with_prompts(asked, 4)
    assert some.prompts == asked.prompts[::6]
    assert with_prompts(asked, 100) == asked
    with pytest.raises(JudgeError, match="asks nothing"):
        with_prompts(asked, 0)
