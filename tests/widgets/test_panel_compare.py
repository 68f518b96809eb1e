"""The panel *Compare*, headless: what it shows is what its code gives."""

import re
import threading
import time
from dataclasses import replace
from typing import Any

import ipywidgets as W
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets.widgets.widget import _instances

import modeldiff as md
from modeldiff.behaviours import Behaviour, Prompt, Verdict
from modeldiff.errors import JudgeError
from modeldiff.generation import Row
from modeldiff_widgets import new_edit
from modeldiff_widgets._answers import AnswerView
from modeldiff_widgets._state import AuditState
from modeldiff_widgets._worddiff import apart
from modeldiff_widgets.compare import Compare
from tests.families import build

HOSTILE = "<img src=x onerror=alert(1)>\u202e</details><script>alert(2)</script>"


@pytest.fixture(scope="module")
def organism():
    return md.ModelPair.load("organism:em-rank1")


@pytest.fixture(scope="module")
def two():
    return build("llama")


@pytest.fixture
def compare(organism):
    with Compare(organism) as panel:
        yield panel


def shift_of(pair, site="resid_post.3"):
    acts = pair.capture(["Hello. How are you?", "I have a question."], at=site)
    return md.mean_difference(acts.finetuned[acts.site], acts.base[acts.site], acts.site, "shift")


def add_edit(panel, kind="ablate", **options):
    panel.state.add_direction(shift_of(panel.pair), code="shift")
    panel.state.edits = [new_edit(kind, "shift", **options)]


def run(panel, action="go") -> Any:
    getattr(panel, action).click()
    assert panel.jobs.wait(60)
    return panel.run_shown


def replayed(panel):
    """What the panel's code gives, and what it shows."""
    scope = {"pair": panel.pair, "state": panel.state, "shift": panel.state.directions.get("shift")}
    exec(panel.code(), scope)
    found = {(a.side, a.edit, a.sample): a.ids for a in scope["answers"]}
    cells = panel.run_shown.request.cells
    shown = {
        (cells[row.cell].side, cells[row.cell].name, row.sample): said.ids
        for row, said in panel.run_shown.said.items()
    }
    return found, shown


def slow(pair, seconds):
    """Make every forward pass take a while; returns a function that ends it."""
    heads = {id(root): root.get_output_embeddings() for root in pair.sides.roots}.values()
    hooks = [h.register_forward_hook(lambda *of: time.sleep(seconds)) for h in heads]
    return lambda: [hook.remove() for hook in hooks]


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def written(panel):
    """Whether the first answer is being written."""
    rows = panel.view.rows
    return rows and rows[0]["cells"][0]["state"] == "streaming" and panel.view.text(0, 0)


def test_the_first_click_shows_judged_answers_of_both_models(compare):
    shown = run(compare)
    assert [len(row["cells"]) for row in compare.view.rows] == [2]
    assert {verdict.label for verdict in shown.verdicts.values()} == {"aligned", "misaligned"}
    assert "100.0\xa0%" in compare.summary.value
    assert compare.view.text(0, 1) == shown.said[Row(1, 0, 0)].text
    marks = [mark for mark, _ in compare.view.rows[0]["cells"][0]["parts"]]
    assert {"", "differs"} == set(marks)


@pytest.mark.parametrize("control", [False, True])
def test_the_code_gives_what_is_shown(compare, control):
    add_edit(compare, layers="all")
    compare.state.update({"n_samples": 2, "random_control": control, "prefill": "I would"})
    run(compare)
    found, shown = replayed(compare)
    assert found == shown
    assert len(shown) == (12 if control else 8)


def test_before_the_first_click_the_code_is_what_the_click_does(compare):
    scope = {"pair": compare.pair}
    exec(compare.code(), scope)
    shown = run(compare)
    assert [a.text for a in scope["answers"]] == [said.text for said in shown.said.values()]


def test_a_run_keeps_its_code_when_settings_change_afterwards(compare):
    run(compare)
    compare.state.update({"seed": 7, "temperature": 0.1})
    found, shown = replayed(compare)
    assert found == shown


def test_regenerate_takes_the_next_seed_and_other_answers(compare):
    compare.state.update({"temperature": 1.5, "n_samples": 3})
    before = [said.ids for said in run(compare).said.values()]
    after = [said.ids for said in run(compare, "again").said.values()]
    assert compare.state.seed == 1
    assert before != after


