"""Numbers, tables and model text in the form a reader sees; nothing here knows HTML."""

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

CellKind = Literal["number", "interval", "text", "token"]
MAX_ROWS = 200

HEADINGS = {
    "cell": "cell",
    "n": "answers",
    "rate": "rate",
    "n_unscored": "unscored",
    "kl": "KL(edited ‖ base), nats per token",
    "kl_to_base": "KL(cell ‖ base), nats per token",
    "loss": "loss, nats per token",
    "n_texts": "texts",
    "n_tokens": "tokens",
    "relative_difference": "mean |h_ft − h_base| / |h_base|",
    "cosine": "cosine(h_ft, h_base)",
    "direction_scale": "length of the direction",
    "split_half": "split-half cosine",
    "text_null": "cosine with text null",
    "kl_after_ablation": "KL(ablated ‖ base), nats per token",
    "random": "the same, random directions",
    "mean_probability_change": "mean change of probability",
    "mean_log_ratio": "mean log p_ft / p_base, nats",
    "n_promoted": "promoted at",
    "n_demoted": "demoted at",
    "share_promoted": "promoted at, share",
    "kl_ft_base": "KL(finetuned ‖ base), nats per token",
    "kl_base_ft": "KL(base ‖ finetuned), nats per token",
    "js": "Jensen-Shannon divergence, nats per token",
    "delta_logprob": "log p_ft − log p_base, nats per token",
    "entropy_base": "entropy of the base's prediction, nats",
    "entropy_ft": "entropy of the fine-tune's prediction, nats",
    "entropy_change": "entropy_ft − entropy_base, nats",
    "logprob_base": "log p_base of the token that came, nats",
    "logprob_ft": "log p_ft of the token that came, nats",
    "rank_base": "rank of the token that came, base (0 = most likely)",
    "rank_ft": "rank of the token that came, finetuned (0 = most likely)",
    "rank_move": "rank_base − rank_ft",
    "top1_base": "base would say",
    "top1_ft": "fine-tune would say",
}
_PERCENT = {"rate", "coherent", "share_promoted"}
_TOKENS = {"token", "top1_base", "top1_ft"}


@dataclass(frozen=True)
class Cell:
    """One entry of a table as it is shown."""

    text: str
    kind: CellKind = "text"


Column = tuple[Cell, tuple[Cell, ...]]


@dataclass(frozen=True)
class Grid:
    """A table as it is shown."""

    headings: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    n_rows: int
    """Rows of the whole table, of which ``rows`` may be the first few."""


def visible(text: str) -> str:
    r"""Replace what cannot be seen: controls, zero-width and bidirectional marks, lone surrogates.

    Newlines and tabs are kept.

    Example:
        >>> visible("safe\u202etxt\x00")
        'safe⟨U+202E⟩txt⟨U+0000⟩'
    """
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def token_text(token: str) -> str:
    r"""A token on its own: spaces, newlines and tabs are shown too.

    Example:
        >>> token_text(" the\n")
        '␣the↵'
    """
    return visible(token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥"))


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters, the last of them ``…`` if something is left out."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def number(value: float) -> str:
    """Three significant digits, whole numbers in full, and a dash for what is missing.

    Example:
        >>> number(0.012345), number(12345), number(float("nan"))
        ('0.0123', '12,345', '–')
    """
    if isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, float) and not (abs(value) < 1e15 and value == round(value)):
        return f"{value:.3g}".replace("-", "−")
    return f"{int(value):,}".replace("-", "−")


def percent(value: float) -> str:
    r"""A fraction in percent.

    Example:
        >>> percent(0.6125)
        '61.3\xa0%'
    """
    return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%".replace("-", "−")


def heading(column: str) -> str:
    """What a column is called in the page, with its unit."""
    return HEADINGS.get(column, column.replace("_", " "))


def grid(frame: pd.DataFrame, limit: int = MAX_ROWS) -> Grid:
    """Lay a frame out: intervals beside their numbers, fractions in percent, tokens visible."""
    shown = frame.head(limit)
    columns = [column for group in _groups(frame) for column in _columns(shown, *group)]
    headings = tuple(top for top, _ in columns)
    rows = tuple(zip(*(cells for _, cells in columns), strict=True))
    return Grid(headings, rows, len(frame))


def _shown(character: str) -> str:
    if character.isprintable() or character in "\n\t":
        return character
    if unicodedata.category(character) == "Zs":
        return character
    return f"⟨U+{ord(character):04X}⟩"


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Columns with the two that hold their interval; a range may stand without a number."""
    columns, i = [str(name) for name in frame.columns], 0
    numeric = {str(name) for name, column in frame.items() if _is_number(column)}
    while i < len(columns):
        name = columns[i]
        following = [other if {name, other} <= numeric else "" for other in columns[i + 1 : i + 3]]
        low, high = [*following, "", ""][:2]
        stem = name.removesuffix("_low")
        if stem != name and low == f"{stem}_high":
            yield "", name, low
            i += 2
        elif any(low == f"{p}low" and high == f"{p}high" for p in ("", f"{name}_", _word(name))):
            yield name, low, high
            i += 3
        else:
            yield name, "", ""
            i += 1


def _word(name: str) -> str:
    return name.split("_")[0] + "_"


def _columns(frame: pd.DataFrame, name: str, low: str, high: str) -> Iterator[Column]:
    stem = name or low.removesuffix("_low")
    show = percent if stem in _PERCENT else number
    if name:
        yield _plain_column(pd.Series(frame[name]), show)
    if low:
        ends = zip(frame[low].tolist(), frame[high].tolist(), strict=True)
        spans = (
            "" if math.isnan(a) or math.isnan(b) else f"{_bare(show(a))} to {show(b)}"
            for a, b in ends
        )
        top = Cell("interval" if name else heading(stem), "interval")
        yield top, tuple(Cell(span, "interval") for span in spans)


def _plain_column(column: pd.Series, show: Callable[[float], str]) -> Column:
    name = str(column.name)
    numeric = _is_number(column)
    kind: CellKind = "number" if numeric else "token" if name in _TOKENS else "text"
    words = heading if name == "metric" else str
    cells = (
        Cell(show(value) if numeric else words(_text(value, kind)), kind)
        for value in column.tolist()
    )
    return Cell(heading(name), kind), tuple(cells)


def _bare(text: str) -> str:
    return text.removesuffix("\u00a0%")


def _text(value: Any, kind: CellKind) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float | int):
        return number(value)
    return shortened(token_text(value) if kind == "token" else value, 300)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
