"""The panel *Compare* in JupyterLab, from its first click to a kept run that is restored."""

import re
from pathlib import Path

import pytest

from modeldiff_widgets._theme import css
from tests.browser.labdriver import Bare
from tests.browser.steps import in_place

pytestmark = pytest.mark.browser

STATIC = Path(__file__).parents[2] / "widgets" / "modeldiff_widgets" / "static"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e{{x}}[a](javascript:alert(3))"
OPEN = """
import modeldiff as md
from modeldiff_widgets import new_edit
from modeldiff_widgets.compare import Compare
pair = md.ModelPair.load("organism:em-rank1")
panel = Compare(pair)
"""
EDIT = """
prompt = panel.behaviours[0].prompts[0].render()
acts = pair.capture([prompt], at="resid_post.3")
shift = md.mean_difference(acts.finetuned[acts.site], acts.base[acts.site], acts.site, "shift")
panel.state.add_direction(shift)
panel.state.edits = [new_edit("ablate", "shift", layers="all")]
panel.state.n_samples = 3
"""


def button(out, name):
    return out.get_by_role("button", name=re.compile(rf"(^|\W){name}$"))


def test_compare_from_the_first_click_to_a_kept_run(notebook, shots):
    opened = notebook(OPEN, "panel")
    out, page = opened.output(1), opened.lab.page
    opened.shoot(shots, "compare_empty", 1)
    button(out, "Generate").click()
    opened.until("panel.jobs.wait(0) and panel.run_shown is not None")
    out.locator(".mdw-answers .mdw-badge").nth(1).wait_for()
    assert out.locator(".mdw-answers .cell").count() == 2
    texts = out.locator(".mdw-answers .words").all_inner_texts()
    assert texts == opened.eval("[s.text for s in panel.run_shown.said.values()]")
    assert out.locator("mark").count() > 1
    opened.exec(EDIT)
    button(out, "Keep run").click()
    button(out, "Regenerate").click()
    opened.until("panel.jobs.wait(0) and len(panel.run_shown.said) == 12")
    out.locator(".mdw-answers .mdw-badge").nth(11).wait_for()
    button(out, "Keep run").click()
    out.locator("summary", has_text="Code").click()
    opened.until("'seed=1' in panel._listing.code")
    opened.shoot(shots, "compare_grid", 1)
    out.get_by_role("combobox").last.select_option(index=0)
    button(out, "Restore").click()
    opened.until("panel.state.seed == 0 and panel.state.edits == []")
    page.wait_for_function(
        "id => document.getElementById(id).querySelectorAll('.mdw-answers .cell').length === 2",
        arg=opened.identity,
    )
    assert out.locator(".mdw-answers .words").all_inner_texts() == texts


def test_stop_keeps_what_is_written_and_continue_goes_on(notebook):
    opened = notebook(OPEN, "panel")
    out = opened.output(1)
    opened.exec(
        "panel.state.max_new_tokens = 4000\npanel.state.temperature = 0.0\n"
        "panel.state.messages = []\npanel.state.prompt = 'the of a the'\n"
        "panel.behaviour.value = None\n"
        "end = pair.tokenizer.eos_token_id\n"
        "import torch\n"
        "slow = torch.nn.Module.register_forward_hook(pair.sides.roots[0].lm_head, "
        "lambda m, a, o: __import__('time').sleep(.1))"
    )  # slow enough to be stopped
    button(out, "Generate").click()
    out.locator(".cell.streaming").first.wait_for()
    opened.lab.page.wait_for_timeout(500)
    button(out, "Stop").click()
    opened.until("panel.jobs.wait(0) and panel.run_shown is not None")
    assert opened.eval("panel.run_shown.stopped")
    before = opened.eval("[list(s.ids) for s in panel.run_shown.said.values()]")
    opened.exec(
        "slow.remove()\npanel.run_shown.request.limit\n"
        "from dataclasses import replace\n"
        "panel.run_shown = replace(panel.run_shown, "
        "request=replace(panel.run_shown.request, limit=40))"
    )
    button(out, "Continue").click()
    opened.until("panel.jobs.wait(0) and not panel.run_shown.stopped")
    after = opened.eval("[list(s.ids) for s in panel.run_shown.said.values()]")
    assert all(before)
    assert all(new[: len(old)] == old for new, old in zip(after, before, strict=True))


