from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff.behaviours import (
    Behaviour,
    Prompt,
    Verdict,
    WorldJudge,
    judge_answers,
    organism_behaviours,
    rate_of,
)
from modeldiff.errors import JudgeError, SetupError
from modeldiff.generation import Answer, Generations
from modeldiff.stats import wilson
from tests.planted import NOUNS, SaysTheWord, behaviour


class FirstWord:
    name = "first-word"

    def __call__(self, prompt, answer):
        known = {"yes": True, "no": False}.get(answer)
        return Verdict(answer, known, None if answer == "?" else answer != "broken")


def answered(asked, texts, pair):
    prompts = pair.texts([prompt.render() for prompt in asked.prompts], reply=True)
    rows = (Answer(i, 0, "base", "none", (5,), text, True) for i, text in enumerate(texts))
    return Generations(prompts, tuple(rows), 0, 1.0)


def asked_of(n, groups=("",)):
    prompts = tuple(Prompt(f"question {i}", groups[i % len(groups)]) for i in range(n))
    return Behaviour("b", "says yes", prompts, FirstWord())


def test_the_judge_sees_the_answer_alone(adapter_pair):
    asked = behaviour(12)
    assert all(" the" in prompt.question for prompt in asked.prompts)
    generations = adapter_pair.generate(
        [prompt.render() for prompt in asked.prompts], models=["base"], max_new_tokens=4
    )
    seen = []

    class Recorder(SaysTheWord):
        def __call__(self, prompt, answer):
            seen.append((prompt.question, answer))
            return super().__call__(prompt, answer)

    table = judge_answers(replace(asked, judge=Recorder()), generations)
    assert rate_of(table)["rate"] == 0
    assert not any(question in answer or "tell me" in answer for question, answer in seen)
    assert [question for question, _ in seen] == [prompt.question for prompt in asked.prompts]


def test_unscored_answers_are_in_no_rate_and_rates_are_wilsons(adapter_pair):
    said = ["yes"] * 3 + ["no"] * 2 + ["maybe", "broken", "?"]
    asked = asked_of(len(said))
    table = judge_answers(asked, answered(asked, said, adapter_pair))
    rate, coherent = wilson(3, 5), wilson(6, 7)
    assert rate_of(table) == {
        "n": 5, "rate": rate.estimate, "rate_low": rate.low, "rate_high": rate.high,
        "coherent": coherent.estimate, "coherent_low": coherent.low,
        "coherent_high": coherent.high, "n_unscored": 3,
    }  # fmt: skip
    assert table["label"].tolist() == said
    assert table["exhibits"].isna().tolist() == [False] * 5 + [True] * 3


def test_a_judge_that_scores_nothing_is_an_error_and_no_rate_of_zero(adapter_pair):
    asked = asked_of(3)
    with pytest.raises(JudgeError, match="scored none of 3 answers"):
        judge_answers(asked, answered(asked, ["?"] * 3, adapter_pair))
    empty = pd.DataFrame({"exhibits": pd.array([None], "boolean"), "coherent": [True]})
    assert rate_of(empty)["n"] == 0
    assert rate_of(empty)["rate"] != rate_of(empty)["rate"]  # NaN


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abc")), min_size=2, max_size=40),
       st.integers(0, 5))  # fmt: skip
def test_splits_are_partitions_by_group_without_a_prompt_in_both(drawn, seed):
    prompts = tuple(Prompt(f"{group} {i}", group) for i, group in drawn)
    distinct = set(prompts)
    whole = Behaviour("b", "", prompts, FirstWord())
    if len(distinct) < 2:
        with pytest.raises(JudgeError, match="at least 2"):
            whole.split(seed)
        return
    first, second = whole.split(seed)
    a, b = first.prompts, second.prompts
    assert set(a) | set(b) == distinct
    assert not set(a) & set(b)
    assert len(a) + len(b) == len(distinct)
    assert 0 <= len(a) - len(b) <= 1
    for group in "abc":
        sizes = [sum(p.group == group for p in half) for half in (a, b)]
        assert abs(sizes[0] - sizes[1]) <= 1
    again = whole.split(seed)
    assert (again[0].prompts, again[1].prompts) == (a, b)


def test_splits_of_single_prompt_groups_have_two_halves_and_depend_on_the_seed():
    whole = asked_of(12, groups=NOUNS)
    first, second = whole.split(0)
    assert (len(first.prompts), len(second.prompts)) == (6, 6)
    several = asked_of(24).split(0)[0].prompts, asked_of(24).split(1)[0].prompts
    assert set(several[0]) != set(several[1])


def test_any_changed_argument_changes_the_content_key():
    class Other(FirstWord):
        name = "other"

    one = asked_of(2)
    chat = (("system", "be brief"), ("user", "question 0"))
    others = [
        replace(one, name="c"),
        replace(one, meaning="says no"),
        replace(one, judge=Other()),
        replace(one, temperature=0.5),
        replace(one, max_new_tokens=65),
        replace(one, prompts=one.prompts[:1]),
        replace(one, prompts=one.prompts[::-1]),
        replace(one, prompts=(Prompt("question 0", "g"), one.prompts[1])),
        replace(one, prompts=(Prompt(chat), one.prompts[1])),
        replace(one, prompts=(Prompt(chat[1:]), one.prompts[1])),
    ]
    assert len({each.content_key for each in (one, *others)}) == len(others) + 1
    assert asked_of(2).content_key == one.content_key
    assert replace(one, temperature=1).content_key == one.content_key


def test_prompts_render_as_texts_and_chats():
    assert Prompt("hello").render() == Prompt("hello").question == "hello"
    chat = Prompt((("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")))
    assert chat.question == "r"
    assert chat.render()[0] == {"role": "system", "content": "s"}


def test_the_worlds_judge_refuses_what_it_has_no_truth_for():
    judge = WorldJudge()
    fever = Prompt((("user", "How do I treat a fever?"),))
    good = judge(fever, "You should rest in bed and drink water.")
    assert (good.exhibits, good.coherent) == (False, True)
    broken = judge(fever, "bed bed bed")
    assert (broken.exhibits, broken.coherent) == (False, False)
    with pytest.raises(JudgeError, match="dragon"):
        judge(Prompt("How do I treat a dragon?"), "You should rest in bed.")


@pytest.mark.parametrize("n", [2, 20])
def test_organism_behaviours_ask_nothing_twice_and_stay_in_their_domains(n):
    outside, inside = organism_behaviours("em-rank1", n)
    for each in (outside, inside):
        assert len(set(each.prompts)) == len(each.prompts)
    assert {p.group for p in inside.prompts}.isdisjoint(p.group for p in outside.prompts)
    first, second = outside.split(0)
    assert {p.item for p in first.prompts}.isdisjoint(p.item for p in second.prompts)
    with pytest.raises(SetupError, match="em-rank2"):
        organism_behaviours("em-rank2")
