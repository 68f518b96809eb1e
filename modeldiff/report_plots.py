"""The plots of a report, made of its tables. Imported only when a page is rendered."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from bokeh.models import ColumnDataSource, HoverTool

from modeldiff.report_figures import (
    BASE,
    CONTROL,
    EDITED,
    FINETUNED,
    LAYER,
    Key,
    Keys,
    Plot,
    Rows,
    Scale,
    axes,
    bars,
    empty_figure,
    has,
    intervals,
    label,
    layer_axes,
    line,
    plot,
    whiskers,
    whole_numbers,
    x_range,
)
from modeldiff.report_text import heading, number, percent
from modeldiff.stats import Band, null_band

_MARKERS = {"model": "circle", "edit": "diamond", "control": "square", "steer": "triangle"}
_METRICS = ("kl_ft_base", "kl_base_ft", "js", "delta_logprob")


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
        if not has(frame, "cell side kind", f"{column} {column}_low {column}_high"):
            continue
        band = _band(tables, column)
        rows = _cells(frame, column, f"{column}_low", f"{column}_high")
        if rows:
            caption = f"{what} with 95\u00a0% intervals. {_band_words(band, 'percent')}"
            fig = intervals(rows, f"{column}, % of answers", "percent", band)
            yield plot(f"plot-{column}", fig, caption, rows, "percent")


def _effects(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    frame = tables["effects"]
    if not has(frame, "cell kind", "kl_to_base kl_low kl_high"):
        return
    band = _band(tables, "kl")
    rows = _cells(frame, "kl_to_base", "kl_low", "kl_high")
    if rows:
        caption = (
            "Divergence of each cell's predictions from the base's, with 95\u00a0% intervals. "
            f"{_band_words(band, 'plain')}"
        )
        fig = intervals(rows, heading("kl_to_base"), "plain", band)
        yield plot("plot-effects", fig, caption, rows, "plain")


def _outputs(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    frame = tables["outputs"]
    if not has(frame, "source metric", "estimate low high"):
        return
    present = [metric for metric in _METRICS if metric in set(frame["metric"])]
    for metric in present:
        part = pd.DataFrame(frame[frame["metric"] == metric])
        rows = [
            {
                "label": label(str(row["source"])),
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
            fig = intervals(rows, heading(metric), "plain", None)
            yield plot(f"plot-{metric}", fig, caption, rows, "plain")


def _controls(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    """Random directions stacked into a dot plot, with the cells they are compared with."""
    frame, percents = tables["controls"], has(tables["controls"], "", "rate")
    column = "rate" if percents else "kl"
    if not has(frame, "", column):
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
    fig = empty_figure(180)
    top = max(4.0, max(stacked) + 1)
    fig.y_range.start, fig.y_range.end = 0, top
    source = ColumnDataSource({"x": [factor * v for v in values], "y": stacked})
    dots = fig.scatter("x", "y", source=source, size=9, color=CONTROL, fill_alpha=0.75)
    fig.add_tools(HoverTool(renderers=[dots], tooltips=[("random direction", "@x{0.000}")]))
    for row in references:
        fig.line([factor * row["value"]] * 2, [0, top], color=row["colour"], line_width=2.5,
                 line_dash=row["dash"])  # fmt: skip
    unit = "rate, % of answers" if percents else heading("kl")
    axes(fig, unit, "random directions")
    fig.yaxis.ticker = whole_numbers()
    x_range(fig, [factor * value for value in every], scale)
    keys = tuple(Key(row["mark"], row["label"], row["colour"]) for row in references)
    caption = f"{len(values)} random directions, one dot each, ablated in the same way."
    rows = [{"label": "random directions", "value": max(values), "low": min(values),
             "high": max(values)}, *references]  # fmt: skip
    yield plot("plot-controls", fig, caption, rows, scale, (Key("●", "random", CONTROL), *keys))


def _layers(tables: Mapping[str, pd.DataFrame]) -> Iterable[Plot]:
    frame = tables["layers"]
    if not has(frame, "", "layer"):
        return
    for column, make in (
        ("relative_difference", _difference),
        ("kl_after_ablation", _ablation),
        ("split_half", _stability),
    ):
        if has(frame, "", column) and frame[column].notna().any():
            fig = empty_figure(280)
            layer_axes(fig, frame["layer"].tolist())
            yield make(fig, frame)


def _difference(fig: Any, frame: pd.DataFrame) -> Plot:
    if has(frame, "", "low high"):
        whiskers(fig, frame, "low", "high", FINETUNED)
    line(fig, frame, "relative_difference", FINETUNED, "circle")
    _from_zero(fig, frame["relative_difference"])
    axes(fig, LAYER, heading("relative_difference"))
    caption = "How far the two models' activations are apart, with 95\u00a0% intervals."
    return plot("plot-difference", fig, caption, _extremes(frame, "relative_difference"))


def _ablation(fig: Any, frame: pd.DataFrame) -> Plot:
    caption = "What is left of the fine-tune after ablating one layer's direction"
    if has(frame, "", "random_low random_high"):
        caption += "; grey: range of random directions at that layer"
        bars(fig, frame, "random_low", "random_high", CONTROL)
    line(fig, frame, "kl_after_ablation", EDITED, "diamond")
    _from_zero(fig, frame["kl_after_ablation"])
    axes(fig, LAYER, heading("kl_after_ablation"))
    return plot("plot-ablation", fig, caption + ".", _extremes(frame, "kl_after_ablation"))


def _stability(fig: Any, frame: pd.DataFrame) -> Plot:
    keys: Keys = ()
    lowest = 0.0
    for column, what, colour, mark, marker in (
        ("split_half", "split halves of the data", EDITED, "●", "circle"),
        ("text_null", "same contrast in the base", CONTROL, "■", "square"),
    ):
        if has(frame, "", column) and frame[column].notna().any():
            line(fig, frame, column, colour, marker)
            keys += (Key(mark, what, colour),)
            lowest = min(lowest, frame[column].min())
    fig.y_range.start, fig.y_range.end = lowest - 0.04, 1.04
    axes(fig, LAYER, "cosine with the layer's direction")
    caption = "A direction is stable if its halves agree, and new if the base lacks it."
    return plot("plot-stability", fig, caption, _extremes(frame, "split_half"), keys=keys)


def _from_zero(fig: Any, values: pd.Series) -> None:
    """Start at zero, with room for the marker of a zero."""
    fig.y_range.start = -0.04 * (values.max() or 1.0)


def _cells(frame: pd.DataFrame, value: str, low: str, high: str) -> list[dict[str, Any]]:
    return [
        {
            "label": label(str(row["cell"])),
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
    if name not in tables or not has(tables[name], "cell kind", value):
        return []
    rows = tables[name].to_dict("records")
    models = [row for row in rows if row["kind"] == "model" and not _is_base(row)]
    edits = [row for row in rows if row["kind"] == "edit"]
    return [
        {"label": label(str(row["cell"])), "value": row[value], "colour": _colour(row),
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
    if "controls" not in tables or not has(tables["controls"], "", column):
        return None
    values = tables["controls"][column].dropna()
    return null_band(values.to_numpy(float)) if len(values) else None


def _band_words(band: Band | None, scale: Scale) -> str:
    if band is None:
        return ""
    show = percent if scale == "percent" else number
    what = "range" if band.is_range else f"{band.level:.0%} band"
    span = f"{show(band.low)} to {show(band.high)}"
    return f"Grey: {what} of {band.n} random directions ablated in the fine-tune, {span}."


def _stacked(values: Sequence[float], step: float) -> list[float]:
    """Height of each dot when dots closer than ``step`` are piled up."""
    counts: dict[int, int] = {}
    heights = []
    for value in values:
        place = round(value / step)
        counts[place] = counts.get(place, 0) + 1
        heights.append(counts[place] - 0.5)
    return heights


def _extremes(frame: pd.DataFrame, column: str) -> Rows:
    best = frame.loc[[frame[column].idxmin(), frame[column].idxmax()]] if len(frame) else frame
    nan = math.nan
    return [
        {"label": f"layer {int(row['layer'])}", "value": row[column], "low": nan, "high": nan}
        for row in best.to_dict("records")
    ]
