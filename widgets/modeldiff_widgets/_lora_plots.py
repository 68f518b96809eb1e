"""Figures of an adapter: the spectrum of a module, the layers, and what removal does."""

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    Range1d,
)
from bokeh.plotting import figure

from modeldiff.lora import AdapterModule
from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import BASE, FINETUNED, RANDOM

MOST = 24
"""Units that are drawn; the table has them all."""
_SIDES = (("out", "removed from the fine-tune", FINETUNED), ("in", "alone on the base", BASE))
_FEW = 4  # bars that a figure has room for at least
_EFFECTS = ("unit", "y", "value", "low", "high", "random_low", "random_high", "p")


class _Bars:
    """Vertical bars over whole numbers, of which one may be marked and clicked."""

    def __init__(
        self, fields: Sequence[str], axes: tuple[str, str], tips: list[tuple[str, str]], label: str
    ) -> None:
        self.source = ColumnDataSource({name: [] for name in (*fields, "alpha")})
        self.x_range = Range1d(start=-0.5, end=0.5)
        fig = figure(height=230, sizing_mode="stretch_width", tools="tap", x_range=self.x_range,
                     toolbar_location=None)  # fmt: skip
        bars = fig.vbar(
            fields[0], 0.8, fields[1], source=self.source, fill_color=FINETUNED, line_color=None,
            fill_alpha="alpha", nonselection_fill_alpha=0.45, selection_fill_alpha=1.0,
        )  # fmt: skip
        fig.add_tools(HoverTool(renderers=[bars], tooltips=tips))
        fig.xaxis.axis_label, fig.yaxis.axis_label = axes
        fig.y_range = DataRange1d(start=0)
        fig.xgrid.grid_line_color = None
        self.ticker = FixedTicker(ticks=[])
        fig.xaxis.ticker = self.ticker
        self.pane = BokehPane(fig, label=label)

    def show(self, data: dict[str, list[Any]], at: str, chosen: int) -> None:
        """Show other bars; ``chosen`` is drawn full."""
        values = data[at]
        with self.pane.editing():
            self.source.selected.indices = []
            pad = max(0.7, (_FEW - max(values) + min(values)) / 2)
            self.x_range.start, self.x_range.end = min(values) - pad, max(values) + pad
            self.ticker.ticks = values[:: max(1, len(values) // 12)]
        alpha = [1.0 if value == chosen else 0.45 for value in values]
        self.pane.replace(self.source, {**data, "alpha": alpha})

    def picked(self, on: Callable[[int], None], field: str) -> Callable[[], None]:
        """Call back with the number under a bar that is clicked."""
        return self.pane.on_select(
            self.source, lambda rows: on(int(self.source.data[field][rows[0]])) if rows else None
        )


class Spectrum(_Bars):
    """Singular values of one module's change; a click chooses a component."""

    def __init__(self) -> None:
        tips = [("component", "@component"), ("singular value", "@value{0.0000}"),
                ("share of squared norm", "@share{0.0 %}")]  # fmt: skip
        super().__init__(
            ("component", "value", "share"), ("component", "singular value"), tips,
            "Singular values of an adapted module",
        )  # fmt: skip

    def draw(self, module: AdapterModule, component: int) -> None:
        """Show a module."""
        values = module.svd.singular.tolist()
        total = sum(value**2 for value in values) or 1.0
        data = {"component": list(range(len(values))), "value": values,
                "share": [value**2 / total for value in values]}  # fmt: skip
        self.show(data, "component", component)
        self.pane.label = f"Singular values of {module.name}"


class LayerBars(_Bars):
    """Relative norm of the change layer by layer; a click chooses the layer."""

    def __init__(self) -> None:
        tips = [("layer", "@layer"), ("relative norm", "@relative{0.00000}"),
                ("norm", "@norm{0.000}"), ("modules", "@modules")]  # fmt: skip
        super().__init__(
            ("layer", "relative", "norm", "modules"), ("layer", "norm of change / of weights"),
            tips, "Relative norm of the change, by layer",
        )  # fmt: skip

    def draw(self, layers: pd.DataFrame, chosen: int) -> None:
        """Show the layers of an adapter."""
        names = ("layer", "relative", "norm", "modules")
        self.show({name: layers[name].tolist() for name in names}, "layer", chosen)


class EffectBars:
    """What leaving units out and in does, each beside random writes of its size."""

    def __init__(self) -> None:
        self.sources = {side: ColumnDataSource({n: [] for n in _EFFECTS}) for side, *_ in _SIDES}
        self.y_range = Range1d(start=0.6, end=-0.6)
        self.figure = figure(
            height=120, sizing_mode="stretch_width", y_range=self.y_range, tools="",
            toolbar_location=None,
        )  # fmt: skip
        self._draw(self.figure)
        self.pane = BokehPane(self.figure, label="Leave one out: not computed yet")

    def draw(self, effects: pd.DataFrame) -> None:
        """Show a table of `leave_one_out`; the first units of it."""
        some = effects.head(MOST)
        names = [str(unit) for unit in some["unit"]]
        with self.pane.editing() as fig:
            fig.height = 96 + 40 * len(names)
            self.y_range.start, self.y_range.end = len(names) - 0.4, -0.6
            fig.yaxis.ticker = FixedTicker(ticks=list(range(len(names))))  # pyright: ignore
            fig.yaxis.major_label_overrides = dict(enumerate(names))  # pyright: ignore
        for offset, (side, *_) in zip((-0.19, 0.19), _SIDES, strict=True):
            columns = {
                "value": side, "low": f"{side}_low", "high": f"{side}_high", "p": f"{side}_p",
                "random_low": f"{side}_random_low", "random_high": f"{side}_random_high",
            }  # fmt: skip
            data = {name: some[column].tolist() for name, column in columns.items()}
            data |= {"unit": names, "y": [i + offset for i in range(len(names))]}
            self.pane.replace(self.sources[side], data)
        self.pane.label = f"Leave one out: {len(names)} units, KL in nats a token"

    def _draw(self, fig: Any) -> None:
        for side, name, colour in _SIDES:
            source = self.sources[side]
            bars = fig.hbar("y", 0.3, "value", source=source, fill_color=colour, line_color=None,
                            fill_alpha=0.6, legend_label=name)  # fmt: skip
            fig.segment("low", "y", "high", "y", source=source, color=colour, line_width=2)
            fig.hbar("y", 0.34, "random_high", "random_low", source=source, fill_color=RANDOM,
                     fill_alpha=0.55, line_color=RANDOM,
                     legend_label="random write of the same size: band")  # fmt: skip
            tips = [("unit", "@unit"), (f"KL, {name}", "@value{0.0000}"),
                    ("95 % over texts", "@low{0.0000} to @high{0.0000}"),
                    ("random writes", "@random_low{0.0000} to @random_high{0.0000}"),
                    ("p", "@p{0.000}")]  # fmt: skip
            fig.add_tools(HoverTool(renderers=[bars], tooltips=tips))
        fig.xaxis.axis_label = "KL, nats a token"
        fig.xaxis.ticker = BasicTicker(desired_num_ticks=6)
        fig.ygrid.grid_line_color = None
        fig.x_range.start = 0
        fig.legend.orientation, fig.legend.spacing, fig.legend.ncols = "horizontal", 18, 2
        fig.add_layout(fig.legend[0], "above")


def effects_html(effects: pd.DataFrame) -> str:
    """All units as a table."""
    headings = ["unit", "modules", "KL without it", "95 %", "random", "p", "KL alone", "95 %",
                "random", "p"]  # fmt: skip
    rows = [
        [str(row["unit"]), str(row["n_modules"]), *_side(row, "out"), *_side(row, "in")]
        for row in effects.to_dict("records")
    ]
    return _render.table(headings, rows, numeric=range(1, len(headings)))


def _side(row: Any, side: str) -> list[Any]:
    return [
        float(row[side]), _range(row[f"{side}_low"], row[f"{side}_high"]),
        _range(row[f"{side}_random_low"], row[f"{side}_random_high"]), float(row[f"{side}_p"]),
    ]  # fmt: skip


def _range(low: float, high: float) -> str:
    return "–" if low != low else f"{low:.3g} to {high:.3g}"  # NaN with one text
