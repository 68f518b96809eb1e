import gzip
import json
import threading

import pytest
from bokeh.models import ColumnDataSource
from bokeh.plotting import figure

from modeldiff_widgets import BokehPane


@pytest.fixture
def source():
    return ColumnDataSource({"x": [0, 1, 2], "y": [0.0, 1.0, 4.0]})


@pytest.fixture
def pane(source):
    plot = figure(height=200, width=300, title="<b>hostile</b>")
    plot.scatter("x", "y", source=source)
    pane = BokehPane(plot, label="y by x")
    yield pane
    pane.close()


def say(pane, **content):
    pane._handle_custom_msg(content, [])


def test_bokehjs_comes_packed_and_only_on_demand(pane, wire):
    heard = wire(pane)
    assert len(json.dumps(pane.get_state(), default=str)) < 40_000
    say(pane, kind="library", view="a")
    assert heard.sent == [{"kind": "library", "to": "a"}]
    packed = heard.buffers[0][0]
    assert len(packed) < 600_000
    assert b"Bokeh" in gzip.decompress(packed)


def test_each_view_gets_the_document_as_it_is_now(pane, source, wire):
    heard = wire(pane)
    pane.stream(source, {"x": [3], "y": [9.0]})
    say(pane, kind="hello", view="late", dark=False)
    patch, document = heard.sent
    assert patch["kind"] == "patch"
    assert (document["to"], document["seq"]) == ("late", patch["seq"])
    assert "9.0" in json.dumps(document["content"])
    assert heard.kinds() == ["patch", "doc"]


def test_patches_are_numbered_and_json(pane, source, wire):
    import numpy as np

    heard = wire(pane)
    for i in range(3):
        pane.stream(source, {"x": [i], "y": [float(i)]})
    pane.replace(source, {"x": np.arange(4.0), "y": np.arange(4.0)})
    assert [content["seq"] for content in heard.sent] == [1, 2, 3, 4]
    json.dumps(heard.sent)


def select(pane, source, indices, view="a"):
    event = {
        "kind": "ModelChanged", "model": {"id": source.selected.id}, "attr": "indices",
        "new": indices,
    }  # fmt: skip
    say(pane, kind="patch", view=view, content={"events": [event]})


def test_a_selection_reaches_python_and_the_other_views(pane, source, wire):
    heard, chosen = wire(pane), []
    undo = pane.on_select(source, chosen.append)
    select(pane, source, [2, 1])
    assert chosen == [[2, 1]]
    assert source.selected.indices == [2, 1]
    assert [(c["kind"], c["from"]) for c in heard.sent] == [("patch", "a")]
    source.selected.indices = [0]  # by Python: mirrored to all, but no one clicked
    assert chosen == [[2, 1]]
    assert heard.sent[-1]["from"] == ""
    undo()
    undo()
    select(pane, source, [1])
    assert chosen == [[2, 1]]


def test_other_changes_of_a_view_are_not_mirrored(pane, wire):
    heard = wire(pane)
    event = {
        "kind": "ModelChanged", "model": {"id": pane.figure.id}, "attr": "name", "new": "seen",
    }  # fmt: skip
    say(pane, kind="patch", view="a", content={"events": [event]})
    assert pane.figure.name == "seen"
    assert heard.sent == []


def test_the_theme_follows_the_view(pane, wire):
    heard = wire(pane)
    say(pane, kind="hello", view="a", dark=True)
    dark = json.dumps(heard.sent[-1]["content"])
    say(pane, kind="hello", view="a", dark=False)
    light = json.dumps(heard.sent[-1]["content"])
    assert "#e6e9ed" in dark
    assert "#1f2328" in light
    assert "#e6e9ed" not in light


def test_two_threads_stream_while_a_user_selects(pane, source, wire):
    heard = wire(pane)

    def write():
        for i in range(100):
            pane.stream(source, {"x": [i], "y": [1.0]})

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(50):
        select(pane, source, [i % 3])
    for thread in threads:
        thread.join()
    assert len(source.data["x"]) == 203
    numbers = [content["seq"] for content in heard.sent]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_snapshot_is_the_picture_or_else_the_data(pane):
    html = pane.snapshot_html()
    assert "<td" in html
    say(pane, kind="picture", data="data:image/png;base64,iVBORw0KGgo=")
    assert "<img" in pane.snapshot_html()
    say(pane, kind="picture", data="javascript:alert(1)")
    assert "javascript" not in pane.snapshot_html()


def test_closing_lets_the_figure_go(source):
    plot = figure(height=200, width=300)
    plot.scatter("x", "y", source=source)
    pane = BokehPane(plot)
    pane.close()
    pane.close()
    assert plot.document is None
    source.stream({"x": [1], "y": [1]})
