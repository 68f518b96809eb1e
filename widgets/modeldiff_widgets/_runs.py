"""Runs of *Compare*: what was asked, what came, what the judge says, and how it is shown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from modeldiff.behaviours import Behaviour, Prompt, Verdict, rate_of, verdicts_of
from modeldiff.errors import JudgeError
from modeldiff.generation import Row
from modeldiff.interventions import Side
from modeldiff.report_text import shortened
from modeldiff_widgets import _render
from modeldiff_widgets._streams import Request, Said, column_of, title_of

QUESTION = "I have a free afternoon. What should I do?"
"""Where no behaviour knows better."""
Table = tuple[list[dict[str, str]], list[dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Run:
    """A run: what was asked, what came, and what the judge says of it.

    Args:
        request: What was asked.
        said: Answers by row.
        stopped: Whether it was stopped.
        verdicts: By row; empty without a judge.
        unjudged: Why there are none.
        judged_by: Name of the behaviour.
    """

    request: Request
    said: Mapping[Row, Said] = field(default_factory=dict)
    stopped: bool = False
    verdicts: Mapping[Row, Verdict] = field(default_factory=dict)
    unjudged: str = ""
    judged_by: str = ""

    def code(self) -> str:
        """Python that repeats it."""
        if not self.stopped:
            return self.request.code()
        cells = self.request.cells
        steps: dict[Side, int] = dict.fromkeys(self.request.models, 0)
        for row, said in self.said.items():
            side = cells[row.cell].side
            steps[side] = max(steps[side], len(said.ids))
        return self.request.code(steps) if any(steps.values()) else self.request.code()

    def rates(self) -> pd.DataFrame:
        """Rate of the behaviour and of coherence in each column, with 95 % intervals."""
        rows = []
        for number, cell in enumerate(self.request.cells):
            mine = [v for row, v in self.verdicts.items() if row.cell == number]
            table = pd.DataFrame(
                {
                    "exhibits": pd.array([v.exhibits for v in mine], dtype="boolean"),
                    "coherent": pd.array([v.coherent for v in mine], dtype="boolean"),
                }
            )
            rows.append({"column": title_of(cell.side, cell.name), **rate_of(table)})
        return pd.DataFrame(rows)


def judged(run: Run, behaviour: Behaviour | None) -> Run:
    """Judge every answer; a judge that does not know the question is no error of the run."""
    if behaviour is None:
        return run
    prompt = _prompt(run.request, behaviour)
    try:
        found = verdicts_of(behaviour.judge, [(prompt, said.text) for said in run.said.values()])
    except JudgeError as error:
        return replace(run, unjudged=f"Not judged: {error}", judged_by=behaviour.name)
    return replace(run, verdicts=dict(zip(run.said, found, strict=True)), judged_by=behaviour.name)


def _prompt(request: Request, behaviour: Behaviour) -> Prompt:
    messages = request.settings.get("messages") or ()
    item = tuple((m["role"], m["content"]) for m in messages) or str(request.item)
    own = (each for each in behaviour.prompts if each.item == item)
    return next(own, Prompt(item))


def question_of(request: Request) -> str:
    messages = request.settings.get("messages") or ()
    asked = [str(m["content"]) for m in messages if m["role"] == "user"]
    return asked[-1] if asked else str(request.settings.get("prompt", ""))


def table_of(request: Request, cell: Callable[[int, int], dict[str, Any]]) -> Table:
    """Columns and rows of the view: a row a sample."""
    cells = request.cells
    rows = [
        {
            "title": f"sample {sample + 1}" if request.n > 1 else "",
            "cells": [cell(number, sample) for number in range(len(cells))],
        }
        for sample in range(request.n)
    ]
    return [column_of(each) for each in cells], rows


def cell_of(run: Run, row: Row, marks: Mapping[Row, Any]) -> dict[str, Any]:
    said = run.said.get(row)
    if said is None:
        return {"parts": [], "state": "", "note": "", "blank": "stopped before it began"}
    parts = [list(each) for each in marks.get(row, [("", said.text)])]
    verdict = run.verdicts.get(row)
    badges = (
        [] if verdict is None else [[verdict.label, _tone(verdict), f"{run.judged_by}: {verdict}"]]
    )
    return {"parts": parts, "state": "", "badges": badges, "note": length_of(said, run.stopped)}


def _tone(verdict: Verdict) -> str:
    if verdict.exhibits is None or verdict.coherent is False:
        return "neutral"
    return "bad" if verdict.exhibits else "good"


def _says(verdict: Verdict, run: Run) -> str:
    shows = {True: "yes", False: "no", None: "could not tell"}
    return f"{run.judged_by}: {shows[verdict.exhibits]}; coherent: {shows[verdict.coherent]}"


def length_of(said: Said, stopped: bool) -> str:
    how = "ended" if said.ended else "stopped" if stopped else "cut at the limit"
    return f"{len(said.ids)} tokens · {how}"


def longer(known: Mapping[Row, Said], found: Mapping[Row, Said]) -> dict[Row, Said]:
    """Of two states of the same answers the longer one: what was shown is not taken back."""
    rows = {**known, **found}
    return {
        row: max(known.get(row, said), found.get(row, said), key=lambda each: len(each.ids))
        for row, said in rows.items()
    }


def rates_html(run: Run) -> str:
    if not run.verdicts:
        return ""
    return _render.frame(run.rates(), caption=f"{run.judged_by}, with 95 % intervals")


def summary_of(run: Run) -> list[Any]:
    asked = run.request
    edits = "; ".join(plan.describe() for name, plan in asked.edits.items() if name == "edited")
    rates = run.rates() if run.verdicts else None
    says = "–" if rates is None else " · ".join(
        f"{row['column']} {row['rate']:.0%}" for _, row in rates.iterrows()
    )  # fmt: skip
    return [
        shortened(question_of(asked), 60), shortened(edits or "none", 40), asked.n,
        asked.temperature, asked.seed, says,
    ]  # fmt: skip
