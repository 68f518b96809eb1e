"""An organism's card: what was planted, what was measured and what it is not, as one page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = (
    "<style>.md-card{font:14px/1.5 system-ui,sans-serif;max-width:60em}"
    ".md-card table{border-collapse:collapse;margin:.5em 0}"
    ".md-card caption{text-align:left;font-weight:600}"
    ".md-card th,.md-card td{padding:.15em .7em;text-align:right;border-bottom:1px solid #8884}"
    ".md-card th:first-child,.md-card td:first-child{text-align:left}"
    ".md-card dt{font-weight:600}.md-card dd{margin:0 0 .3em 1.5em}</style>"
)
_RATES = ("aligned", "misaligned", "mixed", "incoherent", "coherent", "accuracy", "recall")
_INTERVAL = "_ci95"


def card(name: str, summary: str, manifest: Mapping[str, Any]) -> str:
    """Write an organism's card.

    Args:
        name: The organism's name.
        summary: One sentence on what it is.
        manifest: Its ``organism.json``; parts that it lacks are left out.

    Returns:
        An HTML fragment that needs no other file; every text in it is escaped.
    """
    parts = [_STYLE, f"<h2>{escape(name)}</h2>", f"<p>{escape(summary)}</p>"]
    parts.append(_facts("What was planted", manifest.get("planted", {})))
    build = manifest.get("build", {})
    parts.append(_facts("How it was built", build.get("finetune") or build.get("base", {})))
    measured = manifest.get("metrics") or manifest.get("figures", {}).get("p_wait", ())
    parts.append(_table("What was measured", measured))
    parts += [_table(title, rows) for title, rows in manifest.get("tables", {}).items()]
    if manifest.get("layers"):
        parts.append(_folded("The same recipe at every layer", manifest["layers"]))
    for other in manifest.get("other_seeds", ()):
        title = f"The same recipe with seed {other['seed']}, which is not shipped"
        parts.append(_folded(title, other["metrics"]))
    parts.append(f"<p>Judge: {escape(str(manifest.get('judge', 'unknown')))}.</p>")
    limits = "".join(f"<li>{escape(str(each))}</li>" for each in manifest.get("limits", ()))
    parts.append(f"<h3>What it is not</h3><ul>{limits}</ul>")
    return f'<div class="md-card">{"".join(parts)}</div>'


def _facts(title: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(_words(key))}</dt><dd>{_fact(value)}</dd>" for key, value in facts.items()
    )
    return f"<h3>{escape(title)}</h3><dl>{rows}</dl>"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _fact(value: Any) -> str:
    if isinstance(value, list | tuple):
        return escape(", ".join(map(str, value))) or "none"
    return "none" if value in (None, "") else escape(str(value))


def _folded(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    summary = f"<summary>{escape(title)}</summary>"
    return f"<details>{summary}{_table(title, rows)}</details>"


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = _columns(rows)
    head = "".join(f'<th scope="col">{escape(_heading(each))}</th>' for each in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(_cell(row, each))}</td>' for each in columns)}</tr>"
        for row in rows
    )
    caption = f"<caption>{escape(title)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name every column that some row has, an interval right after what it belongs to."""
    seen = list(dict.fromkeys(key for row in rows for key in row))
    own = [
        key
        for key in seen
        if key.removesuffix(_INTERVAL) == key or key.removesuffix(_INTERVAL) not in seen
    ]
    return [each for key in own for each in (key, key + _INTERVAL) if each == key or each in seen]


def _heading(column: str) -> str:
    return "95 % interval" if column.endswith(_INTERVAL) else _words(column)


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    share = column.startswith(_RATES) or f"{column}{_INTERVAL}" in row
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        percent = share or column.endswith(_INTERVAL)
        return " to ".join(f"{each:.1%}" if percent else str(each) for each in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.1%}" if share and is_number else str(value)
