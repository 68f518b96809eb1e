"""Sliders that scale the adapter, all of it or a module: edits of the shared stack, both ways."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ipywidgets as W

from modeldiff.sites import Site
from modeldiff_widgets import _theme
from modeldiff_widgets._edit_rows import REACH
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._stack import new_edit

Key = tuple[int, str] | Literal["all"]
"""A layer and a module in it, or the whole adapter."""


def is_of(edit: Mapping[str, Any], key: Key) -> bool:
    """Whether an edit of the stack scales just this, at every token."""
    if edit["kind"] != "adapter" or edit["where"] != "all":
        return False
    modules = edit.get("modules", [])
    if key == "all":
        return edit["layers"] in (None, "all") and not modules
    return edit["layers"] == [key[0]] and modules == [key[1]]


def factor_of(edits: list[dict[str, Any]], key: Key) -> float:
    """By how much the stack scales this; 1 without an edit."""
    return next((float(e["coefficient"]) for e in edits if is_of(e, key) and e["on"]), 1.0)


def with_factor(edits: list[dict[str, Any]], key: Key, factor: float) -> list[dict[str, Any]]:
    """The stack with this scaled; a factor of 1 takes the edit away.

    Example:
        >>> key = (3, "mlp.down_proj")
        >>> with_factor(with_factor([], key, 0.0), key, 1.0)
        []
    """
    options: Any = {} if key == "all" else {"layers": [key[0]], "modules": [key[1]]}
    made = [new_edit("adapter", **{"layers": "all", **options}, coefficient=factor)]
    made = [] if factor == 1.0 else made
    at = next((i for i, edit in enumerate(edits) if is_of(edit, key)), len(edits))
    left = [edit for edit in edits if not is_of(edit, key)]
    return [*left[:at], *made, *left[at:]]


class ScaleSliders:
    """A slider for the adapter and one a module, kept equal to the stack of edits.

    Args:
        panel: Whose state it is.
        sites: The ``lora`` sites of the adapter.
    """

    def __init__(self, panel: Panel, sites: Sequence[Site]) -> None:
        names: list[tuple[int, str]] = [(site.layer, str(site.module)) for site in sites]
        self.state, self._reading = panel.state, False
        self.sliders: dict[Key, W.FloatSlider] = {key: _slider() for key in ("all", *names)}
        self.reset = _theme.button("All to 1", icon="undo", tooltip="take these edits away")
        panel.on(self.reset, self.clear)
        for key, slider in self.sliders.items():
            panel.link(slider, "value", lambda new, key=key: self._write(key, new))
        panel.link(self.state, "edits", lambda edits: self._read())
        whole = _theme.field("Whole adapter, times", self.sliders["all"], width="22rem")
        each = [_theme.field(f"{layer}.{module}", self.sliders[layer, module])
                for layer, module in names]  # fmt: skip
        self.note = _theme.note()
        self.box = _theme.column(_theme.row(whole, self.reset), _theme.split(*each), self.note)
        self._read()

    def clear(self) -> None:
        """Take all of these edits off the stack."""
        edits = list(self.state.edits)
        for key in self.sliders:
            edits = with_factor(edits, key, 1.0)
        self.state.edits = edits

    def _write(self, key: Key, factor: float) -> None:
        edits = list(self.state.edits)
        if not self._reading and factor_of(edits, key) != factor:
            self.state.edits = with_factor(edits, key, round(float(factor), 6))

    def _read(self) -> None:
        edits = list(self.state.edits)
        mine = [str(i + 1) for i, e in enumerate(edits) if any(is_of(e, k) for k in self.sliders)]
        self._reading = True
        try:
            for key, slider in self.sliders.items():
                factor = factor_of(edits, key)
                slider.min, slider.max = min(slider.min, factor), max(slider.max, factor)
                slider.value = factor
        finally:
            self._reading = False
        on = f"In the stack of edits: {', '.join(mine)}." if mine else "All as trained."
        self.note.value = (
            f"{on} A factor of 0 removes, a negative one reverses; that of the whole adapter "
            "multiplies those of its modules. Compare, Tokens and Chat show what it does."
        )


def _slider() -> W.FloatSlider:
    reach = REACH["adapter"]
    return W.FloatSlider(value=1.0, min=-reach, max=reach, step=0.1, continuous_update=False,
                         readout_format=".1f")  # fmt: skip
