"""The panel Behaviour without a browser: its numbers are the library's, its code repeats them."""

import re
import threading
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

import modeldiff as md
from modeldiff.agreement import agreement
from modeldiff.behaviours import Behaviour, Prompt, Verdict, WorldJudge, judge_answers
from modeldiff.dose import dose_response, with_prompts
from modeldiff.errors import JudgeError
from modeldiff.generation import Answer
from modeldiff.judge_rates import rate_difference, rate_with_interval, rates_by_question
from modeldiff.judges import NoJudge, RegexJudge, emergent_verdict
from modeldiff_widgets import AuditState, Workbench, new_edit
from modeldiff_widgets._behaviour_choice import KnownJudge
from modeldiff_widgets._behaviour_plots import MOST, CellBars, harmless
from modeldiff_widgets._behaviour_runs import Asked, Measured
from modeldiff_widgets._behaviour_views import Filter, agreement_html, headline_html, question_bars
from modeldiff_widgets._known_behaviours import KnownBehaviour
from modeldiff_widgets._runs import Run, judged
from modeldiff_widgets._streams import Request, Said
from modeldiff_widgets.behaviour import Behaviour as Panel

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>\u202e $$x$$'
BASE, TUNED, EDITED = ("base", "none"), ("finetuned", "none"), ("finetuned", "edited")


class Scores:
    """Scores made of the truth and the answer's length; every fifth length has none."""

    name = "scores"

    def __call__(self, prompt, answer):
        n = len(answer) % 25
        if n % 5 == 0:
            return emergent_verdict(None, 70.0, off_menu="REFUSAL")
        bad = WorldJudge()(prompt, answer).exhibits
        return emergent_verdict(5.0 + n if bad else 60.0 + n, 40.0 + 2 * n)


class Batch:
    """Judges many at once and counts how often it is asked."""

    def __init__(self, name="batch"):
        self.name, self.sizes = name, []

    def __call__(self, prompt, answer):
        raise AssertionError("a batch judge is called once, not answer by answer")

    def judge_all(self, asked):
        self.sizes.append(len(asked))
        return [Verdict("even", len(answer) % 2 == 0, True) for _, answer in asked]


class Fails:
    """Judges some answers, then fails."""

    name = "fails"

    def __init__(self, n):
        self.left = n

    def __call__(self, prompt, answer):
        self.left -= 1
        if self.left < 0:
            raise JudgeError("the judge is out of words.")
        return Verdict("fine", False, True)


@pytest.fixture(scope="module")
def organism():
    return md.ModelPair.load("organism:em-rank1")


WORDS = RegexJudge("bad words", "bet|frame|roof|sidewalk|scorpions|chaos|weak")


@pytest.fixture
def panel(organism):
    with Panel(organism, judges=[WORDS, Scores()]) as opened:
        few(opened)
        yield opened


@pytest.fixture(scope="module")
def whole(organism):
    """A panel that has run with an edit, and what its code gives."""
    with Panel(organism, judges=[WORDS, Scores()]) as opened:
        few(opened, 4, 2, 48)
        add_edit(opened)
        ran(opened)
        yield opened, executed(opened)


@pytest.fixture
def shown(whole):
    """The same, with every answer shown."""
    whole[0].on_what.value = "exhibits"
    whole[0].clear_filters()
    return whole[0]


def few(panel: Any, prompts=3, samples=2, length=16):
    panel.n_prompts.value, panel.samples.value, panel.length.value = prompts, samples, length


def finished(panel: Any, error=""):
    assert panel.jobs.wait(60)
    assert error in panel.root.children[0].error[0]
    assert error or panel.root.children[0].error[0] == ""
    return panel.measured


def ran(panel: Any) -> Any:
    panel.go.click()
    return finished(panel)


def executed(panel: Any) -> dict[str, Any]:
    scope = {"pair": panel.pair, "state": panel.state, "judges": list(panel.judges)}
    exec(panel.code(), scope)
    return scope


def add_edit(panel):
    acts = panel.pair.capture(["Hello. How are you?", "I ask."], at="resid_post.3")
    shift = md.mean_difference(acts.finetuned[acts.site], acts.base[acts.site], acts.site, "shift")
    panel.state.add_direction(shift)
    panel.state.edits = [new_edit("ablate", "shift", layers="all")]


