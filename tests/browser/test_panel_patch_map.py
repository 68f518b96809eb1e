"""The panel Patch map in JupyterLab: rows as they come, a click that patches, hostile text."""

import pytest

from tests.browser.steps import go_to
from tests.browser.test_panel_layer_map import click_cell

pytestmark = pytest.mark.browser

OPEN = """
import modeldiff as md
from modeldiff_widgets import Workbench
from modeldiff_widgets.patch_map import PatchMap
pair = md.ModelPair.load("organism:em-rank1")
wb = Workbench(pair, panels=[PatchMap])
panel = wb.panels["Patch map"]
panel.state.max_new_tokens = 12
wb
"""
ENDS = """id => {
  const host = document.getElementById(id).querySelector('.mdw-bokeh');
  const [view] = host.mdViews.roots ?? host.mdViews;
  return [view.frame.x_range.end, view.frame.y_range.end];
}"""
DRAWN = "panel.found is not None and not panel.jobs.current and not panel.values.isnan().any()"
HOSTILE = '<img src=x onerror="alert(1)"> $$x^2$$ \u202e\u200b'


def test_a_map_is_drawn_and_a_click_patches(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("Nothing is patched yet", exact=True).wait_for()
    book.shoot(shots, "patch_map_empty")
    go_to(out, "Patch map")
    out.get_by_role("button", name="Adapter", exact=True).click()
    book.until("panel.parts['adapter'].value")
    go = out.locator(".jupyter-button.mod-primary", has_text="Patch")
    go.click()
    book.until(DRAWN, seconds=60)
    out.get_by_text("of the answer, nats").first.wait_for()
    book.lab.page.wait_for_timeout(500)
    column = book.eval("int(panel.values[3].abs().argmax())")
    click_cell(book, column, 3)  # the residual stream after layer 3
    book.until(f"(panel.state.layer, panel.state.token) == (3, {column})")
    book.until("[e['kind'] for e in panel.state.edits] == ['replace']")
    out.get_by_text("On the stack of edits:").wait_for()
    book.shoot(shots, "patch_map_real")
    out.get_by_role("button", name="Take the patch off").click()
    book.until("panel.state.edits == []")
    out.get_by_role("button", name="Attribution").click()
    book.until("panel.method.value")
    book.exec("panel.metric.value = 'logits'")
    go.click()
    book.until(f"{DRAWN} and panel.found.attribution is not None", seconds=60)
    out.get_by_text("real patches").first.wait_for()
    out.get_by_role("button", name="Check the strongest").click()
    book.until("panel.repair is not None and not panel.jobs.current")
    book.lab.page.wait_for_timeout(500)
    go_to(out, "Patch map")
    ends = book.lab.page.evaluate(ENDS, book.identity)
    assert ends == book.eval("[n - 0.5 for n in reversed(panel.values.shape)]")
    book.shoot(shots, "patch_map_attribution")
    book.exec("panel.grid.widget.layout.display = 'none'")  # the tables below it
    book.shoot(shots, "patch_map_tables")
    book.exec("panel.grid.widget.layout.display = ''")
    book.exec(f"panel.state.messages = [dict(role='user', content={HOSTILE!r})]")
    go.click()
    book.until(f"'onerror' in panel.found.task.text.text and {DRAWN}", seconds=60)
    book.lab.page.wait_for_timeout(500)
    assert book.panel.locator(".jp-OutputArea-output img").count() == 0
    assert out.get_by_role("alert").count() == 0
