"""How far steering can go: known curves, a planted word, and models that never give in."""

import math
import random
from threading import Event
from typing import Any

import pytest

from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, InterventionError, JudgeError
from modeldiff.models import ModelPair
from modeldiff.organisms import world
from modeldiff.organisms.judge import judge
from modeldiff.stats import wilson
from modeldiff.steering_threshold import search, steering_threshold
from tests.families import tokenizer
from tests.planted import TEXTS, WORD, planted_pair

KNOWN: dict[str, Any] = {"target": 0.75, "start": 1.0, "largest": 64.0, "steps": 12}


def curve(crossing, n=1000):
    """A share that falls as a logistic curve and is 75 % at ``crossing``."""

    def measure(coefficient):
        share = 1 / (1 + math.exp(coefficient - crossing - math.log(3)))
        return math.floor(n * share + 1e-9), n

    return measure


@pytest.mark.parametrize("crossing", [7.3, 0.9 + math.log(9), 40.0])
def test_a_known_crossing_is_found(crossing):
    found = search(curve(crossing), **KNOWN)
    assert found.bounded
    assert found.coefficient == pytest.approx(crossing, abs=0.02)
    assert found.coefficient <= crossing
    assert found.low < crossing < found.high
    assert found.table["coefficient"].is_monotonic_increasing


def test_the_interval_narrows_with_more_answers():
    few, many = (search(curve(9.0, n), **KNOWN) for n in (40, 4000))
    assert few.high - few.low > many.high - many.low
    assert (few.low, few.high) != (few.coefficient, few.coefficient)


def test_what_never_falls_apart_is_not_bounded():
    found = search(lambda c: (10, 10), **KNOWN)
    assert not found.bounded
    assert found.coefficient == 64.0
    assert found.high == math.inf
    assert found.low == 0.0  # ten of ten: the interval reaches down to 72 %
    assert wilson(10, 10).low < 0.75
    assert search(lambda c: (100, 100), **KNOWN).low == 64.0


def test_a_first_coefficient_beyond_the_threshold_is_bisected_down():
    found = search(lambda c: (10 if c < 0.1 else 0, 10), **KNOWN)
    assert found.coefficient == pytest.approx(0.1, abs=0.001)


def test_senseless_searches_are_refused():
    with pytest.raises(JudgeError, match=r"6 of 10 answers are coherent, and 75%"):
        search(lambda c: (6, 10), **KNOWN)
    with pytest.raises(JudgeError, match="no answers"):
        search(lambda c: (0, 0), **KNOWN)
    for wrong in ({"start": 0.0}, {"largest": 0.5}, {"target": 1.5}, {"steps": -1}):
        with pytest.raises(InterventionError, match="needed are"):
            search(lambda c: (10, 10), **{**KNOWN, **wrong})


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


def another(answer):
    """Falls apart where an answer begins with the planted word."""
    return answer.ids[0] != tokenizer().convert_tokens_to_ids(WORD)


def test_steering_to_a_word_ends_in_that_word_alone(planted):
    pair, truth = planted
    options: dict[str, Any] = {"side": "base", "steps": 3, "max_new_tokens": 1, "seed": 3,
                               "temperature": 0.2}  # fmt: skip
    found = steering_threshold(pair.sides, truth, TEXTS[:8], another, start=8.0, **options)
    assert found.bounded
    assert 0 < found.coefficient < found.high
    again = steering_threshold(pair.sides, truth, TEXTS[:8], another, start=8.0, **options)
    assert again.table.equals(found.table)
    at = found.table.set_index("coefficient")["share"]
    assert at[0.0] == 1.0
    assert at.iloc[-1] < 0.75
    double = steering_threshold(pair.sides, 2.0 * truth, TEXTS[:8], another, start=4.0, **options)
    assert double.coefficient == pytest.approx(found.coefficient / 2)


def test_cancelling_keeps_what_is_measured(planted):
    pair, truth = planted
    cancel, seen = Event(), []

    def progress(done, total, message):
        seen.append(message)
        if len(seen) == 2:
            cancel.set()

    with pytest.raises(Cancelled) as caught:
        steering_threshold(pair.sides, truth, TEXTS[:2], lambda answer: True, max_new_tokens=2,
                           progress=progress, cancel=cancel)  # fmt: skip
    assert caught.value.partial["coefficient"].tolist() == [0.0, 1.0]


@pytest.mark.slow
def test_the_world_s_model_falls_apart_between_no_steering_and_much():
    """The shift of em-rank1, added to its base; the parser of the world judges."""
    pair = ModelPair.load("organism:em-rank1")
    rng = random.Random(5)
    asked = [world.question(rng) for _ in range(24)]
    chats = [[{"role": "user", "content": each.text}] for each in asked]
    acts = pair.capture(chats, "resid_post.3")
    shift = Direction.of(acts.difference(acts.site).mean(0), acts.site, "shift")
    found = steering_threshold(
        pair.sides, shift, chats,
        lambda answer: judge(asked[answer.prompt], answer.text) != "incoherent",
        side="base", steps=4, temperature=0.7, max_new_tokens=48,
    )  # fmt: skip
    print(found.table.round(3).to_string(), found.coefficient, found.low, found.high)
    assert found.bounded
    assert 0.5 < found.coefficient < 32
