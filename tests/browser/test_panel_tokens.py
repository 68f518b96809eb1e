"""The panel Tokens in JupyterLab: heat, metric, click, keyboard, edits, hostile text."""

import pytest

pytestmark = pytest.mark.browser

OPEN = """
import modeldiff as md
from modeldiff_widgets import new_edit
from modeldiff_widgets.tokens import Tokens
pair = md.ModelPair.load("organism:em-rank1")
panel = Tokens(pair)
panel
"""
HOSTILE = '<img src=x onerror="alert(1)"> \u202e\u200b $$x$$ {{a}}'
DIRECTION = """
site, text = md.Site("resid_post", 3), panel.shown.text
acts = pair.capture([text], "resid_post.3")
shift = md.mean_difference(acts.finetuned[site], acts.base[site], site, "shift")
panel.state.add_direction(shift)
panel.state.edits = [new_edit("ablate", "shift", layers=[3])]
"""


COLOURS = "all => all.map(t => +t.style.getPropertyValue('--v'))"
RECOLOURED = """([id, old]) =>
  [...document.getElementById(id).querySelectorAll('.mdw-pair .t')]
    .some((t, i) => +t.style.getPropertyValue('--v') > old[i] + 0.002)"""


def tokens_of(book):
    return book.panel.locator(".mdw-pair .t")


def recolour_while_the_kernel_is_busy(book):
    """Move the slider during a cell; the colours must change before the cell ends."""
    before = tokens_of(book).evaluate_all(COLOURS)
    book.lab.page.evaluate(
        "path => void mdNotebooks[path].sessionContext.session.kernel"
        ".requestExecute({code: 'import time; time.sleep(4)'})", book.path)  # fmt: skip
    slider = book.output(0).get_by_role("slider").first
    slider.focus()
    for _ in range(15):
        slider.press("ArrowLeft")
    book.lab.page.wait_for_function(RECOLOURED, arg=[book.identity, before], timeout=3000)
    book.until("panel.state.scale < 0.5")


def test_the_panel_from_the_first_click_to_the_edited_columns(notebook, shots):
    book = notebook(OPEN)
    out, page = book.output(0), book.lab.page
    out.get_by_text("Nothing is compared yet").wait_for()
    out.get_by_role("button", name="Compare tokens").click()
    book.until("panel.shown is not None and not panel.jobs.current")
    tokens = tokens_of(book)
    tokens.nth(16).wait_for()
    strongest = book.eval("int(panel.scores[0].table['kl_ft_base'].idxmax()) + 1")
    page.wait_for_timeout(300)
    colours = tokens.evaluate_all(COLOURS)
    assert colours[strongest] == max(colours) == 1.0

    tokens.nth(strongest).click()
    book.until(f"panel.state.token == {strongest}")
    out.get_by_text("fine-tuned says").wait_for()
    assert out.locator("table.mdw-top").count() == 2
    book.shoot(shots, "tokens")
    tokens.nth(strongest).press("ArrowRight")
    page.keyboard.press("Enter")
    book.until(f"panel.state.token == {strongest + 1}")
    recolour_while_the_kernel_is_busy(book)

    metric = out.locator("select", has_text="Jensen-Shannon")
    metric.select_option(label="log p fine-tuned − log p base of the token, nats")
    book.until("panel.view.metric == 'delta_logprob'")
    tokens.locator("xpath=self::*[contains(@class,'neg')]").nth(3).wait_for()

    book.exec(DIRECTION)
    out.get_by_role("button", name="Both").click()
    out.get_by_role("button", name="Compare tokens").click()
    book.until("len(panel.view.columns) == 3 and not panel.jobs.current")
    out.locator(".mdw-pair .col").nth(2).wait_for()
    tokens_of(book).nth(strongest).click()
    out.get_by_text("base with edits says").wait_for()
    book.shoot(shots, "tokens_edited")
    book.exec("panel.metric.value = 'projection_difference'")
    book.until("'projection_difference' in panel.view.columns[0]['values']")
    out.get_by_text("Code", exact=True).click()
    largest = "max(abs(v) for c in panel.view.columns for v in c['values'][panel.view.metric][1:])"
    book.until(f"abs(panel.state.scale / {largest} - 1) < 0.01")
    out.get_by_text("from modeldiff.token_scores import projections").wait_for()
    book.shoot(shots, "tokens_projection")


def test_hostile_text_is_shown_and_never_run_and_what_is_missing_is_said(notebook, shots):
    book = notebook(OPEN, f"panel.state.messages = [dict(role='user', content={HOSTILE!r})]\n"
                          "panel.run(); panel.jobs.wait(30); panel.state.token = 8")  # fmt: skip
    out = book.output(0)
    tokens_of(book).nth(8).wait_for()
    book.until("panel.view.selected == [0, 8]")
    out.get_by_text("fine-tuned says").wait_for()
    book.shoot(shots, "tokens_hostile")
    assert book.panel.locator(".jp-OutputArea-output img").count() == 0
    assert "onerror" in book.panel.locator(".mdw-pair").inner_text()
    book.exec("panel.state.messages = []; panel.state.prompt = ''")
    out.get_by_role("button", name="Compare tokens").click()
    out.get_by_role("alert").get_by_text("There is no prompt yet").first.wait_for()
