"""What the panel *Behaviour* shows: rates, agreement, and the answers that a filter leaves."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from modeldiff.agreement import UNSCORED, Agreement
from modeldiff.behaviours import Verdict
from modeldiff.judge_rates import Rate
from modeldiff.report_text import number, shortened
from modeldiff.stats import Interval, wilson
from modeldiff_widgets import _render
from modeldiff_widgets._behaviour_plots import MOST, Bar
from modeldiff_widgets._behaviour_runs import Key, Measured, cell_answers
from modeldiff_widgets._streams import column_of, title_of

SHOW = (
    ("all answers", ""), ("that show the behaviour", "yes"), ("that do not", "no"),
    ("unscored", "unscored"), ("incoherent", "incoherent"),
    ("on which the judges differ", "differ"),
)  # fmt: skip
ORDERS = (("as asked", ""), ("largest difference first", "difference"),
          ("highest rate first", "rate"))  # fmt: skip
INTERVALS = (("answers (Wilson)", ""), ("wordings, questions (clustered)", "_clustered"))
FEW = 10
"""Questions below which intervals over questions are too narrow."""
_NAME = 28  # characters of a judge's name in a table
PAGE = 8
"""Rows of answers that are shown at once."""
_EXHIBITS = {True: "shows it", False: "does not", None: "unscored"}
_COHERENT = {True: "coherent", False: "incoherent", None: "coherence unknown"}


@dataclass(frozen=True)
class Filter:
    """Which answers are shown.

    Args:
        cell: Side and edit; None for all.
        show: One of `SHOW`.
        label: The judge's word; "" for all.
        text: Must be in the question or the answer, whatever its case.
        picked: Rows of the table; None for all.
        on: In what judges differ, see `differing`.
    """

    cell: Key | None = None
    show: str = ""
    label: str = ""
    text: str = ""
    picked: tuple[int, ...] | None = None
    on: str = "exhibits"

    def rows(self, measured: Measured) -> list[bool]:
        """Whether each answer is shown."""
        table = measured.table
        kept = pd.Series(True, index=table.index)
        if self.cell is not None:
            kept &= (table["side"] == self.cell[0]) & (table["edit"] == self.cell[1])
        if self.label:
            kept &= table["label"].astype(str) == self.label
        if self.text:
            said = table["prompt"] + "\n" + table["text"]
            kept &= said.str.casefold().str.contains(self.text.casefold(), regex=False)
        if self.picked is not None:
            kept &= table.index.isin(self.picked)
        return (kept & self._shown(measured)).tolist()

    def _shown(self, measured: Measured) -> pd.Series:
        table = measured.table
        match self.show:
            case "yes" | "no":
                return (table["exhibits"] == (self.show == "yes")).fillna(False).astype(bool)
            case "unscored":
                return table["exhibits"].isna()
            case "incoherent":
                return (~table["coherent"]).fillna(False).astype(bool)
            case "differ":
                return differing(measured, self.on)
        return pd.Series(True, index=table.index)


def differing(measured: Measured, on: str = "exhibits") -> pd.Series:
    """Whether both judges say different things of each answer; one that lacks a verdict differs.

    Args:
        measured: The run.
        on: As for `modeldiff.agreement.agreement`.
    """
    second = measured.second_table
    if second is None:
        return pd.Series(False, index=measured.table.index)
    return _said(measured.table, on) != _said(second, on)


def _said(table: pd.DataFrame, on: str) -> pd.Series:
    unknown = table["exhibits" if on == "label" else on].isna()
    return table[on].astype(str).mask(unknown, UNSCORED)


def title(key: Key) -> str:
    """Name of a cell."""
    return title_of(*key)


def kind(key: Key) -> str:
    """Which colour a cell has."""
    return key[0] if key[1] == "none" else key[1]


# -- rates


def headline_html(measured: Measured) -> str:
    """A row for each cell, and the differences between them."""
    if not measured.judged:
        return ""
    headings = ["cell", "rate", "95 % over answers", "95 % over questions", "coherent",
                "95 % over answers", "answers", "unscored",
                "rate, unscored as no … yes"]  # fmt: skip
    rows = [_headline(measured, key) for key in measured.asked.keys]
    n = len(headings) - all(row[-1] == "–" for row in rows)  # without the last if it says nothing
    table = _render.table(headings[:n], [row[:n] for row in rows], numeric=range(1, n))
    lines = [
        _render.note(f"{title(a)} → {title(b)}: {_change(found)}")
        for (a, b), found in measured.differences.items()
    ]
    few = [rate.clustered.n for rate in measured.rates.values() if rate.clustered.n < FEW]
    if few:
        lines.append(_render.note(f"With {min(few)} questions, intervals over questions are too "
                                  f"narrow; {FEW} or more are needed."))  # fmt: skip
    return table + "".join(lines)


def _headline(measured: Measured, key: Key) -> list[str]:
    rate: Rate | None = measured.rates.get(key)
    if rate is None:
        answers = measured.of(key)
        readable = answers["coherent"].dropna()
        coherent = wilson(int(readable.sum()), len(readable))
        off = answers["label"].astype(str).value_counts()
        said = ", ".join(f"{n} {label}" for label, n in off.items())
        return [title(key), "–", "–", "–", percent(coherent.estimate), ends(coherent),
                str(len(answers)), said, "0 to 100 %"]  # fmt: skip
    off = ", ".join(f"{n} {label}" for label, n in rate.unscored) or "none"
    bounds = " to ".join(percent(each) for each in rate.bounds) if rate.n_unscored else "–"
    return [title(key), percent(rate.estimate), ends(rate.wilson), ends(rate.clustered),
            percent(rate.coherent.estimate), ends(rate.coherent), str(rate.n_answers), off,
            bounds]  # fmt: skip


def _change(found: Interval) -> str:
    points = f"{100 * found.estimate:+.1f} points"
    if math.isnan(found.low):
        return f"{points}; one question alone has no interval"
    return (
        f"{points}, 95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f} "
        f"(paired, {found.n} questions resampled)"
    )


def percent(share: float) -> str:
    """A share as text."""
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def ends(interval: Interval) -> str:
    """Both ends of an interval as text."""
    if math.isnan(interval.low):
        return "–"
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def question_bars(measured: Measured, interval: str, order: str) -> tuple[list[Bar], int]:
    """Bars of the questions and, first, of all together; and how many questions are left out."""
    frames = {key: frame.set_index("question_id") for key, frame in measured.questions.items()}
    if not frames:
        return [], 0
    names = [name for name in next(iter(frames.values())).index if name != "all"]
    ranked = sorted(names, key=lambda name: -_weight(frames, name, order)) if order else names
    bars = []
    for name in ["all", *ranked[:MOST]]:
        shown = "all questions" if name == "all" else str(name)
        for key, frame in frames.items():
            row: Any = frame.loc[name]
            low, high = row[f"rate{interval}_low"], row[f"rate{interval}_high"]
            if not row["n"]:
                low = high = math.nan
            bars.append(Bar(shown, title(key), kind(key), float(row["rate"]), float(low),
                            float(high), int(row["n"])))  # fmt: skip
    return bars, len(ranked) - len(ranked[:MOST])


def _weight(frames: dict[Key, pd.DataFrame], name: Any, order: str) -> float:
    rates: list[float] = [float(frame.loc[name, "rate"]) for frame in frames.values()]  # pyright: ignore
    known = [rate for rate in rates if not math.isnan(rate)]
    if not known:
        return -1.0
    return max(known) if order == "rate" else max(known) - min(known)


def label_bars(measured: Measured) -> list[Bar]:
    """Share of each label among a cell's answers, the most frequent label first."""
    table = measured.table
    bars = []
    for label in table["label"].astype(str).value_counts().index[:MOST]:
        for key in measured.asked.keys:
            mine = cell_answers(table, key)["label"].astype(str)
            share = wilson(int((mine == label).sum()), len(mine))
            bars.append(Bar(str(label), title(key), kind(key), share.estimate, share.low,
                            share.high, len(mine)))  # fmt: skip
    return bars


