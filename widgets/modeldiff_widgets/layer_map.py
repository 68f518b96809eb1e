"""The panel *Layer map*: where the sides differ, and where an edit changes what is said."""

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
from torch import Tensor

from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MaskError
from modeldiff.layer_maps import (
    LayerEffects,
    ablate_effects,
    before,
    layer_differences,
    patch_effects,
    steer_effects,
)
from modeldiff.report_text import number, token_text, visible
from modeldiff.token_scores import token_scores
from modeldiff.tokens import Text
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._heat_map import HeatMap, Scale
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._prompt_box import Asked, PromptBox, tidy

DIFFERENCES = {
    "relative_norm": "Relative norm of the difference",
    "cosine": "Cosine of fine-tuned and base",
    "projection_difference": "Projection on the direction: fine-tuned − base",
    "projection_ft": "Projection on the direction: fine-tuned",
    "projection_base": "Projection on the direction: base",
}
EFFECTS = {
    "patch": "Effect of patching from the other model there",
    "ablate": "Effect of ablating the direction there",
    "steer": "Effect of steering at each layer, by coefficient",
}
NAMES = DIFFERENCES | EFFECTS
MEASURES = {"kl": "change of KL({side} ‖ base), nats", "logprob": "change of log p({token}), nats"}
SCALES = {
    "relative_norm": Scale("‖fine-tuned − base‖ / ‖base‖ after the layer (0: no difference)"),
    "cosine": Scale("cosine of fine-tuned and base after the layer (1: no difference)", null=1.0),
    "projection_difference": Scale("projection of fine-tuned − base, residual units (0: none)"),
    "projection_ft": Scale("projection of fine-tuned, residual units"),
    "projection_base": Scale("projection of base, residual units"),
}
WIDEST, SELECTED, NEXT = "widest", "selected", "next"
_DIRECTED = ("projection_difference", "projection_ft", "projection_base", "ablate", "steer")


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a job was asked for; never changed afterwards.

    Args:
        asked: What is read.
        what: One of `DIFFERENCES` or `EFFECTS`.
        side: The side that is edited.
        predicted: Which prediction is measured: `WIDEST`, `NEXT` or the index of a token.
        coefficients: For "steer".
        direction: What is projected on, ablated or steered with.
        direction_code: Python that defines ``directions``.
    """

    asked: Asked
    what: str
    side: Any
    predicted: str | int
    coefficients: tuple[float, ...]
    direction: Direction | None
    direction_code: str


@dataclass(frozen=True, eq=False)
class Found:
    """A map: what was wanted, the text, and the numbers."""

    wanted: Wanted
    text: Text
    layers: tuple[int, ...]
    maps: dict[str, Tensor]
    predicted: int = 0
    effects: LayerEffects | None = None
    token: str = ""


class LayerMap(Panel):
    """Layer by token, or layer by coefficient; a click on a cell sets layer and token everywhere.

    Example:
        >>> with LayerMap(pair) as panel:  # doctest: +SKIP
        ...     panel.what.value = "patch"
        ...     panel.run()
        ...     panel.jobs.wait(60)
        ...     panel.values
    """

    title = "Layer map"

    def build(self) -> W.Widget:
        """Make the controls and the map."""
        self.found: Found | None = None
        self.prompt = PromptBox(self)
        self.go = _theme.button("Draw map", primary=True, icon="th")
        self.map = HeatMap("Layer map: layers against tokens", self._clicked)
        self.map.widget.layout.display = "none"
        self.hint = W.HTML(_HINT)
        self.status = _theme.note()
        self.readout = _theme.note()
        self.readout.layout.flex = "1 1 16rem"
        controls = self._controls()
        self._connect()
        return _theme.column(
            self.prompt.box, controls, self.hint, self.map.widget,
            _theme.row(
                _theme.field("Layer", self.layer, width="5.5rem"),
                _theme.field("Token", self.token, width="5.5rem"),
                self.readout,
            ),
            self.status,
        )  # fmt: skip

    def _controls(self) -> W.Box:
        kinds = [(long, name) for name, long in NAMES.items()]
        self.what = W.Dropdown(options=kinds)
        self.direction = W.Dropdown(options=[("none yet: see Directions", "")])
        self.side = W.ToggleButtons(options=[("Fine-tune", "finetuned"), ("Base", "base")])
        self.side.style.button_width = "5.4rem"
        self.measure = W.ToggleButtons(options=[("KL", "kl"), ("log p", "logprob")])
        self.measure.style.button_width = "4.2rem"
        self.predicted = W.Dropdown(
            options=[("where the models differ most", WIDEST), ("the selected token", SELECTED),
                     ("the one after the text", NEXT)]
        )  # fmt: skip
        self.coefficients = W.Text("-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4", continuous_update=False)
        self.layer = W.BoundedIntText(min=0, max=max(0, self.pair.n_layers - 1))
        self.token = W.BoundedIntText(min=-1, max=100_000)
        self._parts = {
            "direction": _theme.field("Direction", self.direction, width="12rem"),
            "side": _theme.field("Edited model", self.side),
            "predicted": _theme.field("Measured on the token", self.predicted, width="14rem"),
            "measure": _theme.field("Measured as change of", self.measure),
            "coefficients": _theme.field("Coefficients (× raw length)", self.coefficients,
                                         width="16rem"),
        }  # fmt: skip
        return _theme.row(
            _theme.field("Show", self.what, width="22rem"), *self._parts.values(), self.go
        )

    def _connect(self) -> None:
        self.on(self.go, self.run)
        self.link(self.what, "value", lambda what: self._chosen_what())
        self.link(self.measure, "value", lambda measure: self._draw())
        self.link(self.direction, "value", lambda name: self.state.set_trait("direction", name))
        self.link(self.state, "directions", lambda found: self._list_directions())
        self.link(self.state, "direction", lambda name: self._list_directions())
        self.bind(self.layer, "layer")
        self.bind(self.token, "token")
        self.link(self.state, "layer", lambda layer: self._frame())
        self.link(self.state, "token", lambda token: self._frame())
        self._list_directions()
        self._fit()

    # -- what is computed

    @property
    def values(self) -> Tensor | None:
        """What is drawn, ``[layer, column]``."""
        if self.found is None:
            return None
        what = self.found.wanted.what
        return self.found.maps[str(self.measure.value) if what in EFFECTS else what]

    def run(self) -> Job:
        """Compute the map that is chosen; returns at once."""
        wanted = self._wanted()
        return self.submit(
            lambda job: self._differences(job, wanted) if wanted.what in DIFFERENCES
            else self._effects(job, wanted),
            on_done=lambda job: self._done(job.result), label="layer map",
        )  # fmt: skip

    def _wanted(self) -> Wanted:
        what = str(self.what.value)
        direction = self.state.directions.get(self.state.direction)
        if what in _DIRECTED and direction is None:
            raise DirectionError(
                f"“{NAMES[what]}” needs a direction: find or load one in "
                "Directions, or state.add_direction(...), then draw the map again."
            )
        code = self.state.directions_code([direction.name]) if direction else ""
        chosen = str(self.predicted.value)
        predicted = self.state.token if chosen == SELECTED else chosen
        return Wanted(self.prompt.asked(), what, self.side.value, predicted, self._numbers(),
                      direction, code)  # fmt: skip

    def _numbers(self) -> tuple[float, ...]:
        try:
            several = tuple(
                float(each) for each in self.coefficients.value.split(",") if each.strip()
            )
        except ValueError as error:
            raise ValueError(f"coefficients are numbers with commas between: {error}.") from error
        return tuple(sorted(set(several))) or (0.0,)

    def _differences(self, job: Job, wanted: Wanted) -> Found:
        text = self.prompt.text(wanted.asked, job)
        job.report(0.5, f"{text.n_tokens} tokens, {self.pair.n_layers} layers")
        maps = layer_differences(self.pair.sides, text, wanted.direction)
        return Found(wanted, text, tuple(range(self.pair.n_layers)), maps)

    def _effects(self, job: Job, wanted: Wanted) -> Found:
        text = self.prompt.text(wanted.asked, job)
        place = place_of(self.pair, text, wanted.predicted)
        part, sides, drawn = before(text, place), self.pair.sides, []

        def found(effects: LayerEffects) -> Found:
            maps = {"kl": effects.kl, "logprob": effects.logprob}
            token = token_text(str(self.pair.tokenizer.decode([effects.token_id])))
            return Found(wanted, text, effects.layers, maps, place, effects, token)

        def on_row(layer: int, effects: LayerEffects) -> None:
            self._stream(found(effects), first=not drawn)
            drawn.append(layer)

        options: dict[str, Any] = {
            "side": wanted.side, "on_row": on_row, "cancel": job.cancel, "progress": job.progress,
            "max_tokens": 1024,
        }  # fmt: skip
        if wanted.what == "patch":
            return found(patch_effects(sides, part, **options))
        assert wanted.direction is not None
        if wanted.what == "ablate":
            return found(ablate_effects(sides, part, wanted.direction, **options))
        return found(steer_effects(sides, part, wanted.direction, wanted.coefficients, **options))

    # -- what is shown

    def _stream(self, found: Found, *, first: bool) -> None:
        """Rows that are finished; in the worker."""
        self.found = found
        self._draw(anew=first)

    def _done(self, found: Found) -> None:
        self.found = found
        self.state.results = {**self.state.results, "layer_map": found}
        self._draw(anew=True)

    def _draw(self, *, anew: bool = False) -> None:
        found, values = self.found, self.values
        if found is None or values is None:
            return
        if anew:
            self._begin(found)
        self.map.fill(values, self._scale(found))
        self.status.value = _summary(found, values, self.pair.n_layers)
        self._frame()

    def _begin(self, found: Found) -> None:
        self.hint.layout.display, self.map.widget.layout.display = "none", ""
        if found.wanted.what == "steer":
            assert found.wanted.direction is not None
            names = [f"{c:+g}" if c else "0" for c in found.wanted.coefficients]
            across = f"coefficient, × raw length of {found.wanted.direction.name}"
            self.map.empty(found.layers, names, across=across)
            return
        width = next(iter(found.maps.values())).shape[1]
        pieces = [visible(token_text(piece)) for piece in found.text.pieces[:width]]
        names = [f"token {i} {piece}" for i, piece in enumerate(pieces)]
        self.map.empty(found.layers, [_cut(piece) for piece in pieces], across="token", names=names)

    def _scale(self, found: Found) -> Scale:
        if found.wanted.what in DIFFERENCES:
            return SCALES[found.wanted.what]
        side = _SIDES[found.wanted.side]
        title = MEASURES[str(self.measure.value)].format(side=f"edited {side}", token=found.token)
        return Scale(f"{title} (0: no effect)")

    def _frame(self) -> None:
        """Mark the chosen cell and say its value."""
        found, values = self.found, self.values
        if found is None or values is None:
            return
        row, column = self.state.layer, self._column(found)
        self.map.select(row, column)
        inside = row < values.shape[0] and 0 <= column < values.shape[1]
        self.readout.value = _readout(found, row, column, values) if inside else ""

    def _column(self, found: Found) -> int:
        if found.wanted.what != "steer":
            return self.state.token
        return min(self._coefficient, len(found.wanted.coefficients) - 1)

    _coefficient = 0

    def _clicked(self, row: int, column: int) -> None:
        if self.found is None:
            return
        if self.found.wanted.what == "steer":
            self._coefficient = column
        else:
            self.state.token = column
        self.state.layer = self.found.layers[row]
        self._frame()

    def _chosen_what(self) -> None:
        """Another map of the same run is drawn at once; any other waits for the button."""
        self._fit()
        what, found = str(self.what.value), self.found
        if found is not None and what in found.maps:
            wanted = Wanted(**{**vars(found.wanted), "what": what})
            self.found = Found(wanted, found.text, found.layers, found.maps)
            self._draw(anew=True)
        elif found is not None:
            self.status.value = "Press “Draw map” for what is chosen; below is the map before it."

    def _fit(self) -> None:
        what = self.what.value
        needed = {"direction": what in _DIRECTED, "coefficients": what == "steer"}
        for name, box in self._parts.items():
            box.layout.display = "" if needed.get(name, what in EFFECTS) else "none"

    def _list_directions(self) -> None:
        names = list(self.state.directions)
        if tuple(names) != tuple(self.direction.options):
            self.direction.options = names or [("none yet: see Directions", "")]
        if self.state.direction in names:
            self.direction.value = self.state.direction

    # -- what remains of it

    def code(self) -> str:
        """Python that reproduces the map that is shown as ``values``, ``[layer, column]``."""
        wanted = self.found.wanted if self.found else self._wanted()
        lines = ["import modeldiff as md", wanted.asked.code()]
        if wanted.direction is not None and wanted.what in _DIRECTED:
            lines += [wanted.direction_code, f"direction = directions[{wanted.direction.name!r}]"]
        if wanted.what in DIFFERENCES:
            along = ", direction" if wanted.what in _DIRECTED else ""
            call = f"values = layer_differences(pair.sides, text{along})[{wanted.what!r}]"
            return tidy(["from modeldiff.layer_maps import layer_differences", *lines, call])
        place = self.found.predicted if self.found else wanted.predicted
        more = {"patch": "", "ablate": ", direction"}.get(
            wanted.what, f", direction, {wanted.coefficients!r}"
        )
        function = f"{wanted.what}_effects"
        return tidy([
            f"from modeldiff.layer_maps import before, {function}", *lines,
            f"found = {function}(pair.sides, before(text, {place!r}){more}, side={wanted.side!r})",
            f"values = found.{self.measure.value}",
        ])  # fmt: skip

    def snapshot_html(self) -> str:
        """The map, what it shows, and the code."""
        if self.found is None or self.values is None:
            return _render.section(self.title, [_render.note("No map was drawn.")])
        caption = self._scale(self.found).title
        parts = [self.map.snapshot_html(self.values, caption), _render.note(self.status.value),
                 _render.note(self.readout.value)]  # fmt: skip
        return _render.section(self.title, parts, code=self.shown_code(), when=True)


_SIDES = {"base": "base", "finetuned": "fine-tuned"}
_HINT = _render.columns([
    ("Nothing is drawn yet", "neutral",
     _render.note("“Draw map” shows, for every layer and token, how far the fine-tune has moved "
                  "from the base. “Effect of patching” then shows where that difference decides "
                  "what is said. Click a cell to go there in every panel."))
])  # fmt: skip


def place_of(pair: Any, text: Text, predicted: str | int) -> int:
    """Index of the token whose prediction is measured."""
    if isinstance(predicted, int):
        if not 0 < predicted < text.n_tokens:
            raise MaskError(
                f"token {predicted} is selected, of {text.n_tokens}: choose one after the first, "
                "in this panel or in Tokens, whose prediction is to be measured."
            )
        return predicted
    if predicted == NEXT:
        return text.n_tokens
    (scores,) = token_scores(pair.sides, text, k=1)
    table = scores.table
    answered = table[table["position"] >= text.n_prompt]
    several = answered if len(answered) else table
    return int(several["position"].iloc[int(several["kl_ft_base"].to_numpy().argmax())])


def _summary(found: Found, values: Tensor, n_layers: int) -> str:
    measured = values[~values.isnan()]
    if found.effects is None:
        null = 1.0 if found.wanted.what == "cosine" else 0.0
        same = int((measured == null).sum())
        exact = "" if found.wanted.what.startswith("projection_") and same == 0 else (
            f" Null: two identical models give exactly {null:g} everywhere; here {same} of "
            f"{measured.numel()} cells are."
        )  # fmt: skip
        return f"{found.text.n_tokens} tokens, {n_layers} layers.{exact}"
    effects = found.effects
    place, side = found.predicted, _SIDES[effects.side]
    came = found.text.pieces[place] if place < found.text.n_tokens else "(not in the text)"
    rows = int((~values.isnan()).all(1).sum())
    same = int((measured == 0).sum())
    return (
        f"Measured on token {place}, {token_text(came)}, as predicted after the {place} tokens "
        f"before it. Without an edit: KL({side} ‖ base) {number(effects.start_kl)} nats, log p "
        f"of the fine-tune's likeliest token {found.token} {number(effects.start_logprob)}. {rows} "
        f"of {len(effects.layers)} layers measured; {same} of {measured.numel()} cells are "
        "exactly 0 (no effect)."
    )


def _readout(found: Found, row: int, column: int, values: Tensor) -> str:
    if found.wanted.what == "steer":
        where = f"coefficient {found.wanted.coefficients[column]:g}"
    else:
        where = f"token {column} {token_text(found.text.pieces[column])}"
    value = float(values[row, column])
    shown = "not measured yet" if value != value else number(value)
    return f"after layer {found.layers[row]}, {where}: {visible(shown)}"


def _cut(piece: str, most: int = 14) -> str:
    return piece if len(piece) <= most else piece[: most - 1] + "…"
