"""The plots of a report, made of its tables. Imported only when a page is rendered."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

import pandas as pd
from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import BasicTicker, BoxAnnotation, ColumnDataSource, HoverTool
from bokeh.plotting import figure

from modeldiff.report_text import heading, number, percent, shortened, visible
from modeldiff.stats import Band, null_band

BASE, FINETUNED, EDITED, CONTROL = "#0072B2", "#D55E00", "#009E73", "#777777"
_MARKERS = {"model": "circle", "edit": "diamond", "control": "square", "steer": "triangle"}
_METRICS = ("kl_ft_base", "kl_base_ft", "js", "delta_logprob")
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


def plots(tables: Mapping[str, pd.DataFrame]) -> dict[str, tuple[Plot, ...]]:
    """All plots that the tables allow, by the name of the table they belong to."""
    makers = {
        "behaviour": _behaviour,
        "controls": _controls,
        "effects": _effects,
        "outputs": _outputs,
        "layers": _layers,
    }
    found = {name: tuple(make(tables)) for name, make in makers.items() if name in tables}
    return {name: several for name, several in found.items() if several}


def _behaviour(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    frame = tables["behaviour"]
    for column, what in (("rate", "Rate"), ("coherent", "Coherent answers")):
        if not _has(frame, "cell", "side", "kind", column, f"{column}_low", f"{column}_high"):
            continue
        band = _band(tables, column)
        rows = _cells(frame, column, f"{column}_low", f"{column}_high")
        if rows:
            caption = f"{what} with 95\u00a0% intervals. {_band_words(band, 'percent')}"
            fig = _intervals(rows, f"{column}, % of answers", "percent", band)
            yield _plot(f"plot-{column}", fig, caption, rows, "percent")


def _effects(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    frame = tables["effects"]
    if not _has(frame, "cell", "kind", "kl_to_base", "kl_low", "kl_high"):
        return
    band = _band(tables, "kl")
    rows = _cells(frame, "kl_to_base", "kl_low", "kl_high")
    if rows:
        caption = (
            "Divergence of each cell's predictions from the base's, with 95\u00a0% intervals. "
            f"{_band_words(band, 'plain')}"
        )
        fig = _intervals(rows, heading("kl_to_base"), "plain", band)
        yield _plot("plot-effects", fig, caption, rows, "plain")


def _outputs(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    frame = tables["outputs"]
    if not _has(frame, "source", "metric", "estimate", "low", "high"):
        return
    present = [metric for metric in _METRICS if metric in set(frame["metric"])]
    for metric in present:
        part = pd.DataFrame(frame[frame["metric"] == metric])
        rows = [
            {
                "label": _label(str(row["source"])),
                "value": row["estimate"],
                "low": row["low"],
                "high": row["high"],
                "colour": FINETUNED,
                "marker": "circle",
            }
            for row in part.to_dict("records")
            if math.isfinite(row["estimate"])
        ]
        if rows:
            caption = f"{heading(metric)}: mean over tokens, 95\u00a0% interval over texts."
            fig = _intervals(rows, heading(metric), "plain", None)
            yield _plot(f"plot-{metric}", fig, caption, rows, "plain")


def _controls(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    """Random directions stacked into a dot plot, with the cells they are compared with."""
    frame, percents = tables["controls"], _has(tables["controls"], "rate")
    column = "rate" if percents else "kl"
    if not _has(frame, column):
        return
    values = frame[column].dropna().tolist()
    references = _references(tables, percents)
    if not values:
        return
    scale: Scale = "percent" if percents else "plain"
    every = values + [row["value"] for row in references]
    factor = 100 if percents else 1
    step = factor * ((max(every) - min(every)) / 60 or 0.01)
    stacked = _stacked([factor * value for value in values], step)
    fig = _figure(180, "x")
    top = max(4.0, max(stacked) + 1)
    fig.y_range.start, fig.y_range.end = 0, top
    source = ColumnDataSource({"x": [factor * v for v in values], "y": stacked})
    dots = fig.scatter("x", "y", source=source, size=9, color=CONTROL, fill_alpha=0.75)
    fig.add_tools(HoverTool(renderers=[dots], tooltips=[("random direction", "@x{0.000}")]))
    for row in references:
        fig.line([factor * row["value"]] * 2, [0, top], color=row["colour"], line_width=2.5,
                 line_dash=row["dash"])  # fmt: skip
    unit = "rate, % of answers" if percents else heading("kl")
    _axes(fig, unit, "random directions")
    fig.yaxis.ticker = _whole_numbers()
    _x_range(fig, [factor * value for value in every], scale)
    keys = tuple(Key(row["mark"], row["label"], row["colour"]) for row in references)
    caption = f"{len(values)} random directions, one dot each, ablated in the same way."
    rows = [{"label": "random directions", "value": max(values), "low": min(values),
             "high": max(values)}, *references]  # fmt: skip
    yield _plot("plot-controls", fig, caption, rows, scale, (Key("●", "random", CONTROL), *keys))


def _layers(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    frame = tables["layers"]
    if not _has(frame, "layer"):
        return
    if _has(frame, "relative_difference", "low", "high"):
        caption = "How far the two models' activations are apart, with 95\u00a0% intervals."
        part = frame.dropna(subset=["layer", "relative_difference"])
        fig = _figure(280, "x")
        _whiskers(fig, part, "low", "high", FINETUNED)
        _line(fig, part, "relative_difference", FINETUNED, "circle")
        _layer_axes(fig, heading("relative_difference"))
        yield _plot("plot-difference", fig, caption, _layer_rows(part, "relative_difference"))
    if _has(frame, "kl_after_ablation"):
        caption = "What is left of the fine-tune after ablating each layer's direction"
        part = frame.dropna(subset=["layer", "kl_after_ablation"])
        fig = _figure(280, "x")
        if _has(frame, "random_low", "random_high"):
            caption += "; grey: range of random directions of the same layer"
            fig.vbar("layer", 0.7, "random_high", "random_low", source=_source(part),
                     fill_color=CONTROL, fill_alpha=0.3, line_color=None)  # fmt: skip
        _line(fig, part, "kl_after_ablation", EDITED, "diamond")
        _layer_axes(fig, heading("kl_after_ablation"))
        yield _plot("plot-ablation", fig, caption + ".", _layer_rows(part, "kl_after_ablation"))
    if _has(frame, "split_half", "text_null"):
        part = frame.dropna(subset=["layer", "split_half"])
        fig = _figure(280, "x")
        _line(fig, part, "split_half", EDITED, "circle")
        _line(fig, part, "text_null", CONTROL, "square")
        _layer_axes(fig, "cosine with the layer's direction", from_zero=False)
        keys = (
            Key("●", "split halves of the data", EDITED),
            Key("■", "same contrast in the base", CONTROL),
        )
        caption = "A direction is stable if its halves agree, and new if the base lacks it."
        yield _plot("plot-stability", fig, caption, _layer_rows(part, "split_half"), keys=keys)


def _intervals(rows: Rows, axis: str, scale: Scale, band: Band | None) -> Any:
    """One row a cell: a marker with its interval, over the band that controls span."""
    factor = 100 if scale == "percent" else 1
    names = _distinct(["\n".join(wrap(row["label"], 22)) or "–" for row in rows])
    data: dict[str, Any] = {
        key: [factor * row[key] for row in rows] for key in ("value", "low", "high")
    }
    data |= {key: [row[key] for row in rows] for key in ("colour", "marker")} | {"label": names}
    fig = _figure(75 + 38 * len(rows), names[::-1])
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
    _axes(fig, axis, "")
    ends = [x for key in ("value", "low", "high") for x in data[key] if math.isfinite(x)]
    _x_range(fig, ends, scale)
    return fig


def _cells(frame: pd.DataFrame, value: str, low: str, high: str) -> list[dict[str, Any]]:
    return [
        {
            "label": _label(str(row["cell"])),
            "value": row[value],
            "low": row[low],
            "high": row[high],
            "colour": _colour(row),
            "marker": _MARKERS.get(row["kind"], "circle"),
        }
        for row in frame.to_dict("records")
        if math.isfinite(row[value])
    ]


def _references(tables: Mapping[str, pd.DataFrame], percents: bool) -> list[dict[str, Any]]:
    """The unedited fine-tune, and the first edit: it is the one that the controls repeat."""
    name, value = ("behaviour", "rate") if percents else ("effects", "kl_to_base")
    if name not in tables or not _has(tables[name], "cell", "kind", value):
        return []
    rows = tables[name].to_dict("records")
    models = [row for row in rows if row["kind"] == "model" and not _is_base(row)]
    edits = [row for row in rows if row["kind"] == "edit"]
    return [
        {"label": _label(str(row["cell"])), "value": row[value], "colour": _colour(row),
         "low": math.nan, "high": math.nan,
         "dash": "solid" if row["kind"] == "edit" else "dashed",
         "mark": "┃" if row["kind"] == "edit" else "┇"}
        for row in (*models, *edits[:1])
        if math.isfinite(row[value])
    ]  # fmt: skip


def _colour(row: Mapping[Any, Any]) -> str:
    if row["kind"] == "control":
        return CONTROL
    if row["kind"] == "model":
        return BASE if _is_base(row) else FINETUNED
    return EDITED


def _is_base(row: Mapping[Any, Any]) -> bool:
    return row["kind"] == "model" and "base" in (row.get("side"), row["cell"])


def _band(tables: Mapping[str, pd.DataFrame], column: str) -> Band | None:
    if "controls" not in tables or not _has(tables["controls"], column):
        return None
    values = tables["controls"][column].dropna()
    return null_band(values.to_numpy(float)) if len(values) else None


def _band_words(band: Band | None, scale: Scale) -> str:
    if band is None:
        return ""
    show = percent if scale == "percent" else number
    what = "range" if band.is_range else f"{band.level:.0%} band"
    return f"Grey: {what} of {band.n} random directions, {show(band.low)} to {show(band.high)}."


def _figure(height: int, y_range: Any) -> Any:
    options = {} if y_range == "x" else {"y_range": y_range}
    fig = figure(height=height, sizing_mode="stretch_width", toolbar_location=None, tools="",
                 outline_line_color=None, min_border_right=16, **options)  # fmt: skip
    fig.xgrid.grid_line_alpha = fig.ygrid.grid_line_alpha = 0.5
    return fig


def _axes(fig: Any, x: str, y: str) -> None:
    fig.xaxis.axis_label, fig.yaxis.axis_label = x, y
    for axis in (*fig.xaxis, *fig.yaxis):
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "13px"
        axis.minor_tick_line_color = None


def _layer_axes(fig: Any, y: str, from_zero: bool = True) -> None:
    _axes(fig, "layer (0 is the first)", y)
    if from_zero:
        fig.y_range.start = 0
    fig.xaxis.ticker = _whole_numbers()


def _whole_numbers() -> BasicTicker:
    return BasicTicker(min_interval=1, num_minor_ticks=0)


def _x_range(fig: Any, values: Sequence[float], scale: Scale) -> None:
    if scale == "percent":
        fig.x_range.start, fig.x_range.end = -3, 103
        return
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.05 * (high - low) or 1.0
    fig.x_range.start, fig.x_range.end = low - margin * (low < 0), high + margin


def _source(frame: pd.DataFrame) -> ColumnDataSource:
    numeric = frame.select_dtypes("number")
    return ColumnDataSource({str(name): numeric[name].tolist() for name in numeric})


def _line(fig: Any, frame: pd.DataFrame, column: str, colour: str, marker: str) -> None:
    source = _source(frame)
    fig.line("layer", column, source=source, color=colour, line_width=2)
    dots = fig.scatter("layer", column, source=source, color=colour, size=8, marker=marker)
    shown = [("layer", "@layer"), (heading(column), f"@{column}{{0.0000}}")]
    fig.add_tools(HoverTool(renderers=[dots], tooltips=shown))


def _whiskers(fig: Any, frame: pd.DataFrame, low: str, high: str, colour: str) -> None:
    fig.segment("layer", low, "layer", high, source=_source(frame), color=colour, line_width=2)


def _stacked(values: Sequence[float], step: float) -> list[float]:
    """Height of each dot when dots closer than ``step`` are piled up."""
    counts: dict[int, int] = {}
    heights = []
    for value in values:
        place = round(value / step)
        counts[place] = counts.get(place, 0) + 1
        heights.append(counts[place] - 0.5)
    return heights


def _layer_rows(frame: pd.DataFrame, column: str) -> Rows:
    best = frame.loc[[frame[column].idxmin(), frame[column].idxmax()]] if len(frame) else frame
    nan = math.nan
    return [
        {"label": f"layer {int(row['layer'])}", "value": row[column], "low": nan, "high": nan}
        for row in best.to_dict("records")
    ]


def _plot(
    target: str, fig: Any, caption: str, rows: Rows, scale: Scale = "plain", keys: Keys = ()
) -> Plot:
    show = percent if scale == "percent" else number
    words = [
        f"{row['label']} {show(row['value'])}"
        + ("" if math.isnan(row["low"]) else f" ({show(row['low'])} to {show(row['high'])})")
        for row in rows[:12]
    ]
    item = _renumbered(json_item(fig, ID(target)))
    return Plot(target, json.dumps(item), f"{caption} {'; '.join(words)}.", caption, keys)


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


def _has(frame: pd.DataFrame, *columns: str) -> bool:
    return all(column in frame.columns for column in columns)


def _label(text: str) -> str:
    """Text that is drawn: short, visible, and never taken for mathematics."""
    text = shortened(" ".join(visible(text).split()), 40)
    for marks, harmless in _MATHS:
        text = text.replace(marks, harmless)
    return text


def _distinct(names: Sequence[str]) -> list[str]:
    return [
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]
