"""`LatentMap`: all latents as points; tap one, or draw a box around several."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from bokeh.models import (
    BasicTicker,
    BoxSelectTool,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    Range1d,
    TapTool,
)
from bokeh.plotting import figure

from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import BASE, FINETUNED, RANDOM

UNKNOWN, FIRING = "not measured", "firing"
COLOURS = {
    "finetuned-only": FINETUNED, "base-only": BASE, "shared": "#8a939c", "shrunk": "#CC79A7",
    "decoupled": "#E69F00", "other": "#56B4E9", "dead": "#b0b0b0", UNKNOWN: RANDOM,
    FIRING: "#009E73",
}  # fmt: skip
"""Colour of each class; no class is told by its colour alone."""
MARKERS = {
    "finetuned-only": "triangle", "base-only": "inverted_triangle", "shared": "circle",
    "shrunk": "square", "decoupled": "diamond", "other": "hex", "dead": "x", UNKNOWN: "circle",
    FIRING: "circle",
}  # fmt: skip
AXES = {
    "firing_rate": "share of rows on which it fires",
    "nu_error": "ν error (0: the lighter model lacks it, 1: it has it as strongly)",
    "nu_reconstruction": "ν reconstruction (0: nothing writes it for the lighter model)",
    "nu_activation": "ν activation (0: only the model it was trained on has it)",
    "max_activation": "largest activation",
    "relative_decoder_norm": "relative decoder norm: base-only 0 … 1 fine-tuned-only",
    "latent": "latent",
}
"""What can be an axis, and what it says."""
_LOW, _HIGH = -0.2, 2.0  # where a nu is drawn at the edge
_FIELDS = ("x", "y", "latent", "name", "kind", "colour", "marker", "rate", "norm", "nu")


class LatentMap:
    """A live scatter; colour and shape say the class.

    Args:
        on_pick: Called with the latents that are tapped or boxed; with none when it is undone.
    """

    def __init__(self, on_pick: Callable[[list[int]], None]) -> None:
        self.source = ColumnDataSource({name: [] for name in _FIELDS})
        self.mark = ColumnDataSource({"x": [], "y": []})
        self.pane = BokehPane(self._figure(), label="Latents: nothing measured yet")
        self.pane.on_select(self.source, lambda rows: on_pick(self._latents(rows)))

    def show(self, table: pd.DataFrame, across: str, up: str, names: Sequence[str]) -> int:
        """Draw the latents of a table; returns how many have both values.

        Args:
            table: One row a latent: latent, class, firing_rate, and the two columns.
            across: Column of the horizontal axis.
            up: Column of the vertical axis; rates are drawn by their logarithm.
            names: Labels, one a row.
        """
        x, y = _placed(table, across), _placed(table, up)
        drawn = np.isfinite(x) & np.isfinite(y)
        kinds = table["class"].astype(str)
        data = {
            "x": x, "y": y, "latent": table["latent"].to_numpy(), "name": np.array(names, object),
            "kind": kinds.to_numpy(object), "colour": kinds.map(COLOURS).to_numpy(object),
            "marker": kinds.map(MARKERS).to_numpy(object), "rate": _column(table, "firing_rate"),
            "norm": _column(table, "relative_decoder_norm"), "nu": _column(table, "nu_error"),
        }  # fmt: skip
        with self.pane.editing():
            self._scale(across, up, y[drawn])
            self.source.selected.indices = []
            self.source.data = {name: column[drawn].tolist() for name, column in data.items()}
            self.figure.legend.visible = bool(drawn.any())
        self.pane.label = f"{int(drawn.sum())} latents: {AXES[up]}, against {AXES[across]}"
        return int(drawn.sum())

    def choose(self, latent: int) -> None:
        """Put a ring around a latent, if it is drawn."""
        with self.pane.editing():
            latents = list(self.source.data["latent"])
            at = latents.index(latent) if latent in latents else -1
            place: dict[str, Any] = {
                name: [self.source.data[name][at]] if at >= 0 else [] for name in ("x", "y")
            }
            self.mark.data = place

    def clear(self) -> None:
        """Undo a selection."""
        with self.pane.editing():
            self.source.selected.indices = []

    def snapshot_html(self) -> str:
        """The picture, or how many latents each class has."""
        if self.pane.picture:
            return self.pane.snapshot_html()
        kinds = pd.Series(list(self.source.data["kind"]), dtype=object).value_counts()
        rows = [(str(kind), int(n)) for kind, n in kinds.items()]
        return _render.note(self.pane.label) + _render.table(["class", "latents"], rows)

    def _latents(self, rows: list[int]) -> list[int]:
        latents = self.source.data["latent"]
        return [int(latents[row]) for row in rows if 0 <= row < len(latents)]

    def _scale(self, across: str, up: str, y: np.ndarray) -> None:
        fig = self.figure
        fig.xaxis.axis_label, fig.yaxis.axis_label = AXES[across], _short(up)
        low, high = (0.0, 1.0) if across == "relative_decoder_norm" else (None, None)
        if across.startswith("nu_"):
            low, high = _LOW, _HIGH
        if low is None or high is None:
            found = self.source.data["x"]
            low, high = (min(found), max(found)) if len(found) else (0.0, 1.0)
        margin = 0.04 * (high - low) or 1.0
        self.x_range.start, self.x_range.end = low - margin, high + margin
        if up == "firing_rate":
            low, high = float(min(y, default=-4)), 0.0
            fig.yaxis.ticker = FixedTicker(ticks=list(range(-7, 1)))
            fig.yaxis.major_label_overrides = _RATES
        else:
            low, high = (_LOW, _HIGH) if up.startswith("nu_") else (0.0, float(max(y, default=1)))
            fig.yaxis.ticker = BasicTicker()
            fig.yaxis.major_label_overrides = _WHOLE
        margin = 0.06 * (high - low) or 1.0
        self.y_range.start, self.y_range.end = low - margin, high + margin

    def _figure(self) -> figure:
        self.x_range, self.y_range = Range1d(start=-0.04, end=1.04), Range1d(start=-4, end=0.1)
        tap, box = TapTool(), BoxSelectTool()
        fig = figure(
            height=400, sizing_mode="stretch_width", x_range=self.x_range, y_range=self.y_range,
            tools=["pan", "wheel_zoom", "reset", "save"], toolbar_location="above",
            active_drag=None, active_scroll=None,
        )  # fmt: skip
        self.figure = fig
        fig.toolbar.logo = None
        points = fig.scatter(
            "x", "y", source=self.source, color="colour", marker="marker", size=7, alpha=0.75,
            line_alpha=0.0, nonselection_alpha=0.2, legend_field="kind",
        )  # fmt: skip
        ring = fig.scatter("x", "y", source=self.mark, size=17, fill_alpha=0.0, line_width=2.5,
                           line_color="#009E73")  # fmt: skip
        ring.level = "overlay"
        tips = [("latent", "@latent @name"), ("class", "@kind"), ("fires on", "@rate{0.000 %}"),
                ("relative norm", "@norm{0.000}"), ("ν error", "@nu{0.00}")]  # fmt: skip
        fig.add_tools(tap, box, HoverTool(renderers=[points], tooltips=tips))
        tap.renderers = box.renderers = [points]
        fig.toolbar.active_tap, fig.toolbar.active_drag = tap, box
        fig.legend.orientation, fig.legend.spacing = "horizontal", 12
        fig.legend.visible = False  # its marks have nothing to show yet
        fig.add_layout(fig.legend[0], "below")
        return fig


_RATES: dict[Any, Any] = {
    0: "100 %", -1: "10 %", -2: "1 %", -3: "0.1 %", -4: "0.01 %", -5: "0.001 %",
    -6: "1e-6", -7: "1e-7",
}  # fmt: skip


_WHOLE: dict[Any, Any] = {number: str(number) for number in range(-7, 3)}
# an empty mapping would leave those of the rates in the browser


def _short(up: str) -> str:
    return AXES[up].split(" (")[0]


def _column(table: pd.DataFrame, name: str) -> np.ndarray:
    if name not in table:
        return np.full(len(table), np.nan)
    return table[name].to_numpy(float)


def _placed(table: pd.DataFrame, name: str) -> np.ndarray:
    values = _column(table, name)
    if name == "firing_rate":
        with np.errstate(divide="ignore"):
            return np.log10(values)
    return np.clip(values, _LOW, _HIGH) if name.startswith("nu_") else values
