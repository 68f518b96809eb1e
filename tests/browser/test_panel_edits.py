"""The panel Steer and ablate in JupyterLab: edits, live slider, masks, dose and response."""

import pytest

pytestmark = pytest.mark.browser

OPEN = """
import modeldiff as md
from modeldiff_widgets.edits import Edits
pair = md.ModelPair.load("organism:em-rank1")
panel = Edits(pair)
panel.state.max_new_tokens = 32
panel
"""
HOSTILE = '<img src=x onerror="alert(1)"> \u202e\u200b $$x$$ {{a}}'
IDLE = "panel.jobs.wait(20)"


def test_the_panel_from_the_first_direction_to_the_curve(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("No edit yet").wait_for()
    book.shoot(shots, "edits_empty")

    out.get_by_role("button", name="Find a direction").click()
    book.until(f"len(panel.state.directions) == 1 and {IDLE}")
    out.get_by_role("button", name="Add edit").click()
    book.until("[e['kind'] for e in panel.state.edits] == ['steer']")
    out.get_by_label("random control").check()
    out.get_by_role("button", name="Generate").click()
    book.until(f"len(panel.view.columns) == 4 and {IDLE}")
    slider = out.get_by_role("slider").first
    slider.focus()
    assert slider.get_attribute("aria-label") == "Coefficient"
    for _ in range(3):
        slider.press("ArrowLeft")
    book.until(f"panel.state.edits[0]['coefficient'] < 0.75 and {IDLE}")
    out.get_by_text("× the mean residual norm").wait_for()

    out.locator("select", has_text="ablate: project it out").first.select_option(
        label="ablate: project it out"
    )
    book.until(f"panel.state.edits[0]['kind'] == 'ablate' and {IDLE}")
    book.until("[len(c.get('badges', '')) for c in panel.view.columns] == [1] * 4")
    book.shoot(shots, "edits_ablate")

    out.locator("select", has_text="ablate: project it out").first.select_option(
        label="scale along it"
    )
    book.exec("panel.points.value, panel.n_prompts.value, panel.reach.value = 5, 8, 2.0")
    out.get_by_role("button", name="Measure").click()
    book.until(f"len(panel.plot.frame) == 5 and {IDLE}")
    out.get_by_text("Code", exact=True).click()
    book.shoot(shots, "edits_dose")


def test_tokens_are_chosen_by_clicks_and_rows_move(notebook, shots):
    book = notebook(OPEN, "panel.add_edit('adapter')\npanel.add_edit('adapter')")
    out = book.output(0)
    tokens = out.locator(".mdw-pair").first.locator(".t")
    tokens.nth(4).click()
    book.until("'positions' in panel.state.edits[1]['where']")
    tokens.nth(6).click()
    book.until("panel.state.edits[1]['where'].count('6') == 1")
    assert out.locator(".mdw-pair").first.locator(".t.m-affected").count() == 2
    out.get_by_role("button", name="Up", exact=True).nth(1).click()
    book.until("'positions' in panel.state.edits[0]['where']")
    book.shoot(shots, "edits_tokens")
    out.get_by_role("button", name="Delete", exact=True).nth(1).click()
    book.until("len(panel.state.edits) == 1")
    layers = out.get_by_placeholder("own, all, 1-3").first
    layers.fill("9")
    layers.press("Enter")
    out.get_by_role("alert").get_by_text("the model has 0 to 5").first.wait_for()
    assert book.eval("panel.state.edits[0]['layers']") == "all"


def test_hostile_names_and_prompts_are_inert(notebook, shots):
    book = notebook(OPEN, f"""
import torch
bad = {HOSTILE!r}
panel.state.messages = [dict(role="user", content=bad)]
panel.state.add_direction(md.Direction.of(torch.ones(128), "resid_post.3", bad))
panel.add_edit("steer")
panel.run(); panel.jobs.wait(60)
""")  # fmt: skip
    out = book.output(0)
    out.locator(".mdw-pair").nth(1).locator(".t").first.wait_for()
    assert out.locator("img").count() == 0
    assert "⟨U+202E⟩" in out.locator("select", has_text="onerror").first.inner_text()
    book.shoot(shots, "edits_hostile")
