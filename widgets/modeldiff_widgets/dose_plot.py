"""`DosePlot`: rate of a behaviour and coherence against a coefficient, point by point."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d, Span
from bokeh.plotting import figure

from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import COLOURS

_COLUMNS = (
    "coefficient", "rate", "rate_low", "rate_high", "coherent", "coherent_low", "coherent_high",
    "random_rate", "random_low", "random_high", "random_coherent", "n", "n_unscored", "n_random",
)  # fmt: skip
_TIPS = [
    ("coefficient", "@coefficient{+0.00}"),
    ("behaviour", "@rate{0 %} (@rate_low{0 %} to @rate_high{0 %})"),
    ("coherent", "@coherent{0 %}"),
    ("random: behaviour", "@random_rate{0 %} (@random_low{0 %} to @random_high{0 %})"),
    ("random: coherent", "@random_coherent{0 %}"),
    ("answers", "@n scored, @n_unscored not"),
]


class DosePlot:
    """A live figure; rows may come from any thread and in any order.

    Example:
        >>> plot = DosePlot()
        >>> plot.add({"coefficient": 1.0, "rate": 0.5})
        >>> plot.frame["rate"].tolist()
        [0.5]
        >>> plot.pane.close()
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self.title = ""
        self.source = ColumnDataSource({name: [] for name in _COLUMNS})
        self.pane = BokehPane(self._figure(), label="Dose-response: nothing measured yet")

    @property
    def frame(self) -> pd.DataFrame:
        """What is shown, in ascending order."""
        return pd.DataFrame(self._sorted(), columns=list(_COLUMNS))

    def begin(self, coefficients: Sequence[float], label: str, unit: str) -> None:
        """Show an empty plot over these coefficients."""
        self._rows, self.title = [], label
        with self.pane.editing():
            low, high = min(coefficients), max(coefficients)
            margin = 0.04 * (high - low) or 0.5
            self.x_range.start, self.x_range.end = low - margin, high + margin
            self.figure.xaxis.axis_label = f"coefficient ({unit})"
        self.pane.replace(self.source, {name: [] for name in _COLUMNS})
        self.pane.label = f"Dose-response of {label}: no point yet"

    def add(self, row: Mapping[str, Any]) -> None:
        """Show one more point."""
        self._rows = [*self._rows, {name: row.get(name, math.nan) for name in _COLUMNS}]
        rows = self._sorted()
        with self.pane.editing():
            self.figure.legend.visible = True
        self.pane.replace(self.source, {name: [r[name] for r in rows] for name in _COLUMNS})
        self.pane.label = f"Dose-response of {self.title}: {len(rows)} points"

    def mark(self, coefficient: float | None) -> None:
        """Say where the slider stands."""
        with self.pane.editing():
            self._here.visible = coefficient is not None
            self._here.location = coefficient or 0.0

    def snapshot_html(self) -> str:
        """The picture, or the numbers as a table."""
        picture = [self.pane.snapshot_html()] if self.pane.picture else []
        return "".join([*picture, self.table_html()])

    def table_html(self) -> str:
        """All points as a table."""
        if not self._rows:
            return ""
        headings = [
            "coefficient", "behaviour", "95 % interval", "coherent", "random: mean",
            "random: range", "random: coherent", "answers",
        ]  # fmt: skip
        rows = [
            (f"{r['coefficient']:+g}", _percent(r["rate"]), _range(r, "rate"),
             _percent(r["coherent"]), _percent(r["random_rate"]), _range(r, "random"),
             _percent(r["random_coherent"]), str(r["n"]))
            for r in self._sorted()
        ]  # fmt: skip
        numeric = range(len(headings))
        return _render.table(headings, rows, caption=self.title, numeric=numeric)

    def _sorted(self) -> list[dict[str, Any]]:
        return sorted(self._rows, key=lambda row: row["coefficient"])

    def _figure(self) -> Any:
        self.x_range = Range1d(start=-4.2, end=4.2)
        fig = figure(
            height=330, sizing_mode="stretch_width", y_range=Range1d(start=-0.04, end=1.04),
            x_range=self.x_range,
            tools="xpan,xwheel_zoom,reset,save", active_drag=None, active_scroll=None,
            toolbar_location="above",
        )  # fmt: skip
        self.figure = fig
        fig.toolbar.logo = None
        fig.xaxis.axis_label = "coefficient"
        fig.yaxis.axis_label = "share of answers"
        fig.yaxis.formatter = NumeralTickFormatter(format="0 %")
        fig.add_layout(Span(location=0, dimension="height", line_color=COLOURS["random"],
                            line_width=1, level="underlay"))  # fmt: skip
        self._here = Span(location=0, dimension="height", line_color=COLOURS["edited"],
                          line_dash="dashed", line_width=1.5, visible=False,
                          level="underlay")  # fmt: skip
        fig.add_layout(self._here)
        self._draw(fig)
        fig.legend.orientation, fig.legend.spacing, fig.legend.ncols = "horizontal", 18, 2
        fig.legend.click_policy = "hide"
        fig.legend.visible = False  # its marks have nothing to show yet
        fig.add_layout(fig.legend[0], "below")
        return fig

    def _draw(self, fig: Any) -> None:
        source, grey, hot, calm = self.source, COLOURS["random"], COLOURS["finetuned"], "#0072B2"
        band = "random directions: behaviour, their range"
        fig.varea("coefficient", "random_low", "random_high", source=source, fill_color=grey,
                  fill_alpha=0.28, legend_label=band)  # fmt: skip
        fig.line("coefficient", "random_rate", source=source, color=grey, line_width=1.5,
                 legend_label=band)  # fmt: skip
        fig.line("coefficient", "random_coherent", source=source, color=grey, line_width=1.5,
                 line_dash="dotted", legend_label="random directions: coherent")  # fmt: skip
        fig.segment("coefficient", "coherent_low", "coefficient", "coherent_high", source=source,
                    color=calm, line_width=1.5, line_alpha=0.6)  # fmt: skip
        fig.line("coefficient", "coherent", source=source, color=calm, line_width=2,
                 line_dash="dashed", legend_label="coherent")  # fmt: skip
        fig.scatter("coefficient", "coherent", source=source, color=calm, size=7, marker="square",
                    legend_label="coherent")  # fmt: skip
        name = "behaviour, 95 % interval"
        fig.segment("coefficient", "rate_low", "coefficient", "rate_high", source=source,
                    color=hot, line_width=2.5)  # fmt: skip
        fig.line("coefficient", "rate", source=source, color=hot, line_width=2.5, legend_label=name)
        dots = fig.scatter("coefficient", "rate", source=source, color=hot, size=9,
                           legend_label=name)  # fmt: skip
        fig.add_tools(HoverTool(renderers=[dots], tooltips=_TIPS, mode="vline"))


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"


def _range(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "–" if math.isnan(low) else f"{100 * low:.0f} to {100 * high:.0f} %"