@pytest.mark.parametrize("which", ["organism", "two"])
def test_what_was_stopped_stays_and_goes_on_as_if_it_had_not_been(which, request):
    pair = request.getfixturevalue(which)
    state = AuditState(prompt="the cat sat on", temperature=0.8, max_new_tokens=24, n_samples=2)
    with Compare(pair, state) as panel:
        panel.behaviour.value = None
        whole = {row: said.ids for row, said in run(panel).said.items()}
        quick = slow(pair, 0.03)
        panel.go.click()
        until(lambda: written(panel))
        panel.stop.click()
        assert panel.jobs.wait(10)
        quick()
        stopped: Any = panel.run_shown
        assert stopped.stopped
        assert any(0 < len(s.ids) < len(whole[row]) for row, s in stopped.said.items())
        assert all(whole[row][: len(said.ids)] == said.ids for row, said in stopped.said.items())
        found, shown = replayed(panel)
        assert {key: ids for key, ids in found.items() if key in shown} == shown
        resumed = run(panel, "more")
        assert {row: said.ids for row, said in resumed.said.items()} == whole


def test_continue_writes_on_where_the_limit_cut(two):
    with Compare(two, AuditState(prompt="the cat", max_new_tokens=5, temperature=1.0)) as panel:
        before = run(panel).said
        after = run(panel, "more")
        assert after.request.limit == 10
        assert all(after.said[row].ids[:5] == said.ids for row, said in before.items())
        assert any(len(said.ids) > 5 for said in after.said.values())
        found, shown = replayed(panel)
        assert found == shown


def test_continue_says_so_if_every_answer_has_ended(compare):
    run(compare)
    told = []
    compare.jobs.on_change(lambda job: told.append(job.error))
    compare.more.click()
    assert "nothing to continue" in told[-1][0]


def test_a_cancel_ends_within_a_third_of_a_second(two):
    with Compare(two, AuditState(prompt="the cat", max_new_tokens=4000, temperature=1.0)) as panel:
        panel.pair.sides.roots[0].config.max_position_embeddings = 8192
        panel.run()
        until(lambda: written(panel))
        start = time.monotonic()
        panel.stop.click()
        assert panel.jobs.wait(5)
        assert time.monotonic() - start < 0.3


def test_live_runs_again_when_an_edit_changes_and_the_latest_wins(compare):
    add_edit(compare, "steer", coefficient=0.5)
    run(compare)
    compare.live.value = True
    for value in (1.0, 2.0, 3.0):
        compare.state.edits = [new_edit("steer", "shift", coefficient=value)]
    assert compare.jobs.wait(60)
    assert compare.run_shown.request.edits["edited"].edits[0].coefficient == 3.0
    assert compare._prefill.n_reused == 4  # of six layers those up to the edited one


def test_kept_runs_come_back_with_their_settings_and_answers(compare):
    add_edit(compare)
    first = run(compare)
    compare.keep.click()
    compare.state.update({"edits": [], "seed": 5, "temperature": 0.0})
    second = run(compare)
    compare.keep.click()
    assert "ablate shift" in compare.kept_table.value
    compare.restore(1)
    assert compare.run_shown is first
    assert (compare.state.seed, len(compare.state.edits)) == (0, 1)
    found, shown = replayed(compare)
    assert found == shown
    compare.restore(2)
    assert compare.run_shown is second
    compare.forget(1)
    assert [number for number, _ in compare.kept] == [2]


def test_an_empty_prompt_is_refused_with_words(compare):
    compare.state.messages = [{"role": "user", "content": " "}]
    told = []
    compare.jobs.on_change(lambda job: told.append(job.error))
    compare.go.click()
    assert "empty" in told[-1][0]
    assert compare.shown_code()


def judge(label, exhibits=True):
    class Always:
        name = "always"

        def __call__(self, prompt, answer):
            if label == "error":
                raise JudgeError("no truth for this question")
            return Verdict(label, exhibits, True)

    return Behaviour(
        "behaviour of mine", "it does", (Prompt("the cat"), Prompt("the dog")), Always()
    )


def test_a_behaviour_of_ones_own_judges_and_is_asked(two):
    with Compare(two, behaviour=judge(HOSTILE)) as panel:
        assert panel.state.prompt == "the cat"
        panel.question.value = 1
        assert panel.state.prompt == "the dog"
        shown = run(panel)
        assert [v.label for v in shown.verdicts.values()] == [HOSTILE] * 2
        assert panel.view.rows[0]["cells"][0]["badges"][0][1] == "bad"
        assert "<img" not in panel.snapshot_html()


def test_a_judge_that_cannot_tell_is_no_failure(two):
    with Compare(two, behaviour=judge("error")) as panel:
        shown = run(panel)
        assert len(shown.said) == 2
        assert not shown.verdicts
        assert "no truth" in panel.remarks.value


