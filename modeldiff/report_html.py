"""The page of a report: one HTML file that needs nothing else.

Imported only when a page is rendered, with the two libraries that takes.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from modeldiff.report import Report, Table
from modeldiff.report_plots import Plot, plots
from modeldiff.report_text import (
    Grid,
    grid,
    heading,
    number,
    percent,
    shortened,
    token_text,
    visible,
)

_TEMPLATES = Path(__file__).parent / "templates"
_FOLDED = {"controls", "layers"}
_MOVED = ("promoted", "demoted")
_MAX_EXAMPLES, _MAX_STRIPS, _MAX_TOKENS = 40, 20, 4000
_LESS_LIKELY = -0.1  # nats; smaller moves are everywhere
_NO_PREDICTION = "no prediction: first token"


@dataclass(frozen=True)
class Section:
    """A table with its plots, as the page shows them."""

    name: str
    title: str
    caption: str
    grid: Grid
    plots: tuple[Plot, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Token:
    """One token of a strip."""

    text: str
    heat: str
    """Its divergence as a share of the largest on the page, 0 to 1."""
    less_likely: bool
    """Whether the fine-tune finds the token that came less likely than the base does."""
    hover: str
    role: str
    """Who speaks from here on; empty where that is as before."""


@dataclass(frozen=True)
class Strip:
    """One text, token by token."""

    label: str
    tokens: tuple[Token, ...]
    top: Grid
    """The tokens where the two models differ most."""


def page(report: Report) -> str:
    """Render the whole page."""
    drawn = plots({name: table.frame for name, table in report.tables.items()})
    script = _source("report.js")
    library = Resources(mode="inline", components=["bokeh"]).js_raw[0] if drawn else ""
    scripts = [text for text in (library, script) if drawn]
    tokens = report.tables["tokens"].frame if "tokens" in report.tables else pd.DataFrame()
    return _environment().get_template("report.html.j2").render(
        report=report,
        style=Markup(_source("report.css")),
        scripts=[Markup(text) for text in scripts],
        policy=" ".join(f"'sha256-{_sha256(text)}'" for text in scripts) or "'none'",
        plot_data=[(plot.target, _script_json(plot.item)) for p in drawn.values() for plot in p],
        sections={section.name: section for section in _sections(report, drawn)},
        examples=_examples(report.tables.get("examples")),
        n_examples=_n_rows(report.tables.get("examples")),
        strips=tuple(_strips(tokens)),
        heat_scale=number(_hottest(tokens)),
        pair=_facts(report.pair),
        settings=_facts(report.settings),
        commands=_commands(report.settings),
        directions=grid(_direction_frame(report)),
        direction_notes=[(each.name, each.notes) for each in report.directions if each.notes],
        seconds=[(stage, f"{wall:.1f} s") for stage, wall in report.seconds.items()],
        total_seconds=f"{sum(report.seconds.values()):.1f} s",
        plot_version=version("bokeh"),
    )  # fmt: skip


def summary(report: Report) -> str:
    """Render the findings and the main table alone, without scripts, for notebooks."""
    name = report.main_table
    main = _section(name, report.tables[name], ()) if name else None
    return _environment().get_template("summary.html.j2").render(report=report, main=main)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: Any) -> Any:
    """What every expression of a template passes through before it is escaped."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _source(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _script_json(text: str) -> Markup:
    """JSON that cannot end the element it stands in."""
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _sections(report: Report, drawn: Mapping[str, tuple[Plot, ...]]) -> Iterator[Section]:
    for name, table in report.tables.items():
        if name not in ("examples", "tokens"):
            yield _section(name, table, drawn.get(name, ()))


def _section(name: str, table: Table, drawn: tuple[Plot, ...]) -> Section:
    folded = name in _FOLDED or (name not in _MOVED and len(table.frame) > 12)
    return Section(name, table.title, table.caption, grid(table.frame), drawn, folded)


def _n_rows(table: Table | None) -> int:
    return 0 if table is None else len(table.frame)


