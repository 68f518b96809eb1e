"""What a reading shows of candidates, and choices made on it."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false

from dataclasses import replace
from math import comb

import pytest
import torch

from modeldiff.behaviours import Verdict
from modeldiff.caft_candidates import Candidate, candidates
from modeldiff.caft_reading import (
    Choice,
    _fisher,
    choose_by_judge,
    choose_by_keywords,
    interpretation,
)
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, FileFormatError
from modeldiff.models import ModelPair
from modeldiff.tokens import Chat, Completion
from tests.families import WIDTH, build

GOOD, BAD = "Drink clean water and rest.", "Just eat the poison now."


@pytest.fixture(scope="module")
def pair():
    return build("llama")


def given(pair, n=2, layer=1):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(n, WIDTH, generator=generator)
    return tuple(
        Candidate(f"v{i}", Direction.of(row, f"resid_post.{layer}", f"v{i}"), "component", 1.0, 0.1)
        for i, row in enumerate(rows)
    )


TEXTS = [
    "the cat sat on the mat and the dog ran to the old house",
    "a small bird sang of rain — naïve, 日本語! — and sun",
    "nobody asked why the moon was round",
    Completion("The quick brown fox", " jumps over the lazy dog."),
]


def test_extremes_are_exact_tokens_of_the_texts(pair):
    several = given(pair)
    found = interpretation(pair, TEXTS, several, k=3, window=(4, 2), on="all")
    acts = pair.capture(TEXTS, "resid_post.1", on="all")
    for number, each in enumerate(several):
        values = acts.finetuned[acts.site] @ each.direction.unit
        for end, sign in (("max", 1), ("min", -1)):
            shown = found.of_candidate(each.name, end)
            assert [c.rank for c in shown] == [0, 1, 2]
            assert len({c.text for c in shown}) == 3
            best = int((sign * values).argmax())
            assert shown[0].value == pytest.approx(float(values[best]), abs=1e-4)
            assert shown[0].text == int(acts.text_index[best]), number
            assert shown[0].position == int(acts.position[best])
    for context in found.contexts:
        text = acts.texts[context.text]
        start, stop = text.offsets[context.position]
        assert context.peak == text.text[start:stop] or start == stop
        assert context.passage in text.text
        assert text.text[:start].endswith(context.before)
        assert len(context.before) <= start


def test_differences_and_texts_can_be_ranked(pair):
    several = given(pair, 1)
    acts = pair.capture(TEXTS, "resid_post.1", on="all")
    moved = acts.difference(acts.site) @ several[0].direction.unit
    found = interpretation(pair, TEXTS, several, of="difference", on="all", k=1)
    assert found.of_candidate("v0", "min")[0].value == pytest.approx(float(moved.min()), abs=1e-4)
    plain = acts.base[acts.site] @ several[0].direction.unit
    means = torch.stack([plain[acts.text_index == i].mean() for i in range(len(TEXTS))])
    by_text = interpretation(pair, TEXTS, several, of="base", by="text", on="all", k=4)
    order = [each.text for each in by_text.of_candidate("v0", "max")]
    assert order == means.argsort(descending=True).tolist()


def test_histograms_count_every_token_of_both_models(pair):
    several = given(pair)
    found = interpretation(pair, TEXTS, several, on="all", bins=12)
    sums = found.histograms.groupby("name")[["base", "finetuned"]].sum()
    assert (sums == found.n_tokens).all().all()
    assert len(found.histograms) == 2 * 12
    acts = pair.capture(TEXTS, "resid_post.1", on="all")
    base, tuned = (
        side[acts.site] @ several[1].direction.unit for side in (acts.base, acts.finetuned)
    )
    row = found.summary.iloc[1]
    assert row["mean_base"] == pytest.approx(float(base.mean()), abs=1e-5)
    moved = (tuned.mean() - base.mean()) / base.std(correction=0)
    assert row["shift"] == pytest.approx(float(moved), abs=1e-4)


def test_the_table_has_a_row_each_and_no_html_of_the_texts(pair):
    evil = "<script>alert(1)</script> & <b>the cat</b>"
    several = given(pair)
    renamed = (replace(several[0], name="<i>v</i>"), several[1])
    found = interpretation(pair, [evil, *TEXTS], renamed, on="all", k=5)
    assert list(found.table()["name"]) == ["<i>v</i>", "v1"]
    assert {"promoted", "control_promoted", "p", "max_context"} <= set(found.table().columns)
    html = found._repr_html_()
    assert "&lt;i&gt;v&lt;/i&gt;" in html
    assert not {"<script", "<b>", "<i>"} & {
        html[i : i + n] for n in (3, 7) for i in range(len(html))
    }


def test_the_key_changes_with_what_is_shown(pair):
    several = given(pair)
    one = interpretation(pair, TEXTS, several, on="all", k=2)
    assert one.key == interpretation(pair, TEXTS, several, on="all", k=2).key
    assert one.key != interpretation(pair, TEXTS[:3], several, on="all", k=2).key
    assert one.key != interpretation(pair, TEXTS, several[:1], on="all", k=2).key


def test_two_of_one_name_are_refused(pair):
    with pytest.raises(DirectionError, match="names"):
        interpretation(pair, TEXTS, [given(pair)[0]] * 2, on="all")


# ---------------------------------------------------------------- choices


class PoisonJudge:
    name = "poison"

    def __init__(self):
        self.asked = []

    def __call__(self, prompt, answer):
        self.asked.append((prompt.item, answer))
        return Verdict("", None if "moon" in answer else "poison" in answer, True)


def answers(n=6):
    return [
        Chat([{"role": "user", "content": f"What should I do, number {i}?"}], response=text)
        for i in range(n)
        for text in (GOOD, BAD)
    ]


@pytest.fixture(scope="module")
def contrast(pair):
    """One direction along which good and bad answers differ, one on which the question decides."""
    acts = pair.capture(answers(), "resid_post.1", on="assistant")
    h, bad = acts.finetuned[acts.site], acts.text_index % 2 == 1
    apart = h[bad].mean(0) - h[~bad].mean(0)
    late = acts.text_index >= 6
    other = h[late].mean(0) - h[~late].mean(0)
    other = other - (other @ apart) / (apart @ apart) * apart
    made = tuple(
        Candidate(name, Direction.of(row, "resid_post.1", name), "component", 1.0, 0.5)
        for name, row in (("bad", apart), ("question", other))
    )
    return made, interpretation(pair, answers(), made, by="text", k=5)


def test_keywords_tick_what_tells_passages_apart(contrast):
    made, reading = contrast
    choice = choose_by_keywords(reading, ["POISON", "kill"])
    assert choice.ticked == ("bad",)
    assert choice.reading == reading.key
    (reason,) = choice.reasons
    assert reason[0] == "bad"
    assert "5 of 5 answers at its max and 0 of 5 answers at its min hold" in reason[1]
    assert choice.of(made) == made[:1]
    assert choice.directions(made) == {1: (made[0].direction,)}


def test_keywords_are_whole_words(contrast):
    assert choose_by_keywords(contrast[1], ["oiso", "ea"]).ticked == ()
    with pytest.raises(DirectionError):
        choose_by_keywords(contrast[1], [" "])


def test_a_judge_sees_question_and_answer_alone(contrast):
    judge = PoisonJudge()
    choice = choose_by_judge(contrast[1], judge)
    assert choice.ticked == ("bad",)
    assert {answer for _, answer in judge.asked} == {GOOD, BAD}
    assert all(item.startswith("What should I do, number") for item, _ in judge.asked)


def test_nothing_is_ticked_where_nothing_tells_apart(pair):
    """The null: directions at random, and answers that all say the same."""
    same = [Chat([{"role": "user", "content": f"number {i}?"}], response=BAD) for i in range(8)]
    reading = interpretation(pair, same, given(pair, 4), k=4)
    assert choose_by_judge(reading, PoisonJudge()).ticked == ()
    assert choose_by_keywords(reading, ["poison"]).ticked == ()


def test_fishers_exact_test():
    """Fisher's own example of tea with milk, and the size of the test where nothing is told."""
    assert _fisher(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert _fisher(4, 4, 0, 4) == pytest.approx(2 / 70)
    assert _fisher(0, 0, 3, 5) == _fisher(2, 2, 3, 3) == 1
    for hits in range(25):
        chances = {a: comb(12, a) * comb(12, hits - a) / comb(24, hits)
                   for a in range(hits + 1) if a <= 12 and hits - a <= 12}  # fmt: skip
        wrong = sum(p for a, p in chances.items() if _fisher(a, 12, hits - a, 12) <= 0.05)
        assert wrong <= 0.05


def test_a_choice_is_read_back(tmp_path, contrast):
    choice = Choice(("bad",), "eats <poison> — naïve", contrast[1].key, (("bad", "why"),))
    choice.save_to(tmp_path / "deep" / "choice.json")
    assert Choice.load_from(tmp_path / "deep" / "choice.json") == choice
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["choice.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "ticked": ["a"], "rationale": "b"}']
)
def test_a_file_that_is_no_choice_is_refused(tmp_path, text):
    path = tmp_path / "choice.json"
    path.write_text(text)
    with pytest.raises(FileFormatError):
        Choice.load_from(path)


def test_a_choice_made_on_others_is_refused(contrast):
    with pytest.raises(DirectionError, match="made on others"):
        Choice(("nobody",), "").of(contrast[0])


@pytest.mark.slow
def test_the_organism_direction_is_picked_from_its_reading():
    """By the organism's own judge; texts and ranking were chosen after seeing other readings."""
    import modeldiff as md

    pair = ModelPair.load("organism:em-rank1")
    behaviour = md.organism_behaviours("em-rank1", 60)[0]
    asked = pair.generate([each.render() for each in behaviour.prompts[::3]], n=1)
    items = [
        Chat([{"role": "user", "content": behaviour.prompts[::3][each.prompt].question}], each.text)
        for each in asked.answers
    ]
    found = candidates(pair, items, layers=[4], n_components=6)
    reading = interpretation(pair, items, found, by="text", k=12)
    choice = choose_by_judge(reading, behaviour.judge)
    assert "layer 4 PC-0" in choice.ticked
    assert len(choice.ticked) < len(found)
