"""The only maker of HTML: everything that comes in is text, and is escaped here.

The results are complete fragments that need no script. Styles that matter are inline, so that they
survive where a notebook is not trusted.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any, Literal

import pandas as pd

from modeldiff.report_text import grid, number, token_text, visible
from modeldiff_widgets._theme import COLOURS, css

Tone = Literal["base", "finetuned", "edited", "random", "good", "bad", "neutral"]
_TONES = {**COLOURS, "good": "#009E73", "bad": "#D55E00", "neutral": "#777777"}
_IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def esc(value: Any) -> str:
    """Make any value safe as text and as an attribute, with what cannot be seen made visible."""
    return escape(visible(str(value)), quote=True)


def token(text: str) -> str:
    """A token on its own, its spaces and line ends visible."""
    return f"<code>{esc(token_text(text))}</code>"


def styled(body: str) -> str:
    """A fragment that brings its stylesheet: for pins and files."""
    return f'<style>{css()}</style><div class="mdw mdw-static">{body}</div>'


def section(title: str, parts: Iterable[str], *, code: str = "", when: bool = False) -> str:
    """A titled block of parts, with the code that makes it below.

    Args:
        title: Heading.
        parts: HTML made by the functions of this module.
        code: Python.
        when: Whether to say when it was made.
    """
    stamp = note(f"pinned {datetime.now():%Y-%m-%d %H:%M:%S}") if when else ""
    listing = f"<details><summary>Code</summary>{code_block(code)}</details>" if code else ""
    return (
        f'<section class="mdw-section" style="margin:0 0 12px"><h4 class="mdw-title" '
        f'style="margin:0 0 6px">{esc(title)}</h4>{stamp}{"".join(parts)}{listing}</section>'
    )


def heading(text: str) -> str:
    """A small heading."""
    return f'<div class="mdw-heading"><strong>{esc(text)}</strong></div>'


def note(text: str) -> str:
    """One muted line."""
    return f'<div class="mdw-note">{esc(text)}</div>'


def paragraph(text: str) -> str:
    """Text with its line ends kept."""
    return f'<div class="mdw-text" dir="auto">{esc(text).replace(chr(10), "<br>")}</div>'


def badge(text: str, tone: Tone = "neutral", *, title: str = "") -> str:
    """A small label; its colour is never all that it says."""
    hint = f' title="{esc(title)}"' if title else ""
    return (
        f'<span class="mdw-badge" style="border-color:{_TONES[tone]}"{hint}>'
        f'<span class="mdw-dot" style="background:{_TONES[tone]}"></span>{esc(text)}</span>'
    )


def alert(line: str, traceback: str = "") -> str:
    """One line that says what went wrong, with the traceback folded below."""
    more = (
        f"<details><summary>Traceback</summary><pre>{esc(traceback)}</pre></details>"
        if traceback
        else ""
    )
    return (
        f'<div class="mdw-alert" role="alert" style="border-left:4px solid {_TONES["bad"]}">'
        f"<span>{esc(line)}</span>{more}</div>"
    )


def code_block(code: str) -> str:
    """Python as text; a click selects all of it."""
    return f'<pre class="mdw-code" style="user-select:all">{esc(code)}</pre>'


def facts(pairs: Mapping[str, Any]) -> str:
    """Names and values side by side."""
    items = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(_shown(value))}</dd></div>"
        for name, value in pairs.items()
    )
    return f'<dl class="mdw-facts">{items}</dl>'


def table(
    headings: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    caption: str = "",
    numeric: Iterable[int] = (),
    selected: int = -1,
) -> str:
    """A table of texts and numbers.

    Args:
        headings: Of the columns.
        rows: Cells; floats get three digits, other values are written as they are.
        caption: Above the table.
        numeric: Columns that are set right; found by themselves if none is named.
        selected: A row to mark.
    """
    body = [list(each) for each in rows]
    right = set(numeric) or {
        i
        for i in range(len(headings))
        if body and all(isinstance(row[i], int | float) for row in body)
    }
    mark = [' class="num"' if i in right else "" for i in range(len(headings))]
    top = "".join(f"<th{m}>{esc(h)}</th>" for h, m in zip(headings, mark, strict=True))
    lines = "".join(
        f"<tr{' class=selected' if n == selected else ''}>"
        + "".join(f"<td{m}>{esc(_shown(v))}</td>" for v, m in zip(row, mark, strict=True))
        + "</tr>"
        for n, row in enumerate(body)
    )
    above = f"<caption>{esc(caption)}</caption>" if caption else ""
    return (
        f'<div class="mdw-scroll"><table class="mdw-table">{above}<thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def frame(data: pd.DataFrame, *, caption: str = "", limit: int = 200) -> str:
    """A data frame as reports show it: intervals beside their numbers, fractions in percent."""
    shown = grid(data, limit)
    right = [i for i, cell in enumerate(shown.headings) if cell.kind in ("number", "interval")]
    more = f" (the first {len(shown.rows)} of {shown.n_rows} rows)"
    left_out = more if len(shown.rows) < shown.n_rows else ""
    return table(
        [cell.text for cell in shown.headings],
        [[cell.text for cell in row] for row in shown.rows],
        caption=f"{caption}{left_out}".strip(),
        numeric=right or [-1],
    )


def bar(fraction: float, text: str = "", tone: Tone = "neutral") -> str:
    """A horizontal bar from 0 to 1 with its label."""
    share = 0.0 if fraction != fraction else min(max(float(fraction), 0.0), 1.0)
    return (
        f'<span class="mdw-bar"><span style="width:{100 * share:.1f}%;'
        f'background:{_TONES[tone]}"></span></span> <span class="mdw-num">{esc(text)}</span>'
    )


def top_tokens(sides: Mapping[str, Sequence[Sequence[Any]]]) -> str:
    """The most likely tokens of each side as bars; values are ``(token, probability)``."""
    blocks = []
    for side, pairs in sides.items():
        tone: Any = side if side in _TONES else "neutral"
        blocks.append((side, tone, token_bars([(str(t), p, f"{p:.3f}") for t, p in pairs], tone)))
    return columns(blocks)


def token_bars(rows: Iterable[tuple[str, float, str]], tone: Tone = "neutral") -> str:
    """Tokens with a bar each: token, length of the bar from 0 to 1, and what it says."""
    whole = ' style="white-space:nowrap"'
    lines = "".join(
        f'<tr><td{whole}>{token(text)}</td><td><span class="mdw-bar" style="width:64px">'
        f'<span style="width:{100 * min(max(share, 0.0), 1.0):.1f}%;background:{_TONES[tone]}">'
        f'</span></span></td><td{whole} class="mdw-num">{esc(said.replace("-", "−"))}</td></tr>'
        for text, share, said in rows
    )
    return f'<table class="mdw-top">{lines}</table>'


def columns(blocks: Sequence[tuple[str, str, str]]) -> str:
    """Blocks side by side: (title, tone, HTML made here)."""
    cells = "".join(
        f'<div class="mdw-side" style="border-top:3px solid {_TONES.get(tone, "#777777")}">'
        f'<div class="mdw-heading">{esc(title)}</div>{html}</div>'
        for title, tone, html in blocks
    )
    return f'<div class="mdw-sides">{cells}</div>'


def heat(
    tokens: Sequence[str], values: Sequence[float | None], scale: float, *, name: str = ""
) -> str:
    """Tokens on a background of their values; orange above 0, blue and dotted below."""
    spans = []
    shown_values = [*values, *[None] * (len(tokens) - len(values))]
    for text, value in zip(tokens, shown_values, strict=False):
        spans.append(_heat_token(text, value, scale, name))
    return f'<div class="mdw-heat-static" dir="auto">{"".join(spans)}</div>'


def _heat_token(text: str, value: float | None, scale: float, name: str) -> str:
    inner = esc(text.replace("\n", "↵").replace("\t", "⇥")) + "<br>" * text.count("\n")
    lead = " " if inner.startswith(" ") and len(inner) > 1 else ""  # as in a PairView
    inner = inner[len(lead) :]
    if value is None or value != value:
        return f"{lead}<span>{inner}</span>"
    colour, cap = ("213,94,0", 0.76) if value >= 0 else ("0,114,178", 0.70)
    share = cap * min(abs(value) / scale, 1.0) if scale > 0 else 0.0
    below = "border-bottom:2px dotted #0072B2;" if value < 0 else ""
    hint = esc(f"{name} {number(float(value))}".strip())
    return (
        f'{lead}<span style="background:rgba({colour},{share:.3f});{below}unicode-bidi:isolate" '
        f'title="{hint}">{inner}</span>'
    )


def diff(before: str, after: str) -> tuple[str, str]:
    """Two texts with the words marked that the other does not have."""
    first, second = _WORDS.findall(before), _WORDS.findall(after)
    matcher = difflib.SequenceMatcher(a=first, b=second, autojunk=False)
    left, right = [], []
    for kind, a, b, c, d in matcher.get_opcodes():
        left.append(_marked("".join(first[a:b]), "del" if kind != "equal" else ""))
        right.append(_marked("".join(second[c:d]), "ins" if kind != "equal" else ""))
    return _flowing(left), _flowing(right)


def marked(parts: Iterable[Sequence[str]]) -> str:
    """A text in pieces ``(mark, text)``; those with a mark are highlighted."""
    return _flowing([_marked(text, "ins" if mark else "") for mark, text in parts])


def passage(said: str, parts: Iterable[Sequence[str]]) -> str:
    """A passage as `marked` shows it, below what is said of it."""
    return f'<div class="mdw-passage" style="margin:0 0 8px">{note(said)}{marked(parts)}</div>'


def _marked(text: str, tag: str) -> str:
    inner = esc(text).replace("\n", "<br>")
    return f'<{tag} class="mdw-{tag}">{inner}</{tag}>' if tag and text else inner


def _flowing(parts: list[str]) -> str:
    return f'<div class="mdw-text" dir="auto">{"".join(parts)}</div>'


def image(data: str, *, label: str) -> str:
    """A picture that a browser drew, as PNG data.

    Raises:
        ValueError: If it is no such data.
    """
    if not _IMAGE.fullmatch(data):
        raise ValueError(f"not a PNG data address: {data[:40]!r}")
    return f'<img class="mdw-image" src="{data}" alt="{esc(label)}" style="max-width:100%">'


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    return number(value) if isinstance(value, int | float) else str(value)