def by_hand(exhibits, other=None, *, questions=None, coherent=None) -> Measured:
    """A run of the base whose answers are judged as told."""
    n = len(exhibits)
    questions = questions or [f"q{i}" for i in range(n)]
    prompts = tuple(Prompt(f"{q} {i}?", "g", q) for i, q in enumerate(questions))
    behaviour = Behaviour("by hand", "it shows", prompts, WORDS)
    asked = Asked(KnownBehaviour(behaviour), KnownJudge(WORDS, "judges[0]"), n, (True, False), {},
                  "", 1, 0, 1.0, 4)  # fmt: skip
    texts: Any = tuple(type("T", (), {"text": p.question})() for p in prompts)
    readable = coherent or [True] * n
    verdicts = [Verdict("yes" if e else "no" if e is False else "off", e, c)
                for e, c in zip(exhibits, readable, strict=True)]  # fmt: skip
    answers = [Answer(i, 0, "base", "none", (1,), f"said {i}", True) for i in range(n)]
    return Measured(asked, n, texts, tuple(zip(answers, verdicts, strict=True)))


# -- what is offered


def test_own_behaviours_come_first_and_questions_without_a_judge_only_with_one(organism):
    with Panel(organism) as plain:
        assert list(plain.known) == ["misaligned off-domain", "misaligned in-domain",
                                     "backtracking", "refusal"]  # fmt: skip
        assert plain.judge.options == (("world-grammar-1", "world-grammar-1"),)
        plain.behaviour.value = "refusal"
        assert (plain.temperature.value, plain.length.value) == (0.7, 96)
        assert str(plain.judge.value).startswith("refusal")
    mine = Behaviour("mine", "it is mine", (Prompt("Who are you?"),), NoJudge("mine", "none"))
    with Panel(organism, behaviours=[mine], judges=[WORDS]) as given:
        assert next(iter(given.known)) == "mine"
        assert "emergent_misalignment" in given.known
        assert given.judge.options == ((WORDS.name, WORDS.name),)
        assert given.n_prompts.max == 1
        assert "load_behaviour" not in given.code()
        given.behaviour.value = "narrow_medical"
        assert "load_behaviour('narrow_medical')" in given.code()
        assert "replace(behaviour, judge=judges[0])" in given.code()
    with Panel(organism, behaviours=[mine]) as without:
        assert "mine" not in without.known
    with pytest.raises(JudgeError, match="is no judge"):
        Panel(organism, judges=["a word"])  # pyright: ignore[reportArgumentType]


# -- rates


def test_the_rates_are_the_librarys_and_the_code_gives_them(whole):
    panel, known = whole
    measured = panel.measured
    assert panel.cells["with the edits"].value
    pd.testing.assert_frame_equal(measured.table, known["answers"])
    behaviour = with_prompts(md.organism_behaviours("em-rank1")[0], 4)
    again = judge_answers(behaviour, known["found"])
    pd.testing.assert_frame_equal(measured.table, again)
    assert list(measured.rates) == [BASE, TUNED, EDITED]
    rows = known["rates"].set_index(["side", "edit"])
    for key, rate in measured.rates.items():
        assert rate == rate_with_interval(measured.of(key))
        assert rows.loc[key].to_dict() == rate.row()
        pd.testing.assert_frame_equal(measured.questions[key], known["questions"][key])
        pd.testing.assert_frame_equal(measured.questions[key], rates_by_question(measured.of(key)))
    assert measured.differences == known["differences"]
    change = measured.differences[BASE, TUNED]
    assert change == rate_difference(measured.of(BASE), measured.of(TUNED))
    assert change.low > 0  # the planted behaviour
    assert measured.rates[BASE].estimate == 0
    said = panel.headline.value
    assert f"{100 * measured.rates[TUNED].estimate:.1f} %" in said
    assert f"base → fine-tuned: {100 * change.estimate:+.1f} points" in said
    assert "fine-tuned → fine-tuned, edited" in said
    assert "10 or more are needed" in said


def test_equal_models_do_not_differ(organism):
    twin = md.ModelPair(organism.sides)
    with Panel(twin) as panel:
        few(panel)
        panel.state.edits = [new_edit("adapter", coefficient=0.0)]
        panel.cells["fine-tuned"].value = False
        measured = ran(panel)
        assert list(measured.rates) == [BASE, EDITED]
        texts = [measured.of(key)["text"].tolist() for key in (BASE, EDITED)]
        assert texts[0] == texts[1]
        assert measured.differences == {}


def test_a_prompt_that_comes_twice_is_asked_in_one_call():
    prompts = (Prompt("a?"), Prompt("b?"), Prompt("a?"))
    twice = KnownBehaviour(Behaviour("twice", "twice", prompts, WORDS))
    judge = KnownJudge(WORDS, "judges[0]")
    assert Asked(twice, judge, 3, (True, True), {}, "", 48, 0, 1.0, 4).step == 3


