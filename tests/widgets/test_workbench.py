import gc
import re
import threading
import time
from typing import Any

import ipywidgets as W
import pytest

from modeldiff.errors import MaskError
from modeldiff_widgets import (
    AuditState,
    BokehPane,
    JobBar,
    PairView,
    Panel,
    Workbench,
    _render,
    _theme,
)
from tests.widgets.conftest import n_widgets

PAIR: Any = object()  # the core never looks inside


class Toy(Panel):
    """Counts; its numbers stand for the tokens of a model."""

    title = "Toy"

    def build(self):
        from bokeh.plotting import figure

        self.temperature = W.FloatSlider(max=2.0)
        self.kind = W.ToggleButtons(options=["a", "b"])
        self.go = _theme.button("Go", primary=True)
        self.bad = _theme.button("Bad")
        self.view = PairView([{"title": "base", "tokens": ["x"]}])
        self.pane = self.own(BokehPane(figure(height=100, width=100)))
        self.spare = self.own(W.HTML("not shown at first"))
        self.bind(self.temperature, "temperature")
        self.on(self.go, self.run)
        self.on(self.bad, lambda: 1 / 0)
        self.heard = []
        self.link(self.state, "layer", self.heard.append)
        self.jslink((self.temperature, "value"), (self.view, "scale"))
        controls = _theme.row(_theme.field("temperature", self.temperature), self.kind, self.go)
        return _theme.column(_theme.card(controls, title="Settings"), self.view, self.bad)

    def run(self, n=5):
        def work(job):
            for i in range(n):
                time.sleep(0.002)
                self.view.append(0, [f" {i}"])
                job.report((i + 1) / n, f"{i + 1}/{n}")
            self.view.finish()
            return n

        return self.submit(work, on_done=lambda job: self.heard.append(job.result))

    def code(self):
        if not self.state.prompt:
            raise MaskError("there is no prompt yet.")
        return f"pair.generate([{self.state.prompt!r}])"

    def snapshot_html(self):
        return _render.section("Toy", [self.view.snapshot_html()], code=self.shown_code())


class Second(Toy):
    title = "Second"


@pytest.fixture
def wb():
    with Workbench(PAIR, panels=(Toy, Second)) as wb:
        yield wb


def test_panels_share_state_runner_and_one_job_bar(wb):
    toy, second = wb.panels["Toy"], wb.panels["Second"]
    toy.temperature.value = 1.5
    assert wb.state.temperature == second.temperature.value == 1.5
    toy.go.click()
    assert wb.jobs.wait(5)
    assert toy.view.columns[0]["tokens"] == ["x", " 0", " 1", " 2", " 3", " 4"]
    assert toy.heard == [5]
    assert (wb.bar.status, wb.bar.label, wb.bar.fraction) == ("done", "toy", 1.0)
    assert re.fullmatch(r"(\d+\.\d s)?", wb.bar.message)  # not what it did last: it is done


def test_the_state_wins_when_a_panel_is_made():
    with Toy(PAIR, AuditState(temperature=1.25)) as toy:
        assert toy.temperature.value == 1.25


def test_a_panel_stands_alone_with_its_own_bar(wb):
    with Second(PAIR) as alone:
        assert isinstance(alone.root.children[0], JobBar)
        alone.run()
        assert alone.jobs.wait(5)
        assert alone.root.children[0].status == "done"
        assert alone.jobs is not wb.jobs
    assert not any(isinstance(each, JobBar) for each in wb.panels["Second"].root.children)


def test_an_error_of_a_button_or_a_job_shows_in_the_bar(wb):
    wb.panels["Toy"].bad.click()
    assert wb.bar.status == "failed"
    assert wb.bar.error[0] == "ZeroDivisionError: division by zero"
    assert "in <lambda>" in wb.bar.error[1]
    wb.panels["Toy"].run()
    assert wb.jobs.wait(5)
    assert wb.bar.error == ["", ""]


