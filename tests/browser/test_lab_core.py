"""The core of the workbench in JupyterLab: token heat, figures, the job bar, pins."""

import json
import re
import time

import pytest

from tests.browser.steps import in_place

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>\u202e"
PAIR_VIEW = """
from modeldiff_widgets import *
import random
random.seed(0)
words = "The doctor said that you should take it every day and call me if it changes .".split()
tokens = [" " + w for w in words * 4]
tokens[9] = "\\n"
def column(title, kind, n=len(tokens)):
    value = lambda: random.random() ** 3 * 3
    top = [[[random.choice(words), p] for p in (.6, .2, .1, .06, .01)] for _ in range(n)]
    return {"title": title, "kind": kind, "tokens": tokens[:n], "subtitle": "seed 0",
            "values": {"kl_ft_base": [None] + [value() for _ in range(n - 1)],
                       "delta_logprob": [random.gauss(0, 1) for _ in range(n)]},
            "top": {"base": top, "finetuned": top}}
view = PairView([column("base", "base"), column("fine-tuned", "finetuned"),
                 column("fine-tuned, ablated", "edited", 50)], linked=True, scale=2.0)
chosen = []
view.on_select(lambda *at: chosen.append(at))
view
"""
FIGURE = """
import numpy as np
from bokeh.models import ColumnDataSource
from bokeh.plotting import figure
from modeldiff_widgets import *
source = ColumnDataSource({"layer": [], "kl": []})
plot = figure(height=260, sizing_mode="stretch_width", tools="tap,box_select,reset",
              x_axis_label="layer", y_axis_label="KL after ablation, nats", title="where it acts")
plot.line("layer", "kl", source=source, line_width=2, color="#D55E00")
plot.scatter("layer", "kl", source=source, size=11, color="#D55E00",
             nonselection_alpha=0.5, legend_label="fine-tuned")
pane = BokehPane(plot, label="KL after ablation by layer")
selected = []
pane.on_select(source, selected.append)
pane
"""
WORKBENCH = """
import ipywidgets as W
from modeldiff_widgets import *
from modeldiff_widgets import _render, _theme
def counted(job, view, n=60, pause=0.03):
    import time
    view.set_columns([{"title": "counting", "kind": "base", "tokens": []}])
    for i in range(n):
        time.sleep(pause)
        view.append(0, [f" {i}"], values={"kl_ft_base": [i / n]})
        job.report((i + 1) / n, f"token {i + 1}/{n}")
    view.finish()
class Count(Panel):
    title = "Count"
    def build(self):
        self.temperature = W.FloatSlider(min=0, max=2, step=0.1)
        self.seed = W.IntText()
        self.prompt = W.Textarea(rows=2)
        self.go = _theme.button("Count", primary=True, icon="play")
        self.bad = _theme.button("Fail")
        self.view = PairView(blank="press Count")
        self.bind(self.temperature, "temperature")
        self.bind(self.seed, "seed")
        self.bind(self.prompt, "prompt")
        self.on(self.go, self.run)
        self.on(self.bad, lambda: self.submit(lambda job: 1 / 0, key="bad"))
        return _theme.column(
            _theme.row(_theme.field("prompt", self.prompt, grow=True)),
            _theme.row(_theme.field("temperature", self.temperature, width="16rem"),
                       _theme.field("seed", self.seed, width="6rem"), self.go, self.bad,
                       _theme.note("0 is greedy")),
            self.view)
    def run(self):
        self.submit(lambda job: counted(job, self.view))
    def code(self):
        return f"pair.generate([{self.state.prompt!r}], temperature={self.state.temperature})"
    def snapshot_html(self):
        return _render.section("Count", [self.view.snapshot_html()], code=self.code(), when=True)
class Other(Count):
    title = "Other"
wb = Workbench(None, panels=[Count, Other])
wb
"""

COUNT = "lambda job: counted(job, wb.panels['Count'].view, 2000, 0.2)"
LONG = f"wb.jobs.submit({COUNT}, key='x', label='long')"


def button(out, text):
    return out.locator(".jupyter-button", has_text=re.compile(f"^{text}$")).first


def test_a_click_reaches_python_and_colours_change(notebook, shots):
    opened = notebook(PAIR_VIEW)
    out = opened.output(0)
    out.locator(".t").nth(5).hover()
    opened.lab.page.locator(".mdw-card-hover").wait_for()
    shots.take(opened.lab.page, "pair_hover.png")
    assert out.locator(".t.linked").count() == 2
    out.locator(".t").nth(5).click()
    assert opened.until("chosen") == [[0, 5]]
    assert opened.eval("view.selected") == [0, 5]
    opened.shoot(shots, "pair_view")
    opened.exec("view.metric = 'delta_logprob'")
    out.locator(".t.neg").first.wait_for()
    opened.shoot(shots, "pair_view_signed")


