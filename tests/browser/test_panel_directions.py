"""The panel Directions in JupyterLab: find, words, cosines, algebra, files, hostile names."""

import pytest

pytestmark = pytest.mark.browser

OPEN = """
import modeldiff as md
from modeldiff_widgets.directions import Directions
pair = md.ModelPair.load("organism:em-rank1")
panel = Directions(pair)
panel
"""
HOSTILE = '<img src=x onerror="alert(1)"> \u202e\u200b $$x$$ {{a}}'
IDLE = "panel.jobs.wait(20)"


def test_the_panel_from_the_first_direction_to_the_stack(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("No directions yet").wait_for()
    book.shoot(shots, "directions_empty")
    out.get_by_role("button", name="Find").click()
    book.until(f"len(panel.state.directions) == 1 and {IDLE}")
    out.get_by_text("reaches further than each of them").or_(
        out.get_by_text("does not reach further than all of them")
    ).first.wait_for()
    contrast = out.locator("select", has_text="answers that show it")
    contrast.select_option(label="answers that show it − normal ones")
    book.until("panel.contrast.value == 'answers'")
    out.get_by_role("button", name="Find").click()
    book.until(f"len(panel.state.directions) == 2 and {IDLE}")
    book.exec("panel.second.value = list(panel.state.directions)[1]; panel.operation.value = '⊥'")
    out.get_by_role("button", name="Make").click()
    book.until(f"len(panel.state.directions) == 3 and {IDLE}")
    assert book.eval("round(panel.map.table()[2][1], 6)") == 0
    out.locator("canvas").first.wait_for()

    out.get_by_role("button", name="Steer with it").click()
    out.get_by_role("button", name="Ablate it").click()
    out.get_by_text("In the stack of edits: steer (1), ablate (2).").wait_for()
    out.get_by_role("button", name="Use in CAFT").click()
    out.get_by_text("Marked for CAFT.").wait_for()
    book.shoot(shots, "directions")
    out.get_by_role("button", name="Remove").click()
    out.get_by_role("alert").get_by_text("is used by edit 1, 2").first.wait_for()


def test_a_click_on_the_map_selects_and_files_come_back(notebook):
    book = notebook(OPEN, """
import torch
eye = torch.eye(128)
for i, name in enumerate("abc"):
    panel.state.add_direction(md.Direction.of(eye[i], "resid_post.3", name))
panel.jobs.wait(30)
""")  # fmt: skip
    out = book.output(0)
    canvas = out.locator(".mdw-bokeh canvas").first
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    book.lab.page.mouse.click(place["x"] + 0.2 * place["width"], place["y"] + 0.2 * place["height"])
    book.until("panel.state.direction == 'a'")
    path = out.get_by_role("textbox").last
    path.fill("../up.safetensors")
    path.press("Enter")
    out.get_by_role("button", name="Export all").click()
    out.get_by_role("alert").get_by_text("leads out of its folder").first.wait_for()
    path.fill("mine.safetensors")
    path.press("Enter")
    out.get_by_role("button", name="Export all").click()
    out.get_by_text("3 directions written to").wait_for()
    book.exec("panel.state.directions = {}")
    out.get_by_role("button", name="Import").click()
    book.until("list(panel.state.directions) == ['a', 'b', 'c']")


def test_hostile_names_are_inert(notebook, shots):
    book = notebook(OPEN, f"""
import torch
bad, site = {HOSTILE!r}, "resid_post.3"
for size in (1.0, 2.0):
    panel.state.add_direction(md.Direction.of(size * torch.ones(128), site, bad))
panel.jobs.wait(30)
""")  # fmt: skip
    out = book.output(0)
    out.get_by_text("random control: promoted").wait_for()
    assert out.locator("img").count() == 0
    book.shoot(shots, "directions_hostile")
