"""The whole workbench in JupyterLab: what is found in one panel is used in the others."""

import base64
from pathlib import Path

import pytest

from tests.browser.labdriver import Notebook
from tests.browser.steps import IDLE, LOAD, OPEN, TABS, finished, go_to, press

pytestmark = pytest.mark.browser

CELL = """([id, column, row]) => {
  const host = [...document.getElementById(id).querySelectorAll('.mdw-bokeh')]
    .find(each => each.checkVisibility());
  const [view] = host.mdViews.roots ?? host.mdViews;
  const {frame, canvas_view} = view;
  const box = canvas_view.el.getBoundingClientRect();
  return [box.left + frame.x_scale.compute(column), box.top + frame.y_scale.compute(row)];
}"""
CURVE = """
edits = wb.show("Steer and ablate")
wb.state.edits, wb.state.random_control = [], True
edits.add_edit("scale_along", layers="all", coefficient=0.0)
edits.run(); wb.jobs.wait(60)
edits.points.value, edits.n_prompts.value, edits.reach.value = 9, 16, 1.0
edits.run_dose(); wb.jobs.wait(120)
"""


def find_and_ablate(book: Notebook) -> None:
    """Find a direction in Directions, and put its ablation on the stack."""
    out = book.output(1)
    go_to(out, "Directions")
    press(out, "Find")
    book.until(f"len(wb.state.directions) == 1 and {IDLE}")
    press(out, "Ablate it")
    out.get_by_text("In the stack of edits: ablate (1).").wait_for()


def draw_and_click(book: Notebook, layer: int, token: int) -> None:
    """Draw the Layer map and click a cell."""
    out, page = book.output(1), book.lab.page
    go_to(out, "Layer map")
    press(out, "Draw map")
    finished(out, "layer map")
    out.locator(".mdw-bokeh:visible canvas").first.wait_for()
    page.wait_for_timeout(500)
    page.mouse.click(*page.evaluate(CELL, [book.identity, token, layer]))
    book.until(f"(wb.state.layer, wb.state.token) == ({layer}, {token})")


def photograph(book: Notebook, path: Path) -> None:
    """The picture of the README: an edit, four answers and a curve, sharp enough for print.

    Run with MODELDIFF_SHOTS set to a folder, look at it, then copy it to notebooks/images.
    """
    page, out = book.lab.page, book.output(1)
    book.exec(CURVE)
    page.set_viewport_size({"width": 1280, "height": 1900})
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    box = out.locator(".mdw-frame").first.bounding_box()
    frame = {"x": box["x"] - 10, "y": box["y"] - 4,
             "width": box["width"] + 20, "height": box["height"] + 10}  # fmt: skip
    session = page.context.new_cdp_session(page)
    shot = session.send(
        "Page.captureScreenshot", {"format": "png", "clip": {**frame, "scale": 1.5}}
    )
    session.detach()
    path.write_bytes(base64.b64decode(shot["data"]))
    page.set_viewport_size({"width": 1280, "height": 1700})


def test_a_direction_that_is_found_is_ablated_compared_and_talked_to(notebook, shots):
    book = notebook(LOAD, OPEN)
    out = book.output(1)
    find_and_ablate(book)
    book.shoot(shots, "directions", 1)

    go_to(out, "Steer and ablate")
    out.get_by_role("combobox").get_by_text("ablate: project it out").wait_for(state="attached")
    book.until("[e['kind'] for e in wb.state.edits] == ['ablate']")
    press(out, "Generate")
    finished(out, "edit and generate")
    verdicts = "[c.get('badges') for c in wb.panels['Steer and ablate'].view.columns]"
    book.until(f"{verdicts} == [['aligned'], ['misaligned'], ['aligned']]")
    book.shoot(shots, "edits", 1)

    go_to(out, "Compare")
    press(out, "Generate")
    finished(out, "compare")
    answers = out.locator(".mdw-answers:visible")
    for title in ("base", "fine-tuned", "base, edited", "fine-tuned, edited"):
        answers.get_by_text(title, exact=True).first.wait_for()
    verdicts = ["aligned", "misaligned", "aligned", "aligned"]
    assert answers.locator(".mdw-badge").all_inner_texts() == verdicts
    compared = answers.locator(".cell .words").all_inner_texts()
    book.shoot(shots, "compare", 1)

    go_to(out, "Chat")
    out.get_by_label("message", exact=True).press("Enter")
    finished(out, "chat")
    book.until(IDLE)
    said = out.locator(".mdw-answers:visible .cell .words").all_inner_texts()
    assert said == [compared[0], compared[1], compared[3]]  # same question, edits and seed
    book.shoot(shots, "chat", 1)
    if shots.wanted:
        photograph(book, shots.folder / "workbench.png")


def test_a_cell_that_is_clicked_is_read_and_everything_outlives_the_page(notebook, shots):
    book = notebook(LOAD, OPEN)
    out = book.output(1)
    draw_and_click(book, layer=3, token=11)
    out.get_by_text("after layer 3, token 11").first.wait_for()
    book.shoot(shots, "layer_map", 1)
    go_to(out, "Tokens")
    press(out, "Compare tokens")
    finished(out, "compare tokens")
    out.locator(".t.selected:visible", has_text="<|assistant|>").wait_for()
    out.get_by_text("token 11, template").wait_for()
    book.shoot(shots, "tokens", 1)
    out.get_by_role("button", name="Pin").click()
    out.locator(".mdw-static .mdw-title", has_text="Tokens").wait_for()

    tokens = out.locator(".mdw-pair:visible .t").all_inner_texts()
    again = book.reopened()
    out = again.output(1)
    out.locator(".t.selected:visible", has_text="<|assistant|>").wait_for()
    assert out.locator(".mdw-pair:visible .t").all_inner_texts() == tokens
    assert out.get_by_role("tab", selected=True).inner_text() == "Tokens"
    for title in TABS:
        go_to(out, title)
    go_to(out, "Layer map")
    out.locator(".mdw-bokeh:visible canvas").first.wait_for()

    again.exec("wb.close()")
    assert again.eval("len(_instances)") == again.eval("before")
    alone = again.reopened(kernel=False)
    alone.panel.get_by_text("model not found").nth(1).wait_for()  # Lab's word for both widgets
    pinned = alone.output(1).locator(".mdw-static")
    pinned.locator(".mdw-title", has_text="Tokens").wait_for()
    assert "<|assistant|>" in pinned.inner_text()
    shots.take(pinned, "pinned_without_kernel.png")
    book.lab.trouble[:] = [each for each in book.lab.trouble if "not found" not in each]
