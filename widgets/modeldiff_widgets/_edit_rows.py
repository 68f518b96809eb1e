"""One edit of the stack as controls: what, along which direction, where, and how much."""

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as W

from modeldiff.directions import Direction
from modeldiff.errors import InterventionError
from modeldiff.masks import Positions
from modeldiff.report_text import visible
from modeldiff_widgets import _theme
from modeldiff_widgets._stack import (
    SITES,
    SOURCES,
    copied,
    mask_of,
    new_edit,
    source_of,
    where_of,
)

KINDS = (
    ("steer: add it", "steer"), ("ablate: project it out", "ablate"),
    ("scale along it", "scale_along"), ("clamp along it", "clamp"),
    ("replace: copy it over", "replace"), ("scale the adapter", "adapter"),
)  # fmt: skip
PLACES = (
    ("every token", "all"), ("prompt", "prompt"), ("new tokens", "new"),
    ("last of the prompt", "last"), ("role: system", "system"), ("role: user", "user"),
    ("role: assistant", "assistant"), ("template", "template"), ("clicked tokens", "clicked"),
)  # fmt: skip
REACH = {"steer": 8.0, "clamp": 8.0, "scale_along": 4.0, "adapter": 4.0}
"""How far a slider goes to both sides of 0, for the kinds that have a coefficient."""
ALL_HEADS: tuple[int, ...] = ()
WHOLE = "none: all of it"
_DIRECTED = ("steer", "ablate", "scale_along", "clamp")
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def layers_text(layers: Sequence[int] | str | None) -> str:
    """Write layers as they are typed: "own", "all", or numbers and ranges."""
    if layers is None:
        return "own"
    return layers if isinstance(layers, str) else ", ".join(str(each) for each in layers)


def read_layers(text: str, n_layers: int) -> list[int] | str | None:
    """Read what `layers_text` writes.

    Raises:
        InterventionError: If it names no layers of the model.

    Example:
        >>> read_layers("1, 3-4", 6)
        [1, 3, 4]
    """
    plain = text.strip().lower()
    if plain in ("", "own"):
        return None
    if plain == "all":
        return "all"
    found: list[int] = []
    for part in plain.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise InterventionError(
                f"layers {text!r}: write own, all, or numbers such as 3 or 1-3, 5."
            )
        first = int(match[1])
        found += range(first, int(match[2] or first) + 1)
    if not found or max(found) >= n_layers:
        raise InterventionError(f"layers {text!r}: the model has 0 to {n_layers - 1}.")
    return list(dict.fromkeys(found))


def size_text(edit: Mapping[str, Any], direction: Direction | None, norms: Sequence[float]) -> str:
    """Say how much the coefficient is: in residual-stream units, and of the mean norm there."""
    kind, amount = edit["kind"], float(edit["coefficient"])
    if kind == "ablate":
        return "the component along it becomes 0"
    if kind == "replace":
        return f"{visible(copied(edit))} is copied here"
    if kind == "adapter":
        what = ", ".join(edit.get("modules", ())) or "the adapter"
        return f"what {what} writes, times {amount:g}"
    if kind == "scale_along":
        return f"the component along it, times {amount:g}"
    if direction is None:
        return "choose a direction"
    verb = "adds" if kind == "steer" else "sets the component to"
    size = amount * direction.scale
    return f"{verb} {size:+.3g}{_relative(abs(size), edit, direction, norms)}"


def _relative(
    size: float, edit: Mapping[str, Any], direction: Direction, norms: Sequence[float]
) -> str:
    layers = edit["layers"]
    if layers is None and direction.resid_norm:
        return f" = {size / direction.resid_norm:.2f} × the mean residual norm"
    chosen = range(len(norms)) if layers == "all" else layers or [direction.site.layer]
    shares = [size / norms[layer] for layer in chosen if layer < len(norms) and norms[layer]]
    if not shares:
        return ""
    low, high = f"{min(shares):.2f}", f"{max(shares):.2f}"
    several = low if low == high else f"{low} to {high}"
    return f" = {several} × the mean residual norm"


