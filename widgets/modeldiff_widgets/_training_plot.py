"""`TrainingPlot`: loss, explained variance, latents a row and dead latents, step by step."""

from collections.abc import Sequence
from typing import Any

from bokeh.layouts import column
from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
    Span,
)
from bokeh.plotting import figure

from modeldiff.dictionaries.training import TrainLog
from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import BASE, EDITED, FINETUNED, RANDOM, side_by_side

_FIELDS = ("step", "loss", "mse", "fve_base", "fve_finetuned", "l0", "dead", "seconds")
_TICKS = [float(f"{digit}e{power}") for power in range(-7, 5) for digit in (1, 2, 5)]
_TIPS = {
    "loss": [("step", "@step"), ("loss", "@loss{0.00000}"), ("squared error", "@mse{0.00000}")],
    "fve": [("step", "@step"), ("base", "@fve_base{0.0000}"),
            ("fine-tuned", "@fve_finetuned{0.0000}")],
    "l0": [("step", "@step"), ("latents a row", "@l0{0.0}")],
    "dead": [("step", "@step"), ("dead", "@dead{0.0 %}")],
}  # fmt: skip


class TrainingPlot:
    """Four curves over the steps of a training.

    Example:
        >>> plot = TrainingPlot()
        >>> plot.begin(steps=10, k=4, inputs="pair")
        >>> plot.add(TrainLog(1, 0.9, 0.9, (0.1, 0.2), 4.0, 0.0, 1e-3, 0.1))
        >>> plot.source.data["fve_finetuned"]
        [0.2]
        >>> plot.pane.close()
    """

    def __init__(self) -> None:
        self.source = ColumnDataSource({name: [] for name in _FIELDS})
        self.x_range = Range1d(start=0, end=1)
        self._inputs = "pair"
        self.figures = {name: self._empty(name, up) for name, up in (
            ("loss", "loss"), ("fve", "variance explained, from 0"), ("l0", "latents a row (L0)"),
            ("dead", "dead latents"))}  # fmt: skip
        self._draw()
        a, b, c, d = self.figures.values()
        rows = [side_by_side(pair) for pair in ([a, b], [c, d])]
        layout = column(*rows, sizing_mode="stretch_width", spacing=12)
        self.pane = BokehPane(layout, label="Training: not begun")

    def begin(self, steps: int, k: float | None, inputs: str) -> None:
        """Show empty curves.

        Args:
            steps: Of the whole training.
            k: Latents a row that are wanted; None if there is no such number.
            inputs: What the dictionary sees, see `DictionaryConfig`.
        """
        self._inputs = inputs
        with self.pane.editing():
            self.x_range.end = max(steps, 1)
            self._goal.visible, self._goal.location = k is not None, k or 0
        self.pane.replace(self.source, {name: [] for name in _FIELDS})
        self.pane.label = f"Training: 0 of {steps} steps"

    def add(self, log: TrainLog) -> None:
        """Add one line of the log; from any thread."""
        base, finetuned = _by_side(log.fve, self._inputs)
        values = (log.step, log.loss, log.mse, base, finetuned, log.l0, log.dead, log.seconds)
        self.pane.stream(self.source, {name: [v] for name, v in zip(_FIELDS, values, strict=True)})
        self.pane.label = f"Training: step {log.step}, loss {log.loss:.4g}"

    def snapshot_html(self) -> str:
        """The picture, and the last line as numbers."""
        data = self.source.data
        if not len(data["step"]):
            return _render.note(self.pane.label)
        last = {name: list(data[name])[-1] for name in _FIELDS}
        picture = self.pane.snapshot_html() if self.pane.picture else ""
        return picture + _render.facts(last)

    def _empty(self, name: str, up: str) -> Any:
        fig = figure(
            height=210, sizing_mode="stretch_width", x_range=self.x_range, tools=["save"],
            toolbar_location=None, y_axis_type="log" if name == "loss" else "linear",
        )  # fmt: skip
        fig.min_border_left, fig.min_border_right = 74, 26
        fig.xaxis.axis_label, fig.yaxis.axis_label = "step", up
        return fig

    def _draw(self) -> None:
        fve, dead, l0 = self.figures["fve"], self.figures["dead"], self.figures["l0"]
        self._line("loss", "loss", EDITED)
        self.figures["loss"].yaxis.ticker = FixedTicker(ticks=_TICKS)
        self.figures["loss"].yaxis.formatter = BasicTickFormatter(use_scientific=False)
        self._line("fve", "fve_base", BASE, "base", width=5, alpha=0.5)
        self._line("fve", "fve_finetuned", FINETUNED, "fine-tuned or difference")
        self._line("l0", "l0", EDITED)
        self._line("dead", "dead", RANDOM)
        fve.y_range = Range1d(start=-0.03, end=1.03)
        fve.legend.location, fve.legend.click_policy = "bottom_right", "hide"
        dead.y_range.start = 0
        for fig in (fve, dead):
            fig.yaxis.formatter = NumeralTickFormatter(format="0 %")
        l0.y_range.start = 0
        self._goal = Span(location=0, dimension="width", line_color=RANDOM, line_dash="dashed",
                          line_width=1.5, visible=False)  # fmt: skip
        l0.add_layout(self._goal)
        for name, fig in self.figures.items():
            fig.add_tools(HoverTool(tooltips=_TIPS[name], mode="vline"))

    def _line(
        self, name: str, field: str, colour: str, legend: str = "", *, width: float = 2.0,
        alpha: float = 1.0,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {"legend_label": legend} if legend else {}
        self.figures[name].line(
            "step", field, source=self.source, color=colour, line_width=width, line_alpha=alpha,
            **options,
        )  # fmt: skip


def _by_side(fve: Sequence[float], inputs: str) -> tuple[float, float]:
    """Base and fine-tuned; NaN for one that the dictionary does not see."""
    if len(fve) > 1:
        return fve[0], fve[1]
    return (fve[0], float("nan")) if inputs == "base" else (float("nan"), fve[0])