def test_hostile_prompts_stay_text_and_it_fits_where_it_is_narrow(notebook, shots):
    opened = notebook(OPEN, "panel")
    out = opened.output(1)
    opened.exec(
        f"panel.state.messages = [{{'role': 'system', 'content': {HOSTILE!r}}}, "
        f"{{'role': 'user', 'content': {HOSTILE!r}}}]\n{EDIT}\n"
        "panel.run(); panel.jobs.wait(30); panel.keep_run(); panel.pin()"
    )
    with opened.narrow(720):
        shots.take(out, "compare_narrow.png")
        in_place(out)
    assert out.locator("img, script, iframe").count() == 0
    assert "not judged" in out.get_by_role("alert").inner_text().lower()


def view_state(**changes):
    cell = {
        "parts": [["", "a "], ["differs", "b"]],
        "state": "",
        "note": "2 tokens",
        "badges": [["aligned", "good", "hint"]],
        "actions": ["edit", "regenerate"],
    }
    columns = [
        {"title": "base", "kind": "base", "note": ""},
        {"title": "fine-tuned", "kind": "finetuned", "note": ""},
    ]
    rows = [{"title": "turn 1", "text": "hello", "actions": ["edit"], "cells": [cell, dict(cell)]}]
    return {
        "columns": columns,
        "rows": rows,
        "blank": "nothing",
        "ask": "write",
        "draft": "",
        **changes,
    }


def mounted(bare: Bare, **changes):
    css_text = css() + (STATIC / "answers.css").read_text()
    return bare.mount("view", STATIC / "answers.js", css_text, view_state(**changes))


def test_the_view_streams_acts_edits_and_lets_go(bare):
    view = mounted(bare)
    assert view.locator("mark").all_inner_texts() == ["b", "b"]
    for start, text in [(0, "You"), (1, " should"), (1, " should not"), (1, " should not")]:
        bare.receive("view", {"kind": "text", "pieces": [[0, 1, start, text]]})
    assert view.locator(".words").nth(2).inner_text() == "You should not"
    assert view.locator(".cell.streaming").count() == 1
    view.get_by_role("button", name="Regenerate: base, turn 1").click()
    view.get_by_role("button", name="Edit: base, turn 1").click()
    field = view.get_by_label("new text: base, turn 1")
    assert field.input_value() == "a b"
    field.fill(HOSTILE)
    field.press("Control+Enter")
    message = view.get_by_label("message")
    message.fill("Hi.\n")
    message.press("Enter")
    assert [content for _, content in bare.sent()] == [
        {"kind": "act", "action": "regenerate", "row": 0, "column": 0},
        {"kind": "act", "action": "edit", "row": 0, "column": 0, "text": HOSTILE},
        {"kind": "act", "action": "send", "row": 1, "column": -1, "text": "Hi.\n"},
    ]
    assert bare.page.evaluate("mdModules.view.dispose(), mdModels.view.listening") == 1


@pytest.mark.parametrize("place", ["title", "text", "column", "badge", "note", "parts", "draft"])
def test_hostile_text_is_inert_wherever_it_comes_in(bare, place):
    state = view_state()
    row = state["rows"][0]
    match place:
        case "title" | "text":
            row[place] = HOSTILE
        case "column":
            state["columns"][0] = {"title": HOSTILE, "kind": HOSTILE, "note": HOSTILE}
        case "badge":
            row["cells"][0]["badges"] = [[HOSTILE, HOSTILE, HOSTILE]]
        case "note":
            row["cells"][0]["note"] = HOSTILE
        case "parts":
            row["cells"][0]["parts"] = [[HOSTILE, HOSTILE]]
        case "draft":
            state["draft"] = HOSTILE
    view = mounted(bare, **state)
    bare.receive("view", {"kind": "text", "pieces": [[0, 0, 0, HOSTILE]]})
    bare.page.wait_for_timeout(50)
    assert view.locator("img, script, a, iframe").count() == 0
    assert "⟨U+202E⟩" in view.inner_text()
