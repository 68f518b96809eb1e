import ipywidgets.widgets.widget as widget_module
import pytest
from ipywidgets import Widget


@pytest.fixture(autouse=True)
def no_widget_is_left():
    """Every test closes what it opened: what stays open piles up in a long session."""
    before = set(widget_module._instances)
    yield
    left = [widget_module._instances[key] for key in set(widget_module._instances) - before]
    names = [type(widget).__name__ for widget in left]
    for widget in left:
        widget.close()
    assert names == []


def n_widgets() -> int:
    """How many widgets are open."""
    return len(widget_module._instances)


class Wire:
    """What a widget sends, in place of a browser."""

    def __init__(self, widget: Widget, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list = []
        self.buffers: list = []
        monkeypatch.setattr(widget, "send", self._note)

    def _note(self, content, buffers=None):
        self.sent.append(content)
        self.buffers.append(buffers or [])

    def kinds(self):
        return [content["kind"] for content in self.sent]


@pytest.fixture
def wire(monkeypatch):
    """Listen to a widget: ``wire(widget).sent``."""
    return lambda widget: Wire(widget, monkeypatch)