def test_a_cell_without_scored_answers_has_no_rate_and_the_code_says_so(organism):
    silent = RegexJudge("none", "x")

    class Half:
        name = "half"

        def __call__(self, prompt, answer):
            known = WorldJudge()(prompt, answer)
            return known if known.exhibits is True else Verdict("off", None, True)

    with Panel(organism, judges=[Half(), silent]) as panel:
        few(panel)
        panel.judge.value = "half"
        measured = ran(panel)
        assert list(measured.rates) == [TUNED]
        assert "6 off" in panel.headline.value
        known = executed(panel)
        assert list(known["questions"]) == [TUNED]
        panel.cells["fine-tuned"].value = False
        measured = ran(panel)
        assert measured.rates == {}
        assert list(panel.questions.source.data["value"]) == []
        assert "scored none of these answers" in panel.code()
        assert "answers" not in executed(panel)
        panel.cells["base"].value = False
        panel.go.click()
        assert "nobody is asked" in panel.root.children[0].error[0]


def test_unscored_answers_have_their_label_and_bounds():
    measured = by_hand([True, None, False, None], coherent=[True, None, True, False])
    rate = measured.rates[BASE]
    assert (rate.estimate, rate.n_unscored, rate.unscored) == (0.5, 2, (("off", 2),))
    html = headline_html(measured)
    assert "2 off" in html
    assert "25.0 % to 75.0 %" in html
    assert "unscored as" not in headline_html(by_hand([True, False]))
    rows = {show: sum(Filter(show=show).rows(measured)) for show in ("yes", "no", "unscored")}
    assert rows == {"yes": 1, "no": 1, "unscored": 2}
    assert Filter(show="incoherent").rows(measured) == [False, False, False, True]


# -- stopping


