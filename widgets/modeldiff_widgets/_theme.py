"""One look: colours, bokeh themes, and the few ways in which controls are laid out.

Sizes and colours live in ``static/theme.css``. No `Layout` is ever shared: closing the first widget
that has it would break the others.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ipywidgets as W

STATIC = Path(__file__).parent / "static"
BASE, FINETUNED, EDITED, RANDOM = "#0072B2", "#D55E00", "#009E73", "#777777"
_NUMBERS = W.IntText, W.BoundedIntText, W.FloatText, W.BoundedFloatText
COLOURS = {"base": BASE, "finetuned": FINETUNED, "edited": EDITED, "random": RANDOM}
"""Fixed colour of each column (Okabe-Ito)."""


@cache
def source(name: str) -> str:
    """A file of the front-end as text; given a path, anywidget keeps every widget alive."""
    return (STATIC / name).read_text(encoding="utf-8")


def css() -> str:
    """The stylesheet of everything here."""
    return source("theme.css")


def row(*children: W.Widget, classes: Sequence[str] = ()) -> W.Box:
    """Controls side by side, aligned at the bottom, wrapping where it is narrow."""
    return _box(children, "mdw-row", classes)


def column(*children: W.Widget, classes: Sequence[str] = ()) -> W.Box:
    """Things below each other, at one distance."""
    return _box(children, "mdw-column", classes)


def split(*children: W.Widget, classes: Sequence[str] = ()) -> W.Box:
    """Equal columns that go below each other where it is narrow."""
    return _box(children, "mdw-split", classes)


def card(*children: W.Widget, title: str = "", classes: Sequence[str] = ()) -> W.Box:
    """A framed group with an optional heading."""
    head = (heading(title),) if title else ()
    return _box((*head, *children), "mdw-card", classes)


def _box(children: Sequence[W.Widget], kind: str, classes: Sequence[str]) -> W.Box:
    box = W.Box(tuple(children))
    for name in (kind, *classes):
        box.add_class(name)
    return box


def heading(text: str) -> W.Label:
    """A small heading."""
    return _label(text, "mdw-heading")


def note(text: str = "") -> W.Label:
    """One muted line; change its ``value``."""
    return _label(text, "mdw-note")


def _label(text: str, kind: str) -> W.Label:
    label = W.Label(text)
    label.add_class(kind)
    return label


def field(name: str, control: Any, *, grow: bool = False, width: str = "") -> W.Box:
    """A control with its name above it.

    Args:
        name: What it sets, with its unit.
        control: Any control. One for a number takes the name as its description, which the page
            hides: it is the only name that readers of screens are given.
        grow: Whether it takes the space that is left.
        width: CSS width, such as "12rem".
    """
    control.layout.width = "auto"
    if hasattr(control, "tooltip") and not control.tooltip:
        control.tooltip = name
    if isinstance(control, _NUMBERS):
        control.description = name
    box = _box((_label(name, "mdw-name"), control), "mdw-field", ("mdw-grow",) if grow else ())
    if width:
        box.layout.width = width
    return box


def side_by_side(figures: Sequence[Any]) -> Any:
    """Figures in a row, below each other where it is narrow."""
    from bokeh.layouts import row as bokeh_row

    for each in figures:
        each.min_width = 340
    return bokeh_row(
        list(figures), sizing_mode="stretch_width", spacing=12, styles={"flex-wrap": "wrap"}
    )


def button(text: str, *, primary: bool = False, icon: str = "", tooltip: str = "") -> W.Button:
    """A button; one of a group is primary."""
    made = W.Button(description=text, icon=icon, tooltip=tooltip or text)
    made.button_style = "primary" if primary else ""
    made.layout.width = "auto"
    made.add_class("mdw-button")
    return made


@cache
def bokeh_theme(dark: bool) -> Any:
    """The theme of figures: the page's background, quiet grid, one font."""
    from bokeh.themes import Theme

    ink, muted, line = ("#e6e9ed", "#a9b3bd", "#39424c") if dark else (
        "#1f2328", "#59636e", "#dfe3e8")  # fmt: skip
    font = {"text_font": "system-ui, sans-serif", "text_color": ink}
    axis = {
        "axis_line_color": line, "major_tick_line_color": line, "minor_tick_line_color": None,
        "major_label_text_color": muted, "major_label_text_font": font["text_font"],
        "major_label_text_font_size": "12px", "axis_label_text_color": ink,
        "axis_label_text_font": font["text_font"], "axis_label_text_font_size": "12.5px",
        "axis_label_text_font_style": "normal", "axis_label_standoff": 8,
    }  # fmt: skip
    legend = {
        "background_fill_alpha": 0, "border_line_color": None, "label_text_color": ink,
        "label_text_font": font["text_font"], "label_text_font_size": "12px",
    }  # fmt: skip
    bar = {
        "background_fill_alpha": 0, "major_label_text_color": muted, "title_text_color": ink,
        "title_text_font_style": "normal", "bar_line_color": line, "major_tick_line_color": line,
    }  # fmt: skip
    plot = {"background_fill_alpha": 0, "border_fill_alpha": 0, "outline_line_color": line}
    title = {**font, "text_font_size": "13px", "text_font_style": "bold"}
    return Theme(
        json={
            "attrs": {
                "Plot": plot, "Axis": axis, "Grid": {"grid_line_color": line}, "Legend": legend,
                "BaseColorBar": bar, "Title": title, "Toolbar": {"logo": None},
            }
        }
    )  # fmt: skip
