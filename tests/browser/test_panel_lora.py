"""The panel LoRA lab in JupyterLab: modules, scalars, sliders, leave one out, hostile text."""

import pytest

from tests.browser.steps import press

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="alert(1)"> \u202e $$x^2$$'
OPEN = """
import modeldiff as md
from modeldiff_widgets.lora import LoraLab
pair = md.ModelPair.load("organism:em-rank1")
panel = LoraLab(pair)
panel.lines.value = "I have a headache.\\nWhat is the best way to save money?"
panel.state.max_new_tokens = 24
panel
"""
WIDE = """
from peft import LoraConfig, get_peft_model
import torch
base = md.ModelPair.load("organism:em-base").sides.roots[0]
config = LoraConfig(r=4, lora_alpha=8, layers_to_transform=[1, 3, 5],
                    target_modules=["q_proj", "o_proj", "up_proj", "down_proj"])
wide = get_peft_model(base, config, adapter_name="wide").eval().requires_grad_(False)
draw = torch.Generator().manual_seed(0)
for name, weight in wide.named_parameters():
    if "lora_" in name:
        weight.data = 0.02 * torch.randn(weight.shape, generator=draw)
panel = LoraLab(md.ModelPair.of(wide, None, pair.tokenizer))
panel.n_random.value = 5
panel.by.value = "module"
panel.lines.value = "I have a headache."
panel
"""
IDLE = "panel.jobs.wait(60) and panel.root.children[0].error == ['', '']"


POINT = """([id, x, y]) => {
  const host = document.getElementById(id);
  const [view] = host.mdViews.roots ?? host.mdViews;
  const {frame, canvas_view} = view;
  const box = canvas_view.el.getBoundingClientRect();
  return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y)];
}"""


def test_from_the_modules_to_leaving_one_out(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.locator(".mdw-rows td", has_text="3.mlp.down_proj").wait_for()
    press(out, "Read scalars")
    book.until(f"panel.scalars is not None and {IDLE}", seconds=60)
    assert out.locator(".mdw-pair .t").count() > 10
    out.get_by_text("bias fraction", exact=True).first.wait_for()
    press(out, "Add its write direction to the library")
    book.until("len(panel.state.directions) == 1")
    slider = out.locator(".mdw-field", has_text="Whole adapter, times").get_by_role("slider")
    slider.focus()
    book.lab.page.keyboard.press("ArrowLeft")
    book.until("[e['kind'] for e in panel.state.edits] == ['adapter']")
    out.get_by_text("In the stack of edits: 1.").wait_for()
    press(out, "Leave one out")
    book.until(f"panel.effects is not None and {IDLE}", seconds=90)
    out.get_by_text("Whole adapter: KL").wait_for()
    book.shoot(shots, "lora", high=3300)
    press(out, "All to 1")
    book.until("panel.state.edits == []")
    book.exec("pair.sides.lora and panel.state.set_trait('messages', [])")
    book.exec(f"panel.state.prompt = {HOSTILE!r}; panel.prompt.answer.value = ''")
    press(out, "Read scalars")
    out.locator(".mdw-pair .t", has_text="<").first.wait_for()
    assert out.locator("img").count() == 0


def test_many_modules_sort_and_choose(notebook, shots):
    book = notebook(OPEN, WIDE)
    out = book.output(1)
    out.locator(".mdw-rows tbody tr").nth(11).wait_for()
    out.locator(".mdw-rows th button", has_text="rel. norm").click()
    book.until("panel.order == ('relative', True)")
    out.locator(".mdw-rows tbody tr").nth(2).click()
    book.until("panel.chosen == panel.table.ids[2]")
    book.exec("panel.choose(3)")
    pane = out.locator(".mdw-bokeh").first
    pane.locator("canvas").first.wait_for()
    pane.scroll_into_view_if_needed()
    book.lab.page.wait_for_timeout(500)
    identity = pane.evaluate("e => e.id ||= 'spectrum-of-the-test'")
    book.lab.page.mouse.click(*book.lab.page.evaluate(POINT, [identity, 2, 0.02]))
    book.until("panel.component.value == 2")
    press(out, "Read scalars")
    book.until(f"panel.scalars is not None and {IDLE}", seconds=60)
    press(out, "Leave one out")
    book.until(f"panel.effects is not None and {IDLE}", seconds=120)
    book.shoot(shots, "lora_wide", 1, high=3300)


def test_two_whole_models_get_one_sentence(notebook):
    book = notebook("""
import modeldiff as md
from modeldiff_widgets.lora import LoraLab
pair = md.ModelPair.load("organism:em-base")
panel = LoraLab(pair)
panel
""")
    book.output(0).get_by_text("makes one of their difference").first.wait_for()