def test_a_prompt_that_the_template_refuses_is_an_alert_and_the_panel_lives(compare):
    compare.state.messages = [{"role": "nobody", "content": "x"}]
    told = []
    compare.jobs.on_change(lambda job: told.append((job.status, job.error)))
    compare.go.click()
    assert compare.jobs.wait(20)
    assert told[-1][0] == "failed"
    compare.state.messages = [{"role": "user", "content": "I have a headache."}]
    assert len(run(compare).said) == 2


def test_the_prompt_is_written_as_chat_or_as_text(compare):
    box = compare.composer
    box.add("system", "Be kind.")
    assert [m["role"] for m in compare.state.messages] == ["user", "system"]
    box._turns[0].text.value = "Hello?"
    box._turns[1].role.value = "assistant"
    assert compare.state.messages == [
        {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Be kind."}
    ]  # fmt: skip
    box.remove(1)
    box.format.value = False
    assert (compare.state.messages, compare.state.prompt) == ([], "Hello?")
    box.format.value = True
    assert compare.state.messages == [{"role": "user", "content": "Hello?"}]
    compare.state.messages = [{"role": "user", "content": "from elsewhere"}]
    assert box.messages[0]["content"] == "from elsewhere"


def test_hostile_texts_are_escaped_in_snapshots_and_tables(compare):
    compare.state.messages = [{"role": "user", "content": HOSTILE}]
    run(compare)
    compare.keep.click()
    for html in (compare.snapshot_html(), compare.kept_table.value, compare.remarks.value):
        assert not re.search(r"<(img|script|/?details>\s*<script)", html)
        assert "\u202e" not in html


def test_nothing_stays_open(organism):
    before = set(_instances)
    for _ in range(3):
        panel = Compare(organism)
        add_edit(panel)
        panel.composer.add("system", "x")
        panel.composer.remove(0)
        run(panel)
        panel.keep.click()
        panel.close()
    assert set(_instances) == before
    assert not [t for t in threading.enumerate() if t.name == "modeldiff-jobs" and t.is_alive()]


def test_no_layout_is_shared(organism):
    with Compare(organism) as one, Compare(organism) as other:
        layouts = [
            {id(w.layout) for w in _tree(panel.root) if isinstance(w, W.DOMWidget)}
            for panel in (one, other)
        ]
        assert not layouts[0] & layouts[1]


def _tree(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from _tree(child)


words = st.lists(st.sampled_from(["a", "b", "the", ".", "\n", "x"]), max_size=8).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(words, words)
def test_marked_parts_are_the_texts_and_what_is_unmarked_is_common(first, second):
    ours, theirs = apart(first, second)
    assert "".join(text for _, text in ours) == first
    assert "".join(text for _, text in theirs) == second
    same = ["".join("".join(t for mark, t in each if not mark).split()) for each in (ours, theirs)]
    assert same[0] == same[1]
    if first == second:
        assert not any(mark for mark, _ in ours)


def test_streamed_text_arrives_in_full_whatever_the_pieces(monkeypatch):
    view = AnswerView(columns=[{"title": "x"}], rows=[{"cells": [{"parts": []}]}])
    sent = []
    monkeypatch.setattr(view, "send", sent.append)
    for text in ("a", "ab", "ab c", "ab d", "ab de"):
        view.write({(0, 0): text})
    view.flush()
    parts = []  # as the browser puts them together
    for message in sent:
        for _, _, start, text in message["pieces"]:
            parts = [*parts[:start], text]
    assert "".join(parts) == view.text(0, 0) == "ab de"
    view.close()


@pytest.mark.parametrize("content", [
    {"kind": "act", "action": "edit", "row": 9, "column": 0, "text": "x"},
    {"kind": "act", "action": "edit", "row": "0", "column": 0},
    {"kind": "act", "action": 3, "row": 0, "column": 0},
    {"kind": "act", "action": "edit", "row": 0, "column": 0, "text": 1}, {},
])  # fmt: skip
def test_messages_that_make_no_sense_do_nothing(content):
    view = AnswerView(columns=[{"title": "x"}], rows=[{"cells": [{"parts": []}]}])
    told = []
    view.on_act(lambda *act: told.append(act))
    view._handle_custom_msg(content, [])
    assert told == []
    view.close()


def test_a_stopped_request_of_uneven_sides_is_written_side_by_side(two):
    with Compare(two, AuditState(prompt="the cat", max_new_tokens=6, temperature=1.0)) as panel:
        shown = run(panel)
        cut = {row: replace(said, ids=said.ids[: 2 + row.cell]) for row, said in shown.said.items()}
        panel.run_shown = replace(shown, said=cut, stopped=True)
        found, expected = replayed(panel)
        assert found == expected
