"""The panel *Patch map*: which component, at which token, carries what the fine-tune says."""

from typing import Any

import ipywidgets as W
import pandas as pd

from modeldiff.attribution import attribute
from modeldiff.errors import InterventionError
from modeldiff.patch_runs import Component, Part
from modeldiff.patching import PatchMap as Patches
from modeldiff.patching import patch_map
from modeldiff.report_text import number, token_text, visible
from modeldiff.self_repair import ablation_table
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._patch_ask import (
    KL,
    LOGITS,
    ONSET,
    OTHER,
    PART_NAMES,
    SIDE_NAMES,
    Ask,
    Found,
    Task,
    edit_of,
    repair_table,
    unmeasured,
)
from modeldiff_widgets._patch_grid import PatchGrid, name_of
from modeldiff_widgets._prompt_box import PromptBox, tidy
from modeldiff_widgets._row_table import RowTable
from modeldiff_widgets._stack import copied
from modeldiff_widgets.layer_map import NEXT, SELECTED, WIDEST

METRICS = (
    ("loss of the answer's first tokens", ONSET),
    ("logit difference of two tokens", LOGITS),
    ("KL to the other model", KL),
)
N_STRONGEST = 12
_N_REPAIR = 6
_DONORS = "The sun is warm today.\nI want to cook dinner.\nMy train was late again."
_HEADINGS = ["component", "token", "says", "change", "share of the way"]
_HINT = _render.columns([
    ("Nothing is patched yet", "neutral",
     _render.note("“Patch” copies, one component and token at a time, what the other model has "
                  "there, runs the rest, and shows how far that moves the metric. Click a cell to "
                  "go there in every panel and to put the patch on the stack of edits."))
])  # fmt: skip


