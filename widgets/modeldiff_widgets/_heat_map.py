"""`HeatMap`: layers against tokens (or coefficients) as a live bokeh figure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LinearColorMapper,
    PlainText,
    Range1d,
    TapTool,
)
from bokeh.plotting import figure
from torch import Tensor

from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import BASE, FINETUNED

STEPS = 128
_MOST_LABELS = 64


@dataclass(frozen=True, eq=False)
class Scale:
    """What a value's colour means.

    Args:
        title: Quantity and unit, above the colour bar.
        null: The value that stands for no difference; it has no colour.
        name: Short, for the card under the pointer.
    """

    title: str
    null: float = 0.0
    name: str = "value"


class HeatMap:
    """A grid of coloured cells; NaN cells, not measured yet, are grey.

    Args:
        label: What it shows, for those who cannot see it.
        on_cell: Called with row and column when a cell is clicked.
    """

    def __init__(self, label: str, on_cell: Callable[[int, int], None]) -> None:
        self.rows: tuple[int, ...] = ()
        self.columns: tuple[str, ...] = ()
        self.source = ColumnDataSource(_data((), (), None))
        self.mark = ColumnDataSource({"x": [], "y": []})
        self.mapper = LinearColorMapper(
            palette=_palette(True), low=-1, high=1, nan_color="rgba(128,128,128,0.28)"
        )
        self.bar = ColorBar(
            color_mapper=self.mapper, orientation="horizontal", height=9, title=" ", padding=4,
            title_standoff=6, label_standoff=5, margin=6,
        )  # fmt: skip
        self.pane = BokehPane(self._figure(), label=label)
        self.pane.on_select(self.source, lambda rows: self._chosen(rows, on_cell))

    @property
    def widget(self) -> W.DOMWidget:
        """What is put into a layout."""
        return self.pane

    def empty(self, rows: Sequence[int], columns: Sequence[str], *, across: str,
              names: Sequence[str] = ()) -> None:  # fmt: skip
        """Begin a map whose values are not known yet.

        Args:
            rows: Layers, from the lowest.
            columns: What each column is called.
            across: Label of the horizontal axis.
            names: What the card under the pointer says of each column; default the same.
        """
        self.rows, self.columns = tuple(rows), tuple(columns)
        with self.pane.editing():
            self.source.selected.indices = []
            self.mark.data = {"x": [], "y": []}
            self.source.data = _data(self.rows, tuple(names) or self.columns, None)
            self._axes(across)

    def fill(self, values: Tensor, scale: Scale) -> None:
        """Show values ``[row, column]``."""
        flat = [float(each) for each in values.flatten()]
        known = [each - scale.null for each in flat if math.isfinite(each)]
        most = max((abs(each) for each in known), default=0.0) or 1.0
        signed, falling = any(x < 0 for x in known), any(x > 0 for x in known)
        with self.pane.editing():
            self.source.patch({"value": [(slice(0, len(flat)), flat)]})
            low, high = -most if signed else 0.0, most if falling or not signed else 0.0
            if signed and falling:
                low, high = -most, most
            self.mapper.update(
                palette=_palette(signed, falling or not signed), low=scale.null + low,
                high=scale.null + high,
            )  # fmt: skip
            self.bar.title = scale.title

    def select(self, row: int, column: int) -> None:
        """Frame a cell; none if there is no such cell."""
        inside = 0 <= row < len(self.rows) and 0 <= column < len(self.columns)
        with self.pane.editing():
            self.mark.data = {"x": [column], "y": [row]} if inside else {"x": [], "y": []}

    def snapshot_html(self, values: Tensor, caption: str) -> str:
        """The last picture, or the values as a table where there is none."""
        if self.pane.picture:
            return _render.note(caption) + self.pane.snapshot_html()
        rows = [[f"layer {layer}", *values[i].tolist()] for i, layer in enumerate(self.rows)]
        return _render.table(["", *self.columns], rows, caption=caption)

    def _chosen(self, rows: list[int], on_cell: Callable[[int, int], None]) -> None:
        if rows and self.columns:
            on_cell(*divmod(rows[-1], len(self.columns)))

    def _figure(self) -> figure:
        plot = figure(
            height=300, sizing_mode="stretch_width", toolbar_location="right",
            tools="box_zoom,reset", x_range=Range1d(start=-0.5, end=0.5),
            y_range=Range1d(start=-0.5, end=0.5),
        )  # fmt: skip
        plot.toolbar.logo = None
        plot.grid.visible = False
        cells = plot.rect(
            "x", "y", width=0.96, height=0.92, source=self.source, line_color=None,
            fill_color={"field": "value", "transform": self.mapper},
        )  # fmt: skip
        cells.nonselection_glyph = cells.selection_glyph = None
        plot.rect("x", "y", width=0.96, height=0.92, source=self.mark, fill_alpha=0,
                  line_color="#7a7f87", line_width=2.5)  # fmt: skip
        card = [("layer", "@layer"), ("at", "@name"), ("value", "@value{0.0000}")]
        plot.add_tools(HoverTool(tooltips=card, renderers=[cells]), TapTool(renderers=[cells]))
        plot.add_layout(self.bar, "above")
        plot.yaxis.axis_label = "after layer"
        return plot

    def _axes(self, across: str) -> None:
        plot = self.pane.figure
        n, m = len(self.rows), len(self.columns)
        every = max(1, math.ceil(m / _MOST_LABELS))
        for each in (plot.x_range, plot.y_range):  # pyright: ignore
            each.bounds = None  # the browser clips new ends to old bounds
        plot.x_range.update(start=-0.5, end=m - 0.5, bounds=(-0.5, m - 0.5))  # pyright: ignore
        plot.y_range.update(start=-0.5, end=n - 0.5, bounds=(-0.5, n - 0.5))  # pyright: ignore
        plot.height = min(760, 170 + max(16, min(34, 640 // max(n, 1))) * n)  # pyright: ignore
        plot.xaxis.ticker = FixedTicker(ticks=list(range(0, m, every)))  # pyright: ignore
        plot.yaxis.ticker = FixedTicker(ticks=list(range(0, n, max(1, n // 32))))  # pyright: ignore
        plot.xaxis.major_label_overrides = _labels(self.columns)  # pyright: ignore
        plot.yaxis.major_label_overrides = _labels([str(row) for row in self.rows])  # pyright: ignore
        plot.xaxis.major_label_orientation = (  # pyright: ignore
            0.9 if sum(map(len, self.columns)) > 60 else "horizontal"
        )
        plot.xaxis.axis_label = across  # pyright: ignore


def _labels(texts: Sequence[str]) -> dict[float, PlainText]:
    """Labels that are never read as mathematics, whatever a token says."""
    return {i: PlainText(text=text) for i, text in enumerate(texts)}


def _data(rows: tuple[int, ...], names: tuple[str, ...], values: None) -> dict[str, Any]:
    cells = [(i, j) for i in range(len(rows)) for j in range(len(names))]
    return {
        "x": [j for _, j in cells],
        "y": [i for i, _ in cells],
        "layer": [rows[i] for i, _ in cells],
        "name": [names[j] for _, j in cells],
        "value": [math.nan] * len(cells),
    }


def _palette(negative: bool, positive: bool = True) -> list[str]:
    """Colours from transparent at the null to full: the page's background shows through."""
    down = [f"{BASE}{_alpha(i)}" for i in range(STEPS, 0, -1)] if negative else []
    up = [f"{FINETUNED}{_alpha(i)}" for i in range(STEPS)] if positive else []
    return [*down, *up]


def _alpha(step: int) -> str:
    return f"{round(245 * (step / STEPS) ** 0.7):02x}"
