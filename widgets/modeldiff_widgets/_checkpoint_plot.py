"""`CheckpointPlot`: how the vector of a training turns, grows and settles, step by step."""

from collections.abc import Callable
from typing import Any

import pandas as pd
from bokeh.layouts import column
from bokeh.models import (
    BasicTicker,
    BasicTickFormatter,
    ColorBar,
    ColumnDataSource,
    FixedTicker,
    GlyphRenderer,
    HoverTool,
    LinearColorMapper,
    Range1d,
    Span,
    TapTool,
)
from bokeh.plotting import figure

from modeldiff.series import path_pca
from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._checkpoint_source import Course
from modeldiff_widgets._theme import BASE, EDITED, FINETUNED, RANDOM, side_by_side

_ALONG = ("step", "norm", "moved", "cosine_to_last", "pc1", "pc2")
_TURN = ("step", "local_cosine", "walk_low", "walk_high")
_LOG = ("step", "learning_rate", "gradient_norm", "gradient_norm_mean")
_TIPS = {
    "turn": [("step", "@step"), ("local cosine", "@local_cosine{0.000}"),
             ("random walks", "@walk_low{0.000} to @walk_high{0.000}")],
    "path": [("step", "@step"), ("PC 1", "@pc1{0.000}"), ("PC 2", "@pc2{0.000}")],
    "norm": [("step", "@step"), ("norm", "@norm{0.0000}"), ("moved", "@moved{0.0000}")],
    "last": [("step", "@step"), ("cosine to the last", "@cosine_to_last{0.0000}")],
    "rate": [("step", "@step"), ("learning rate", "@learning_rate{0.000000}")],
    "gradient": [("step", "@step"), ("gradient norm", "@gradient_norm{0.0000}"),
                 ("mean of 5", "@gradient_norm_mean{0.0000}")],
}  # fmt: skip
_UP = {
    "turn": "local cosine", "path": "PC 2", "norm": "length", "last": "cosine to the last",
    "rate": "learning rate", "gradient": "gradient norm",
}  # fmt: skip


