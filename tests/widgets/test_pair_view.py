import json
import math
import threading
import time

import pytest
from traitlets import TraitError

from modeldiff_widgets import PairView

HOSTILE = "<img src=x onerror=alert(1)>\u202e"


@pytest.fixture
def view():
    view = PairView([{"title": "base", "tokens": ["a", " b"]}, {"title": "ft", "tokens": ["c"]}])
    yield view
    view.close()


def pieces(wire):
    """Put the messages of a stream together, as the browser does."""
    columns: dict = {}
    for content in wire.sent:
        if content["kind"] == "append":
            tokens = columns.setdefault(content["column"], [])
            tokens[content["start"] :] = content["tokens"]
    return columns


def test_numbers_that_json_does_not_know_become_none():
    values = {"js": [float("nan"), float("inf"), None, 0.123456789]}
    with_nan = PairView([{"tokens": list("abcd"), "values": values}])
    assert with_nan.columns[0]["values"]["js"] == [None, None, None, 0.12346]
    json.dumps(with_nan.get_state()["columns"], allow_nan=False)
    with_nan.close()


def test_unknown_fields_and_too_many_columns_are_refused(view):
    with pytest.raises(ValueError, match="tokenz"):
        view.columns = [{"tokenz": []}]
    with pytest.raises(TraitError):
        view.columns = [{"tokens": []}] * 5
    with pytest.raises(TraitError, match="CSS"):
        view.height = "1rem; background: url(x)"


def test_a_click_reaches_python_once_and_sets_the_selection(view):
    chosen = []
    undo = view.on_select(lambda *at: chosen.append(at))
    view._handle_custom_msg({"kind": "select", "column": 0, "index": 1}, [])
    assert chosen == [(0, 1)]
    assert view.selected == [0, 1]
    undo()
    view._handle_custom_msg({"kind": "select", "column": 0, "index": 0}, [])
    assert chosen == [(0, 1)]


@pytest.mark.parametrize(
    "content",
    [{}, {"kind": "select"}, {"kind": "select", "column": 0, "index": 7},
     {"kind": "select", "column": -1, "index": 0}, {"kind": "select", "column": "0", "index": 0},
     {"kind": "run", "code": "1"}],
)  # fmt: skip
def test_messages_that_make_no_sense_are_ignored(view, content):
    view.on_select(lambda *at: pytest.fail("called"))
    view._handle_custom_msg(content, [])
    assert view.selected == []


def test_a_stream_is_cut_into_pieces_and_complete(view, wire):
    heard = wire(view)
    start = time.monotonic()
    for i in range(300):
        view.append(0, [f" {i}"])
        time.sleep(0.001)
    view.finish()
    seconds = time.monotonic() - start
    expected = ["a", " b", *(f" {i}" for i in range(300))]
    assert view.columns[0]["tokens"] == expected
    assert ["a", " b", *pieces(heard)[0][0:]][-300:] == expected[-300:]
    assert len(heard.sent) <= 10 * seconds + 4
    assert heard.sent[-1]["streaming"] is False


def test_the_last_piece_comes_by_itself(view, wire):
    heard = wire(view)
    view.append(0, [" x"])
    view.append(0, [" y"])
    end = time.monotonic() + 3
    while len(heard.sent) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert [content["tokens"] for content in heard.sent] == [[" x"], [" y"]]


def test_values_stay_beside_their_tokens_where_some_are_missing(view):
    view.append(0, [" c"], values={"js": [0.5]}, marks=["affected"], top={"base": [[(" c", 1.0)]]})
    column = view.columns[0]
    assert column["values"]["js"] == [None, None, 0.5]
    assert column["marks"] == ["", "", "affected"]
    assert column["top"]["base"] == [[], [], [[" c", 1.0]]]


def test_a_reload_finds_what_was_streamed(view):
    view.append(1, [" d", " e"])
    assert view.get_state()["columns"][1]["tokens"] == ["c", " d", " e"]


def test_new_columns_drop_what_was_not_shown(view, wire):
    heard = wire(view)
    view.append(0, [" x"])
    view.append(0, [" y"])
    view.set_columns([{"tokens": ["new"]}])
    time.sleep(0.25)
    assert [c["tokens"] for c in heard.sent] == [[" x"]]
    assert view.columns[0]["tokens"] == ["new"]


def test_two_threads_append_and_no_token_is_lost(view, wire):
    heard = wire(view)

    def write(column):
        for i in range(500):
            view.append(column, [f" {i}"])

    threads = [threading.Thread(target=write, args=(c,)) for c in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    view.finish()
    got = pieces(heard)
    for column, before in [(0, 2), (1, 1)]:
        assert len(view.columns[column]["tokens"]) == before + 500
        assert got[column][-500:] == [f" {i}" for i in range(500)]


def test_closing_ends_the_stream():
    view = PairView([{"tokens": []}])
    view.append(0, ["a"])
    view.append(0, ["b"])
    timer = view._timer
    assert timer is not None
    view.close()
    assert timer.finished.is_set()


def test_the_snapshot_is_escaped_and_coloured():
    values = {"kl_ft_base": [1.0, math.nan]}
    view = PairView([{"title": HOSTILE, "tokens": [HOSTILE, "b"], "values": values}])
    html = view.snapshot_html()
    view.close()
    assert "<img" not in html
    assert "\u202e" not in html
    assert "213,94,0,0.760" in html