class EditRow:
    """Controls of one edit.

    Args:
        number: Its place in the stack, from 0.
        n_layers: Of the model.
        heads: How many attention heads a layer has, and the channels of each.
        changed: Called with the place and the new edit when a control was moved.
        acted: Called with the place and "up", "down", "delete" or "focus".
        failed: Called with an error about what was typed.
    """

    def __init__(
        self,
        number: int,
        n_layers: int,
        heads: tuple[int, int],
        changed: Callable[[int, dict[str, Any]], None],
        acted: Callable[[int, str], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.number, self.n_layers, self.heads = number, n_layers, heads
        self._changed, self._failed = changed, failed
        self._showing, self._edit = 0, new_edit("adapter")
        self.on = W.Checkbox(value=True, indent=False, description=f"edit {number + 1}")
        self.on.tooltip = f"whether edit {number + 1} takes part"
        self.on.layout.width = "5.2rem"
        self.kind = W.Dropdown(options=KINDS)
        self.direction = W.Dropdown(options=[("none yet", "")])
        self.layers = W.Text(continuous_update=False)
        self.layers.placeholder = "own, all, 1-3"
        self.where = W.Dropdown(options=PLACES)
        self.site = W.Dropdown(options=[(name, site) for site, name in SITES.items()])
        self.head = W.Dropdown(options=[("all", ALL_HEADS)])
        self.source = W.Dropdown(options=[(f"the {n}", side) for side, n in SOURCES.items()])
        self.coefficient = W.FloatSlider(min=-8, max=8, step=0.1, readout_format="+.1f")
        self.size = _theme.note()
        self.buttons = {
            name: _theme.button(text, tooltip=hint)
            for name, text, hint in (
                ("focus", "Tokens", f"show which tokens edit {number + 1} touches"),
                ("up", "Up", f"move edit {number + 1} up"),
                ("down", "Down", f"move edit {number + 1} down"),
                ("delete", "Delete", f"delete edit {number + 1}"),
            )
        }
        for name, button in self.buttons.items():
            button.on_click(lambda clicked, name=name: acted(self.number, name))
        for control in self._controls():
            control.observe(self._moved, names="value")
        self._amount = _theme.field("Coefficient", self.coefficient, grow=True)
        self.box = self._laid_out()

    def show(
        self, edit: Mapping[str, Any], directions: Mapping[str, Direction],
        norms: Sequence[float], chosen: bool,
    ) -> None:  # fmt: skip
        """Show an edit; nothing is told of it."""
        self._showing, self._edit = threading.get_ident(), dict(edit)
        try:
            self._fill(edit, directions)
        finally:
            self._showing = 0
        self.measure(edit, directions, norms)
        self.box.layout.border_left = f"4px solid {'#009E73' if chosen else '#8886'}"

    def measure(
        self, edit: Mapping[str, Any], directions: Mapping[str, Direction], norms: Sequence[float]
    ) -> None:
        """Say how much the coefficient is; from any thread."""
        self.size.value = size_text(edit, directions.get(edit["direction"]), norms)

    def _fill(self, edit: Mapping[str, Any], directions: Mapping[str, Direction]) -> None:
        kind, name, amount = edit["kind"], edit["direction"], float(edit["coefficient"])
        known = [(f"{visible(each)} @ {found.site}", each) for each, found in directions.items()]
        if name and name not in directions:
            known.append((f"{visible(name)} (missing)", name))
        if kind == "replace":
            known.insert(0, (WHOLE, ""))
        elif not name:
            known.insert(0, ("choose one" if known else "none yet: see Directions", ""))
        self.direction.options, self.direction.value = known, name
        self.on.value, self.kind.value = bool(edit["on"]), kind
        self.layers.value = layers_text(edit["layers"])
        self.where.options = _places(edit["where"])
        self.where.value = _place(edit["where"])
        reach = max(REACH.get(kind, 8.0), abs(amount))
        self.coefficient.max, self.coefficient.min = reach, -reach
        self.coefficient.value = amount
        self._amount.layout.display = "" if kind in REACH else "none"
        self._direction_field.layout.display = "none" if kind == "adapter" else ""
        self._fill_copy(edit)

    def _fill_copy(self, edit: Mapping[str, Any]) -> None:
        """What a ``replace`` edit copies, and from where."""
        self.source.value, self.site.value = source_of(edit), edit.get("site") or "resid_post"
        channels, (n, width) = tuple(edit.get("channels") or ()), self.heads
        known = [("all", ALL_HEADS)]
        if self.site.value == "z":
            known += [(f"head {i}", (i * width, (i + 1) * width)) for i in range(n)]
        if channels and channels not in [value for _, value in known]:
            known.append((f"channels {channels[0]} to {channels[1] - 1}", channels))
        self.head.options, self.head.value = known, channels or ALL_HEADS
        whole = edit["kind"] == "replace" and not edit["direction"]
        self._site_field.layout.display = "" if whole else "none"
        self._head_field.layout.display = "" if whole and len(known) > 1 else "none"
        self._source_field.layout.display = "" if edit["kind"] == "replace" else "none"

    def _moved(self, change: Any) -> None:
        if self._showing == threading.get_ident():
            return
        try:
            edit = self._read(change["owner"])
        except InterventionError as error:
            self.layers.value = layers_text(self._edit["layers"])
            self._failed(error)
            return
        self._changed(self.number, edit)

    def _read(self, owner: Any) -> dict[str, Any]:
        kind, where = str(self.kind.value), str(self.where.value)
        layers = read_layers(self.layers.value, self.n_layers)
        amount = self.coefficient.value
        if owner is self.kind:
            layers = {"ablate": "all", "adapter": "all"}.get(kind)
            amount = 0.0 if kind in ("scale_along", "adapter") else 1.0
            where = "prompt" if kind == "replace" else where
        if where == "clicked":
            kept = self._edit["where"]
            where = kept if _place(kept) == "clicked" else where_of(Positions((-1,)))
        elif where == "custom":
            where = self._edit["where"]
        direction = "" if kind == "adapter" else str(self.direction.value or "")
        if kind == "replace" and layers is None and not direction:
            layers = [self.n_layers // 2]
        more: dict[str, Any] = {"modules": self._edit.get("modules", ())}
        if kind != "adapter":
            more = self._copy(owner, direction) if kind == "replace" else {}
        return new_edit(
            kind, direction, layers=layers, where=where, coefficient=amount, on=self.on.value,  # pyright: ignore[reportArgumentType]
            **more,
        )  # fmt: skip

    def _copy(self, owner: Any, direction: str) -> dict[str, Any]:
        if direction:
            return {"source": self.source.value}
        site = "" if self.site.value == "resid_post" else self.site.value
        channels = () if owner is self.site else self.head.value
        return {"site": site, "source": self.source.value, "channels": channels}

    def _controls(self) -> tuple[Any, ...]:
        return (
            self.on, self.kind, self.direction, self.layers, self.where, self.coefficient,
            self.site, self.head, self.source,
        )  # fmt: skip

    def _laid_out(self) -> W.Box:
        self._direction_field = _theme.field("Direction", self.direction, grow=True)
        self._site_field = _theme.field("What is copied", self.site, width="12rem")
        self._head_field = _theme.field("Of it", self.head, width="8rem")
        self._source_field = _theme.field("From", self.source, width="8rem")
        top = _theme.row(
            self.on,
            _theme.field("What is done", self.kind, width="11.5rem"),
            self._direction_field, self._site_field, self._head_field, self._source_field,
            _theme.field("Layers", self.layers, width="7rem"),
            _theme.field("Tokens", self.where, width="10rem"),
        )  # fmt: skip
        self.size.layout.width = "24rem"
        return _theme.card(top, _theme.row(self._amount, self.size, *self.buttons.values()))


def clicked(where: str, position: int, n_prompt: int) -> str:
    """Add a position to the clicked tokens or take it out; the last one stays."""
    before: set[int] = set()
    if _place(where) == "clicked":
        before = {i % n_prompt for i in json.loads(where)["indices"] if -n_prompt <= i < n_prompt}
        if before == {n_prompt - 1} and json.loads(where)["indices"] == [-1]:
            before = set()  # what the menu begins with
    after = before ^ {position}
    return where_of(Positions(tuple(sorted(after or before))))


def _place(where: str) -> str:
    if not where.startswith("{"):
        return where
    return "clicked" if isinstance(mask_of(where), Positions) else "custom"


def _places(where: str) -> list[tuple[str, str]]:
    known = {value for _, value in PLACES}
    place = _place(where)
    extra = [] if place in known else [("as set in code" if place == "custom" else place, place)]
    return [*PLACES, *extra]