class PatchMap(Panel):
    """Component by token; a click on a cell goes there everywhere and patches it.

    Example:
        >>> with PatchMap(pair) as panel:  # doctest: +SKIP
        ...     panel.metric.value = "kl"
        ...     panel.run()
        ...     panel.jobs.wait(60)
        ...     panel.values
    """

    title = "Patch map"

    def build(self) -> W.Widget:
        """Make the controls, the map and the tables."""
        self.found: Found | None = None
        self.repair: pd.DataFrame | None = None
        self._repair_code = ""
        self.row = -1
        self._mine: dict[str, Any] | None = None
        self.prompt = PromptBox(self)
        self.grid = PatchGrid(self.choose)
        self.hint, self.status, self.agreement = W.HTML(_HINT), _theme.note(), W.HTML()
        self.readout, self.stacked = _theme.note(), _theme.note()
        self.readout.layout.flex = "1 1 20rem"
        self.table = RowTable(headings=_HEADINGS, numeric=[1, 3, 4], label="Strongest cells")
        controls = self._controls()
        self.shown = _theme.column(
            self.status, self.agreement, self.grid.widget, *self._cell(), self._tables()
        )
        self.shown.layout.display = "none"
        self._connect()
        return _theme.column(self.prompt.box, *controls, self.hint, self.shown)

    def _controls(self) -> tuple[W.Widget, ...]:
        self.parts: dict[Part, W.ToggleButton] = {}
        for part, name in PART_NAMES.items():
            self.parts[part] = W.ToggleButton(
                value=part in ("resid_post", "attn_out", "mlp_out"), description=name, tooltip=name
            )
            self.parts[part].layout.width = "5.2rem"
        self.parts["adapter"].disabled = not self.pair.sides.lora
        self.metric = W.Dropdown(options=METRICS)
        self.side = _toggle([("Fine-tune", "finetuned"), ("Base", "base")], "5.6rem")
        self.method = _toggle([("Real patches", False), ("Attribution", True)], "7.4rem")
        self.grad_drop = W.Checkbox(description="GradDrop", indent=False)
        self.n_onset = W.BoundedIntText(3, min=1, max=64)
        self.predicted = W.Dropdown(
            options=[("where the models differ most", WIDEST), ("the selected token", SELECTED),
                     ("the one after the text", NEXT)]
        )  # fmt: skip
        self.tokens = W.Text(placeholder="those that move most", continuous_update=False)
        self.go = _theme.button("Patch", primary=True, icon="th")
        self._fields = {
            "n_onset": _theme.field("Tokens of the answer", self.n_onset, width="9rem"),
            "predicted": _theme.field("Measured on the token", self.predicted, width="14rem"),
            "tokens": _theme.field("Two tokens: one | other", self.tokens, width="12rem"),
            "grad_drop": _theme.field("Cancelling paths", self.grad_drop, width="7.5rem"),
        }
        fields = self._fields
        first = _theme.row(
            _group("Components", *self.parts.values()),
            _theme.field("Patched model", self.side),
            _theme.field("By", self.method), fields["grad_drop"],
        )  # fmt: skip
        second = _theme.row(
            _theme.field("Measured as change of", self.metric, width="16rem"), fields["n_onset"],
            fields["predicted"], fields["tokens"], self.go,
        )  # fmt: skip
        return first, second

    def _cell(self) -> tuple[W.Widget, ...]:
        self.layer = W.BoundedIntText(min=0, max=max(0, self.pair.n_layers - 1))
        self.token = W.BoundedIntText(min=-1, max=100_000)
        self.patches = W.Checkbox(True, description="a click patches", indent=False)
        self.off = _theme.button("Take the patch off", icon="times")
        self.off.disabled = True
        return (
            _theme.row(
                _theme.field("Layer", self.layer, width="5.5rem"),
                _theme.field("Token", self.token, width="5.5rem"),
                _theme.field("Stack of edits", self.patches, width="9rem"), self.off, self.readout,
            ),
            self.stacked,
        )  # fmt: skip

    def _tables(self) -> W.Widget:
        self.donors = W.Textarea(_DONORS, rows=3, continuous_update=False)
        self.check = _theme.button("Check the strongest", icon="medkit")
        self.repaired = W.HTML()
        repair = _theme.card(
            _theme.note(
                "Ablates whole heads, attentions and MLPs three ways: where they "
                "disagree, or later layers repair it, one number misleads."
            ),
            _theme.field("Other texts, one a line: donors", self.donors),
            _theme.row(self.check),
            title="Self-repair",
        )
        cells = _theme.card(self.table, title="Strongest cells")
        return _theme.column(_theme.split(cells, repair), self.repaired)

    def _connect(self) -> None:
        self.on(self.go, self.run)
        self.on(self.check, self.check_repair)
        self.on(self.off, self.take_off)
        self.listen(self.table.on_choose, self._chosen)
        for control in (self.metric, self.method):
            self.link(control, "value", lambda new: self._fit())
        self.bind(self.layer, "layer")
        self.bind(self.token, "token")
        for trait in ("layer", "token"):
            self.link(self.state, trait, lambda new: self._frame())
        self.link(self.state, "edits", lambda edits: self._show_stacked())
        self._fit()

    def _fit(self) -> None:
        metric = self.metric.value
        shown = {"n_onset": metric == ONSET, "predicted": metric != ONSET,
                 "tokens": metric == LOGITS, "grad_drop": bool(self.method.value)}  # fmt: skip
        for name, box in self._fields.items():
            box.layout.display = "" if shown[name] else "none"

    # -- what is computed

    @property
    def values(self) -> Any:
        """What is drawn, ``[component, token]``; None before anything is."""
        return None if self.found is None else self.found.values

    def run(self) -> Job:
        """Patch what is chosen; returns at once."""
        ask = self._ask()
        work = self._estimate if ask.estimated else self._patch
        return self.submit(
            lambda job: work(job, Task.of(self.pair, ask, self.prompt.text(ask.asked, job))),
            on_done=lambda job: self._done(job.result), label="patch map",
        )  # fmt: skip

    def _ask(self) -> Ask:
        parts: tuple[Part, ...] = tuple(part for part, button in self.parts.items() if button.value)
        if not parts:
            raise InterventionError("no components are chosen: switch some on, such as Residual.")
        side: Any = self.side.value
        predicted = str(self.predicted.value)
        named = tuple(self.tokens.value.split("|")) if self.tokens.value.strip() else ()
        return Ask(
            self.prompt.asked(), parts, str(self.metric.value), side,
            self.state.token if predicted == SELECTED else predicted, named, self.n_onset.value,
            bool(self.method.value), bool(self.method.value and self.grad_drop.value),
        )  # fmt: skip

    def _patch(self, job: Job, task: Task) -> Found:
        """In the worker; the map grows place by place."""
        components = task.ask.components(self.pair.sides)
        self._begin(Found(task, components, unmeasured(components, task.text)))

        def found(patches: Patches) -> Found:
            return Found(task, components, patches.effect, patches=patches)

        return found(patch_map(
            self.pair.sides, task.text, task.metric(self.pair.sides), side=task.ask.side,
            components=components, on_place=lambda place, so_far: self._stream(found(so_far)),
            progress=job.progress, cancel=job.cancel,
        ))  # fmt: skip

    def _estimate(self, job: Job, task: Task) -> Found:
        job.report(0.3, "one pass back, then a sample of real patches")
        components = task.ask.components(self.pair.sides)
        found = attribute(
            self.pair.sides, task.text, task.metric(self.pair.sides), side=task.ask.side,
            components=components, grad_drop=task.ask.grad_drop,
        )  # fmt: skip
        job.report(1.0, "drawing")
        return Found(task, components, found.estimate, attribution=found)

    def check_repair(self) -> Job:
        """Ablate the strongest heads, attentions and MLPs of the map; returns at once."""
        found = self.found
        chosen = [] if found is None else _ablatable(found)
        if found is None or not chosen:
            raise InterventionError(
                "self-repair is checked on heads, attentions and MLPs: draw a map that has some."
            )
        others = tuple(line for line in self.donors.value.splitlines() if line.strip())
        code = found.task.repair_code(tuple(chosen), others)
        return self.submit(
            lambda job: self._ablate(job, found.task, chosen, others), key="repair",
            on_done=lambda job: self._show_repair(found, job.result, code), label="self-repair",
        )  # fmt: skip

    def _ablate(
        self, job: Job, task: Task, chosen: list[Component], others: tuple[str, ...]
    ) -> pd.DataFrame:
        sides, side = self.pair.sides, task.ask.side
        texts = [task.text, *self.pair.texts(others)]
        return ablation_table(
            sides, texts, chosen, lambda text: task.ablated(sides, text), side=side,
            progress=job.progress, cancel=job.cancel,
        )  # fmt: skip

    # -- what is shown

    def _begin(self, found: Found) -> None:
        self.found, self.row = found, -1
        self.hint.layout.display, self.shown.layout.display = "none", ""
        self.grid.begin(found.components, found.task.text)
        self.repair, self.repaired.value, self._repair_code = None, "", ""

    def _stream(self, found: Found) -> None:
        self.found = found
        self._draw()

    def _done(self, found: Found) -> None:
        if found.attribution is not None:
            self._begin(found)
        self.found = found
        self.state.results = {**self.state.results, "patch_map": found}
        self._draw()

    def _draw(self) -> None:
        found = self.found
        if found is None:
            return
        self.grid.fill(found.values, self.caption)
        self.status.value = _summary(found)
        self.agreement.value = _agreement(found)
        best = found.strongest(N_STRONGEST)
        width = found.values.shape[1]
        self.table.show(
            [row * width + column for row, column in best],
            [_cells(found, row, column) for row, column in best],
            note="" if best else "No cell differs from 0.",
        )
        self._frame()

    @property
    def caption(self) -> str:
        """What the colours mean."""
        if self.found is None:
            return ""
        estimated = self.found.attribution is not None
        size = "size of the " if self.found.task.ask.grad_drop else ""
        how = "estimated " if estimated else ""
        return f"{size}{how}change of the {self.found.task.said} (0: no effect)"

    def choose(self, row: int, column: int) -> None:
        """Go to a cell in every panel, and patch it if that is switched on."""
        found = self.found
        if found is None:
            return
        self.row, component = row, found.components[row]
        self.state.layer, self.state.token = component.layer, column
        if self.patches.value:
            self._put(component, column)
        self._frame()

    def _chosen(self, number_: int) -> None:
        if self.found is not None:
            self.choose(*divmod(number_, self.found.values.shape[1]))

    def _put(self, component: Component, position: int) -> None:
        """Put the patch on the stack, in place of the last one that was put there."""
        assert self.found is not None
        edit = edit_of(self.pair.sides, self.found.task, component, position)
        kept = [each for each in self.state.edits if each != self._mine]
        if isinstance(edit, str):
            self._mine, self.state.edits = None, kept
            self.stacked.value = f"Not on the stack: {edit}."
            return
        self._mine = edit
        self.state.edits = [*kept, edit]
        self._show_stacked()

    def take_off(self) -> None:
        """Take the patch that a click put there off the stack."""
        self.state.edits = [each for each in self.state.edits if each != self._mine]

    def _show_stacked(self) -> None:
        on = self._mine is not None and self._mine in self.state.edits
        self.off.disabled = not on
        if not on:
            self._mine, self.stacked.value = None, ""
            return
        late = self.found is not None and self.state.token >= self.found.task.whole.n_prompt
        limit = (
            " The token is of the answer: what reads this text has the patch, what generates "
            "an answer of its own refuses it." if late else ""
        )  # fmt: skip
        silenced = self._mine is not None and self._mine["kind"] == "adapter"
        copies = "" if self._mine is None or silenced else f"copies the {copied(self._mine)}"
        what = "silences this module of the adapter" if silenced else copies
        of_base = self._mine is not None and self._mine.get("source") == "finetuned"
        side = (
            " It is an edit of the base: Steer and ablate can edit the base, what edits the "
            "fine-tune refuses it." if of_base else ""
        )  # fmt: skip
        self.stacked.value = f"On the stack of edits: {what} there, in every panel.{side}{limit}"

    def _frame(self) -> None:
        """Mark the chosen cell and say its value."""
        found = self.found
        if found is None:
            return
        if self.row < 0 or found.components[self.row].layer != self.state.layer:
            self.row = next(
                (i for i, c in enumerate(found.components) if c.layer == self.state.layer), -1
            )
        row, column = self.row, self.state.token
        inside = row >= 0 and 0 <= column < found.values.shape[1]
        self.grid.select(row if inside else -1, column)
        self.readout.value = _readout(found, row, column) if inside else ""
        chosen = row * found.values.shape[1] + column if inside else -1
        self.table.selected = chosen if chosen in self.table.ids else -1

    def _show_repair(self, found: Found, table: pd.DataFrame, code: str) -> None:
        if self.found is None or self.found.task is not found.task:
            return  # another map is shown by now
        task, self.repair, self._repair_code = found.task, table, code
        other = SIDE_NAMES[OTHER[task.ask.side]]
        kl = f"KL(ablated ‖ {other}) after the last token, nats"
        metric = task.said if task.ask.metric == LOGITS else kl
        self.repaired.value = _render.table(
            ["component", "zero", "mean", "resample", "direct", "repaired", "warning"],
            repair_table(table), caption=f"Mean change of the {metric}",
        )  # fmt: skip

    # -- what remains of it

    def code(self) -> str:
        """Python that makes ``values``, ``[component, token]``, and, if shown, ``repair``."""
        if self.found is None:
            return "# Nothing is patched yet: press “Patch”."
        return tidy([self.found.task.code(), self._repair_code])

    def snapshot_html(self) -> str:
        """The map, the strongest cells and the code."""
        if self.found is None:
            return _render.section(self.title, [_render.note("Nothing was patched.")])
        parts = [
            self.grid.snapshot_html(self.found.values, self.caption),
            _render.note(self.status.value), self.agreement.value, self.table.snapshot_html(),
            self.repaired.value,
        ]  # fmt: skip
        return _render.section(self.title, parts, code=self.shown_code(), when=True)