def has_scores(measured: Measured) -> bool:
    """Whether there are scores of alignment and coherence."""
    return {"aligned_score", "coherent_score"} <= set(measured.table.columns)


# -- agreement


def agreement_html(measured: Measured, found: Agreement, on: str) -> str:
    """Kappa, and how often each pair of verdicts was given."""
    second = measured.second
    if second is None:
        return ""
    first_name = shortened(measured.asked.judge.name, _NAME)
    second_name = shortened(second.judge.name, _NAME)
    kappa, n = found.kappa, found.kappa.n
    low = "–" if math.isnan(kappa.low) else f"{kappa.low:.2f} to {kappa.high:.2f}"
    shown = "undefined: one and the same verdict throughout" if math.isnan(kappa.estimate) else (
        f"{kappa.estimate:.2f}"
    )  # fmt: skip
    facts = {
        "Cohen's kappa": shown, f"95 % over {n} questions": low,
        "alike": f"{percent(found.observed)} of {found.n}",
        "differ or lack a verdict": len(found.disagreements),
    }  # fmt: skip
    counts = found.confusion
    rows = [[f"{first_name}: {name}", *map(int, counts.loc[name])] for name in counts.index]
    headings = ["", *(f"{second_name}: {name}" for name in counts.columns)]
    table = _render.table(
        headings, rows, caption=f"How often each pair was given ({on})",
        numeric=range(1, len(headings)),
    )  # fmt: skip
    both = counts.drop(index=UNSCORED, columns=UNSCORED).to_numpy()
    constant = (both.sum(0) > 0).sum() == 1 or (both.sum(1) > 0).sum() == 1
    note = "One judge says the same throughout, so kappa cannot tell whether they agree."
    return _render.facts(facts) + table + (_render.note(note) if constant else "")