class CheckpointPlot:
    """Six figures over the steps of a training; a click on a point of the path chooses its step.

    Args:
        on_step: Called with the step that is clicked.
    """

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.along, self.turn, self.log = (_source(each) for each in (_ALONG, _TURN, _LOG))
        self.here = ColumnDataSource({"pc1": [], "pc2": []})
        self.x_range = Range1d(start=0, end=1)
        self.mapper = LinearColorMapper(palette=_shades(), low=0, high=1)
        self.marks: list[Span] = []
        self.figures = {name: self._empty(name) for name in _UP}
        self._draw()
        f = self.figures
        rows = [("turn", "path"), ("norm", "last"), ("rate", "gradient")]
        boxes = [side_by_side([f[a], f[b]]) for a, b in rows]
        self.logged = boxes[-1]
        self.pane = BokehPane(
            column(*boxes, sizing_mode="stretch_width", spacing=10), label="Checkpoints"
        )
        self.pane.on_select(self.along, lambda rows: self._tapped(rows, on_step))

    def show(self, course: Course, k: int) -> None:
        """Draw another course; from any thread."""
        table, steps, log = course.table, course.series.steps, course.series.log
        share = [100 * float(each) for each in path_pca(course.series.vectors).explained]
        with self.pane.editing():
            self.along.selected.indices = []
            self.along.data = _columns(table, _ALONG)
            self.log.data = _columns(_logged(log), _LOG)
            self.logged.visible = bool(len(log))
            pad = 0.02 * (steps[-1] - steps[0])
            self.x_range.update(start=steps[0] - pad, end=steps[-1] + pad)
            self.mapper.update(low=steps[0], high=steps[-1])
            path = self.figures["path"]
            x, y = (
                f"PC {i} ({each:.0f} % of variance)" for i, each in enumerate([*share, 0][:2], 1)
            )
            path.xaxis.axis_label, path.yaxis.axis_label = f"{x}, colour: step", y
            self.turning.visible = course.turns.transition is not None
            self.turning.location = course.turns.transition or 0
        self.pane.label = f"Checkpoints: {course.turns.verdict()}"
        self.show_turn(course, k)

    def show_turn(self, course: Course, k: int) -> None:
        """Draw the local cosine for another ``k``."""
        curves = course.turns.curves
        with self.pane.editing():
            self.turn.data = _columns(curves[curves["k"] == k], _TURN)

    def mark(self, step: int) -> None:
        """Mark a step in all figures."""
        data = self.along.data
        at = [i for i, each in enumerate(data["step"]) if each == step]
        with self.pane.editing():
            for span in self.marks:
                span.update(location=step, visible=True)
            self.here.data = {name: [list(data[name])[i] for i in at] for name in ("pc1", "pc2")}

    def snapshot_html(self) -> str:
        """The last picture, if a browser drew one."""
        return self.pane.snapshot_html() if self.pane.picture else ""

    def _tapped(self, rows: list[int], on_step: Callable[[int], None]) -> None:
        if rows:
            on_step(int(self.along.data["step"][rows[-1]]))

    def _empty(self, name: str) -> Any:
        options: dict[str, Any] = {} if name == "path" else {"x_range": self.x_range}
        fig: Any = figure(
            height=250 if name in ("turn", "path") else 190, sizing_mode="stretch_width",
            tools=[], toolbar_location=None, **options,
        )  # fmt: skip
        fig.min_border_left, fig.min_border_right = 84, 26
        fig.xaxis.axis_label, fig.yaxis.axis_label = "step", _UP[name]
        if name != "path":
            fig.xaxis.ticker = BasicTicker(mantissas=[1, 2, 5], min_interval=1)
            span = Span(dimension="height", line_color=RANDOM, line_width=1.5, visible=False)
            fig.add_layout(span)
            self.marks.append(span)
        return fig

    def _draw(self) -> None:
        f = self.figures
        turn = f["turn"]
        turn.varea("step", "walk_low", "walk_high", source=self.turn, fill_color=RANDOM,
                   fill_alpha=0.28, legend_label="95 % of random walks")  # fmt: skip
        self._line("turn", "local_cosine", FINETUNED, self.turn, "this training", dots=True)
        turn.y_range = Range1d(start=-1.08, end=1.08)
        turn.yaxis.ticker = FixedTicker(ticks=[-1, -0.5, 0, 0.5, 1])
        turn.yaxis.major_label_overrides = {-1: "−1 straight", 0: "0 turn", 1: "+1 back"}
        turn.legend.location = "top_right"
        self.turning = Span(dimension="height", line_color=FINETUNED, line_dash="dashed",
                            line_width=2, visible=False)  # fmt: skip
        turn.add_layout(self.turning)
        self._line("norm", "norm", FINETUNED, self.along, "norm")
        self._line("norm", "moved", EDITED, self.along, "moved since the step before")
        f["norm"].legend.location = "center_right"
        self._line("last", "cosine_to_last", BASE, self.along, dots=True)
        f["last"].y_range = Range1d(start=-1.08, end=1.08)
        self._line("rate", "learning_rate", EDITED, self.log)
        self._line("gradient", "gradient_norm", RANDOM, self.log, "as logged")
        self._line("gradient", "gradient_norm_mean", FINETUNED, self.log, "mean of 5")
        f["norm"].y_range.start = f["rate"].y_range.start = f["gradient"].y_range.start = 0
        f["rate"].yaxis.formatter = BasicTickFormatter(use_scientific=False)
        self._draw_path()
        for each in {one for fig in f.values() for one in fig.references()}:
            if isinstance(each, GlyphRenderer):  # a chosen point dims nothing
                each.nonselection_glyph = each.selection_glyph = None
        for name, fig in f.items():
            if name != "path":
                fig.add_tools(HoverTool(tooltips=_TIPS[name], mode="vline"))

    def _draw_path(self) -> None:
        fig = self.figures["path"]
        fig.line("pc1", "pc2", source=self.along, line_color=RANDOM, line_alpha=0.6)
        dots = fig.scatter(
            "pc1", "pc2", source=self.along, size=10, line_color=RANDOM, line_width=0.7,
            fill_color={"field": "step", "transform": self.mapper},
        )  # fmt: skip
        fig.scatter("pc1", "pc2", source=self.here, size=17, fill_alpha=0, line_color=BASE,
                    line_width=2.5)  # fmt: skip
        fig.add_layout(ColorBar(color_mapper=self.mapper, width=9,
                                ticker=BasicTicker(desired_num_ticks=5)), "right")  # fmt: skip
        fig.add_tools(HoverTool(tooltips=_TIPS["path"], renderers=[dots]),
                      TapTool(renderers=[dots]))  # fmt: skip

    def _line(
        self, name: str, field: str, colour: str, source: ColumnDataSource, legend: str = "", *,
        dots: bool = False,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {"legend_label": legend} if legend else {}
        fig = self.figures[name]
        fig.line("step", field, source=source, color=colour, line_width=2, **options)
        if dots:
            fig.scatter("step", field, source=source, color=colour, size=5, **options)


def verdict_html(course: Course) -> str:
    """The verdict in words, and the table behind it."""
    found = course.turns
    names = ["k", "k_steps", "peak", "step", "prominence", "walk_prominence", "p", "turned"]
    shown = ["k", "k in steps", "sharpest turn", "at step", "stands out by", "random walks reach",
             "p", "transition"]  # fmt: skip
    rows = [[each[name] for name in names] for each in found.table.to_dict("records")]
    for each in rows:
        each[-1] = bool(each[-1])
    tone = "neutral" if found.transition is None else "bad"
    label = "no transition" if found.transition is None else f"transition at {found.transition}"
    return (
        _render.badge(label, tone) + _render.paragraph(found.verdict())
        + _render.table(shown, rows, numeric=range(7),
                        caption=f"Alarms on random walks: {100 * found.alarm_rate:g} % in all")
    )  # fmt: skip


def _source(names: tuple[str, ...]) -> ColumnDataSource:
    return ColumnDataSource({name: [] for name in names})


def _columns(table: pd.DataFrame, names: tuple[str, ...]) -> Any:
    """Columns as lists; those that are not known are NaN."""
    return {
        name: table[name].tolist() if name in table else [float("nan")] * len(table)
        for name in names
    }


def _logged(log: pd.DataFrame) -> pd.DataFrame:
    if "gradient_norm" not in log:
        return log
    return log.assign(gradient_norm_mean=log["gradient_norm"].rolling(5, min_periods=1).mean())


def _shades() -> list[str]:
    """From the page's background to full, for the first to the last step."""
    return [f"{FINETUNED}{round(25 + 230 * i / 31):02x}" for i in range(32)]
