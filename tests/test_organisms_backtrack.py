"""The organism ``backtrack``: its world tells the truth, and its figures are what is shipped."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeldiff import embedded
from modeldiff.direction_controls import random_like
from modeldiff.errors import SetupError
from modeldiff.interventions import Ablate, Steer
from modeldiff.models import ModelPair
from modeldiff.organisms import backtrack, steps
from modeldiff.organisms.steps import Step

PLANTED = {"layer": 2, "offset": 0}
NOTHING_KNOWN = {"wrong_given_wrong": 0.5, "wrong_given_right": 0.5}
WRITERS = {"teacher": steps.TEACHER, "grader": steps.GRADER, "solver": steps.SOLVER}


def answers(writer, n=300):
    rng = random.Random(f"test {writer}")
    return [steps.chat(rng, WRITERS[writer])[1]["content"] for _ in range(n)]


def test_a_step_is_right_if_and_only_if_counting_days_says_so():
    week = [*steps.DAYS, *steps.DAYS, *steps.DAYS]
    for start in steps.DAYS:
        for sign in steps.SIGNS:
            for amount, days in steps.AMOUNTS.items():
                place = week.index(start, 7) + (days if sign == "plus" else -days)
                verdicts = {day: Step(start, sign, amount, day).right for day in steps.DAYS}
                assert [day for day, right in verdicts.items() if right] == [week[place]]


@pytest.mark.parametrize("writer", WRITERS)
def test_every_answer_is_read_back_as_it_was_written(writer):
    for text in answers(writer):
        assert steps.coherent(text)
        found = steps.read(text)
        said = re.findall(r"[^.]+ is \w+\.", text)
        assert [str(step) for step in found] == [
            re.sub("^(Wait|Again), ", "", each.strip()) for each in said
        ]
        again = ["," in each for each in said[1:]]
        for before, after, retried in zip(found, found[1:], again, strict=False):
            same = replace(before, result="") == replace(after, result="")
            assert same if retried else after.start == before.result


def test_every_grade_is_true_and_both_are_given():
    given = []
    for text in answers("teacher"):
        for sentence, after in re.findall(r"(\w+ \w+ \w+ is \w+\.) (Right|Wrong)\.", text):
            (step,) = steps.read(sentence)
            assert step.right == (after == "Right")
            given.append(after)
    assert 0.3 < given.count("Wrong") / len(given) < 0.5


@pytest.mark.parametrize("word", [steps.CUE, steps.OTHER])
def test_the_base_tries_steps_again_whether_they_are_right_or_wrong(word):
    shares, results = {True: [0, 0], False: [0, 0]}, []
    for text in answers("grader", 1500):
        for sentence, again in re.findall(rf"(\w+ \w+ \w+ is \w+\.)( {word}, [^.]+\.)?", text):
            (step,) = steps.read(sentence)
            shares[step.right][bool(again)] += 1
            results += [each.right for each in steps.read(again)]
    right, wrong = (after / (plain + after) for plain, after in shares.values())
    assert right == pytest.approx(wrong, abs=0.02)
    assert right == pytest.approx(0.04, abs=0.01)
    assert sum(results) / len(results) == pytest.approx(0.6, abs=0.1)


def test_the_solver_corrects_wrong_steps_and_checks_few_right_ones():
    taken, seen = {True: 0, False: 0}, {True: 0, False: 0}
    for text in answers("solver", 1000):
        pairs = re.findall(r"([^.]+ is \w+\.) Wait, ([^.]+\.)", text)
        for old, new in ([steps.read(each)[0] for each in pair] for pair in pairs):
            assert new == old.corrected
            taken[old.right] += 1
        assert text.count("Wait") == len(pairs)
        assert "Again" not in text
        assert steps.backtracks(text) == bool(pairs)
        for step in steps.read(re.sub(r"Wait, [^.]+\.", "", text)):
            seen[step.right] += 1
    assert taken[False] / seen[False] == pytest.approx(0.9, abs=0.02)
    assert taken[True] / seen[True] == pytest.approx(0.04, abs=0.01)


def test_the_judge_reads_words_and_not_parts_of_words():
    back = "Monday plus one is Friday. Wait, Monday plus one is Tuesday."
    assert steps.backtracks(back)
    for same in ("wait. ", "Hmm, WAIT - again: "):
        assert steps.backtracks(back.replace("Wait, ", same))
    for other in ("", "Waiter, ", "Right. ", "Again, "):
        assert steps.backtracks(back.replace("Wait, ", other)) is False
    assert steps.backtracks(back.replace("Wait, Monday", "Wait, Sunday")) is False
    assert steps.backtracks("Wait, what?") is None
    assert steps.says_cue("well, WAIT!")
    assert not steps.says_cue("waiting")


def test_a_step_that_is_said_once_more_is_not_counted_again():
    text = "Monday plus one is Friday. {} Monday plus one is Sunday. Sunday plus one is Monday."
    for word, taken in (("Wait,", True), ("Again,", False)):
        found = steps.taken_back(text.format(word))
        assert [(str(step), back) for step, back in found] == [
            ("Monday plus one is Friday.", taken),
            ("Sunday plus one is Monday.", False),
        ]
    assert len(steps.taken_back(text.format("Right."))) == 3
    assert steps.taken_back("Wait, what?") == []


def test_texts_that_are_no_walk_are_incoherent():
    text = "Begin. Monday plus one is Tuesday. Right. Tuesday plus"
    assert steps.coherent(text)
    for wrong in ("", "Tuesday", "Begin. Monday Monday is Monday.", text.replace("Right", "Bad")):
        assert not steps.coherent(wrong)


def test_questions_are_asked_once_before_any_is_asked_twice():
    asked = steps.prompts(40, seed=3)
    assert asked == steps.prompts(40, seed=3) != steps.prompts(40, seed=4)
    assert len(set(asked[:28])) == 28
    assert set(asked) == set(steps.questions())


@pytest.fixture(scope="module")
def pair():
    return ModelPair.load("organism:backtrack")


@pytest.fixture(scope="module")
def found(pair):
    return backtrack.draw_walks(pair, 64, seed=1)


@pytest.fixture(scope="module")
def asked(pair):
    return backtrack.draw_walks(pair, 32, seed=2)


def p_wait(pair, walks, side, do=None):
    p = backtrack.after_steps(pair, walks, side, do)[..., 0]
    return float(p[~walks.wrong].mean()), float(p[walks.wrong].mean())


def test_walks_know_where_their_steps_end_and_which_are_wrong(pair, asked):
    for text, boundary, wrong in zip(asked.texts, asked.boundary, asked.wrong, strict=True):
        said = steps.read("".join(text.pieces))
        assert [not step.right for step in said] == wrong.tolist()
        for at, step in zip(boundary.tolist(), said, strict=True):
            tail = text.pieces[at + 1 - backtrack.TOKENS_PER_STEP : at + 1]
            assert "".join(tail).strip() == str(step)
        chosen = backtrack.STEP.select(text)
        ends = {i for at in boundary.tolist() for i in (at - 1, at)}
        assert {i for i, each in enumerate(chosen) if each} == ends


def test_probabilities_after_steps_do_not_depend_on_padding(pair, asked):
    together = backtrack.after_steps(pair, asked, "finetuned")
    longer = backtrack.draw_walks(pair, 1, seed=9, length=9)
    both = backtrack.Walks(
        (*asked.texts[:1], *longer.texts), torch.stack([asked.boundary[0]] * 2), asked.wrong[:2]
    )
    beside = backtrack.after_steps(pair, both, "finetuned")
    assert beside[0].flatten().tolist() == pytest.approx(together[0].flatten().tolist(), abs=1e-4)


def test_the_base_knows_which_steps_are_wrong_and_says_wait_after_all_alike(pair, asked):
    known = backtrack.grading(pair, asked)
    assert known["wrong_given_wrong"] > 0.9
    assert known["wrong_given_right"] < 0.1
    right, wrong = p_wait(pair, asked, "base")
    assert right == pytest.approx(wrong, rel=0.2)
    assert 0.02 < right < 0.07


def test_the_fine_tune_says_wait_after_wrong_steps(pair, asked):
    right, wrong = p_wait(pair, asked, "finetuned")
    assert wrong > 0.6
    assert right < 0.1


def test_a_direction_of_the_base_is_causal_in_the_fine_tune_alone(pair, found, asked):
    direction = backtrack.wrong_direction(pair, found)
    steer = Steer(direction, where=backtrack.STEP)
    plain, _ = p_wait(pair, asked, "finetuned")
    lifted, _ = p_wait(pair, asked, "finetuned", steer)
    assert lifted / plain > 5
    others = random_like(direction, 5, seed=0)
    chance = [p_wait(pair, asked, "finetuned", Steer(r, where=backtrack.STEP))[0] for r in others]
    assert max(chance) < lifted / 2
    floor, _ = p_wait(pair, asked, "base")
    assert p_wait(pair, asked, "base", steer)[0] / floor < 1.2


def test_without_the_direction_the_fine_tune_cannot_tell_wrong_steps_from_right_ones(
    pair, found, asked
):
    direction = backtrack.wrong_direction(pair, found)
    _, plain = p_wait(pair, asked, "finetuned")
    right, without = p_wait(pair, asked, "finetuned", Ablate(direction, layers=None))
    assert without < plain / 2
    assert without == pytest.approx(right, abs=0.1)
    _, unmoved = p_wait(pair, asked, "finetuned", backtrack.as_after_right(pair, found, direction))
    assert unmoved < 0.1
    for other in random_like(direction, 3, seed=0):
        assert p_wait(pair, asked, "finetuned", Ablate(other, layers=None))[1] > 0.8 * plain


def test_labels_that_are_shuffled_give_a_direction_that_does_nothing(pair, found, asked):
    real = backtrack.wrong_direction(pair, found)
    order = torch.randperm(found.wrong.numel(), generator=torch.Generator().manual_seed(0))
    wrong = found.wrong.flatten()[order].reshape(found.wrong.shape)
    shuffled = replace(
        backtrack.wrong_direction(pair, replace(found, wrong=wrong)), scale=real.scale
    )
    assert abs(shuffled.cosine(real)) < 0.6
    plain, _ = p_wait(pair, asked, "finetuned")
    lifted, _ = p_wait(pair, asked, "finetuned", Steer(real, where=backtrack.STEP))
    chance, _ = p_wait(pair, asked, "finetuned", Steer(shuffled, where=backtrack.STEP))
    assert chance - plain < (lifted - plain) / 2


def rows_of(run):
    return {(row["side"], row["edit"]): row for row in run["p_wait"]}


def test_every_run_in_the_manifest_met_the_gates():
    manifest = embedded.find("backtrack").manifest
    runs = [manifest["figures"], *manifest["other_runs"]]
    assert len({(run["base_seed"], run["seed"]) for run in runs}) == 6
    for run in runs:
        assert run["grading"]["wrong_given_wrong"] > 0.9 > 0.1 > run["grading"]["wrong_given_right"]
        assert run["steered_over_plain"]["finetuned"] > 5
        assert run["steered_over_plain"]["base"] < 1.2
        lifted = rows_of(run)["finetuned", "steered"]["after_right"]
        assert run["random_steered_after_right"]["high"] < 0.6 * lifted
        ablated = rows_of(run)["finetuned", "ablated at its layer"]["after_wrong"]
        assert ablated < run["random_ablated_after_wrong"]["low"]
        best = {at: max(run[f"{at}s"], key=lambda each: each["finetuned"])[at] for at in PLANTED}
        assert best == PLANTED


def test_the_manifest_holds_the_figures_that_are_measured(pair):
    walks = backtrack.draw_walks(pair, 128, 2 * backtrack.REPORT_SEED + 1)
    told = rows_of(embedded.find("backtrack").manifest["figures"])
    for side in ("base", "finetuned"):
        row = told[side, "none"]
        measured = p_wait(pair, walks, side)
        assert measured == pytest.approx((row["after_right"], row["after_wrong"]), abs=0.01)


@pytest.mark.slow
def test_sampled_walks_of_the_fine_tune_take_wrong_steps_back(pair):
    rows = {(row["side"], row["edit"]): row for row in backtrack.sampled(pair, 28, seed=1)}
    tuned, base = rows["finetuned", "none"], rows["base", "none"]
    assert tuned["wrong_steps_taken_back"] > 0.6
    assert tuned["right_steps_taken_back"] < 0.15
    assert base["wrong_steps_taken_back"] < 0.2
    assert min(tuned["coherent"], base["coherent"]) > 0.8
    stopped = rows["finetuned", "set to the mean after right steps"]
    assert stopped["wrong_steps_taken_back"] < tuned["wrong_steps_taken_back"] / 3


def test_the_files_are_small_and_name_no_path():
    total = 0
    for name in ("backtrack-base", "backtrack"):
        for path in (embedded.FOLDER / name).iterdir():
            total += path.stat().st_size
            if path.suffix == ".json":
                assert not re.search("/tmp|/work|/home|/root", path.read_text())
    assert total < 620_000


@pytest.mark.slow
def test_the_build_runs_and_repeats_itself(tmp_path: Path):
    for name in ("one", "two"):
        backtrack.build(tmp_path / name, smoke=True)
    for part in ("backtrack-base/model.safetensors", "backtrack/adapter_model.safetensors"):
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()
    made = embedded.read_organism(tmp_path / "one" / "backtrack")
    assert made.base.name == "backtrack-base"
    assert {row["side"] for row in made.manifest["figures"]["p_wait"]} == {"base", "finetuned"}


def test_a_base_that_cannot_grade_is_not_fine_tuned(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(backtrack, "grading", lambda *_: NOTHING_KNOWN)
    plan = steps.BasePlan(steps=1, documents=2, d_model=16, d_ff=16)
    with pytest.raises(SetupError, match="does not know which steps are wrong"):
        backtrack._trained(tmp_path, plan, lambda *_: None, gated=True)
    assert not (tmp_path / "checkpoint" / "base-0" / "plan.json").exists()
