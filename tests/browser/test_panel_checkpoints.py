"""The panel Checkpoints in JupyterLab: curves, scrubbing to a step, the model that answers."""

import pytest

from tests.browser.steps import go_to, press

pytestmark = pytest.mark.browser

OPEN = """
import modeldiff as md
from modeldiff_widgets import Workbench
from modeldiff_widgets.checkpoints import Checkpoints
pair = md.ModelPair.load("organism:em-rank1")
wb = Workbench(pair, panels=[Checkpoints])
panel = wb.panels["Checkpoints"]
panel.state.max_new_tokens = 24
wb
"""
POINT = """([id, x, y]) => {
  const host = document.getElementById(id).querySelector('.mdw-bokeh');
  const [root] = host.mdViews.roots ?? host.mdViews;
  const found = [];
  const walk = view => (view.child_views ?? []).forEach(v => v.frame ? found.push(v) : walk(v));
  walk(root);
  const {frame, canvas_view} = found[1];  // the path is the second figure
  const box = canvas_view.el.getBoundingClientRect();
  return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y)];
}"""
IDLE = "not panel.jobs.current and not panel.jobs.n_waiting"
HOSTILE = '<img src=x onerror="alert(1)"> \u202e\u200b'


def test_a_training_is_read_and_scrubbed(notebook, shots):
    book = notebook(OPEN)
    out, page = book.output(0), book.lab.page
    out.get_by_text("No checkpoints are read yet").first.wait_for()
    book.shoot(shots, "checkpoints_empty")
    go_to(out, "Checkpoints")
    press(out, "Read")
    book.until(f"panel.course is not None and {IDLE}")
    out.get_by_text("No transition of layers.3").first.wait_for()
    out.locator(".mdw-bokeh canvas").first.wait_for()
    page.wait_for_timeout(800)
    at = book.eval("[float(panel.course.table[n][5]) for n in ('pc1', 'pc2')]")
    page.mouse.click(*page.evaluate(POINT, [book.identity, *at]))
    book.until("panel.step.value == 10")
    press(out, "Answer")
    book.until(f"panel.asked is not None and {IDLE}", seconds=60)
    book.exec("panel.factor.value = 3.0")
    slider = out.locator(".widget-slider [role=slider], .noUi-handle").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    book.until("panel.step.value == 12")
    press(out, "Answer")
    book.until(f"panel.asked and panel.asked[1].step == 12 and {IDLE}", seconds=60)
    out.get_by_text("step 12, × 3").first.wait_for()
    out.get_by_role("button", name="Add this step's direction").click()
    book.until("panel.state.direction == 'step 12 3.mlp.down_proj'")
    page.wait_for_timeout(500)
    go_to(out, "Checkpoints")
    book.shoot(shots, "checkpoints_read")
    book.exec(f"panel.state.messages = [dict(role='user', content={HOSTILE!r})]")
    press(out, "Answer")
    book.until(f"panel.asked and 'onerror' in panel.asked[1].item_code and {IDLE}", seconds=60)
    assert book.panel.locator(".jp-OutputArea-output img").count() == 0
    out.get_by_role("button", name="Answer at every step").click()
    book.until("panel.jobs.current is not None")
    out.get_by_role("button", name="Cancel").click()
    book.until(IDLE)
    assert out.get_by_role("alert").count() == 0
