"""The panel CAFT in JupyterLab: candidates, ticks, two arms, stop and go on, the table of arms."""

import pytest

from tests.browser.steps import in_place

pytestmark = pytest.mark.browser

OPEN = """
import modeldiff as md
from modeldiff_widgets.caft import Caft
pair = md.ModelPair.load("organism:em-rank1")
panel = Caft(pair)
panel.n_texts.value, panel.layers.value, panel.components.value = 8, "3-4", 2
form = panel.form
form.prompts.value, form.steps.value, form.every.value = 6, 6, 2
panel
"""
IDLE = "panel.jobs.current is None and panel.jobs.n_waiting == 0"
FINE = "panel.root.children[0].error == ['', '']"
HOSTILE = '<img src=x onerror="alert(1)"> \u202e $$x^2$$'


def test_from_candidates_to_the_table_of_arms(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("540 conversations on medicine").wait_for()
    in_place(out)
    book.shoot(shots, "caft_empty", high=3300)
    out.get_by_role("button", name="Find").click()
    book.until(IDLE, seconds=90)
    assert book.eval(FINE)
    out.get_by_text("Largest projections").wait_for()
    first = out.get_by_role("checkbox", name="tick layer 3 PC-0")
    first.check()
    book.until("panel.ticked == ('layer 3 PC-0',)")
    table = out.get_by_role("grid", name="candidates for ablation")
    table.press("ArrowDown")
    book.until("panel.table.selected == 1")
    table.press("Space")
    book.until("panel.ticked == ('layer 3 PC-0', 'layer 3 PC-1')")
    out.get_by_text("layer 3 PC-1, on").wait_for()
    assert out.get_by_role("checkbox", name="tick layer 3 PC-1").is_checked()
    out.get_by_placeholder("why these").fill("they carry the change")
    out.get_by_placeholder("why these").press("Tab")
    book.until("panel.choice.rationale == 'they carry the change'")
    in_place(out)
    book.shoot(shots, "caft_candidates", high=3300)

    book.exec("form.steps.value = 4000")
    out.get_by_role("button", name="Run").click()
    book.until("max((s for c in panel.plot.curves.values() for s in c.train), default=0) >= 3", 90)
    assert not out.get_by_role("button", name="Stop and keep").is_disabled()
    out.get_by_role("button", name="Stop and keep").click()
    out.get_by_text("Stopped; finished arms are kept").wait_for(timeout=60_000)
    book.until(IDLE)
    assert book.eval("panel.result.arms") == ["base"]
    book.exec("form.steps.value = 6")
    out.get_by_role("button", name="Run").click()
    book.until(f"panel.result is not None and {IDLE}", seconds=120)
    assert book.eval(FINE)
    assert book.eval("panel.result.arms") == ["base", "caft", "plain"]
    out.get_by_text("Finished: base, caft, plain.").wait_for()
    out.get_by_role("cell", name="plain", exact=True).wait_for()
    in_place(out)
    book.shoot(shots, "caft_arms", high=3300)
    out.get_by_role("button", name="Audit the new model").click()
    book.until(f"panel.new_pair is not None and {IDLE}", seconds=60)
    out.get_by_text("ModelPair.load(find('em-base').base, adapter=").wait_for()
    assert book.eval("panel.new_pair.kind") == "adapter"
    out.get_by_role("button", name="Pin").click()
    book.output(0).locator(".mdw-static").get_by_text("plain / arm").first.wait_for()


def test_hostile_names_are_inert_and_errors_are_said(notebook, shots):
    book = notebook(OPEN, f"""
import torch
panel.state.add_direction(md.Direction.of(torch.ones(128), "resid_post.3", {HOSTILE!r}))
panel.state.caft = list(panel.state.directions)
panel.computes.value = False
""")  # fmt: skip
    out = book.output(0)
    out.get_by_role("checkbox", name="tick <img src=x").wait_for()
    assert out.get_by_role("checkbox", name="tick <img src=x").is_checked()
    out.get_by_role("button", name="Find").click()
    book.until(f"panel.reading is not None and {IDLE}", seconds=90)
    out.get_by_text("Largest projections").wait_for()
    assert out.locator("img").count() == 0
    out.get_by_role("checkbox", name="tick <img src=x").uncheck()
    book.until("panel.state.caft == []")
    out.get_by_role("button", name="Run").click()
    out.get_by_role("alert").get_by_text("no candidate is ticked").first.wait_for()
    book.shoot(shots, "caft_hostile", high=3300)
