"""The panel Latents in JupyterLab: measure, tap and box, examples, label, steer; hostile text."""

import pytest

from tests.browser.steps import go_to, press

pytestmark = pytest.mark.browser

STORE = """
import modeldiff as md
from modeldiff.dictionaries.models import crosscoder
from modeldiff.dictionaries.training import TrainConfig, train
from modeldiff.harvesting import harvest
from modeldiff_widgets import AuditState
from modeldiff_widgets.latents import Latents
pair = md.ModelPair.load("organism:em-rank1")
asked = [p.render() for b in md.organism_behaviours("em-rank1") for p in b.prompts][:48]
answers = pair.generate(asked, max_new_tokens=24).of("finetuned")
chats = [[*chat, dict(role="assistant", content=a.text)] for chat, a in zip(asked, answers)]
store = harvest(pair, chats, "resid_post.3", "store")
state = AuditState()
state.use_rows(store)
"""
TRAINED = """
made = crosscoder(pair.d_model, 192, k=8, site="resid_post.3", n_exclusive=(24, 24))
config = TrainConfig(steps=150, batch_size=256, lr=4e-3)
state.use_dictionary(train(made, state.rows, config).dictionary)
"""
OPEN = STORE + TRAINED + """
panel = Latents(pair, state)
panel
"""  # fmt: skip
POINT = """([id, x, y]) => {
  const host = document.getElementById(id).querySelector('.mdw-bokeh');
  const [view] = host.mdViews.roots ?? host.mdViews;
  const {frame, canvas_view} = view;
  const box = canvas_view.el.getBoundingClientRect();
  return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y)];
}"""
IDLE = "panel.jobs.wait(30)"
HOSTILE = '<img src=x onerror="alert(1)"> \u202e $$x^2$$'


def measure(book):
    book.output(0).get_by_role("button", name="Measure").click()
    book.until(f"panel.found.examples is not None and {IDLE}", seconds=60)
    book.output(0).locator(".mdw-bokeh canvas").first.wait_for()
    book.lab.page.wait_for_timeout(500)


def at(book, x, y):
    book.output(0).locator(".mdw-bokeh").first.scroll_into_view_if_needed()
    return book.lab.page.evaluate(POINT, [book.identity, x, y])


def lonely(book):
    """Index of a drawn point that has the most room around it."""
    return book.eval(
        "max(range(len(panel.map.source.data['x'])), key=lambda i: min("
        "(abs(panel.map.source.data['x'][i] - panel.map.source.data['x'][j]) * 400) ** 2 + "
        "(abs(panel.map.source.data['y'][i] - panel.map.source.data['y'][j]) * 100) ** 2 "
        "for j in range(len(panel.map.source.data['x'])) if j != i))"
    )


