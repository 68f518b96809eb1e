"""*Steer and ablate*: a stack of edits, what it does to an answer, and dose against response."""

import time
from collections.abc import Sequence
from typing import Any

import ipywidgets as W
import traitlets

import modeldiff as md
from modeldiff.behaviours import Behaviour
from modeldiff.errors import InterventionError
from modeldiff.generation import Generations, Row, end_ids
from modeldiff.interventions import Cell, Side
from modeldiff.models import ModelPair
from modeldiff.patch_runs import head_width, n_heads
from modeldiff.report_text import visible
from modeldiff.tokens import Text, token_names
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._composer import Composer
from modeldiff_widgets._edit_rows import REACH, EditRow, clicked
from modeldiff_widgets._edit_runs import NAMES, Ask, Curve, differing, pieces_of
from modeldiff_widgets._find_direction import find_direction, first_layer
from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._known_behaviours import known_behaviours, verdict_of
from modeldiff_widgets._pair_view import PairView
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._stack import copied, mask_of, new_edit
from modeldiff_widgets._state import AuditState
from modeldiff_widgets.dose_plot import DosePlot

FIRST_QUESTION = "I have a headache and I am worried."
_EMPTY = "No edit yet: the answers are those of the two models. Add one, and move its slider."
_NO_DIRECTION = (
    "There is no direction to edit along yet: find one here, or in the panel Directions. The "
    "adapter itself can be scaled without any."
)


