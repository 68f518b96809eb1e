"""The whole workbench in JupyterLab: what is found in one panel is used in the others."""

from pathlib import Path

import pytest

from tests.browser.labdriver import Notebook
from tests.browser.steps import IDLE, OPEN, TABS, finished, go_to, press

pytestmark = pytest.mark.browser

CELL = """([id, column, row]) => {
  const host = [...document.getElementById(id).querySelectorAll('.mdw-bokeh')]
    .find(each => each.checkVisibility());
  const [view] = host.mdViews.roots ?? host.mdViews;
  const {frame, canvas_view} = view;
  const box = canvas_view.el.getBoundingClientRect();
  return [box.left + frame.x_scale.compute(column), box.top + frame.y_scale.compute(row)];
}"""


def find_and_ablate(book: Notebook) -> None:
    """Find a direction in Directions, and put its ablation on the stack."""
    out = book.output(0)
    go_to(out, "Directions")
    press(out, "Find")
    book.until(f"len(wb.state.directions) == 1 and {IDLE}")
    press(out, "Ablate it")
    out.get_by_text("In the stack of edits: ablate (1).").wait_for()


def draw_and_click(book: Notebook, layer: int, token: int) -> None:
    """Draw the Layer map and click a cell."""
    out = book.output(0)
    go_to(out, "Layer map")
    press(out, "Draw map")
    finished(out, "layer map")
    out.locator(".mdw-bokeh canvas:visible").first.wait_for()
    book.lab.page.wait_for_timeout(300)
    book.lab.page.mouse.click(*book.lab.page.evaluate(CELL, [book.identity, token, layer]))
    book.until(f"(wb.state.layer, wb.state.token) == ({layer}, {token})")


def test_a_direction_that_is_found_is_ablated_and_compared(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    find_and_ablate(book)
    book.shoot(shots, "directions")

    go_to(out, "Steer and ablate")
    kind = out.get_by_role("combobox").get_by_text("ablate: project it out")
    assert kind.count() == 1
    assert book.eval("wb.panels['Steer and ablate']._rows[0].kind.value") == "ablate"
    press(out, "Generate")
    finished(out, "edit and generate")
    assert book.eval("[c['badges'] for c in wb.panels['Steer and ablate'].view.columns]") == [
        ["aligned"], ["misaligned"], ["aligned"],
    ]  # fmt: skip
    book.shoot(shots, "edits")

    go_to(out, "Compare")
    press(out, "Generate")
    finished(out, "compare")
    heads = out.locator(".mdw-answers:visible")
    for title in ("base", "fine-tuned", "base, edited", "fine-tuned, edited"):
        heads.get_by_text(title, exact=True).first.wait_for()
    badges = heads.locator(".mdw-badge").all_inner_texts()
    assert badges[1::2] == ["misaligned", "aligned"], badges
    book.shoot(shots, "compare")
    photograph(book, shots / "workbench.png")
