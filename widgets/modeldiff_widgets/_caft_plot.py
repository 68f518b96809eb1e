"""`RunPlot`: loss of every training, step by step, and how often each arm shows the behaviour."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bokeh.models import ColumnDataSource, FactorRange, HoverTool, NumeralTickFormatter, Range1d
from bokeh.plotting import figure

from modeldiff.caft_results import BASE, CaftResult, Cell
from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import COLOURS, side_by_side

TONES = {
    BASE: COLOURS["base"], "plain": COLOURS["finetuned"], "caft": COLOURS["edited"],
    "unchosen": "#CC79A7", "random choice": "#E69F00", "matched random": "#777777",
    "all": "#56B4E9", "post-hoc": "#8C564B", "gradient only": "#7F5FBF",
    "forward only": "#17BECF", "steering": "#B8860B", "narrow KL": "#4B6F44",
}  # fmt: skip
"""Colour of each arm."""
_STEP = re.compile(
    r"(?P<arm>.+), seed (?P<seed>-?\d+): step (?P<step>\d+) of \d+, loss (?P<loss>[\d.]+)"
    r"(?:, held-out (?P<held>[\d.]+) after (?P<at>\d+))?"
)
_CURVES = ("xs", "ys", "arm", "seed", "colour")
_RATES = ("arm", "rate", "low", "high", "n", "colour")
_EVERY = 0.2  # seconds between two pictures


@dataclass
class Curve:
    """Losses of one training: of the rows of each step, and held out."""

    train: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)


class RunPlot:
    """Two figures that grow while arms are trained.

    Example:
        >>> plot = RunPlot()
        >>> plot.begin(("plain",), "misaligned")
        >>> plot.heard("plain, seed 0: step 3 of 12, loss 1.2500")
        >>> plot.curves["plain", 0].train
        {3: 1.25}
        >>> plot.pane.close()
    """

    def __init__(self) -> None:
        self.curves: dict[tuple[str, int], Curve] = {}
        self._drawn = 0.0
        self.train, self.held_out = (
            ColumnDataSource({name: [] for name in _CURVES}) for _ in range(2)
        )
        self.rates = ColumnDataSource({name: [] for name in _RATES})
        self.arms = FactorRange(factors=[])
        self.pane = BokehPane(
            side_by_side([self._losses(), self._bars()]), label="Arms: nothing was trained yet"
        )

    def begin(self, arms: Sequence[str], behaviour: str) -> None:
        """Show empty figures for these arms."""
        self.curves = {}
        with self.pane.editing():
            self.arms.factors = [*reversed(arms), BASE]
            self.right.xaxis.axis_label = behaviour
        for source in (self.train, self.held_out, self.rates):
            self.pane.replace(source, {name: [] for name in source.column_names})
        self.pane.label = "Arms: training begins"

    def heard(self, message: str) -> None:
        """Take a step out of a line of progress; others are ignored."""
        found = _STEP.fullmatch(message)
        if found is None:
            return
        curve = self.curves.setdefault((found["arm"], int(found["seed"])), Curve())
        curve.train[int(found["step"])] = float(found["loss"])
        if found["held"]:
            curve.held_out[int(found["at"])] = float(found["held"])
        if time.monotonic() - self._drawn > _EVERY:
            self.draw()
        self.pane.label = f"Arms: {message}"

    def finished(self, cell: Cell) -> None:
        """Take a finished arm's exact losses."""
        if cell.history:
            curve = self.curves[cell.arm, cell.seed] = Curve()
            for each in cell.history:
                for values, name in ((curve.train, "loss"), (curve.held_out, "held_out_loss")):
                    if each[name] is not None:
                        values[int(each["step"])] = float(each[name])
        self.draw()

    def show_rates(self, result: CaftResult) -> None:
        """Show how often the finished arms show the first behaviour."""
        rates = result.rates()
        mine = rates[(rates["behaviour"] == next(iter(result.behaviours))) & rates["deployed"]]
        data = {name: mine[name].tolist() for name in _RATES if name != "colour"}
        self.pane.replace(self.rates, {**data, "colour": [_tone(a) for a in data["arm"]]})
        self.pane.label = f"Arms: {', '.join(result.arms)} finished"

    def draw(self) -> None:
        """Draw the curves as they are now."""
        self._drawn = time.monotonic()
        for source, name in ((self.train, "train"), (self.held_out, "held_out")):
            data: dict[str, list[Any]] = {each: [] for each in _CURVES}
            for (arm, seed), curve in self.curves.items():
                values = getattr(curve, name)
                line = (list(values), list(values.values()), arm, seed, _tone(arm))
                for each, value in zip(_CURVES, line, strict=True):
                    data[each].append(value)
            self.pane.replace(source, data)

    def snapshot_html(self) -> str:
        """The picture, and the last losses as numbers."""
        if not self.curves:
            return _render.note(self.pane.label)
        rows = [
            (arm, seed, max(curve.train, default=0), *map(_last, (curve.train, curve.held_out)))
            for (arm, seed), curve in self.curves.items()
        ]
        picture = self.pane.snapshot_html() if self.pane.picture else ""
        headings = ("arm", "seed", "step", "training loss", "held-out loss")
        return picture + _render.table(headings, rows, numeric=(1, 2, 3, 4))

    def _losses(self) -> Any:
        fig: Any = figure(height=290, sizing_mode="stretch_width", tools=["save"],
                          toolbar_location=None)  # fmt: skip
        fig.xaxis.axis_label, fig.yaxis.axis_label = "step", "loss, nats a token"
        fig.multi_line("xs", "ys", source=self.train, line_color="colour", line_width=1.5,
                       line_alpha=0.7, line_dash="dotted")  # fmt: skip
        held = fig.multi_line("xs", "ys", source=self.held_out, line_color="colour",
                              line_width=2.5, legend_field="arm")  # fmt: skip
        fig.legend.label_text_font_size = "11px"
        fig.add_layout(fig.legend[0], "above")
        fig.legend.orientation, fig.legend.padding, fig.legend.spacing = "horizontal", 2, 14
        fig.add_tools(HoverTool(renderers=[held], tooltips=[
            ("arm", "@arm, seed @seed"), ("step", "$data_x{0}"),
            ("held-out loss", "$data_y{0.000}"),
        ]))  # fmt: skip
        fig.x_range.start = 0
        return fig

    def _bars(self) -> Any:
        fig: Any = figure(height=290, sizing_mode="stretch_width", tools=["save"],
                          toolbar_location=None, y_range=self.arms,
                          x_range=Range1d(start=-0.02, end=1.02))  # fmt: skip
        fig.xaxis.axis_label = "behaviour"
        fig.xaxis.formatter = NumeralTickFormatter(format="0 %")
        fig.ygrid.grid_line_color = None
        fig.segment("low", "arm", "high", "arm", source=self.rates, color="colour", line_width=2.5)
        dots = fig.scatter("rate", "arm", source=self.rates, color="colour", size=10)
        fig.add_tools(HoverTool(renderers=[dots], tooltips=[
            ("arm", "@arm"), ("rate", "@rate{0.0 %} (@low{0 %} to @high{0 %})"), ("answers", "@n"),
        ]))  # fmt: skip
        self.right = fig
        return fig


def _last(values: dict[int, float]) -> float | None:
    return values[max(values)] if values else None


def _tone(arm: str) -> str:
    return TONES.get(arm, COLOURS["random"])