def _examples(table: Table | None) -> list[dict[str, Any]]:
    """Prompts with the answers of base, fine-tune and edit, as far as the table has them."""
    if table is None or "prompt" not in table.frame:
        return []
    columns = [name for name in ("base", "finetuned", "edited") if name in table.frame]
    return [
        {
            "prompt": _plain(row["prompt"]),
            "answers": [
                {
                    "column": column,
                    "text": _plain(row[column]),
                    "label": _plain(row.get(f"{column}_label")),
                }
                for column in columns
            ],
        }
        for row in table.frame.head(_MAX_EXAMPLES).to_dict("records")
    ]


def _plain(value: Any) -> str:
    return "" if value is None or pd.isna(value) else str(value)


def _strips(frame: pd.DataFrame) -> Iterator[Strip]:
    needed = {"source", "text", "token", "kl_ft_base"}
    if not needed <= set(frame.columns):
        return
    hottest = _hottest(frame)
    keys = frame[["source", "text"]].drop_duplicates().head(_MAX_STRIPS)
    for source, text in keys.itertuples(index=False, name=None):
        part = frame[(frame["source"] == source) & (frame["text"] == text)]
        rows = part.head(_MAX_TOKENS).to_dict("records")
        roles = [_plain(row.get("role")) for row in rows]
        starts = [a if a != b else "" for a, b in zip(roles, ["", *roles], strict=False)]
        tokens = tuple(_token(row, hottest, role) for row, role in zip(rows, starts, strict=True))
        columns = ["position", "token", "kl_ft_base", "top1_base", "top1_ft"]
        top = part.nlargest(6, "kl_ft_base").filter(columns)
        name = f"text {text}" if isinstance(text, int) else shortened(str(text), 60)
        yield Strip(f"{source} · {name}", tokens, grid(top))


def _hottest(frame: pd.DataFrame) -> float:
    values = frame["kl_ft_base"].dropna().tolist() if "kl_ft_base" in frame else []
    return max(values, default=0.0)


def _token(row: Mapping[Any, Any], hottest: float, role: str) -> Token:
    kl = row["kl_ft_base"]
    share = kl / hottest if hottest > 0 and kl == kl else 0.0
    change = row.get("delta_logprob", 0.0)
    text = str(row["token"])
    facts = [f"{token_text(text)!r}"]
    if kl == kl:
        facts.append(f"KL(finetuned ‖ base) {number(float(kl))} nats")
        facts += [
            f"{words} {number(float(row[column]))} nats"
            for column, words in (("js", "JS"), ("delta_logprob", "log p_ft − log p_base"))
            if column in row and row[column] == row[column]
        ]
        facts += [
            f"{heading(column)} {token_text(_plain(row[column]))!r}"
            for column in ("top1_base", "top1_ft")
            if column in row
        ]
    else:
        facts.append(_NO_PREDICTION)
    shown = visible(text).replace("\n", "↵\n").replace("\t", "⇥")
    return Token(
        shown, f"{min(max(share, 0), 1):.3f}", change < _LESS_LIKELY, "\n".join(facts), role
    )


def _facts(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as one list of names and values."""
    found: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            found += _facts(value, f"{prefix}{key}.")
        elif prefix or key not in ("python", "command"):
            found.append((f"{prefix}{key}", _value_text(value)))
    return found


def _value_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False)


def _commands(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How to repeat the audit: what it was told to show, else the command for its folder."""
    told = [("Python", settings.get("python")), ("Command line", settings.get("command"))]
    given = [(name, text) for name, text in told if isinstance(text, str) and text]
    return given or [("Command line (FOLDER is the folder of this file)", "modeldiff rerun FOLDER")]


def _direction_frame(report: Report) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "name": each.name,
                "site": str(each.site),
                "length": each.scale,
                "of the residual norm": percent(each.relative_scale or float("nan")),
                "tokens": each.n_tokens,
                "split-half cosine": _or_nan(each.split_half),
                "cosine with text null": _or_nan(each.text_null),
                "method": each.method,
                "points": each.sign,
                "hash": each.content_key,
            }
            for each in report.directions
        ]
    )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
