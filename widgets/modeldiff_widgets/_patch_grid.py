"""`PatchGrid`: components against tokens, as a live heat map with names for its rows."""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as W
from bokeh.models import HoverTool, PlainText
from torch import Tensor

from modeldiff.patch_runs import Component
from modeldiff.report_text import token_text, visible
from modeldiff.tokens import Text
from modeldiff_widgets import _render
from modeldiff_widgets._heat_map import HeatMap, Scale

_SHORT = {
    "resid_post": "residual", "attn_out": "attention", "mlp_out": "MLP", "mlp_act": "neurons",
    "head": "head",
}  # fmt: skip


class PatchGrid:
    """A cell for each component and token; a click on one calls back with row and column."""

    def __init__(self, on_cell: Callable[[int, int], None]) -> None:
        self.names: tuple[str, ...] = ()
        self.map = HeatMap("Patch map: components against tokens", on_cell)
        figure = self.map.pane.figure
        figure.yaxis.axis_label = ""  # pyright: ignore[reportAttributeAccessIssue]
        (hover,) = (each for each in figure.references() if isinstance(each, HoverTool))
        hover.tooltips = [("patched", "@layer"), ("at", "@name"), ("change", "@value{0.0000}")]

    @property
    def widget(self) -> W.DOMWidget:
        """What is put into a layout."""
        return self.map.widget

    def begin(self, components: Sequence[Component], text: Text) -> None:
        """Show grey cells for these."""
        self.names = tuple(map(name_of, components))
        pieces = [visible(token_text(piece)) for piece in text.pieces]
        several = [f"token {i} {piece}" for i, piece in enumerate(pieces)]
        labels = [each if len(each) <= 14 else each[:13] + "…" for each in pieces]
        map_, n = self.map, len(text.pieces)
        with map_.pane.editing() as figure:
            for each in (figure.x_range, figure.y_range):  # pyright: ignore
                each.bounds = None  # the browser clips new ends to old bounds
            map_.empty(range(len(components)), labels, across="token", names=several)
            rows = [name for name in self.names for _ in range(n)]
            data: Any = map_.source.data
            map_.source.data = {**data, "layer": rows}
            figure.yaxis.major_label_overrides = {  # pyright: ignore[reportAttributeAccessIssue]
                i: PlainText(text=name) for i, name in enumerate(self.names)
            }

    def fill(self, values: Tensor, title: str) -> None:
        """Show values ``[component, token]``."""
        with self.map.pane.editing():
            self.map.fill(values, Scale(title))
            self._clear_null()

    def _clear_null(self) -> None:
        """Leave exact zeros without colour: most cells below what is trained are."""
        mapper = self.map.mapper
        low, high, shades = float(mapper.low or 0), float(mapper.high or 0), list(mapper.palette)
        if low < 0:
            at = len(shades) // 2 if high > 0 else len(shades)
            mapper.palette = [*shades[:at], "#00000000", *shades[at:]]

    def select(self, row: int, column: int) -> None:
        """Frame a cell; none if there is no such cell."""
        self.map.select(row, column)

    def snapshot_html(self, values: Tensor, caption: str) -> str:
        """The last picture, or the values as a table where there is none."""
        if self.map.pane.picture:
            return _render.note(caption) + self.map.pane.snapshot_html()
        rows = [[name, *values[i].tolist()] for i, name in enumerate(self.names)]
        return _render.table(["", *self.map.columns], rows, caption=caption)


def name_of(component: Component) -> str:
    """A component in words.

    Example:
        >>> name_of(Component("head", 2, head=1))
        'head 2.1'
    """
    if component.part == "adapter":
        return f"adapter {component.layer} {component.module.rsplit('.', 1)[-1]}"
    end = f".{component.head}" if component.head >= 0 else ""
    return f"{_SHORT.get(component.part, component.part)} {component.layer}{end}"
