"""The panel Layer map in JupyterLab: every kind of map, clicking a cell, hostile text."""

import pytest

pytestmark = pytest.mark.browser

OPEN = """
import modeldiff as md
from modeldiff_widgets.layer_map import LayerMap
pair = md.ModelPair.load("organism:em-rank1")
panel = LayerMap(pair)
panel
"""
DIRECTION = """
site, text = md.Site("resid_post", 3), panel.found.text
acts = pair.capture([text], "resid_post.3")
shift = md.mean_difference(acts.finetuned[site], acts.base[site], site, "shift")
panel.state.add_direction(shift)
"""
CELL = """([id, column, row]) => {
  const host = document.getElementById(id).querySelector('.mdw-bokeh');
  const [view] = host.mdViews.roots ?? host.mdViews;
  const {frame, canvas_view} = view;
  const box = canvas_view.el.getBoundingClientRect();
  return [box.left + frame.x_scale.compute(column), box.top + frame.y_scale.compute(row)];
}"""


def draw(book, what):
    book.exec(f"panel.what.value = {what!r}")
    book.output(0).get_by_role("button", name="Draw map").click()
    book.until(f"panel.found and panel.found.wanted.what == {what!r} and not panel.jobs.current")
    book.until("bool((~panel.values.isnan()).all())")
    book.lab.page.wait_for_timeout(300)


def click_cell(book, column, row):
    x, y = book.lab.page.evaluate(CELL, [book.identity, column, row])
    book.lab.page.mouse.click(x, y)


def test_maps_are_drawn_and_a_click_goes_there(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("Nothing is drawn yet").wait_for()
    draw(book, "relative_norm")
    out.locator(".mdw-bokeh canvas").first.wait_for()
    book.shoot(shots, "layer_map_norm")
    draw(book, "patch")
    click_cell(book, 11, 3)
    book.until("(panel.state.layer, panel.state.token) == (3, 11)")
    out.get_by_text("after layer 3, token 11 <|end|>: −").first.wait_for()
    book.shoot(shots, "layer_map_patch")
    book.exec("panel.what.value = 'steer'")
    out.get_by_role("button", name="Draw map").click()
    out.get_by_role("alert").get_by_text("needs a direction").first.wait_for()
    book.exec(DIRECTION)
    draw(book, "steer")
    click_cell(book, 2, 1)
    book.until("panel.state.layer == 1")
    book.shoot(shots, "layer_map_steer")


def test_hostile_tokens_are_labels_and_never_run(notebook, shots):
    hostile = '<img src=x onerror="alert(1)"> $$x^2$$ \u202e\u200b'
    book = notebook(OPEN, f"panel.state.messages = [dict(role='user', content={hostile!r})]\n"
                          "panel.run(); panel.jobs.wait(30)")  # fmt: skip
    out = book.output(0)
    out.locator(".mdw-bokeh canvas").first.wait_for()
    book.lab.page.wait_for_timeout(500)
    click_cell(book, 5, 2)
    book.until("panel.state.token == 5")
    assert book.panel.locator(".jp-OutputArea-output img").count() == 0
    book.shoot(shots, "layer_map_hostile")
