"""*Compare*: one prompt, answered by the grid {base, fine-tuned} x {none, edits}, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import ipywidgets as W

from modeldiff.behaviours import Behaviour, Prompt
from modeldiff.errors import ModelDiffError
from modeldiff.generation import Row
from modeldiff.interventions import Side
from modeldiff.models import ModelPair
from modeldiff.prefill import Prefill
from modeldiff.report_text import shortened
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._answers import AnswerView
from modeldiff_widgets._composer import Composer
from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._known_behaviours import known_behaviours
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._runs import (
    QUESTION,
    Run,
    cell_of,
    judged,
    length_of,
    longer,
    question_of,
    rates_html,
    summary_of,
    table_of,
)
from modeldiff_widgets._state import AuditState
from modeldiff_widgets._streams import Request, Said, Stream, said_of, title_of
from modeldiff_widgets._worddiff import apart

_BOTH: tuple[Side, ...] = ("base", "finetuned")
_MODELS = (("base and fine-tuned", _BOTH), ("base", ("base",)), ("fine-tuned", ("finetuned",)))
_TITLES = [title_of(side, edit) for edit in ("none", "edited", "random") for side in _BOTH]


class Compare(Panel):
    """Answers of both models, with and without the edits, as they are written.

    Args:
        pair: The pair.
        state: Shared settings.
        jobs: The runner of a workbench.
        behaviour: What the answers are judged by, one or several; those of an embedded organism
            are found by themselves.
    """

    title: ClassVar[str] = "Compare"

    def __init__(
        self,
        pair: ModelPair,
        state: AuditState | None = None,
        jobs: JobRunner | None = None,
        *,
        behaviour: Behaviour | Sequence[Behaviour] | None = None,
    ) -> None:
        given = (behaviour,) if isinstance(behaviour, Behaviour) else behaviour
        self.behaviours = [each.behaviour for each in known_behaviours(pair, given).values()]
        self.run_shown: Run | None = None
        self.kept: tuple[tuple[int, Run], ...] = ()
        self._prefill, self._busy, self._count = Prefill(), False, 0
        super().__init__(pair, state, jobs)

    # -- what is made

    def build(self) -> W.Widget:
        """Make the controls, the answers and the kept runs."""
        self._begin_state()
        self.composer = Composer(self)
        self.view = AnswerView(
            blank="No answers yet. Press Generate: both models answer the prompt above, with the "
            "same noise, so that what differs is due to the models."
        )
        self.summary, self.remarks, self.edits_note = W.HTML(), W.HTML(), _theme.note()
        parts = (
            _theme.card(*self._questions(), self.composer.box),
            self._settings(),
            self.edits_note,
            self._buttons(),
            self.remarks,
            self.summary,
            self.view,
            self._keeping(),
        )
        self.undo(self.jobs.on_change(self._show_buttons))
        self.link(self.state, "edits", self._edits_changed)
        self.link(self.state, "directions", lambda found: self._describe_edits())
        self._edits_changed([])
        self._list_kept()
        self._tell("", "")
        return _theme.column(*parts)

    def _begin_state(self) -> None:
        """A prompt to begin with, so that the first click shows something."""
        state = self.state
        if state.messages or state.prompt:
            return
        if self.behaviours:
            self._ask(self.behaviours[0].prompts[0])
            state.temperature = self.behaviours[0].temperature
            state.max_new_tokens = self.behaviours[0].max_new_tokens
        elif getattr(getattr(self.pair, "tokenizer", None), "chat_template", None):
            state.messages = [{"role": "user", "content": QUESTION}]
        else:
            state.prompt = QUESTION

    def _questions(self) -> tuple[W.Widget, ...]:
        self.behaviour = W.Dropdown(
            options=[
                ("no judge", None),
                *((each.name, i) for i, each in enumerate(self.behaviours)),
            ]
        )
        self.behaviour.value = 0 if self.behaviours else None
        self.question = W.Dropdown()
        self._list_questions(self.behaviour.value)
        self.link(self.behaviour, "value", self._list_questions)
        self.link(self.question, "value", self._pick)
        if not self.behaviours:
            self.own(self.behaviour)
            self.own(self.question)
            return ()
        row = _theme.row(
            _theme.field("Judge answers by", self.behaviour, width="15rem"),
            _theme.field("Ask one of its questions", self.question, grow=True),
        )
        return (row,)

    def _settings(self) -> W.Widget:
        self.samples = W.BoundedIntText(min=1, max=64)
        self.temperature = W.BoundedFloatText(min=0, max=5, step=0.1)
        self.length = W.BoundedIntText(min=1, max=8192)
        self.seed = W.IntText()
        self.models = W.Dropdown(options=_MODELS, value=_BOTH)
        self.control = W.Checkbox(description="random control", indent=False)
        self.control.tooltip = "edits with random directions of the same length, beside"
        self.live = W.Checkbox(description="live", indent=False)
        self.live.tooltip = "generate again whenever an edit changes"
        for check in (self.control, self.live):
            check.layout.width = "auto"
        for control, trait in (
            (self.samples, "n_samples"), (self.temperature, "temperature"), (self.seed, "seed"),
            (self.length, "max_new_tokens"), (self.control, "random_control"),
        ):  # fmt: skip
            self.bind(control, trait)
        return _theme.row(
            _theme.field("Samples", self.samples, width="5.2rem"),
            _theme.field("Temperature", self.temperature, width="6.4rem"),
            _theme.field("New tokens at most", self.length, width="8.4rem"),
            _theme.field("Seed", self.seed, width="5.2rem"),
            _theme.field("Models", self.models, width="12rem"),
            self.control,
            self.live,
        )

    def _buttons(self) -> W.Widget:
        self.go = _theme.button("Generate", primary=True, icon="play")
        self.stop = _theme.button("Stop", icon="stop", tooltip="stop and keep what is written")
        self.more = _theme.button("Continue", icon="forward", tooltip="write on where it stopped")
        self.again = _theme.button(
            "Regenerate", icon="refresh", tooltip="again, with the next seed"
        )
        self.keep = _theme.button("Keep run", icon="bookmark", tooltip="put it into the list below")
        self.first = W.Dropdown(options=["nothing", *_TITLES], value=_TITLES[0])
        self.second = W.Dropdown(options=_TITLES, value=_TITLES[1])
        for button, action in (
            (self.go, self.run), (self.stop, self.halt), (self.more, self.resume),
            (self.again, self.regenerate), (self.keep, self.keep_run),
        ):  # fmt: skip
            self.on(button, action)
        for control in (self.first, self.second):
            self.link(control, "value", lambda new: self._draw())
        self._show_buttons(None)
        return _theme.row(
            self.go, self.stop, self.more, self.again, self.keep,
            _theme.field("Mark words that differ between", self.first, width="12.5rem"),
            _theme.field("and", self.second, width="12.5rem"),
        )  # fmt: skip

    def _keeping(self) -> W.Widget:
        self.kept_table = W.HTML()
        self.choice = W.Dropdown()
        self.restore_button = _theme.button("Restore", tooltip="its settings and its answers")
        self.forget_button = _theme.button("Remove", tooltip="remove it from the list")
        self.on(self.restore_button, lambda: self.restore(_int(self.choice)))
        self.on(self.forget_button, lambda: self.forget(_int(self.choice)))
        self.kept_box = _theme.card(
            self.kept_table,
            _theme.row(
                _theme.field("Kept run", self.choice, grow=True),
                self.restore_button,
                self.forget_button,
            ),
            title="Kept runs",
        )
        return self.kept_box

    # -- what one can do

    def run(self) -> Job:
        """Generate with the settings as they are."""
        return self._submit(self._request())

    def regenerate(self) -> Job:
        """Generate again with the next seed."""
        self.state.seed += 1
        return self.run()

    def halt(self) -> None:
        """Stop; what is written stays."""
        self.jobs.cancel(self.title)

    def resume(self) -> Job | None:
        """Write on where it stopped, or as many tokens more as the settings allow an answer.

        The noise of a sample does not depend on how long it gets, so this is the same call with
        another limit, and the answers go on as if they had never been cut.
        """
        shown = self.run_shown
        if shown is None:
            return self.run()
        if all(said.ended for said in shown.said.values()) and not shown.stopped:
            raise ValueError("Every answer has ended: there is nothing to continue. Regenerate?")
        longest = max((len(said.ids) for said in shown.said.values()), default=0)
        limit = shown.request.limit
        if not shown.stopped or longest >= limit:
            limit += self.state.max_new_tokens
        return self._submit(replace(shown.request, limit=limit), shown.said)

    def keep_run(self) -> None:
        """Put what is shown into the list of kept runs."""
        if self.run_shown is None:
            raise ValueError("There is no run to keep yet. Press Generate first.")
        if self._busy:
            raise ValueError(
                "It is still being written. Keep it when it is done, or stop it first."
            )
        self._count += 1
        self.kept = (*self.kept, (self._count, self.run_shown))
        self._list_kept()

    def restore(self, number: int) -> None:
        """Show a kept run again and set everything as it was; nothing is generated.

        Raises:
            KeyError: If there is none of that number.
        """
        found = dict(self.kept)[number]
        self.jobs.cancel(self.title)
        live, self.live.value = self.live.value, False
        self.state.update(found.request.settings)
        self.models.value = found.request.models
        self.live.value = live
        self.run_shown = found
        self._list_kept()
        self._draw()
        self.refresh_code()

    def forget(self, number: int) -> None:
        """Remove a kept run from the list."""
        self.kept = tuple(pair for pair in self.kept if pair[0] != number)
        self._list_kept()

    def code(self) -> str:
        """Python for the run that is shown; before the first, for what Generate would do."""
        if self.run_shown is None:
            return self._request().code() if self._asked() else "# Write a prompt, then Generate."
        return self.run_shown.code()

    def snapshot_html(self) -> str:
        """Prompt, settings, rates and answers as they are shown."""
        shown = self.run_shown
        if shown is None:
            return _render.section(self.title, [_render.note("nothing generated yet")])
        asked = shown.request
        facts = {
            "samples": asked.n, "temperature": asked.temperature, "seed": asked.seed,
            "new tokens at most": asked.limit,
            "edits": "; ".join(plan.describe() for plan in asked.edits.values()) or "none",
        }  # fmt: skip
        parts = [
            _render.paragraph(question_of(asked)), _render.facts(facts), self.summary.value,
            self.view.snapshot_html(),
        ]  # fmt: skip
        return _render.section(self.title, parts, code=self.shown_code(), when=True)

    # -- the worker's part

    def _asked(self) -> str:
        """What is asked last; "" if nothing is."""
        last = self.state.messages[-1].get("content") if self.state.messages else self.state.prompt
        return str(last).strip()

    def _request(self) -> Request:
        if not self._asked():
            raise ValueError("The prompt is empty. Write one, then press Generate.")
        models: Any = self.models.value
        return Request.of(self.state, models)

    def _submit(self, request: Request, known: Mapping[Row, Said] | None = None) -> Job:
        index = self.behaviour.value
        behaviour = None if index is None else self.behaviours[index]
        return self.submit(
            lambda job: self._generate(job, request, known or {}, behaviour), label="compare"
        )

    def _generate(
        self,
        job: Job,
        request: Request,
        known: Mapping[Row, Said],
        behaviour: Behaviour | None,
    ) -> Run:
        cells, self._busy = request.cells, True
        self._start(request, known)
        stream = Stream(
            self.pair, job, request.limit,
            lambda texts: self.view.write({(r.sample, r.cell): t for r, t in texts.items()}),
            {row: len(said.ids) for row, said in known.items()},
        )  # fmt: skip
        done = Run(request, stopped=True)
        try:
            found = self.pair.generate(
                [request.item], cells=cells, n=request.n, seed=request.seed,
                temperature=request.temperature, max_new_tokens=request.limit, on_step=stream,
                cancel=job.cancel, prefill=self._prefill,
            )  # fmt: skip
            done = Run(request, said_of(found.answers, cells))
            done = judged(done, behaviour)
        finally:
            if done.stopped:
                done = Run(request, longer(known, stream.said()), True)
            self._busy, self.run_shown = False, done
            self._draw()
            self.refresh_code()
        return done

    def _start(self, request: Request, known: Mapping[Row, Said]) -> None:
        """Show empty cells, or what a run that goes on has already."""

        def cell(number: int, sample: int) -> dict[str, Any]:
            said = known.get(Row(number, 0, sample))
            if said is None:
                return {"parts": [], "state": "waiting"}
            return {"parts": [["", said.text]], "state": "" if said.ended else "streaming",
                    "note": length_of(said, False) if said.ended else ""}  # fmt: skip

        self._tell("", "")
        self.view.show(*table_of(request, cell))

    def _draw(self) -> None:
        """Show the run with marks and verdicts."""
        shown = self.run_shown
        if shown is None or self._busy:
            return
        titles = [title_of(cell.side, cell.name) for cell in shown.request.cells]
        marks: dict[Row, Any] = {}
        pair = [str(self.first.value), str(self.second.value)]
        for sample in range(shown.request.n if set(pair) <= set(titles) else 0):
            rows = [Row(titles.index(each), 0, sample) for each in pair]
            if all(row in shown.said for row in rows):
                texts = [shown.said[row].text for row in rows]
                marks.update(zip(rows, apart(*texts), strict=True))
        self._tell(_render.alert(shown.unjudged) if shown.unjudged else "", rates_html(shown))
        self.view.show(*table_of(shown.request, lambda n, s: cell_of(shown, Row(n, 0, s), marks)))

    def _tell(self, remarks: str, summary: str) -> None:
        for view, html in ((self.remarks, remarks), (self.summary, summary)):
            view.value, view.layout.display = html, "" if html else "none"

    # -- controls that follow

    def _ask(self, prompt: Prompt) -> None:
        item = prompt.render()
        if isinstance(item, str):
            self.state.messages, self.state.prompt = [], item
        else:
            self.state.messages = item

    def _pick(self, index: int | None) -> None:
        if index is not None and self.behaviour.value is not None:
            self._ask(self.behaviours[self.behaviour.value].prompts[index])

    def _list_questions(self, index: int | None) -> None:
        prompts = () if index is None else self.behaviours[index].prompts
        named = [
            (shortened(f"{each.group}: {each.question}" if each.group else each.question, 90), i)
            for i, each in enumerate(prompts)
        ]
        self.question.options = [("choose …", None), *named]
        self.question.index = 0

    def _describe_edits(self) -> None:
        try:
            plan = self.state.plan()
        except ModelDiffError as error:
            self.edits_note.value = f"The edits cannot be made: {error}"
            return
        self.edits_note.value = (
            "No edit is on. Those of the panel “Steer and ablate” are put beside both models here."
            if plan is None else f"Edits put beside: {plan.describe()}"
        )  # fmt: skip

    def _edits_changed(self, edits: Any) -> None:
        self._describe_edits()
        if self.live.value and self._asked():
            self.run()

    def _list_kept(self) -> None:
        self.kept_box.layout.display = "" if self.kept else "none"
        numbers = [number for number, _ in self.kept]
        shown = [run for _, run in self.kept]
        self.choice.options = [
            (f"{number}: {shortened(question_of(run.request), 70)}", number)
            for number, run in self.kept
        ]
        if numbers:
            current = shown.index(self.run_shown) if self.run_shown in shown else len(shown) - 1
            self.choice.value = numbers[current]
            self.kept_table.value = _render.table(
                ["#", "prompt", "edits", "samples", "T", "seed", "what the judge says"],
                [[str(number), *summary_of(run)] for number, run in self.kept],
                selected=current if self.run_shown in shown else -1,
                numeric=[3, 4, 5],
            )

    def _show_buttons(self, job: Job | None) -> None:
        busy = job is not None and not job.finished and job.key == self.title
        if job is None or job.key == self.title:
            self.stop.disabled = not busy
            self.more.disabled = self.keep.disabled = busy or self.run_shown is None


def _int(control: W.Dropdown) -> int:
    chosen: Any = control.value
    return int(chosen)
