"""Pieces that the plots of a report are made of. Imported only when a page is rendered."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

import pandas as pd
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import BasicTicker, BoxAnnotation, ColumnDataSource, HoverTool
from bokeh.plotting import figure

from modeldiff.report_text import heading, number, percent, shortened, visible
from modeldiff.stats import Band

BASE, FINETUNED, EDITED, CONTROL = "#0072B2", "#D55E00", "#009E73", "#777777"
LAYER = "layer (0 is the first)"
_MATHS = (("$$", "$\u200a$"), ("\\(", "\\\u200a("), ("\\[", "\\\u200a["))

Scale = Literal["percent", "plain"]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Key:
    """One entry of a plot's legend, which is text beside the plot."""

    mark: str
    label: str
    colour: str


@dataclass(frozen=True)
class Plot:
    """A plot ready for the page."""

    target: str
    """Id of the element it is drawn in."""
    item: str
    """The plot as JSON for ``Bokeh.embed.embed_item``."""
    summary: str
    """What it shows, for those who cannot see it."""
    caption: str
    keys: tuple[Key, ...] = ()


Keys = tuple[Key, ...]


def intervals(rows: Rows, axis: str, scale: Scale, band: Band | None) -> Any:
    """One row a cell: a marker with its interval, over the band that controls span."""
    factor = 100 if scale == "percent" else 1
    names = _distinct(["\n".join(wrap(row["label"], 22)) or "–" for row in rows])
    data: dict[str, Any] = {
        key: [factor * row[key] for row in rows] for key in ("value", "low", "high")
    }
    data |= {key: [row[key] for row in rows] for key in ("colour", "marker")} | {"label": names}
    fig = empty_figure(75 + 38 * len(rows), names[::-1])
    if band is not None:
        fig.add_layout(
            BoxAnnotation(left=factor * band.low, right=factor * band.high, level="underlay",
                          fill_color=CONTROL, fill_alpha=0.22, line_color=None)
        )  # fmt: skip
    source = ColumnDataSource(data)
    fig.segment("low", "label", "high", "label", source=source, color="colour", line_width=2.5)
    dots = fig.scatter("value", "label", source=source, size=11, color="colour", marker="marker")
    shown = [("", "@label"), (axis, "@value{0.000} (@low{0.000} to @high{0.000})")]
    fig.add_tools(HoverTool(renderers=[dots], tooltips=shown))
    axes(fig, axis, "")
    ends = [x for key in ("value", "low", "high") for x in data[key] if math.isfinite(x)]
    x_range(fig, ends, scale)
    return fig


def whiskers(fig: Any, frame: pd.DataFrame, low: str, high: str, colour: str) -> None:
    """A vertical interval at each layer."""
    fig.segment("layer", low, "layer", high, source=_source(frame), color=colour, line_width=2)


def bars(fig: Any, frame: pd.DataFrame, low: str, high: str, colour: str) -> None:
    """A pale bar at each layer, from one column to another."""
    fig.vbar("layer", 0.7, high, low, source=_source(frame), fill_color=colour, fill_alpha=0.3,
             line_color=None)  # fmt: skip


def line(fig: Any, frame: pd.DataFrame, column: str, colour: str, marker: str) -> None:
    """A line over layers; those without a value are left out."""
    source = _source(frame.dropna(subset=[column]))
    fig.line("layer", column, source=source, color=colour, line_width=2)
    dots = fig.scatter("layer", column, source=source, color=colour, size=8, marker=marker)
    shown = [("layer", "@layer"), (heading(column), f"@{column}{{0.0000}}")]
    fig.add_tools(HoverTool(renderers=[dots], tooltips=shown))


def empty_figure(height: int, rows: Sequence[str] = ()) -> Any:
    """A figure as wide as its place; the vertical axis has numbers unless it has named rows."""
    options: dict[str, Any] = {"y_range": list(rows)} if rows else {}
    fig = figure(height=height, sizing_mode="stretch_width", toolbar_location=None, tools="",
                 outline_line_color=None, min_border_right=16, **options)  # fmt: skip
    fig.xgrid.grid_line_alpha = fig.ygrid.grid_line_alpha = 0.5
    return fig


def axes(fig: Any, x: str, y: str) -> None:
    """Label both axes, with units."""
    fig.xaxis.axis_label, fig.yaxis.axis_label = x, y
    for axis in (*fig.xaxis, *fig.yaxis):
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "13px"
        axis.minor_tick_line_color = None


def layer_axes(fig: Any, layers: Sequence[float]) -> None:
    """Show every layer, also those where nothing was measured."""
    fig.xaxis.ticker = whole_numbers()
    fig.x_range.start, fig.x_range.end = min(layers, default=0) - 0.5, max(layers, default=0) + 0.5


def whole_numbers() -> BasicTicker:
    """Ticks for what can only be counted."""
    return BasicTicker(min_interval=1, num_minor_ticks=0)


def x_range(fig: Any, values: Sequence[float], scale: Scale) -> None:
    """Percents from 0 to 100; everything else with zero in sight."""
    if scale == "percent":
        fig.x_range.start, fig.x_range.end = -3, 103
        return
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.05 * (high - low) or 1.0
    fig.x_range.start, fig.x_range.end = low - margin * (low < 0), high + margin


def plot(
    target: str, fig: Any, caption: str, rows: Rows, scale: Scale = "plain", keys: Keys = ()
) -> Plot:
    """Make the figure ready for the page; the rows are what its summary says in words."""
    show = percent if scale == "percent" else number
    words = [
        f"{row['label']} {show(row['value'])}"
        + ("" if math.isnan(row["low"]) else f" ({show(row['low'])} to {show(row['high'])})")
        for row in rows[:12]
    ]
    item = _renumbered(json_item(fig, ID(target)))
    return Plot(target, json.dumps(item), f"{caption} {'; '.join(words)}.", caption, keys)


def label(text: str) -> str:
    """Text that is drawn: short, visible, and never taken for mathematics."""
    text = shortened(" ".join(visible(text).split()), 40)
    for marks, harmless in _MATHS:
        text = text.replace(marks, harmless)
    return text


def has(frame: pd.DataFrame, words: str, numbers: str) -> bool:
    """Whether there are columns of these names, the latter of numbers."""
    numeric = frame.select_dtypes("number").columns
    return set(words.split()) <= set(frame.columns) and set(numbers.split()) <= set(numeric)


def _source(frame: pd.DataFrame) -> ColumnDataSource:
    numeric = frame.select_dtypes("number")
    return ColumnDataSource({str(name): numeric[name].tolist() for name in numeric})


def _renumbered(item: Any) -> Any:
    """Count model ids from 1, so that one report gives one page, byte for byte."""
    ids: dict[str, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: ids.setdefault(entry, f"p{len(ids) + 1}")
                if key in ("id", "root_id") and isinstance(entry, str)
                else walk(entry)
                for key, entry in value.items()
            }
        return [walk(entry) for entry in value] if isinstance(value, list) else value

    return walk(item)


def _distinct(names: Sequence[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]
