"""`CosineMap`: cosines between all pairs of directions, as a live figure."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    HoverTool,
    LinearColorMapper,
    Range1d,
    SingleIntervalTicker,
)
from bokeh.plotting import figure

from modeldiff.directions import Direction
from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import BASE, FINETUNED

_STEPS = 32
_PALETTE = tuple(
    f"{BASE if i < 0 else FINETUNED}{round(255 * 0.9 * abs(i) / _STEPS):02x}"
    for i in range(-_STEPS, _STEPS + 1)
)
"""Blue below 0, orange above, the page's own background at 0."""
_FIELDS = ("x", "y", "cosine", "a", "b")


class CosineMap:
    """A square cell a pair, numbered as in the library's table.

    Args:
        on_pair: Called with the names of A and B when a cell is clicked.

    Example:
        >>> import torch
        >>> cosines = CosineMap(lambda a, b: None)
        >>> e = torch.eye(2)
        >>> cosines.show({n: Direction.of(v, "resid_post.0", n) for n, v in zip("ab", e)})
        >>> cosines.table()
        [[1.0, 0.0], [0.0, 1.0]]
        >>> cosines.pane.close()
    """

    def __init__(self, on_pair: Callable[[str, str], None]) -> None:
        self.names: tuple[str, ...] = ()
        self.source = ColumnDataSource({name: [] for name in _FIELDS})
        self.pane = BokehPane(self._figure(), label="Cosines between directions")
        self.pane.on_select(self.source, lambda rows: self._tapped(rows, on_pair))

    def show(self, directions: Mapping[str, Direction]) -> None:
        """Show other directions; where widths differ there is no cosine."""
        self.names = tuple(directions)
        rows = [
            (j + 1, i + 1, _cosine(a, b), i + 1, j + 1)
            for i, a in enumerate(directions.values())
            for j, b in enumerate(directions.values())
        ]
        columns: list[Any] = list(zip(*rows, strict=True)) or [()] * len(_FIELDS)
        data = {name: list(column) for name, column in zip(_FIELDS, columns, strict=True)}
        end = max(len(self.names), 1) + 0.5
        with self.pane.editing():
            self.source.selected.indices = []
            self.x_range.end = self.y_range.start = end
            for ticker in self.tickers:
                ticker.interval = max(1, len(self.names) // 12)
        self.pane.replace(self.source, data)

    def table(self) -> list[list[float]]:
        """Rows of cosines."""
        n, flat = len(self.names), list(self.source.data["cosine"])
        return [flat[n * i : n * (i + 1)] for i in range(n)]

    def snapshot_html(self) -> str:
        """The cosines as a table, numbered as the library."""
        numbers = [str(i + 1) for i in range(len(self.names))]
        rows = [[number, *row] for number, row in zip(numbers, self.table(), strict=True)]
        return _render.table(["#", *numbers], rows, caption="Cosines") if rows else ""

    def _tapped(self, rows: list[int], on_pair: Callable[[str, str], None]) -> None:
        if rows and rows[0] < len(self.names) ** 2:
            a, b = divmod(rows[0], len(self.names))
            on_pair(self.names[a], self.names[b])

    def _figure(self) -> Any:
        self.x_range, self.y_range = Range1d(start=0.5, end=1.5), Range1d(start=1.5, end=0.5)
        fig = figure(
            height=300, sizing_mode="stretch_width", x_range=self.x_range, y_range=self.y_range,
            tools="tap", toolbar_location=None,
        )  # fmt: skip
        mapper = LinearColorMapper(
            palette=_PALETTE, low=-1, high=1, nan_color="rgba(128,128,128,0.28)"
        )  # fmt: skip
        cells = fig.rect(
            "x", "y", 0.96, 0.96, source=self.source, line_color="#77777766",
            fill_color={"field": "cosine", "transform": mapper}, nonselection_fill_alpha=1.0,
        )  # fmt: skip
        tips = [("A", "@a"), ("B", "@b"), ("cosine", "@cosine{0.000}")]
        fig.add_tools(HoverTool(renderers=[cells], tooltips=tips))
        bar = ColorBar(color_mapper=mapper, width=10, ticker=BasicTicker(desired_num_ticks=5))
        fig.add_layout(bar, "right")
        fig.grid.grid_line_color = None
        self.tickers = [SingleIntervalTicker(interval=1, num_minor_ticks=0) for _ in "xy"]
        fig.xaxis.ticker, fig.yaxis.ticker = self.tickers
        fig.xaxis.axis_label, fig.yaxis.axis_label = "direction B (#)", "direction A (#)"
        return fig


def _cosine(a: Direction, b: Direction) -> float:
    return a.cosine(b) if a.d_model == b.d_model else math.nan