def _toggle(options: list[tuple[str, Any]], width: str) -> W.ToggleButtons:
    made = W.ToggleButtons(options=options)
    made.style.button_width = width
    return made


def _group(name: str, *controls: W.Widget) -> W.Box:
    """Several controls under one name; a `field` is for a single one."""
    label = W.Label(name)
    label.add_class("mdw-name")
    box = W.Box((label, _theme.row(*controls)))
    box.add_class("mdw-field")
    return box


def _cells(found: Found, row: int, column: int) -> list[str]:
    share = found.recovered(row, column)
    piece = visible(token_text(found.task.text.pieces[column]))
    value = number(float(found.values[row, column]))
    return [
        name_of(found.components[row]), str(column), piece, value,
        "–" if share != share else f"{round(100 * share)} %".replace("-", "−"),
    ]  # fmt: skip


def _summary(found: Found) -> str:
    task, values = found.task, found.values
    measured = values[~values.isnan()]
    rows, same = int((~values.isnan()).all(1).sum()), int((measured == 0).sum())
    side, other = SIDE_NAMES[task.ask.side], SIDE_NAMES[OTHER[task.ask.side]]
    ends = "" if found.patches is None else (
        f" Unpatched {side}: {number(found.patches.start)}; {other}: "
        f"{number(found.patches.target)}.")  # fmt: skip
    if found.patches is not None and not found.has_way:
        ends += (
            f" They differ by {number(found.way)}, less than half of what the strongest cell "
            "changes: shares of that way would say nothing and are left out."
        )
    return (
        f"The {side}, patched from the {other}; measured: {task.said}, of what is predicted after "
        f"the first {task.place if task.ask.metric != ONSET else task.text.n_prompt} tokens."
        f"{ends} {rows} of {len(values)} components; {same} of {measured.numel()} cells are "
        "exactly 0 (no effect)."
    )