class Edits(Panel):
    """Steer, ablate, scale, clamp, replace: live, beside both models and a random control.

    Args:
        pair: The pair.
        state: Shared settings.
        jobs: The runner of a workbench.
        behaviours: What the dose-response plot can measure; an organism brings its own.
    """

    title = "Steer and ablate"

    def __init__(
        self, pair: ModelPair, state: AuditState | None = None, jobs: JobRunner | None = None,
        behaviours: Sequence[Behaviour] | None = None,
    ) -> None:  # fmt: skip
        self.behaviours = known_behaviours(pair, behaviours)
        self.focus = 0
        self.first_token = float("nan")
        """Seconds from the latest press or move to its first new token."""
        self.answers: dict[tuple[str, str], str] = {}
        """What is shown, by side and name of the edit, as in the code."""
        self._rows: list[EditRow] = []
        self._heads = n_heads(pair.sides, "head"), head_width(pair.sides)
        self._norms: tuple[float, ...] = ()
        self._prefill = md.Prefill()
        self._plain: tuple[str, Generations] | None = None
        self._asked = False
        self._answer_code = self._curve_code = ""
        super().__init__(pair, state, jobs)

    # -- controls

    def build(self) -> W.Widget:
        """Make everything."""
        self._begin()
        self.composer = Composer(self)
        self.tokens = PairView(details=False, height="9rem", scale=1.0)
        self.tokens.name("edits", "edits", "edits that touch the token")
        self.tokens.metric = "edits"
        self.undo(self.tokens.on_select(lambda column, index: self._click(index)))
        self.stack = _theme.column()
        self.empty = _theme.note(_EMPTY)
        self.plot = DosePlot()
        parts = (
            _theme.card(self.composer.box),
            _theme.card(
                _theme.row(self._stack_buttons()), self.empty, self.stack, self.tokens,
                title="Edits",
            ),
            _theme.card(self._answer_controls(), self._answer_view(), title="Answers"),
            _theme.card(*self._dose_controls(), self.plot.pane, title="Dose and response"),
        )  # fmt: skip
        for trait in ("edits", "directions"):
            self.link(self.state, trait, lambda new: self._show())
        for trait in ("messages", "prompt", "prefill"):
            self.link(self.state, trait, lambda new: self._show_tokens())
        self._show()
        return _theme.column(*parts)

    def _begin(self) -> None:
        if self.state.messages or self.state.prompt:
            return
        first = next(iter(self.behaviours.values()), None)
        asked = first.behaviour.prompts[0].render() if first else None
        if isinstance(asked, list):
            self.state.messages = asked
        elif asked is None and self.pair.tokenizer.chat_template:
            self.state.messages = [{"role": "user", "content": FIRST_QUESTION}]
        else:
            self.state.prompt = asked or FIRST_QUESTION

    def _stack_buttons(self) -> W.Widget:
        self.add = _theme.button("Add edit", icon="plus")
        self.find = _theme.button("Find a direction", icon="search")
        self.find.tooltip = "mean difference of both models on the fine-tune's own answers"
        self.clear = _theme.button("Remove all", icon="trash")
        self.side = W.ToggleButtons(options=[(name, side) for side, name in NAMES.items()])
        self.side.value = "finetuned"
        self.side.style.button_width = "6rem"
        self.on(self.add, self.add_edit)
        self.on(self.find, self.find_first)
        self.on(self.clear, lambda: setattr(self.state, "edits", []))
        self.link(self.side, "value", lambda side: self._slid())
        which = _theme.field("The model that is edited", self.side)
        return _theme.row(self.find, self.add, self.clear, which)

    def _answer_controls(self) -> W.Widget:
        self.go = _theme.button("Generate", primary=True, icon="play")
        self.live = W.Checkbox(value=True, indent=False, description="live: moving regenerates")
        self.live.layout.width = "13rem"
        self.random = W.Checkbox(indent=False, description="random control")
        self.random.tooltip = "the same edits with random directions of the same length"
        self.random.layout.width = "9rem"
        self.temperature = W.BoundedFloatText(min=0, max=5, step=0.1)
        self.length = W.BoundedIntText(min=1, max=2048)
        self.seed = W.IntText()
        for control, trait in (
            (self.random, "random_control"), (self.temperature, "temperature"),
            (self.length, "max_new_tokens"), (self.seed, "seed"),
        ):  # fmt: skip
            self.bind(control, trait)
        self.on(self.go, self.run)
        self.link(self.random, "value", lambda wanted: self._slid())
        return _theme.row(
            self.go, self.live, self.random,
            _theme.field("Temperature (0: greedy)", self.temperature, width="9.5rem"),
            _theme.field("New tokens at most", self.length, width="8rem"),
            _theme.field("Seed", self.seed, width="5rem"),
        )  # fmt: skip

    def _answer_view(self) -> PairView:
        self.view = PairView(details=False, height="16rem", blank="press Generate")
        self.view.columns = [{"title": n, "kind": s, "tokens": []} for s, n in NAMES.items()]
        return self.view

    def _dose_controls(self) -> Sequence[W.Widget]:
        names = list(self.behaviours)
        self.behaviour = W.Dropdown(options=names or [("none given", "")])
        self.reach = W.BoundedFloatText(value=4.0, min=0.01, max=1000, step=0.5)
        self.points = W.BoundedIntText(value=9, min=3, max=41, step=2)
        self.n_prompts = W.BoundedIntText(value=16, min=1, max=2000)
        self.n_random = W.BoundedIntText(value=3, min=0, max=40)
        self.measure = _theme.button("Measure", primary=True, icon="chart-line")
        self.measure.disabled = not names
        self.dose_note = _theme.note(
            "The coefficient of the edit in focus runs over a range; the others stay as they are. "
            "Cancel keeps the points that are finished."
            if names else "Give the panel behaviours to measure: Edits(pair, behaviours=[...])."
        )  # fmt: skip
        self.on(self.measure, self.run_dose)
        return self.dose_note, _theme.row(
            self.measure,
            _theme.field("Behaviour", self.behaviour, width="13rem"),
            _theme.field("From −c to +c, c =", self.reach, width="8rem"),
            _theme.field("Points", self.points, width="5rem"),
            _theme.field("Prompts at most", self.n_prompts, width="7.5rem"),
            _theme.field("Random directions", self.n_random, width="8.5rem"),
        )

    # -- the stack

    def add_edit(self, kind: str = "", direction: str = "", **options: Any) -> None:
        """Put an edit on the stack; by default one along the selected direction.

        Args:
            kind: As for `new_edit`; "" chooses one that works.
            direction: Name of a direction; "" takes the selected one.
            options: As for `new_edit`.
        """
        name = direction or self.state.direction or next(iter(self.state.directions), "")
        if not kind:
            kind = "steer" if name or self.pair.kind != "adapter" else "adapter"
        if kind == "adapter":
            name, options = "", {"coefficient": 0.0, "layers": "all", **options}
        if kind == "ablate":
            options = {"layers": "all", **options}
        self.focus = len(self.state.edits)
        self.state.edits = [*self.state.edits, new_edit(kind, name, **options)]

    def find_first(self) -> Job:
        """Find a first direction: what the fine-tune adds on its own answers."""
        if not self.behaviours:
            raise InterventionError("there is no behaviour to ask for: Edits(pair, behaviours=...)")
        known = next(iter(self.behaviours.values())).some(40)
        return find_direction(self, known, "models", first_layer(self.pair))

    def _change(self, number: int, edit: dict[str, Any]) -> None:
        edits = list(self.state.edits)
        self.focus, edits[number] = number, edit
        try:
            self.state.edits = edits
        except traitlets.TraitError as error:
            self.jobs.fail(self.title.lower(), error)
        self._slid()

    def _act(self, number: int, action: str) -> None:
        edits = list(self.state.edits)
        if action == "delete":
            del edits[number]
            self.focus = max(0, min(self.focus, len(edits) - 1))
        elif action in ("up", "down"):
            other = number + (-1 if action == "up" else 1)
            if not 0 <= other < len(edits):
                return
            edits[number], edits[other] = edits[other], edits[number]
            self.focus = other
        else:
            self.focus = number
        self.state.edits = edits
        self._show()
        if action != "focus":
            self._slid()

    def _click(self, index: int) -> None:
        if not self.state.edits:
            return
        self.state.token = index
        edit = dict(self.state.edits[self.focus])
        edit["where"] = clicked(edit["where"], index, self._text().n_tokens)
        self._change(self.focus, edit)

    def _slid(self) -> None:
        if self.live.value and self._asked:
            self.run()

    def _show(self) -> None:
        """Show the stack as it is; rows are made once and hidden when they are not needed."""
        edits = self.state.edits
        self.focus = max(0, min(self.focus, len(edits) - 1))
        while len(self._rows) < len(edits):
            row = EditRow(
                len(self._rows), self.pair.n_layers, self._heads, self._change, self._act,
                lambda error: self.jobs.fail(self.title.lower(), error),
            )  # fmt: skip
            self._rows.append(row)
            self.own(row.box)
        for number, (row, edit) in enumerate(zip(self._rows, edits, strict=False)):
            row.show(edit, self.state.directions, self._norms, number == self.focus)
        self.stack.children = tuple(row.box for row in self._rows[: len(edits)])
        self.empty.value = _EMPTY if self.state.directions else f"{_EMPTY} {_NO_DIRECTION}"
        self.empty.layout.display = "none" if edits else ""
        self.clear.disabled = not edits
        self.find.layout.display = "none" if self.state.directions or not self.behaviours else ""
        focused = edits[self.focus] if edits else None
        varied = focused if focused and focused["kind"] in REACH else None
        self.plot.mark(varied["coefficient"] if varied else None)
        self._show_tokens()

    def _text(self) -> Text:
        return self.pair.texts([self.state.item()], reply=True)[0]

    def _show_tokens(self) -> None:
        """Show which tokens of the prompt the edits touch."""
        edits = self.state.edits
        self.tokens.layout.display = "" if edits else "none"
        if not edits or not self.state.item():
            return
        text = self._text()
        touched = [mask_of(edit["where"]).select(text) for edit in edits if edit["on"]]
        focused = mask_of(edits[self.focus]["where"])
        mine = focused.select(text)
        new = "and every new one" if focused.on_new else "and no new one"
        self.tokens.scale = float(max(2, len(touched)))
        self.tokens.set_columns([{
            "title": f"Tokens that edit {self.focus + 1} touches",
            "subtitle": f"underlined: {sum(mine)} of {len(mine)} in the prompt, {new}; "
                        "click to choose others",
            "kind": "edited", "tokens": text.pieces,
            "marks": ["affected" if each else "" for each in mine],
            "values": {"edits": [float(sum(each)) for each in zip(*touched, strict=True)]},
        }])  # fmt: skip

    # -- answers

    def run(self) -> Job:
        """Generate with the edits as they are; an older run of this is stopped."""
        started = time.monotonic()
        ask = Ask.of(self.state, self.side.value)  # pyright: ignore[reportArgumentType]
        self._asked = True
        return self.submit(
            lambda job: self._generate(job, ask, started), key="generate", label="edit and generate"
        )

    def _generate(self, job: Job, ask: Ask, started: float) -> None:
        known = self._plain is not None and self._plain[0] == ask.plain_key
        columns = ask.columns()
        if known:
            columns[:2] = [dict(each) for each in self.view.columns[:2]]
        self.view.set_columns(columns)
        try:
            if not known:
                cells = [Cell("base"), Cell("finetuned")]
                self._plain = None
                found = self._streamed(job, ask, cells, 0, started)
                self._plain = ask.plain_key, found
                self._finish(ask, found, 0)
            if ask.plans:
                cells = [Cell(ask.side, name, plan) for name, plan in ask.plans.items()]
                self._finish(ask, self._streamed(job, ask, cells, 2, started), 2)
        finally:
            self.view.finish()
        self._answer_code = ask.code
        self._measure_norms()

    def _streamed(
        self, job: Job, ask: Ask, cells: list[Cell], offset: int, started: float
    ) -> Generations:
        ends, count = set(end_ids(self.pair.sides)), 0
        names: dict[int, str] = {}

        def on_step(new: list[tuple[Row, int]]) -> None:
            nonlocal count
            if not count:
                self.first_token = time.monotonic() - started
            count += 1
            for row, token in new:
                if token not in ends:
                    if token not in names:
                        names[token] = token_names(self.pair.tokenizer, [token])[0]
                    self.view.append(offset + row.cell, [names[token]])
            job.report(count / ask.settings["max_new_tokens"], f"token {count}")

        return self.pair.generate(
            [ask.item], cells=cells, on_step=on_step, cancel=job.cancel, prefill=self._prefill,
            **ask.settings,
        )  # fmt: skip

    def _finish(self, ask: Ask, found: Generations, offset: int) -> None:
        """Put the exact tokens in place, with verdicts and what the edit changed."""
        columns = [dict(each) for each in self.view.columns]  # pyright: ignore[reportArgumentType]
        unedited = columns[0 if ask.side == "base" else 1]["tokens"]
        kept = {key: text for key, text in self.answers.items() if offset and key[1] == "none"}
        self.answers = kept | {(a.side, a.edit): a.text for a in found.answers}
        for number, answer in enumerate(found.answers):
            column = columns[offset + number]
            column["tokens"] = pieces_of(self.pair, found.prompts[0], answer)
            column["streaming"] = False
            if offset:
                column["marks"] = differing(unedited, column["tokens"])
            verdict = verdict_of(self.behaviours, ask.item, answer.text)
            column["badges"] = [verdict.label] if verdict else []
        self.view.set_columns(columns)

    def _measure_norms(self) -> None:
        text = self._text()
        self._norms = md.residual_norms(self.pair, [text])
        for row, edit in zip(self._rows, self.state.edits, strict=False):
            row.measure(edit, self.state.directions, self._norms)

    # -- dose and response

    def run_dose(self) -> Job:
        """Measure the curve of the edit in focus; points appear as they are finished."""
        if not self.behaviours:
            raise InterventionError("there is no behaviour to measure: Edits(pair, behaviours=...)")
        known = self.behaviours[str(self.behaviour.value)].some(self.n_prompts.value)
        side: Side = self.side.value  # pyright: ignore[reportAssignmentType]
        curve = Curve.of(
            self.state, self.focus, side, known, self.reach.value, self.points.value,
            self.n_random.value,
        )  # fmt: skip
        return self.submit(
            lambda job: self._measure(job, curve), key="dose", label="dose and response"
        )

    def _measure(self, job: Job, curve: Curve) -> Any:
        asked = len(curve.known.behaviour.prompts)
        self.plot.begin(curve.coefficients, curve.label, curve.unit)
        self.dose_note.value = visible(
            f"{curve.label}: {curve.known.behaviour.name}, {asked} prompts, "
            f"random controls: {curve.n_random}, seed {curve.seed}."
        )
        self._curve_code = curve.code()
        return curve.measure(
            self.pair, on_point=self.plot.add, progress=job.progress, cancel=job.cancel
        )

    # -- what stays

    def code(self) -> str:
        """Python for the answers and the curve that are shown; before, for those to come."""
        answers = self._answer_code or Ask.of(self.state, self.side.value).code  # pyright: ignore
        return "\n\n".join(each for each in (answers, self._curve_code) if each)

    def snapshot_html(self) -> str:
        """Stack, answers and curve."""
        headings = ("edit", "direction", "layers", "tokens", "coefficient", "on", "copied")
        fields = ("kind", "direction", "layers", "where", "coefficient", "on")
        rows = [
            ["own" if edit[f] is None else edit[f] for f in fields]
            + [copied(edit) if edit["kind"] == "replace" else ""] for edit in self.state.edits
        ]  # fmt: skip
        stack = _render.table(headings, rows, caption="Edits") if rows else _render.note(_EMPTY)
        verdicts = [
            _render.badge(f"{c['title']}: {b}") for c in self.view.columns
            for b in c.get("badges") or ()
        ]  # fmt: skip
        parts = [stack, self.view.snapshot_html(), *verdicts, self.plot.snapshot_html()]
        return _render.section(self.title, parts, code=self.shown_code())
