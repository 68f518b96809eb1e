"""`RowTable`: rows to choose from, by click or arrow key, and to tick; columns sort them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
import traitlets

from modeldiff_widgets import _render
from modeldiff_widgets._theme import source


class RowTable(anywidget.AnyWidget):
    """A table in which one row is chosen; who listens decides what that means.

    A cell is a text, or a pair of a text and a colour as "#rrggbb", which is shown as a dot.

    Example:
        >>> table = RowTable(headings=["latent"])
        >>> table.show([7, 9], [["7"], ["9"]], selected=9)
        >>> table.ids, table.selected
        ([7, 9], 9)
        >>> table.close()
    """

    _esm = source("row_table.js")
    _css = source("theme.css") + source("row_table.css")

    headings = traitlets.List(traitlets.Unicode()).tag(sync=True)
    numeric = traitlets.List(traitlets.Int(), help="Columns set right.").tag(sync=True)
    ids = traitlets.List(traitlets.Int()).tag(sync=True)
    rows = traitlets.List().tag(sync=True)
    selected = traitlets.Int(-1, help="Id of the chosen row; -1 for none.").tag(sync=True)
    tickable = traitlets.Bool(False, help="Whether rows have a tick box.").tag(sync=True)
    ticked = traitlets.List(traitlets.Int(), help="Ids of the ticked rows.").tag(sync=True)
    sorted = traitlets.List(default_value=[-1, False], help="Column, falling.").tag(sync=True)
    note = traitlets.Unicode(help="Below the table.").tag(sync=True)
    label = traitlets.Unicode("table", help="What it shows.").tag(sync=True)

    def __init__(self, **options: Any) -> None:
        self._choosers: list[Callable[[int], None]] = []
        self._sorters: list[Callable[[int], None]] = []
        self._tickers: list[Callable[[int, bool], None]] = []
        super().__init__(**options)
        self.on_msg(self._receive)

    def show(
        self, ids: Sequence[int], rows: Sequence[Sequence[Any]], *, selected: int = -1,
        note: str = "",
    ) -> None:  # fmt: skip
        """Show other rows; from any thread."""
        with self.hold_sync():
            self.ids, self.rows = list(ids), [list(row) for row in rows]  # pyright: ignore
            self.selected, self.note = selected, note

    def on_choose(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Call back with the id of a row that is chosen; the result ends it."""
        return _kept(self._choosers, callback)

    def on_sort(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Call back with a column whose heading is clicked; the result ends it."""
        return _kept(self._sorters, callback)

    def on_tick(self, callback: Callable[[int, bool], None]) -> Callable[[], None]:
        """Call back with a row whose box is clicked, and whether it is ticked now."""
        return _kept(self._tickers, callback)

    def snapshot_html(self) -> str:
        """The rows as static HTML."""
        plain = [[cell[0] if isinstance(cell, list) else cell for cell in row] for row in self.rows]
        at = self.ids.index(self.selected) if self.selected in self.ids else -1
        headings, numeric = list(self.headings), list(self.numeric)
        if self.tickable:
            plain = [["✓" if each in self.ticked else "", *row]
                     for each, row in zip(self.ids, plain, strict=True)]  # fmt: skip
            headings, numeric = ["ticked", *headings], [each + 1 for each in numeric]
        return _render.table(headings, plain, numeric=numeric or (-1,), selected=at) + _render.note(
            self.note
        )

    def close(self) -> None:
        """Close the widget."""
        self._choosers.clear()
        self._sorters.clear()
        self._tickers.clear()
        self.layout.close()
        super().close()

    def _receive(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        kind, chosen, column = content.get("kind"), content.get("id"), content.get("column")
        if kind == "choose" and isinstance(chosen, int) and chosen in self.ids:
            for callback in tuple(self._choosers):
                callback(chosen)
        if kind == "tick" and isinstance(chosen, int) and chosen in self.ids:
            for tick in tuple(self._tickers):
                tick(chosen, bool(content.get("on")))
        if kind == "sort" and isinstance(column, int) and 0 <= column < len(self.headings):
            for callback in tuple(self._sorters):
                callback(column)


def _kept(several: list[Any], one: Callable[..., None]) -> Callable[[], None]:
    several.append(one)
    return lambda: several.remove(one) if one in several else None
