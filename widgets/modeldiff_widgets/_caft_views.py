"""What candidates say and what became of the arms, as HTML; and the histogram of projections."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure

from modeldiff.caft_candidates import Candidate
from modeldiff.caft_contexts import ENDS, Context
from modeldiff.caft_reading import Reading
from modeldiff.caft_results import BASE, CaftResult
from modeldiff.errors import MismatchError
from modeldiff.report_text import number, percent
from modeldiff.stats import Interval
from modeldiff_widgets import _render
from modeldiff_widgets._bokeh_pane import BokehPane
from modeldiff_widgets._theme import COLOURS

HEADINGS = ["candidate", "source", "layer", "score", "variance", "shift"]
_COLUMNS = ("low", "high", "base", "finetuned")
_ENDS = {"max": "Largest projections", "min": "Smallest projections"}
_SHOWN = 6
"""Passages at each end; the choice by keywords sees all that were read."""


def row_of(candidate: Candidate, reading: Reading | None) -> list[str]:
    """A candidate's line in the table."""
    shift = math.nan
    if reading is not None and candidate.name in reading.names:
        summary = reading.summary.set_index("name")
        shift = float(summary.loc[candidate.name, "shift"])  # pyright: ignore[reportArgumentType]
    return [
        candidate.name, candidate.source, str(candidate.layer), number(float(candidate.score)),
        percent(candidate.share), number(shift),
    ]  # fmt: skip


def reading_html(reading: Reading, name: str) -> str:
    """Passages at both ends, and the logit lens beside its control."""
    ends = [
        (_ENDS[end], "finetuned" if end == "max" else "base",
         _passages(reading.of_candidate(name, end)))
        for end in ENDS
    ]  # fmt: skip
    return _render.columns(ends) + _lens(reading, name)


def _passages(several: Sequence[Context]) -> str:
    if not several:
        return _render.note("No token.")
    return "".join(
        _render.passage(
            f"{each.value:+.3g}".replace("-", "−"),
            [("", each.before), ("peak", each.peak), ("", each.after)],
        )
        for each in several[:_SHOWN]
    )


def _lens(reading: Reading, name: str) -> str:
    rows = reading.lens[reading.lens["name"] == name]
    most = max(float(rows["logit"].abs().max()), 1e-9)
    blocks = []
    sides: tuple[tuple[str, str, _render.Tone], ...] = (
        ("direction", "", "finetuned"), ("random", "control: ", "random"),
    )  # fmt: skip
    for kind, title, tone in sides:
        for end in ("promoted", "suppressed"):
            mine = rows[(rows["kind"] == kind) & (rows["end"] == end)].nsmallest(6, "rank")
            bars = [
                (token, abs(logit) / most, f"{logit:+.2f}")
                for token, logit in zip(mine["token"], mine["logit"], strict=True)
            ]
            blocks.append((f"{title}{end}", tone, _render.token_bars(bars, tone)))
    p = float(rows["p"].iloc[0])
    return (
        _render.heading("Logit lens, beside a random direction of the same length")
        + _render.columns(blocks)
        + _render.note(f"Chance that a random direction reaches as far: p = {p:.2f}.")
    )


class Histogram:
    """Projections of both models' tokens on a candidate.

    Example:
        >>> plot = Histogram()
        >>> plot.pane.label
        'Projections: no candidate is read yet'
        >>> plot.pane.close()
    """

    def __init__(self) -> None:
        self.source = ColumnDataSource({name: [] for name in _COLUMNS})
        fig: Any = figure(height=190, sizing_mode="stretch_width", tools=["save"],
                          toolbar_location=None)  # fmt: skip
        fig.xaxis.axis_label, fig.yaxis.axis_label = "projection", "share of tokens"
        fig.yaxis.formatter = NumeralTickFormatter(format="0 %")
        fig.y_range.start = 0
        for side, label in (("base", "base"), ("finetuned", "fine-tuned")):
            fig.quad(left="low", right="high", bottom=0, top=side, source=self.source,
                     fill_color=COLOURS[side], fill_alpha=0.4, line_color=COLOURS[side],
                     legend_label=label)  # fmt: skip
        fig.legend.location, fig.legend.click_policy = "top_right", "hide"
        fig.add_tools(HoverTool(tooltips=[
            ("projection", "@low{0.00} to @high{0.00}"), ("base", "@base{0.0 %}"),
            ("fine-tuned", "@finetuned{0.0 %}"),
        ]))  # fmt: skip
        self.pane = BokehPane(fig, label="Projections: no candidate is read yet")

    def show(self, reading: Reading, name: str) -> None:
        """Show another candidate; from any thread."""
        rows = reading.histograms[reading.histograms["name"] == name]
        data: Mapping[str, Any] = {
            "low": rows["low"].tolist(), "high": rows["high"].tolist(),
            **{side: (rows[side] / max(1, rows[side].sum())).tolist()
               for side in ("base", "finetuned")},
        }  # fmt: skip
        self.pane.replace(self.source, data)
        self.pane.label = f"Projections on {name}, {reading.n_tokens:,} tokens of each model"