def test_the_scale_moves_colours_without_the_kernel(notebook):
    opened = notebook(
        PAIR_VIEW + "\nimport ipywidgets as W\nslider = W.FloatSlider(2, min=.1, max=4)"
        "\nlink = W.jslink((slider, 'value'), (view, 'scale'))\nW.VBox([slider, view])"
    )
    token = opened.output(0).locator(".t").nth(3)
    before = token.evaluate("e => e.style.getPropertyValue('--v')")
    opened.exec("import threading, time\nblock = threading.Event()")
    page = opened.lab.page
    # the kernel sleeps in a cell meanwhile: only the browser can have recoloured
    page.evaluate(
        """path => { mdNotebooks[path].sessionContext.session.kernel.requestExecute(
        {code: "time.sleep(4)"}); }""",
        opened.path,
    )
    start = time.monotonic()
    opened.output(0).locator("[role=slider]").press("Home")
    page.wait_for_function(
        "([id, old]) => document.getElementById(id).querySelectorAll('.t')[3]"
        ".style.getPropertyValue('--v') !== old",
        arg=[opened.identity, before],
    )
    assert time.monotonic() - start < 3


def test_keys_walk_through_tokens_and_do_not_reach_lab(notebook):
    opened = notebook(PAIR_VIEW)
    out, page = opened.output(0), opened.lab.page
    out.locator(".t").first.focus()
    for key in ["ArrowRight", "ArrowRight", "ArrowDown", "Enter"]:
        page.keyboard.press(key)
    assert opened.until("chosen") == [[1, 2]]
    for key in "abdz":
        page.keyboard.press(key)  # in Lab's command mode a and b insert cells
    assert opened.panel.locator(".jp-Cell").count() == 1


def test_tokens_that_stream_are_there_after_a_reload(notebook):
    opened = notebook(
        "from modeldiff_widgets import *\n"
        "view = PairView([{'title': 'one', 'tokens': ['a']}])\nview"
    )
    opened.exec("for i in range(50):\n    view.append(0, [f' {i}'])\nview.finish()")
    tokens = opened.output(0).locator(".t")
    opened.lab.page.wait_for_function(
        "id => document.getElementById(id).querySelectorAll('.t').length === 51",
        arg=opened.identity,
    )
    opened.lab.page.evaluate(
        "path => { const w = mdNotebooks[path]; return w.context.save(); }", opened.path
    )
    opened.exec("from IPython.display import display")
    assert tokens.all_inner_texts()[-1] == "49"
    again = opened.reopened()
    again.output(0).locator(".t").nth(50).wait_for()
    assert again.output(0).locator(".t").all_inner_texts()[-1] == "49"


def test_a_figure_streams_selects_and_survives_a_second_view(notebook, shots):
    opened = notebook(FIGURE, "pane")
    page = opened.lab.page
    opened.exec(
        "for i in range(6):\n    pane.stream(source, {'layer': [i], 'kl': [(i - 2.5) ** 2]})"
    )
    for index in (0, 1):
        opened.output(index).locator(".mdw-bokeh canvas").first.wait_for()
    count = """([id, i]) => {
      const host = document.getElementById(id).querySelectorAll('.mdw-bokeh')[i];
      const source = [...host.mdViews.roots][0].model.renderers[0].data_source;
      return source.get_length() + 100 * source.selected.indices.length;
    }"""
    for index in (0, 1):
        page.wait_for_function(f"a => ({count})(a) === 6", arg=[opened.identity, index])
    place = page.evaluate(
        """id => {
      const [view] = document.getElementById(id).querySelector('.mdw-bokeh').mdViews.roots;
      const box = view.canvas_view.el.getBoundingClientRect();
      const frame = view.frame;
      return [box.x + frame.x_scale.compute(3), box.y + frame.y_scale.compute(.25)];
    }""",
        opened.identity,
    )
    page.mouse.click(*place)
    assert opened.until("selected") == [[3]]
    page.wait_for_function(f"a => ({count})(a) === 106", arg=[opened.identity, 1])  # mirrored
    opened.until("pane.picture != ''")
    opened.shoot(shots, "figure")
    opened.lab.theme("dark")
    page.wait_for_timeout(300)
    for index in (0, 1):
        page.wait_for_function(f"a => ({count})(a) === 106", arg=[opened.identity, index])
    saved = json.dumps(opened.save())
    assert len(saved) < 20_000
    again = opened.reopened()
    again.output(0).locator(".mdw-bokeh canvas").first.wait_for()
    page.wait_for_function(f"a => ({count})(a) === 106", arg=[again.identity, 0])