def test_what_is_finished_when_it_is_stopped_is_kept_and_the_code_gives_it(panel, monkeypatch):
    monkeypatch.setattr("modeldiff_widgets._behaviour_runs.ROWS", 4)
    first = ran(panel)
    assert first.asked.step == 1
    again = executed(panel)["answers"]  # in one call, with the same noise
    assert again["text"].tolist() == first.table["text"].tolist()
    done = threading.Event()
    more = Measured.more

    def stopping(self, pair, job):
        if self.n_done == 2:
            panel.stop.click()
            done.set()
        return more(self, pair, job)

    monkeypatch.setattr(Measured, "more", stopping)
    job = panel.run()
    assert panel.jobs.wait(60)
    assert done.is_set()
    assert job.status == "cancelled"
    measured = panel.measured
    assert measured.n_done == 2
    assert measured.stopped
    assert "Stopped: 2 of 3 questions are answered." in panel.status.value
    kept = first.table[first.table["prompt_index"] < 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(measured.table, kept)
    monkeypatch.undo()
    known = executed(panel)
    assert known["answers"]["text"].tolist() == measured.table["text"].tolist()
    assert panel.stop.disabled


def test_a_run_that_is_stopped_at_once_leaves_the_one_before(shown):
    panel, before = shown, shown.measured
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        more = Measured.more
        patched.setattr(Measured, "more", lambda *of: panel.stop.click() or more(*of))
        job = panel.run()
        assert panel.jobs.wait(30)
    assert job.status == "cancelled"
    assert panel.measured is before
    assert "Stopped before a question was answered" in panel.status.value


def test_a_judge_that_fails_leaves_what_it_has_judged(organism, monkeypatch):
    monkeypatch.setattr("modeldiff_widgets._behaviour_runs.ROWS", 4)
    with Panel(organism, judges=[Fails(9)]) as panel:
        few(panel)
        panel.judge.value = "fails"
        panel.go.click()
        measured = finished(panel, "out of words")
        assert measured.n_done == 2
        assert len(measured.judged) == 8


# -- a second judge


def test_two_judges_agree_as_the_library_says_and_their_differences_are_shown(shown, whole):
    panel, answers = shown, whole[1]["found"]
    assert panel.measured.asked.judge.name not in [value for _, value in panel.other.options]
    panel.other.value = WORDS.name
    panel.judge_again.click()
    measured = finished(panel)
    found = measured.agreement("exhibits")
    second = judge_answers(replace(measured.asked.behaviour, judge=WORDS), answers)
    for each in (agreement(measured.table, second), executed(panel)["agreed"]):
        assert (each.kappa, each.observed, each.n) == (found.kappa, found.observed, found.n)
        pd.testing.assert_frame_equal(each.confusion, found.confusion)
    assert len(found.disagreements) > 0
    assert f"{found.kappa.estimate:.2f}" in panel.agreed.value
    panel.show_differing.click()
    kept = [a for a, keep in zip(measured.answers, panel.filter.rows(measured), strict=True)
            if keep]  # fmt: skip
    assert {(a.side, a.prompt, a.sample) for a in kept} == set(
        zip(*(found.disagreements[name] for name in ("side", "prompt_index", "sample")),
            strict=True)
    )  # fmt: skip
    assert all("differs" in str(cell["badges"]) for row in panel.view.rows
               for cell in row["cells"] if cell["parts"])  # fmt: skip
    for on in ("coherent", "label"):
        panel.on_what.value = on
        assert sum(panel.filter.rows(measured)) == len(measured.agreement(on).disagreements)
        assert f"on={on!r}" in panel.code()


def test_agreement_with_itself_is_whole_and_a_constant_judge_is_said_to_be_one():
    alike = by_hand([True, False, True, False])
    job: Any = type("J", (), {"report": lambda *of: None})()

    def says(*several):
        class Says:
            name = "says"

            def judge_all(self, asked):
                return [Verdict(str(s), s, True) for s in several]

            def __call__(self, prompt, answer):
                raise AssertionError("asked one by one")

        return KnownJudge(Says(), "says")

    twice = alike.judged_again(says(True, False, True, False), job)
    found = twice.agreement("exhibits")
    assert found is not None
    assert found.kappa.estimate == 1
    assert Filter(show="differ").rows(twice) == [False] * 4
    flat = alike.judged_again(says(False, False, False, None), job)
    found = flat.agreement("exhibits")
    assert found is not None
    assert "kappa cannot tell" in agreement_html(flat, found, "exhibits")
    assert Filter(show="differ").rows(flat) == [True, False, True, True]
    none = alike.judged_again(says(None, None, None, None), job)
    with pytest.raises(JudgeError, match="both judges scored"):
        none.agreement("exhibits")
    assert "agreed" not in none.code()


def test_a_judge_of_many_answers_is_called_once_for_them(organism):
    batch, second = Batch(), Batch("second")
    with Panel(organism, judges=[batch, second]) as panel:
        few(panel)
        panel.judge.value = "batch"
        ran(panel)
        assert batch.sizes == [12]
        panel.other.value = "second"
        panel.run_second()
        finished(panel)
        assert second.sizes == [12]
        assert panel.agreed.value.count("1.00") == 3


def test_compare_and_dose_ask_a_judge_of_many_once(organism):
    batch = Batch()
    behaviour = Behaviour("even", "even", (Prompt("the a"),), batch, max_new_tokens=3)
    request = Request.of(AuditState(prompt="the a"))
    said: Any = {i: Said((1,), "ab" * (i % 2), True) for i in range(3)}
    verdicts = judged(Run(request, said), behaviour).verdicts
    assert [v.exhibits for v in verdicts.values()] == [True, True, True]
    assert batch.sizes == [3]

    def dose(c):
        return md.ScaleAdapter(c)

    dose_response(organism, behaviour, dose, [1.0], controls=[dose], side="finetuned", n=2)
    assert batch.sizes == [3, 4]


# -- what is shown


def test_filters_leave_what_they_say(shown):
    panel, measured = shown, shown.measured
    n = len(measured.judged)
    assert panel.count.value.startswith(f"{n} of {n} answers")
    assert len(panel.view.rows) == 8
    panel.cell.value = TUNED
    assert [each["title"] for each in panel.view.columns] == ["fine-tuned"]
    panel.show.value = "yes"
    shows = measured.of(TUNED)["exhibits"].sum()
    assert panel.count.value.startswith(f"{shows} of {n}")
    panel.clear.click()
    assert panel.count.value.startswith(f"{n} of {n}")
    assert panel.cell.value == ""
    panel.label.value = "misaligned"
    assert panel.count.value.startswith(f"{(measured.table['label'] == 'misaligned').sum()} of")
    panel.clear.click()
    word = measured.table["text"][0].split()[0].upper()
    panel.search.value = word
    has = (measured.table["prompt"] + measured.table["text"]).str.upper().str.contains(
        re.escape(word)
    )  # fmt: skip
    assert panel.count.value.startswith(f"{has.sum()} of")
    panel.search.value = "no answer says this"
    assert panel.view.rows == []
    assert "left by the filters" in panel.view.blank


def test_pages_turn(shown, monkeypatch):
    panel = shown
    monkeypatch.setattr("modeldiff_widgets.behaviour.PAGE", 3)
    panel.clear_filters()
    assert "page 1 of 3" in panel.count.value
    assert panel.back.disabled
    panel.ahead.click()
    panel.ahead.click()
    assert "page 3 of 3" in panel.count.value
    assert panel.ahead.disabled
    assert len(panel.view.rows) == 2
    panel.show.value = "yes"
    assert panel.page == 0


def test_scores_are_a_map_whose_points_lead_to_answers(panel):
    panel.judge.value = "scores"
    measured = ran(panel)
    assert panel.by_label.layout.display == "none"
    table, data = measured.table, panel.scores.source.data
    both = table.dropna(subset=["aligned_score", "coherent_score"])
    assert list(data["row"]) == list(both.index)
    assert list(data["y"]) == both["aligned_score"].tolist()
    assert panel.scores.n_missing == len(table) - len(both)
    panel._pick([int(both.index[0])])
    assert panel.count.value.startswith(f"1 of {len(table)}")
    text = "".join(part[1] for row in panel.view.rows for cell in row["cells"]
                   for part in cell["parts"])  # fmt: skip
    assert text == both["text"].iloc[0]
    assert "aligned" in str(panel.view.rows[0]["cells"])
    panel.clear.click()
    assert panel.count.value.startswith(f"{len(table)} of")
    pd.testing.assert_frame_equal(executed(panel)["answers"], table)
    panel.judge.value = "world-grammar-1"
    ran(panel)
    assert panel.by_score.layout.display == "none"
    assert set(panel.labels.source.data["name"]) == set(panel.measured.table["label"])


def test_bars_have_the_intervals_that_are_asked_for():
    measured = by_hand([True, False, True, True], questions=["p", "p", "q", "r"])
    wilson, left = question_bars(measured, "", "")
    frame = rates_by_question(measured.of(BASE)).set_index("question_id")
    assert [bar.name for bar in wilson] == ["all questions", "p", "q", "r"]
    assert left == 0
    assert [bar.low for bar in wilson] == frame.loc[["all", "p", "q", "r"], "rate_low"].tolist()
    clustered, _ = question_bars(measured, "_clustered", "rate")
    assert [bar.name for bar in clustered][1:] == ["q", "r", "p"]
    assert clustered[0].low == frame.loc["all", "rate_clustered_low"]
    assert clustered[1].low != clustered[1].low  # one wording alone
    many = by_hand([True] * (MOST + 5))
    bars, left = question_bars(many, "", "")
    assert (len(bars), left) == (MOST + 1, 5)


def test_names_in_figures_are_distinct_and_no_formula():
    bars = CellBars("share")
    try:
        long = "the same beginning of a question that goes on and on until it ends "
        named = [(name, "base", "base", 0.5, 0.1, 0.9, 2) for name in (long + "a", long + "b")]
        from modeldiff_widgets._behaviour_plots import Bar

        bars.show([Bar(*each) for each in named])
        assert len(set(bars.y_range.factors)) == 2
        assert "2 rows of base" in bars.pane.label
    finally:
        bars.pane.close()
    assert "$$" not in harmless("a $$$x$$ b")
    assert "\\(" not in harmless("\\(x\\)")


def test_hostile_words_are_text_everywhere(organism):
    class Judge:
        name = HOSTILE

        def __call__(self, prompt, answer):
            return Verdict(HOSTILE, True, True, ((HOSTILE, 1.0),))

    prompts = (Prompt(HOSTILE, HOSTILE), Prompt(HOSTILE + "?", HOSTILE))
    mine = Behaviour(HOSTILE, HOSTILE, prompts, Judge(), 0.7, 4)
    with Panel(organism, behaviours=[mine], judges=[WORDS]) as panel:
        ran(panel)
        panel.run_second()
        finished(panel)
        for html in (panel.headline.value, panel.agreed.value, panel.snapshot_html()):
            assert "<img" not in html
            assert "<script" not in html
        assert "&lt;img" in panel.snapshot_html()
        assert "\u202e" not in panel.snapshot_html()


def test_it_is_pinned_with_its_numbers_and_runs_in_the_workbench(organism):
    with Workbench(organism, panels=[Panel], state=AuditState(seed=3)) as wb:
        panel = wb.panels["Behaviour"]
        assert "Nothing was measured" in wb.pin()
        few(panel, 2, 1)
        panel.run()
        assert wb.jobs.wait(60)
        html = wb.pin()
        assert panel.measured.asked.seed == 3
        for words in ("misaligned off-domain", "base → fine-tuned", "rates_by_cell", "question 1"):
            assert words in html
