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
_COLUMNS = ("questions", "templates", "temperature", "n", "misaligned", "95 % interval", "aligned",
            "mixed", "incoherent")  # fmt: skip


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
    parts.append(_table("What was measured", manifest.get("metrics", ())))
    for other in manifest.get("other_seeds", ()):
        title = f"The same recipe with seed {other['seed']}, which is not shipped"
        parts.append(f"<details><summary>{escape(title)}</summary>")
        parts.append(_table(title, other["metrics"]) + "</details>")
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


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(each)}</th>' for each in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(row))}</tr>" for row in rows
    )
    caption = f"<caption>{escape(title)}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["misaligned_ci95"]
    shares = {each: f"{row[each]:.1%}" for each in ("misaligned", "aligned", "mixed", "incoherent")}
    plain = {each: str(row[each]) for each in ("questions", "templates", "temperature", "n")}
    cells = {**plain, **shares, "95 % interval": f"{low:.1%} to {high:.1%}"}
    return [cells[each] for each in _COLUMNS]
