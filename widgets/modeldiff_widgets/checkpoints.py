"""The panel *Checkpoints*: how a training went, where it turned, and its model at any step."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as W

from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.generation import Row
from modeldiff.lora import adapter_modules, write_directions
from modeldiff.models import ModelPair
from modeldiff.series import load_pairs
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._answers import AnswerView
from modeldiff_widgets._checkpoint_answers import Question, answered, cell_of
from modeldiff_widgets._checkpoint_plot import CheckpointPlot, verdict_html
from modeldiff_widgets._checkpoint_source import ORGANISM, Course, Look, Training, open_training
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._prompt_box import Asked, PromptBox, tidy
from modeldiff_widgets._streams import Said

EMBEDDED = f"{ORGANISM}checkpoints"
_PARTS = (("what it writes (B)", "B"), ("what it reads (A)", "A"), ("the whole adapter", "adapter"))
_NONE = [("none yet", -1)]
_FACTS = {
    "step": "step", "norm": "norm", "moved": "moved", "cosine_to_last": "cosine to the last",
    "learning_rate": "learning rate", "gradient_norm": "gradient norm", "loss": "loss",
}  # fmt: skip


class Checkpoints(Panel):
    """Curves of a training with their null, and its model at a step that one scrubs to.

    Args:
        pair: The pair; its base is taken where a folder of adapters is read.
        state: Shared settings.
        jobs: The runner of a workbench.

    Example:
        >>> with Checkpoints(pair) as panel:  # doctest: +SKIP
        ...     panel.where.value = "runs/bad-advice"  # with checkpoint-10, checkpoint-20, ...
        ...     panel.run()
        ...     panel.jobs.wait(60)
        ...     panel.course.turns.transition
    """

    title = "Checkpoints"

    def build(self) -> W.Widget:
        """Make everything."""
        self.course: Course | None = None
        self.pairs: dict[int, ModelPair] = {}
        self.answers: dict[Question, list[Said]] = {}
        self.asked: tuple[Training, Question] | None = None
        self._filling, self._loaded, self._opened = False, "", 0
        self._folder = tempfile.TemporaryDirectory(prefix="modeldiff-")
        self.undo(self._folder.cleanup)
        self.plot = CheckpointPlot(self.scrub)
        self.verdict, self.hint = W.HTML(), W.HTML(_HINT)
        reading, live = self._reading(), self._live()
        self.whole = _theme.column(
            _theme.card(self.verdict, title="Did it turn?"),
            _theme.card(self.looking, self.plot.pane, title="Along the training"),
            _theme.card(*live, title="The model at a step"),
        )  # fmt: skip
        self.whole.layout.display = "none"
        self._connect()
        return _theme.column(reading, self.hint, self.whole)

    def _reading(self) -> W.Widget:
        names = getattr(self.pair, "sides", None) and self.pair.sides.names
        base = names[0] if names else ""
        own = base.endswith("em-base")
        self.where = W.Text(EMBEDDED if own else "", placeholder="folder with checkpoint-10, …",
                            continuous_update=False)  # fmt: skip
        self.base = W.Text(base, placeholder="path or hub id", continuous_update=False)
        self.equal = W.Checkbox(description="interpolate", indent=False)
        self.go = _theme.button("Read", primary=True, icon="folder-open")
        self.part = W.Dropdown(options=_PARTS)
        self.module = W.Dropdown(options=[("none yet", "")])
        self.k = W.ToggleButtons(options=[1, 2, 3])
        self.k.style.button_width = "2.6rem"
        self.looking = _theme.row(
            _theme.field("Vector", self.part, width="12rem"),
            _theme.field("Module", self.module, width="16rem"),
            _theme.field("Checkpoints back and on (k)", self.k),
        )
        return _theme.row(
            _theme.field(
                f"Checkpoints: a folder of adapters, or {EMBEDDED}", self.where, grow=True
            ),
            _theme.field("Base model", self.base, grow=True),
            _theme.field("Unequal spacing", self.equal, width="8rem"),
            self.go,
        )

    def _live(self) -> tuple[W.Widget, ...]:
        self.step = W.SelectionSlider(options=_NONE, continuous_update=False)
        self.factor = W.BoundedFloatText(1.0, min=-64, max=64, step=0.5)
        self.follow = W.Checkbox(description="answer as I scrub", indent=False)
        self.answer = _theme.button("Answer", primary=True, icon="comment")
        self.every = _theme.button("Answer at every step", icon="list-ol")
        self.add = _theme.button("Add this step's direction", icon="plus")
        self.prompt = PromptBox(self)
        self.prompt.options.children[1].layout.display = "none"  # nobody answers beforehand
        self.facts, self.view, self.added = W.HTML(), AnswerView(), _theme.note()
        self.view.blank = "“Answer” loads the base once, with the adapter of every step."
        return (
            _theme.row(
                _theme.field("Step", self.step, grow=True),
                _theme.field("Adapter × (amplified)", self.factor, width="9.5rem"),
                _theme.field("Live", self.follow, width="9rem"),
            ),
            self.facts, self.prompt.box, _theme.row(self.answer, self.every, self.add), self.added,
            self.view,
        )  # fmt: skip

    def _connect(self) -> None:
        self.on(self.go, self.run)
        self.on(self.answer, self.ask)
        self.on(self.every, self.ask_every)
        self.on(self.add, self.add_direction)
        for control in (self.part, self.module):
            self.link(control, "value", lambda new: self._look_again())
        self.link(self.k, "value", lambda k: self._show_turn())
        self.link(self.step, "value", lambda step: self._scrubbed())
        self.link(self.factor, "value", lambda factor: self._show_known())

    # -- the course of the training

    def run(self) -> Job:
        """Read the checkpoints that are named; returns at once."""
        where, base = self.where.value.strip(), self.base.value.strip()
        part: Any = self.part.value
        look = Look(part, str(self.module.value), self.equal.value)

        def work(job: Job) -> Course:
            job.report(0.05, "reading the adapters")
            self._opened += 1
            folder = Path(self._folder.name) / str(self._opened)
            return self._course(job, open_training(where, base, folder), look)

        return self.submit(work, key="read", on_done=lambda job: self._show(job.result),
                           label="read checkpoints")  # fmt: skip

    def _course(self, job: Job, training: Training, look: Look) -> Course:
        job.report(0.4, f"{len(training.steps)} checkpoints; walking at random")
        found = Course.of(training, look)
        job.report(1.0, "drawing")
        return found

    def _look_again(self) -> None:
        """Another vector of the same training."""
        known = self.course
        if known is None or self._filling:
            return
        part: Any = self.part.value
        look = replace(known.look, part=part, module=str(self.module.value))
        self.submit(
            lambda job: self._course(job, known.training, look), key="read",
            on_done=lambda job: self._show(job.result), label="read checkpoints",
        )  # fmt: skip

    def _show(self, course: Course) -> None:
        fresh = self.course is None or self.course.training is not course.training
        self.course = course
        self.hint.layout.display, self.whole.layout.display = "none", ""
        self._fill(course, fresh)
        self.verdict.value = verdict_html(course)
        self.plot.show(course, int(self.k.value))  # pyright: ignore[reportArgumentType]
        self._scrubbed()
        self.state.results = {**self.state.results, "checkpoints": course}

    def _fill(self, course: Course, fresh: bool) -> None:
        """Offer what this training has."""
        self._filling = True
        self.module.options = [(name, name) for name in course.modules]
        self.module.value = course.look.module
        ks = [int(k) for k in course.turns.table["k"]]
        if list(self.k.options) != ks:
            self.k.options = ks
        if fresh:
            self.pairs, self.answers, self.asked = {}, {}, None
            self.view.show([], [])
            self.step.options = [(str(each), each) for each in course.training.steps]
            self.step.value = course.training.steps[-1]
        self._filling = False

    def _show_turn(self) -> None:
        if self.course is not None and not self._filling and self.k.value is not None:
            self.plot.show_turn(self.course, int(self.k.value))  # pyright: ignore

    # -- the model at a step

    @property
    def live(self) -> ModelPair | None:
        """The pair of the step that is chosen; None until a first answer has loaded it."""
        return self.pairs.get(int(self.step.value))  # pyright: ignore[reportArgumentType]

    def scrub(self, step: int) -> None:
        """Go to a checkpoint."""
        if self.course is not None and step in self.course.training.steps:
            self.step.value = step

    def _scrubbed(self) -> None:
        if self.course is None or self._filling:
            return
        step = int(self.step.value)  # pyright: ignore[reportArgumentType]
        self.plot.mark(step)
        self.facts.value = _facts(self.course, step)
        if not self._show_known() and self.follow.value:
            self.ask()

    def _show_known(self) -> bool:
        """Show the answers of this step, if it gave them."""
        if self.course is None or not self.answers:
            return False
        question = self._question(self.prompt.asked())
        known = self.answers.get(question)
        if known is not None:
            self._put(self.course.training, question, known)
        return known is not None

    def _question(self, asked: Asked, step: int | None = None) -> Question:
        chosen = int(self.step.value) if step is None else step  # pyright: ignore
        return Question.of(asked, chosen, float(self.factor.value))

    def _training(self) -> Training:
        if self.course is None:
            raise MismatchError("no checkpoints were read: name them and press “Read”.")
        return self.course.training

    def ask(self) -> Job:
        """Answer the prompt with the base and with the chosen step; returns at once."""
        training, asked = self._training(), self.prompt.asked()
        question = self._question(asked)
        return self.submit(
            lambda job: self._answer(job, training, asked, question), key="answer",
            label=f"answer at step {question.step}",
        )  # fmt: skip

    def ask_every(self) -> Job:
        """Answer at every step, so that scrubbing shows each at once; returns at once."""
        training, asked = self._training(), self.prompt.asked()
        questions = [self._question(asked, step) for step in training.steps]
        here = self._question(asked)

        def work(job: Job) -> None:
            for number, question in enumerate(questions):
                job.report(number / len(questions), f"step {question.step}")
                if question not in self.answers:
                    self._answer(job, training, asked, question)
            self._put(training, here, self.answers[here])

        return self.submit(work, key="answer", label="answer at every step")

    def _answer(self, job: Job, training: Training, asked: Asked, question: Question) -> None:
        """In the worker."""
        pair = self._load(job, training)[question.step]
        self._put(training, question, None)

        def show(texts: dict[Row, str]) -> None:
            self.view.write({(0, row.cell): text for row, text in texts.items()})

        done: list[Said] = []
        try:
            done = answered(pair, asked.item, question, job, show)
        finally:
            if not done:  # stopped or failed: what is shown is no answer
                self.view.show([], [])
                self.refresh_code()
        self.answers[question] = done
        self._put(training, question, done)

    def _load(self, job: Job, training: Training) -> dict[int, ModelPair]:
        """The base once, with the adapter of every step; in the worker."""
        if not self.pairs:
            job.report(0.0, f"loading {training.base} with {len(training.steps)} adapters")
            self.pairs = load_pairs(training.base, training.paths)
        return self.pairs

    def _put(self, training: Training, question: Question, said: list[Said] | None) -> None:
        """Show answers, or places for them."""
        waiting = [{"parts": [], "state": "waiting"} for _ in question.cells]
        cells = waiting if said is None else [cell_of(each) for each in said]
        self.asked = None if said is None else (training, question)
        self.view.show(question.columns(), [{"title": "", "cells": cells}])

    def add_direction(self) -> Job:
        """Put what the chosen module writes at this step into the library; returns at once."""
        training, step = self._training(), int(self.step.value)  # pyright: ignore
        assert self.course is not None
        module = self.course.look.module
        return self.submit(
            lambda job: self._direction(job, training, step, module), key="direction",
            on_done=lambda job: self._keep(job.result), label="direction of a step",
        )  # fmt: skip

    def _direction(self, job: Job, training: Training, step: int, module: str) -> Direction:
        pair = self._load(job, training)[step]
        several = adapter_modules(pair.sides)
        if module == "adapter" and len(several) == 1:
            module = several[0].name
        found = [each for each in several if each.name == module.split("layers.")[-1]]
        if not found:
            raise DirectionError(
                f"{module!r} is no single module: choose one to take what it writes."
            )
        made = write_directions(found[0], 1, models=pair.digests)[0]
        return made.renamed(f"step {step} {found[0].name}")

    def _keep(self, direction: Direction) -> None:
        name = self.state.add_direction(direction)
        self.added.value = f"“{name}” is in the library: see Directions, Steer and ablate."

    # -- what remains of it

    def code(self) -> str:
        """Python that reproduces ``series``, ``found``, ``table`` and, if shown, ``answers``."""
        if self.course is None:
            return "# No checkpoints were read: name them and press “Read”."
        lines = [self.course.code()]
        if self.asked is not None:
            lines.append(self.asked[1].code())
        return tidy(lines)

    def snapshot_html(self) -> str:
        """Verdict, curves, the table and the answers."""
        if self.course is None:
            return _render.section(self.title, [_render.note("No checkpoints were read.")])
        shown = self.course.table.drop(columns=["pc1", "pc2"], errors="ignore")
        parts = [
            _render.note(self.course.training.where), self.verdict.value,
            self.plot.snapshot_html(), _render.frame(shown), self.facts.value,
        ]  # fmt: skip
        if self.asked is not None:
            parts += [_render.paragraph(self.asked[1].item_code), self.view.snapshot_html()]
        return _render.section(self.title, parts, code=self.shown_code(), when=True)


_HINT = _render.columns([
    ("No checkpoints are read yet", "neutral",
     _render.note("“Read” takes a folder of PEFT checkpoints and shows how what the adapter writes "
                  "turned, grew and settled, beside random walks with the same steps. Then scrub "
                  "to a step: the model of that step answers beside its base."))
])  # fmt: skip


def _facts(course: Course, step: int) -> str:
    """What is known at a step."""
    rows = course.table[course.table["step"] == step].to_dict("records")
    if not rows:
        return _render.note(f"step {step} is not on the interpolated path")
    known: dict[str, Any] = {
        shown: rows[0][name]
        for name, shown in _FACTS.items()
        if name in rows[0] and rows[0][name] == rows[0][name]
    }
    return _render.facts(known)
