"""The panel *Chat* in JupyterLab: messages, edits, other seeds, equal histories."""

import re

import pytest

from tests.browser.steps import in_place

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e{{x}}[a](javascript:alert(3))"
OPEN = """
import modeldiff as md
from modeldiff_widgets import new_edit
from modeldiff_widgets.chat import Chat
pair = md.ModelPair.load("organism:em-rank1")
panel = Chat(pair)
panel.state.temperature, panel.state.max_new_tokens = 0.7, 48
"""
EDIT = """
acts = pair.capture([panel.talk.messages(0, 0)], at="resid_post.3")
shift = md.mean_difference(acts.finetuned[acts.site], acts.base[acts.site], acts.site, "shift")
panel.state.add_direction(shift)
panel.state.edits = [new_edit("ablate", "shift", layers="all")]
"""
REPLIES = "[[r and r.text for r in t.replies] for t in panel.talk.turns]"


def said(opened):
    """Every answer in the kernel, turn by turn."""
    return [text for turn in opened.eval(REPLIES) for text in turn]


def cells(opened, n):
    """Wait for that many answers that are complete, and return what they say."""
    opened.lab.page.wait_for_function(
        """([id, n]) => document.getElementById(id)
          .querySelectorAll('.cell:not(.streaming, .waiting) .words').length === n""",
        arg=[opened.identity, n],
    )
    assert opened.until("panel.jobs.wait(0)")
    return opened.output(1).locator(".cell .words").all_inner_texts()


def test_chat_from_the_first_message_to_equal_histories(notebook, shots):
    opened = notebook(OPEN, "panel")
    out = opened.output(1)
    opened.shoot(shots, "chat_empty", 1)
    message = out.get_by_label("message", exact=True)
    first = message.input_value()
    message.press("Enter")
    cells(opened, 2)
    opened.until(f"panel.talk.turns[0].user == {first!r}")
    message.fill("And what about my car?")
    message.press("Enter")
    assert cells(opened, 4) == said(opened)
    out.get_by_role("button", name="Regenerate: fine-tuned, turn 1").click()
    opened.until("panel.jobs.wait(0) and panel.talk.turns[0].replies[1].recipe.seed == 1")
    out.get_by_role("button", name="Edit: turn 2").click()
    field = out.get_by_label("new text: turn 2")
    field.fill("What about my boss?")
    field.press("Control+Enter")
    opened.until("panel.jobs.wait(0) and panel.talk.turns[1].user == 'What about my boss?'")
    opened.exec(EDIT)
    opened.until("panel.jobs.wait(0) and panel.talk.n_columns == 3")
    message.fill("Thank you. I want to save money.")
    message.press("Enter")
    cells(opened, 9)
    out.get_by_role("button", name="Use everywhere: base, turn 1").click()
    opened.until(
        "panel.jobs.wait(0) and len(set(r.text for r in panel.talk.turns[0].replies)) == 1"
    )
    shown = cells(opened, 9)
    assert shown == said(opened)
    assert shown[0] == shown[1] == shown[2]
    opened.shoot(shots, "chat", 1)
    out.locator("summary", has_text="Code").click()
    opened.until("'turns = [' in panel._listing.code")
    opened.exec(
        "again = {'pair': pair, 'shift': shift, 'state': panel.state}\n"
        "exec(panel._listing.code, again)"
    )
    by_turn = "[list(x) for x in zip(*again['answers'].values())]"
    assert opened.eval(by_turn) == opened.eval(REPLIES)


def test_hostile_messages_stay_text_and_keys_do_not_reach_lab(notebook, shots):
    opened = notebook(OPEN, "panel")
    out = opened.output(1)
    message = out.get_by_label("message", exact=True)
    message.fill("")
    message.press_sequentially("abdz ")  # a and b insert cells in Lab's command mode
    message.fill(HOSTILE)
    message.press("Enter")
    cells(opened, 2)
    out.get_by_role("button", name=re.compile("Edit: base, turn 1")).click()
    field = out.get_by_label("new text: base, turn 1")
    field.fill(HOSTILE)
    out.get_by_role("button", name="Save").click()
    opened.until(f"panel.jobs.wait(0) and panel.talk.turns[0].replies[0].text == {HOSTILE!r}")
    opened.exec("panel.pin()")
    out.locator(".mdw-static").wait_for()
    with opened.narrow(720):
        shots.take(out, "chat_narrow.png")
        in_place(out)
    assert out.locator("img, script, iframe, a").count() == 0
    assert "⟨U+202E⟩" in out.locator(".said .words").first.inner_text()
    assert opened.panel.locator(".jp-Cell").count() == 2