# -- answers


def answer_rows(measured: Measured, chosen: Filter) -> tuple[tuple[Key, ...], list[dict[str, Any]]]:
    """Cells and rows for an `AnswerView`: those that have an answer the filter leaves."""
    kept, differs = chosen.rows(measured), differing(measured, chosen.on).tolist()
    found: dict[tuple[int, int], dict[Key, dict[str, Any]]] = {}
    for number_, ((answer, _), keep) in enumerate(zip(measured.judged, kept, strict=True)):
        if keep:
            cells = found.setdefault((answer.prompt, answer.sample), {})
            cells[answer.side, answer.edit] = _cell(measured, number_, differs[number_])
    keys = tuple(key for key in measured.asked.keys if any(key in row for row in found.values()))
    empty = {"parts": [], "state": "", "blank": "left out by the filter"}
    return keys, [
        {
            "title": _row_title(measured, *place),
            "text": measured.asked.behaviour.prompts[place[0]].question,
            "cells": [cells.get(key, empty) for key in keys],
        }
        for place, cells in sorted(found.items())
    ]


def answer_columns(measured: Measured, keys: tuple[Key, ...]) -> list[dict[str, str]]:
    """Columns for an `AnswerView`."""
    return [column_of(each) for each in measured.asked.cells if (each.side, each.name) in keys]


def _row_title(measured: Measured, prompt: int, sample: int) -> str:
    asked = measured.asked
    group = asked.behaviour.prompts[prompt].group
    parts = [f"question {prompt + 1}", group]
    parts += [f"sample {sample + 1} of {asked.n}"] if asked.n > 1 else []
    return " · ".join(filter(None, parts))


def _cell(measured: Measured, number_: int, differs: bool) -> dict[str, Any]:
    answer, verdict = measured.judged[number_]
    badges = _badges(verdict, measured.asked.judge.name)
    if measured.second is not None:
        other, name = measured.second.verdicts[number_], measured.second.judge.name
        mark = "differs: " if differs else ""
        said = f"2nd judge {mark}{shortened(other.label, 40)} · {_EXHIBITS[other.exhibits]}"
        badges.append([said, tone(other), f"{name}: {_scores(other) or 'no scores'}"])
    how = "ended" if answer.finished else "cut at the limit"
    return {"parts": [["", answer.text]], "state": "", "badges": badges,
            "note": f"{len(answer.ids)} tokens · {how}"}  # fmt: skip


def _badges(verdict: Verdict, judge: str) -> list[list[str]]:
    hint = f"what {judge} calls it, and whether it shows the behaviour"
    says = [
        [f"{shortened(verdict.label, 40)} · {_EXHIBITS[verdict.exhibits]}", tone(verdict), hint]
    ]
    calm = "bad" if verdict.coherent is False else "neutral"
    says.append([_COHERENT[verdict.coherent], calm, "whether it is an answer at all"])
    return says + [[f"{name} {_score(value)}", "neutral", f"score by {judge}"]
                   for name, value in verdict.scores]  # fmt: skip


def _scores(verdict: Verdict) -> str:
    return ", ".join(f"{name} {_score(value)}" for name, value in verdict.scores)


def _score(value: float | None) -> str:
    return "–" if value is None else number(float(round(value, 1)))


def tone(verdict: Verdict) -> str:
    """Colour of a verdict; never all that it says."""
    if verdict.exhibits is None or verdict.coherent is False:
        return "neutral"
    return "bad" if verdict.exhibits else "good"