def _agreement(found: Found) -> str:
    """How well estimates agree with real patches: never left out."""
    if found.attribution is None:
        return ""
    r, n = found.attribution.r, len(found.attribution.sample)
    if r.estimate != r.estimate:
        return _render.alert(
            f"Estimated, and not checked: {n} real patches do not vary. Use real patches."
        )
    range_ = f"{r.estimate:.2f} [{r.low:.2f}, {r.high:.2f}]".replace("-", "−")
    said = f"r = {range_} with {n} real patches"
    tone = "good" if r.low >= 0.8 else "bad"
    advice = "" if r.low >= 0.8 else " They agree too little: use real patches."
    return _render.badge(said, tone) + _render.note(
        f"Estimated from one pass back, and checked on cells drawn at random.{advice}"
    )


def _ablatable(found: Found) -> list[Component]:
    """Heads, attentions and MLPs that have the strongest cells."""
    rows = dict.fromkeys(row for row, _ in found.strongest(found.values.numel()))
    several = [found.components[row] for row in rows]
    return [c for c in several if c.part in ("attn_out", "mlp_out", "head")][:_N_REPAIR]


def _readout(found: Found, row: int, column: int) -> str:
    component, token, says, change, share = _cells(found, row, column)
    value = float(found.values[row, column])
    if value != value:
        return f"{component}, token {token} {says}: not measured yet"
    end = "" if share == "–" else f", {share} of the way to the other model"
    return f"{component}, token {token} {says}: {change}{end}"