def test_the_cancel_button_stops_the_job(wb):
    job = wb.panels["Toy"].run(n=2000)
    while job.status == "queued":
        time.sleep(0.002)
    start = time.monotonic()
    wb.bar._handle_custom_msg({"kind": "cancel"}, [])
    assert wb.jobs.wait(5)
    assert time.monotonic() - start < 0.3
    assert (job.status, wb.bar.status) == ("cancelled", "cancelled")


def test_the_same_panel_twice_is_one_job(wb):
    jobs = [wb.panels["Toy"].run(n=500) for _ in range(5)]
    other = wb.panels["Second"].run(n=2)
    assert wb.jobs.wait(10)
    assert [job.status for job in jobs] == ["cancelled"] * 4 + ["done"]
    assert other.status == "done"


def test_the_code_is_written_when_it_is_looked_at(wb):
    listing = wb.panels["Toy"]._listing
    assert listing.code == "# there is no prompt yet."
    wb.state.prompt = "hello"
    assert "hello" not in listing.code
    listing.unfolded = True
    assert listing.code == "pair.generate(['hello'])"
    wb.state.prompt = "again"
    assert listing.code == "pair.generate(['again'])"


def test_a_pin_keeps_the_panel_in_front(wb):
    wb.state.prompt = "<b>bold</b>"
    wb.show("Second")
    assert wb.current is wb.panels["Second"]
    wb.bar._handle_custom_msg({"kind": "pin"}, [])
    wb.bar._handle_custom_msg({"kind": "pin"}, [])
    assert len(wb.pins) == 2
    assert "&lt;b&gt;bold" in wb.pins[0]
    assert "<b>" not in wb.snapshot_html()
    with pytest.raises(KeyError):
        wb.show("Third")


def test_displaying_makes_a_place_for_pins(wb, monkeypatch):
    from IPython import display as shown

    updates = []

    class Slot:
        def update(self, html):
            updates.append(html.data)

    monkeypatch.setattr(
        shown, "display", lambda what, display_id=False: Slot() if display_id else None
    )
    wb._ipython_display_()
    wb.pin()
    assert "mdw-static" in updates[0]
    wb.pin()
    assert updates[1].count("<section") == 2


def test_closing_leaves_no_widget_and_undoes_every_link():
    before, threads = n_widgets(), threading.active_count()
    state = AuditState()
    wb = Workbench(PAIR, panels=(Toy, Second), state=state)
    toy = wb.panels["Toy"]
    toy.run(n=2000)
    wb.close()
    wb.close()
    assert n_widgets() == before
    assert threading.active_count() == threads
    state.layer, state.temperature = 4, 0.5
    assert 4 not in toy.heard


def test_closing_one_workbench_leaves_another_whole(wb):
    Workbench(PAIR, panels=(Toy, Second)).close()
    toy = wb.panels["Toy"]
    toy.run()
    assert wb.jobs.wait(5)
    assert wb.bar.status == "done"
    for widget in (toy.go, toy.temperature, toy.view, wb.tabs):
        assert widget.comm is not None
        assert widget.layout.comm is not None


def grown(times):
    """How many objects and widgets stay when a workbench is opened, used and closed so often."""

    def once():
        with Workbench(PAIR, panels=(Toy,)) as wb:  # pyright: ignore[reportArgumentType]
            wb.panels["Toy"].run(n=1)
            wb.jobs.wait(5)

    counts = []
    for several in (3, times):
        for _ in range(several):
            once()
        gc.collect()
        counts.append((len(gc.get_objects()), n_widgets()))
    (objects, widgets), (objects_after, widgets_after) = counts
    return objects_after - objects, widgets_after - widgets


@pytest.mark.parametrize("times", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_opening_and_closing_leaves_widgets_and_memory_flat(times):
    objects, widgets = grown(times)
    assert widgets == 0
    assert objects < 200  # a workbench that stayed would be some thousand


def test_without_panels_there_is_nothing_to_pin():
    with Workbench(PAIR, panels=()) as wb:
        assert wb.current is None
        assert wb.pin() == ""