def test_the_job_bar_runs_cancels_and_complains(notebook, shots):
    opened = notebook(WORKBENCH)
    out, page = opened.output(0), opened.lab.page
    button(out, "Count").click()
    page.wait_for_function(
        "id => /running/.test(document.getElementById(id).textContent)", arg=opened.identity
    )
    opened.shoot(shots, "workbench_running")
    button(out, "Count").click()
    page.wait_for_timeout(600)
    start = time.monotonic()
    out.get_by_role("button", name="Cancel").click()
    page.wait_for_function(
        "id => /cancelled/.test(document.getElementById(id).querySelector('.words').textContent)",
        arg=opened.identity,
    )
    assert time.monotonic() - start < 1.0
    assert not opened.eval("bool(wb.jobs.current)")
    button(out, "Fail").click()
    alert = out.get_by_role("alert")
    alert.wait_for()
    assert "ZeroDivisionError" in alert.inner_text()
    out.get_by_text("Traceback", exact=True).click()
    assert "in <lambda>" in out.locator(".mdw-alert pre").inner_text()
    opened.shoot(shots, "workbench_error")
    button(out, "Count").click()
    opened.until("wb.jobs.wait(20)")
    page.wait_for_function(
        "id => /done/.test(document.getElementById(id).querySelector('.words').textContent)",
        arg=opened.identity,
    )
    assert out.get_by_role("alert").count() == 0


def test_a_job_outlives_its_page_but_not_its_kernel(notebook, shots):
    book = notebook(WORKBENCH)
    book.exec(LONG)
    again = book.reopened()
    out, page = again.output(0), book.lab.page
    out.get_by_role("status").get_by_text("running: long").wait_for()
    tokens = out.locator(".mdw-pair:visible .t")
    seen = tokens.count()
    page.wait_for_function(
        "([id, n]) => document.getElementById(id).querySelectorAll('.mdw-pair .t').length > n",
        arg=[again.identity, seen],
    )
    again.restart()  # nobody is left who could say that the job has ended
    out.get_by_text("run the cell again").wait_for()
    assert out.get_by_role("button", name="Cancel").is_disabled()
    shots.take(out, "kernel_restarted.png")
    again.run()
    out.get_by_role("status").get_by_text("ready").wait_for()
    assert not out.get_by_text("run the cell again").count()


def test_pins_stay_in_the_file_and_need_no_kernel(notebook, shots):
    opened = notebook(WORKBENCH)
    out = opened.output(0)
    opened.exec(f"wb.state.prompt = {HOSTILE!r}\nwb.panels['Count'].run()\nwb.jobs.wait(20)")
    out.locator("summary", has_text="Code").first.click()
    code = out.locator(".mdw-listing .mdw-code").first
    opened.lab.page.wait_for_timeout(300)
    assert "pair.generate" in code.inner_text()
    out.get_by_role("button", name="Pin").click()
    pinned = out.locator(".mdw-static")
    pinned.wait_for()
    opened.shoot(shots, "workbench_pinned")
    assert out.locator("img").count() == 0
    saved = opened.save()
    html = "".join(
        "".join(o["data"].get("text/html", "")) for o in saved["cells"][0]["outputs"] if "data" in o
    )
    assert "59" in re.sub("<[^>]*>", "", html)
    assert "<img" not in html
    lab = opened.lab
    lab.expected, lab.seen = ("widget model not found",), []
    again = opened.reopened(kernel=False)
    again.output(0).locator(".mdw-static").wait_for()
    end = time.monotonic() + 20
    while not lab.seen and time.monotonic() < end:  # Lab asks the new kernel, then gives up
        lab.page.wait_for_timeout(100)
    assert lab.seen
    shots.take(again.output(0), "reopened_without_kernel.png")


def test_it_fits_where_it_is_narrow(notebook, shots):
    opened = notebook(WORKBENCH)
    opened.exec("wb.panels['Count'].run()\nwb.jobs.wait(20)")
    for width in (1280, 760):
        with opened.narrow(width):
            shots.take(opened.output(0), f"workbench_{width}.png")
            in_place(opened.output(0))
