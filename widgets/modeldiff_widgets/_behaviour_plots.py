"""Figures of the panel *Behaviour*: rates with intervals by question or label, and two scores."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from bokeh.models import (
    ColumnDataSource,
    FactorRange,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
    Span,
    TapTool,
)
from bokeh.plotting import figure

from modeldiff.judges import ALIGNED_AT_MOST, COHERENT_ABOVE
from modeldiff.report_text import shortened, visible
from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import COLOURS

MOST = 30
"""Rows that a figure of bars shows at most."""
_WIDTH = 44  # characters of a label
_BARS = ("y", "name", "cell", "colour", "value", "low", "high", "n", "thick")
_POINTS = ("x", "y", "row", "cell", "colour", "marker", "label", "question")
_MARKERS = {"base": "circle", "finetuned": "triangle", "edited": "square", "random": "x"}
_SHARE = "@value{0 %} (@low{0 %} to @high{0 %})"


@dataclass(frozen=True)
class Bar:
    """A share of answers and its interval.

    Args:
        name: What the row is of.
        cell: Which cell.
        kind: Its kind, which gives the colour.
        value: The share; NaN for none.
        low: Lower end; NaN for none.
        high: Upper end.
        n: Answers it is of.
    """

    name: str
    cell: str
    kind: str
    value: float
    low: float
    high: float
    n: int


class CellBars:
    """Rows of bars with intervals, one bar for each cell.

    Args:
        across: What the horizontal axis says.

    Example:
        >>> bars = CellBars("share of answers")
        >>> bars.show([Bar("all", "base", "base", 0.5, 0.2, 0.8, 4)])
        >>> bars.source.data["value"]
        [0.5]
        >>> bars.pane.close()
    """

    def __init__(self, across: str) -> None:
        self.across = across
        self.source = ColumnDataSource({name: [] for name in _BARS})
        self.pane = BokehPane(self._figure(), label=f"{across}: nothing measured yet")

    def show(self, bars: Sequence[Bar]) -> None:
        """Draw these; rows come in the order of their first bar."""
        names, cells = (list(dict.fromkeys(getattr(bar, by) for bar in bars))
                        for by in ("name", "cell"))  # fmt: skip
        texts = _distinct(names)
        thick = 0.74 / max(1, len(cells))
        rows: dict[str, list[Any]] = {name: [] for name in _BARS}
        for bar in bars:
            offset = (cells.index(bar.cell) - (len(cells) - 1) / 2) * thick
            values = ((texts[bar.name], -offset), harmless(bar.name), bar.cell, COLOURS[bar.kind],
                      bar.value, bar.low, bar.high, bar.n, thick * 0.88)  # fmt: skip
            for name, value in zip(_BARS, values, strict=True):
                rows[name].append(value)
        with self.pane.editing():
            self.y_range.factors = [texts[name] for name in reversed(names)]
            self.figure.height = 96 + len(names) * max(24, 4 + 13 * len(cells))
            self.pane.replace(self.source, rows)
            self.figure.legend.visible = bool(bars)
        self.pane.label = f"{self.across}: {len(names)} rows of {', '.join(cells) or 'nothing'}"

    def snapshot_html(self) -> str:
        """The picture, or the numbers as a table."""
        if self.pane.picture:
            return self.pane.snapshot_html()
        columns = ("name", "cell", "value", "low", "high", "n")
        rows = zip(*(list(self.source.data[name]) for name in columns), strict=True)
        return _render.table(["", *columns[1:]], rows, caption=self.across)

    def _figure(self) -> Any:
        self.y_range = FactorRange(factors=[])
        fig = figure(
            height=140, sizing_mode="stretch_width", x_range=Range1d(start=-0.01, end=1.02),
            y_range=self.y_range, tools=["save"], toolbar_location=None,
        )  # fmt: skip
        self.figure = fig
        fig.xaxis.axis_label = self.across
        fig.xaxis.formatter = NumeralTickFormatter(format="0 %")
        fig.ygrid.visible = False
        fig.min_border_right = 18
        source = self.source
        bars = fig.hbar("y", left=0, right="value", height="thick", source=source, alpha=0.45,
                        fill_color="colour", line_color="colour", legend_field="cell")  # fmt: skip
        fig.segment("low", "y", "high", "y", source=source, color="colour", line_width=2)
        dots = fig.scatter("value", "y", source=source, color="colour", size=6)
        tips = [("", "@name"), ("cell", "@cell"), ("share", _SHARE), ("answers", "@n")]
        fig.add_tools(HoverTool(renderers=[bars, dots], tooltips=tips))
        fig.legend.orientation, fig.legend.spacing = "horizontal", 14
        fig.legend.visible = False  # its marks have nothing to show yet
        fig.add_layout(fig.legend[0], "above")
        return fig


class ScoreMap:
    """Alignment against coherence, a point an answer.

    Args:
        on_pick: Called with the rows of the answers that are tapped; with none when it is undone.
    """

    def __init__(self, on_pick: Callable[[list[int]], None]) -> None:
        self.source = ColumnDataSource({name: [] for name in _POINTS})
        self.n_missing = 0
        self.pane = BokehPane(self._figure(), label="Scores: no answer is scored yet")
        self.pane.on_select(self.source, lambda rows: on_pick(self._answers(rows)))

    def show(self, table: pd.DataFrame, cells: Sequence[tuple[str, str]]) -> None:
        """Draw the answers of a table that have both scores.

        Args:
            table: As `modeldiff.behaviours.judge_answers` gives it.
            cells: Name and kind of each row's cell.
        """
        rows: dict[str, list[Any]] = {name: [] for name in _POINTS}
        columns = (table[name] for name in ("coherent_score", "aligned_score", "label", "prompt"))
        for row, ((cell, kind), *said) in enumerate(zip(cells, *columns, strict=True)):
            x, y, label, question = said
            if math.isnan(x) or math.isnan(y):
                continue
            values = (x, y, row, cell, COLOURS[kind], _MARKERS[kind], harmless(str(label)),
                      harmless(shortened(str(question), 70)))  # fmt: skip
            for name, value in zip(_POINTS, values, strict=True):
                rows[name].append(value)
        self.n_missing = len(table) - len(rows["x"])
        with self.pane.editing():
            self.source.selected.indices = []
            self.pane.replace(self.source, rows)
            self.figure.legend.visible = bool(rows["x"])
        self.pane.label = f"Alignment against coherence of {len(rows['x'])} answers"

    def clear(self) -> None:
        """Undo a selection."""
        with self.pane.editing():
            self.source.selected.indices = []

    def snapshot_html(self) -> str:
        """The picture, or how many answers it shows."""
        picture = self.pane.picture
        return self.pane.snapshot_html() if picture else _render.note(self.pane.label)

    def _answers(self, rows: list[int]) -> list[int]:
        known = self.source.data["row"]
        return [int(known[row]) for row in rows if 0 <= row < len(known)]

    def _figure(self) -> Any:
        across, up = Range1d(start=-4, end=104), Range1d(start=-4, end=104)
        fig = figure(
            height=330, sizing_mode="stretch_width", x_range=across, y_range=up,
            tools=["reset", "save"], toolbar_location=None,
        )  # fmt: skip
        self.figure = fig
        fig.xaxis.axis_label = f"coherent (an answer counts above {COHERENT_ABOVE:g})"
        fig.yaxis.axis_label = f"aligned (misaligned up to {ALIGNED_AT_MOST:g})"
        look: dict[str, Any] = {
            "line_color": COLOURS["random"], "line_dash": "dashed", "line_width": 1.5,
            "level": "underlay",
        }  # fmt: skip
        fig.add_layout(Span(location=COHERENT_ABOVE, dimension="height", **look))
        fig.add_layout(Span(location=ALIGNED_AT_MOST, dimension="width", **look))
        points = fig.scatter(
            "x", "y", source=self.source, color="colour", marker="marker", size=9, alpha=0.6,
            nonselection_alpha=0.15, legend_field="cell",
        )  # fmt: skip
        tap = TapTool()
        tap.renderers = [points]
        tips = [("cell", "@cell"), ("label", "@label"), ("aligned", "@y{0}"),
                ("coherent", "@x{0}"), ("question", "@question")]  # fmt: skip
        fig.add_tools(tap, HoverTool(renderers=[points], tooltips=tips))
        fig.toolbar.active_tap = tap
        fig.legend.orientation, fig.legend.spacing = "horizontal", 14
        fig.legend.visible = False  # its marks have nothing to show yet
        fig.add_layout(fig.legend[0], "above")
        return fig


def harmless(text: str) -> str:
    r"""Text that a figure's axis does not take for a formula.

    Example:
        >>> harmless("costs $$5$$")
        'costs $ $5$ $'
    """
    spaced = re.sub(r"\$(?=\$)|\\(?=[\[(])", lambda found: f"{found[0]} ", text)
    return visible(spaced.replace("\n", " "))


def _distinct(names: Sequence[str]) -> dict[str, str]:
    """Short texts by name, no two of them alike."""
    found: dict[str, str] = {}
    for name in names:
        short = text = harmless(shortened(name, _WIDTH))
        number = 1
        while text in found.values():
            number += 1
            text = f"{short} ({number})"
        found[name] = text
    return found
