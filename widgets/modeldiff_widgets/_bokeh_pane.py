"""`BokehPane`: a live bokeh figure as a widget.

BokehJS is sent over the comm once a page and stored nowhere. Each view asks for the document as it
is now and then follows numbered patches, so a reload and a second view show the truth.
"""

import gzip
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import bokeh
import traitlets
from bokeh.core.serialization import Serialized, Serializer
from bokeh.document import Document
from bokeh.models import ColumnDataSource, GlyphRenderer, LayoutDOM, Selection

from modeldiff_widgets import _render
from modeldiff_widgets._theme import bokeh_theme, source

_ROWS = 50
_MOST = 4 << 20  # characters of a picture


@cache
def _library() -> bytes:
    """BokehJS without widgets, tables and WebGL, packed."""
    folder = Path(bokeh.__file__).parent / "server" / "static" / "js"
    return gzip.compress((folder / "bokeh.min.js").read_bytes(), 6, mtime=0)


class BokehPane(anywidget.AnyWidget):
    """Shows a figure or a layout of figures; Python and all its views stay in step.

    Change the figure while you hold `editing` if a job does it: the user may be selecting.

    Args:
        figure: A bokeh model. It belongs to the pane from now on.
        label: What it shows, for those who cannot see it.

    Example:
        >>> from bokeh.plotting import figure
        >>> pane = BokehPane(figure(height=200, width=300), label="nothing yet")
        >>> pane.close()
    """

    _esm = source("bokeh_pane.js")
    _css = source("theme.css")

    label = traitlets.Unicode("figure").tag(sync=True)
    version = traitlets.Unicode(bokeh.__version__, read_only=True).tag(sync=True)

    def __init__(self, figure: LayoutDOM, label: str = "figure", **options: Any) -> None:
        self.lock = threading.RLock()
        self.figure = figure
        self.picture = ""
        self._number = 0
        self._origin = ""
        self._undo: list[Callable[[], None]] = []
        self._document = Document(theme=bokeh_theme(False))
        self._document.add_root(figure)
        super().__init__(label=label, **options)
        self._document.on_change_dispatch_to(self)
        self.on_msg(self._receive)

    @contextmanager
    def editing(self) -> Iterator[LayoutDOM]:
        """Hold the figure while it is changed, from any thread."""
        with self.lock:
            yield self.figure

    def stream(self, source: ColumnDataSource, rows: Mapping[str, Sequence[Any]]) -> None:
        """Add rows to a source of the figure, from any thread."""
        with self.lock:
            source.stream(dict(rows))

    def replace(self, source: ColumnDataSource, data: Mapping[str, Sequence[Any]]) -> None:
        """Put other rows into a source of the figure, from any thread."""
        with self.lock:
            source.data = dict(data)

    def on_select(
        self, source: ColumnDataSource, callback: Callable[[list[int]], None]
    ) -> Callable[[], None]:
        """Call back with the selected rows of a source whenever the user changes them.

        Returns:
            A function that ends it.
        """

        def chosen(attr: str, old: Any, new: Any) -> None:
            if self._origin:  # set by a view, not by Python
                callback(list(new))

        selection = source.selected
        selection.on_change("indices", chosen)
        done: list[bool] = []

        def undo() -> None:
            if not done:
                done.append(True)
                selection.remove_on_change("indices", chosen)

        self._undo.append(undo)
        return undo

    def snapshot_html(self) -> str:
        """The last picture that a browser drew; without one the data as a table."""
        if self.picture:
            return _render.image(self.picture, label=self.label)
        with self.lock:
            tables = [_table(source) for source in self._sources()]
        return _render.note(self.label) + "".join(tables)

    def close(self) -> None:
        """Let the figure go and close the widget."""
        with self.lock:
            if self._document.roots:
                for undo in self._undo:
                    undo()
                self._document.remove_on_change(self)
                self._document.clear()
        self.layout.close()
        super().close()

    def _sources(self) -> list[ColumnDataSource]:
        found = [
            each.data_source
            for each in self.figure.references()
            if isinstance(each, GlyphRenderer) and isinstance(each.data_source, ColumnDataSource)
        ]
        return sorted({source.id: source for source in found}.values(), key=lambda s: s.id)

    def _document_patched(self, event: Any) -> None:
        """A change of the document, in any thread: bokeh calls this."""
        with self.lock:
            if event.setter is self and not isinstance(getattr(event, "model", None), Selection):
                return  # the view that changed it knows; only selections are mirrored
            references = self._document.models.synced_references
            serializer = Serializer(references=references, deferred=False)
            content = {"events": serializer.encode([event])}
            self._document.models.flush_synced(lambda model: not serializer.has_ref(model))
            self._number += 1
            origin = self._origin if event.setter is self else ""
            self.send({"kind": "patch", "seq": self._number, "from": origin, "content": content})

    def _receive(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        kind, view = content.get("kind"), str(content.get("view", ""))
        if kind == "library":
            self.send({"kind": "library", "to": view}, [_library()])
        elif kind == "hello":
            self._greet(view, bool(content.get("dark")))
        elif kind == "patch":
            self._apply(view, content["content"])
        elif kind == "picture":
            self._keep(str(content.get("data", "")))

    def _greet(self, view: str, dark: bool) -> None:
        with self.lock:
            self._document.theme = bokeh_theme(dark)
            found = self._document.to_json(deferred=False)
            self._document.models.flush_synced()
            self.send({"kind": "doc", "to": view, "seq": self._number, "content": found})

    def _apply(self, view: str, patch: Any) -> None:
        with self.lock:
            self._origin = view
            try:
                self._document.apply_json_patch(Serialized(content=patch), setter=self)  # pyright: ignore
            finally:
                self._origin = ""

    def _keep(self, data: str) -> None:
        if len(data) <= _MOST and data.startswith("data:image/png;base64,"):
            self.picture = data


def _table(source: ColumnDataSource) -> str:
    data = {str(name): list(column) for name, column in source.data.items()}
    rows = list(zip(*data.values(), strict=False))
    more = f"the first {_ROWS} of {len(rows)} rows" if len(rows) > _ROWS else ""
    return _render.table(list(data), rows[:_ROWS], caption=more)