def test_from_measuring_to_steering(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("Not measured yet").first.wait_for()
    measure(book)
    out.get_by_text("Measured on").first.wait_for()

    out.locator(".mdw-rows tbody tr").nth(3).click()
    book.until("panel.state.latent == panel.list.ids[3]")
    book.lab.page.keyboard.press("ArrowDown")
    book.until("panel.state.latent == panel.list.ids[4]")
    out.locator(".mdw-rows tr.selected").wait_for()

    i = lonely(book)
    x, y = book.eval(f"(panel.map.source.data['x'][{i}], panel.map.source.data['y'][{i}])")
    book.lab.page.mouse.click(*at(book, x, y))
    book.until(f"panel.state.latent == panel.map.source.data['latent'][{i}]")

    out.get_by_placeholder("what it stands for").fill(HOSTILE)
    out.get_by_placeholder("what it stands for").press("Enter")
    book.until(f"panel.labels.get(panel.state.latent) == {HOSTILE!r}")
    out.locator(".mdw-rows td", has_text="<img").wait_for()
    out.get_by_role("button", name="Steer with it").click()
    out.get_by_role("button", name="Ablate it").click()
    out.get_by_role("button", name="Use in CAFT").click()
    out.get_by_text("In the stack of edits: steer (1), ablate (2).").first.wait_for()
    out.get_by_text("reach further than").first.or_(
        out.get_by_text("reaches further than").first
    ).first.wait_for()
    assert out.locator(".mdw-pair .t").count() > 10
    assert book.eval(IDLE)
    assert out.locator("img").count() == 0
    book.shoot(shots, "latents")


def test_a_box_filters_the_table_and_a_heading_sorts(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    measure(book)
    page = book.lab.page
    ids = book.eval("len(panel.list.ids)")
    (x0, y0), (x1, y1) = at(book, 0.9, 0.1), at(book, 1.03, -3.2)
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2, steps=4)
    page.mouse.move(x1, y1, steps=4)
    page.mouse.up()
    book.until(f"0 < len(panel.list.ids) < {ids}")
    assert book.eval(
        "all(panel.found.table['relative_decoder_norm'][j] > .89 for j in panel.list.ids)"
    )
    out.locator(".mdw-rows th button", has_text="fires on").click()
    book.until("panel.list.sorted[1] and panel.order.column == 'firing_rate'")
    book.shoot(shots, "latents_boxed")
    out.get_by_role("button", name="Clear selection").click()
    book.until(f"len(panel.list.ids) == {ids}")
    out.locator("select", has_text="any class").select_option(label="shared")
    book.until("set(panel._passing()['class']) == {'shared'}")
    out.locator("select", has_text="ν error").select_option(label="ν error")
    book.until("panel.up.value == 'nu_error'")
    book.shoot(shots, "latents_nu")


def test_files_and_no_dictionary(notebook, shots):
    book = notebook(STORE + "panel = Latents(pair, state)\npanel")
    out = book.output(0)
    out.get_by_text("There is no dictionary yet").wait_for()
    book.shoot(shots, "latents_empty")
    book.exec(TRAINED + "state.dictionary.save_to('mine')")
    book.exec("state.use_dictionary(None)")
    folder = out.get_by_placeholder("folder of a dictionary")
    folder.fill("nowhere")
    folder.press("Enter")
    out.get_by_role("button", name="Open").click()
    out.get_by_role("alert").get_by_text("there is no file or folder").first.wait_for()
    folder.fill("mine")
    folder.press("Enter")
    out.get_by_role("button", name="Open").click()
    book.until("state.dictionary is not None and state.dictionary_folder == 'mine'")
    out.get_by_text("Labels are kept in labels.json.").wait_for()
    book.until(IDLE)


def test_hostile_tokens_are_inert(notebook, shots):
    book = notebook(OPEN)
    book.exec(f"""
import modeldiff.dictionaries.examples as examples
examples.token_names = lambda tokenizer, ids: [{HOSTILE!r} for _ in ids]
""")
    measure(book)
    out = book.output(0)
    book.exec("state.latent = panel.map.source.data['latent'][0]")
    out.locator(".mdw-pair .t", has_text="<img").first.wait_for()
    assert out.locator("img").count() == 0
    book.shoot(shots, "latents_hostile")


def test_in_the_workbench_a_latent_goes_from_panel_to_panel(notebook, shots):
    from_state = "from modeldiff_widgets import Workbench\nwb = Workbench(pair, state=state)\nwb"
    book = notebook(STORE + TRAINED + from_state)
    out = book.output(0)
    go_to(out, "Latents")
    press(out, "Measure")
    book.until("wb.panels['Latents'].found.examples is not None and wb.jobs.wait(30)", seconds=60)
    out.locator(".mdw-bokeh:visible canvas").first.wait_for()
    go_to(out, "Latents")
    out.locator(".mdw-rows:visible tbody tr").nth(40).click()
    book.until("state.latent == wb.panels['Latents'].list.ids[40]")
    press(out, "Steer with it")
    book.until("[e['kind'] for e in state.edits] == ['steer'] and wb.jobs.wait(30)")
    go_to(out, "Directions")
    name = book.eval("next(iter(state.directions))")
    out.locator("table:visible td", has_text=name).first.wait_for()
    go_to(out, "Training")
    out.get_by_text("rows of both models").wait_for()
    go_to(out, "Latents")
    book.shoot(shots, "latents_workbench")
    assert book.eval("wb.bar.error == ['', '']")