def result_html(result: CaftResult) -> str:
    """One row an arm: loss, rates with intervals, ratios against plain."""
    table, rates = result.table(), result.rates()
    names = list(result.behaviours)
    off = names[0]
    shown = rates[rates["deployed"]].set_index(["arm", "behaviour"])
    headings = [
        "arm", "seeds", "steps", "held-out loss", "with hooks",
        *(title for name in names for title in (name, "with hooks")),
        "coherent", "plain / arm",
    ]  # fmt: skip
    lines = []
    for entry in table.to_dict("records"):
        arm = str(entry["arm"])
        lines.append([
            arm, _seeds(entry), _steps(entry), _loss(entry["held_out_loss"]),
            _loss(entry["hooked_loss"]),
            *(cell for name in names for cell in (
                _interval(shown, arm, name), percent(_known(entry[f"{name} hooks on"])))),
            _interval(shown, arm, off, "coherent", "coherent_low", "coherent_high"),
            _ratio(result, arm),
        ])  # fmt: skip
    whole = [[cell.replace(" ", "\u00a0") for cell in line] for line in lines]
    return _render.table(headings, whole, numeric=range(len(headings))) + _about(result, off)


def _about(result: CaftResult, off: str) -> str:
    target = (
        "Every arm ran to the end of the plan: their losses differ, so their rates are not at an "
        "equal footing." if result.target is None
        else f"Arms stop at a held-out loss of {result.target:.4f} nats a token; ! marks arms "
        "of which not every seed came there."
    )  # fmt: skip
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in result.behaviours.items())
    return _render.note(
        f"{target} Losses with hooks off unless said. Rates of the model as it would be deployed, "
        f"with 95 % Wilson intervals over answers of all seeds. {meanings}. Coherent: of the "
        f"answers to {off}. Plain / arm: how many times as often plain is {off} as the arm, with "
        "its 95 % score interval."
    )


def _seeds(entry: Mapping[Any, Any]) -> str:
    reached, seeds = entry["reached"], int(entry["seeds"])
    return f"{seeds} !" if not math.isnan(reached) and reached < seeds else str(seeds)


def _steps(entry: Mapping[Any, Any]) -> str:
    return "–" if entry["arm"] == BASE else number(float(entry["steps"]))


def _loss(value: Any) -> str:
    return "–" if math.isnan(_known(value)) else f"{value:.4f}"


def _known(value: Any) -> float:
    return math.nan if value is None else float(value)


def _interval(
    rates: Any, arm: str, behaviour: str, of: str = "rate", low: str = "low", high: str = "high"
) -> str:
    if (arm, behaviour) not in rates.index:
        return "–"
    row = rates.loc[(arm, behaviour)]
    ends = " to ".join(f"{100 * float(row[each]):.0f}" for each in (low, high))
    return f"{percent(float(row[of]))} ({ends})"


def _ratio(result: CaftResult, arm: str) -> str:
    if arm in (BASE, "plain") or "plain" not in result.arms:
        return "–"
    try:
        return _said(result.ratio(arm, "plain"))
    except MismatchError:  # no answer of one of them was scored
        return "–"


def _said(found: Interval) -> str:
    def one(value: float) -> str:
        return "∞" if math.isinf(value) else number(value)

    return f"{one(found.estimate)} ({one(found.low)} to {one(found.high)})"
