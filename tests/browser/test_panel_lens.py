"""The panel Lens in JupyterLab: a direction, the difference, a token, a topic, a patchscope."""

import pytest

from tests.browser.steps import press

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="alert(1)"> \u202e $$x^2$$'
OPEN = """
import modeldiff as md
from modeldiff.lora import adapter_modules, write_directions
from modeldiff_widgets.lens import Lens
pair = md.ModelPair.load("organism:em-rank1")
panel = Lens(pair)
panel
"""
IDLE = "panel.jobs.wait(60) and panel.root.children[0].error == ['', '']"


def test_from_the_difference_to_a_patchscope(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("Nothing is read yet").wait_for()
    out.get_by_role("button", name="A direction of the library").click()
    press(out, "Read")
    out.get_by_role("alert").get_by_text("the library has no direction yet").first.wait_for()
    book.shoot(shots, "lens_empty")
    out.get_by_role("button", name="Difference of the pair").click()
    press(out, "Read")
    book.until("panel.reading is not None and panel.jobs.wait(60)", seconds=90)
    out.get_by_text("random difference 0: suppressed").wait_for()
    press(out, "Add it to the library")
    book.until("len(panel.state.directions) == 1")

    token = out.get_by_placeholder("a word or a token")
    token.fill("water")
    token.press("Enter")
    press(out, "Ask")
    book.until("panel.queried is not None and panel.jobs.wait(30)")
    out.get_by_text("Rank 1 is promoted most").wait_for()
    topic = out.get_by_placeholder("words of it, with commas")
    topic.fill("doctor, pain, medicine")
    topic.press("Enter")
    press(out, "Test")
    book.until("panel.topic is not None and panel.jobs.wait(30)")
    press(out, "Read by patchscope")
    book.until("panel.scope is not None and panel.jobs.wait(60)", seconds=60)
    out.get_by_text("times the mean norm").wait_for()
    book.shoot(shots, "lens_difference", high=2400)

    book.exec("panel.state.add_direction(write_directions(adapter_modules(pair.sides)[0])[0])")
    out.get_by_role("button", name="A direction of the library").click()
    press(out, "Read")
    book.until(f"panel.reading.trace is None and {IDLE}", seconds=60)
    out.get_by_text("3.mlp.down_proj write 0 @ mlp_out.3 is read by").wait_for()
    book.shoot(shots, "lens_direction", high=2400)

    book.exec(f"""
import modeldiff.logit_lens as lens_module
lens_module.token_names = lambda tokenizer, ids: [{HOSTILE!r} for _ in ids]
panel.state.add_direction(panel.reading.direction.renamed({HOSTILE!r}))
""")
    press(out, "Read")
    out.locator("code", has_text="<img").first.wait_for()
    assert out.locator("img").count() == 0
