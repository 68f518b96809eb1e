"""The panel Training in JupyterLab: curves while it trains, stop and keep, on to Latents."""

import pytest

from tests.browser.test_panel_latents import IDLE, STORE

pytestmark = pytest.mark.browser

OPEN = STORE + """
from modeldiff_widgets.training import Training
panel = Training(pair, state)
panel.n_latents.value, panel.k.value, panel.steps.value, panel.batch.value = 256, 8, 4000, 256
panel.lr.value = "0.004"
panel
"""  # fmt: skip
EMPTY = """
import modeldiff as md
from modeldiff_widgets.training import Training
panel = Training(md.ModelPair.load("organism:em-rank1"))
panel
"""
DRAWN = """id => {
  const host = document.getElementById(id).querySelector('.mdw-bokeh');
  const views = host.mdViews.roots ?? host.mdViews;
  return views.length + host.querySelectorAll('canvas').length;
}"""


def test_curves_stream_and_stop_keeps_what_there_is(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("rows of both models").wait_for()
    assert out.get_by_role("button", name="Stop and keep").is_disabled()
    out.get_by_role("button", name="Train").click()
    book.until("len(panel.plot.source.data['step']) >= 8", seconds=60)
    out.get_by_text("of 4,000: loss").first.wait_for()
    book.shoot(shots, "training_running")
    out.get_by_role("button", name="Stop and keep").click()
    out.get_by_text("Stopped after").first.wait_for()
    book.until(f"state.dictionary is not None and {IDLE}")
    assert book.eval("0 < panel.n_done < 4000")
    assert book.eval("panel.plot.source.data['step'][-1] <= panel.n_done")
    book.shoot(shots, "training_stopped")
    again = book.reopened()
    again.output(0).locator(".mdw-bokeh canvas").first.wait_for()
    assert again.lab.page.evaluate(DRAWN, again.identity) > 1


def test_without_rows_and_with_a_bad_number(notebook, shots):
    book = notebook(EMPTY, STORE)
    out = book.output(0)
    out.get_by_text("There are no activations").wait_for()
    book.shoot(shots, "training_empty")
    book.exec("panel.state.use_rows(store)")
    rate = out.get_by_placeholder("automatic")
    rate.fill("fast")
    rate.press("Enter")
    out.get_by_role("button", name="Train").click()
    out.get_by_role("alert").get_by_text("is no number").first.wait_for()
