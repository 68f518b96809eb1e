"""*Behaviour*: how often the models show a behaviour, by which judge, and in which answers."""

import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import ipywidgets as W

from modeldiff.behaviours import Behaviour as Measurable
from modeldiff.behaviours import Judge
from modeldiff.errors import InterventionError, JudgeError, ModelDiffError
from modeldiff.models import ModelPair
from modeldiff.report_text import shortened, visible
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._answers import AnswerView
from modeldiff_widgets._behaviour_choice import judges_for, known, second_judges
from modeldiff_widgets._behaviour_plots import CellBars, ScoreMap
from modeldiff_widgets._behaviour_runs import Asked, Measured, checked_judge
from modeldiff_widgets._behaviour_views import (
    INTERVALS,
    ORDERS,
    PAGE,
    SHOW,
    Filter,
    agreement_html,
    answer_columns,
    answer_rows,
    has_scores,
    headline_html,
    kind,
    label_bars,
    question_bars,
    title,
)
from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._state import AuditState

_NONE = ("none", "")
_ON = (("whether it shows the behaviour", "exhibits"), ("coherence", "coherent"),
       ("label", "label"))  # fmt: skip
_BLANK = (
    "No answers yet. Press Run: every model is asked the questions, and every answer is judged."
)
_NO_EDITS = "No edit is on: those of the panel “Steer and ablate” can be measured here too."
_SECOND = "Another judge judges the same answers: how far can the rates above be trusted?"


class Behaviour(Panel):
    """Rates of a behaviour in base, fine-tune and edited fine-tune, with every answer behind them.

    Args:
        pair: The pair.
        state: Shared settings.
        jobs: The runner of a workbench.
        behaviours: What can be measured beside the organism's own and the shipped questions.
        judges: Judges beside the behaviours' own; needed for questions that bring none.

    Raises:
        JudgeError: If one of ``judges`` is no judge.

    Example:
        >>> with Behaviour(pair, judges=[judge]) as panel:  # doctest: +SKIP
        ...     panel.run()
        ...     panel.jobs.wait(60)
        ...     panel.measured.rates
    """

    title: ClassVar[str] = "Behaviour"

    def __init__(
        self,
        pair: ModelPair,
        state: AuditState | None = None,
        jobs: JobRunner | None = None,
        *,
        behaviours: Sequence[Measurable] = (),
        judges: Sequence[Judge] = (),
    ) -> None:
        self.judges = tuple(checked_judge(each) for each in judges)
        self.known = known(pair, behaviours, self.judges)
        self.measured: Measured | None = None
        self.page, self._filling, self._picked = 0, 0, None
        super().__init__(pair, state, jobs)

    # -- what is made

    def build(self) -> W.Widget:
        """Make everything."""
        asked = _theme.card(*self._asking(), title="What is asked")
        rates = _theme.card(*self._rates(), title="Rates")
        second = _theme.card(*self._second(), title="Second judge")
        answers = _theme.card(*self._answers(), title="Answers")
        self.undo(self.jobs.on_change(self._show_buttons))
        for trait in ("edits", "directions", "random_control"):
            self.link(self.state, trait, lambda new: self._describe_edits())
        self._choose()
        self._describe_edits()
        self._show_buttons(None)
        self._draw()
        return _theme.column(asked, rates, second, answers)

    def _asking(self) -> tuple[W.Widget, ...]:
        names = [(visible(name), name) for name in self.known]
        self.behaviour = W.Dropdown(options=names)
        self.judge = W.Dropdown()
        self.meaning, self.edits_note, self.status = (W.HTML() for _ in range(3))
        self.n_prompts = W.BoundedIntText(value=20, min=1, max=20)
        self.samples = W.BoundedIntText(value=2, min=1, max=256)
        self.temperature = W.BoundedFloatText(min=0, max=5, step=0.1)
        self.length = W.BoundedIntText(value=64, min=1, max=8192)
        self.seed = W.IntText()
        self.bind(self.seed, "seed")
        self.cells = {name: _check(name) for name in ("base", "fine-tuned", "with the edits")}
        self.control = _check("random control", "edits with random directions of the same length")
        self.bind(self.control, "random_control")
        self.go = _theme.button("Run", primary=True, icon="play")
        self.stop = _theme.button("Stop", icon="stop", tooltip="stop and keep what is finished")
        self.on(self.go, self.run)
        self.on(self.stop, lambda: self.jobs.cancel(self.title))
        self.link(self.behaviour, "value", lambda new: self._choose())
        what = _theme.row(
            _theme.field("Behaviour", self.behaviour, grow=True),
            _theme.field("Judged by", self.judge, grow=True),
        )
        how = _theme.row(
            _theme.field("Prompts", self.n_prompts, width="5.2rem"),
            _theme.field("Samples of each", self.samples, width="7rem"),
            _theme.field("Temperature", self.temperature, width="6.4rem"),
            _theme.field("New tokens at most", self.length, width="8.4rem"),
            _theme.field("Seed", self.seed, width="5.2rem"),
        )
        ticks = _theme.row(*self.cells.values(), self.control)
        who = _theme.row(self.go, self.stop, _named("Who answers", ticks))
        return what, self.meaning, how, who, self.edits_note, self.status

    def _rates(self) -> tuple[W.Widget, ...]:
        self.headline = W.HTML()
        self.order = W.Dropdown(options=ORDERS)
        self.interval = W.Dropdown(options=INTERVALS)
        for control in (self.order, self.interval):
            self.link(control, "value", lambda new: self._draw_questions())
        self.questions = CellBars("rate of the behaviour")
        self.labels = CellBars("share of the answers")
        self.scores = ScoreMap(self._pick)
        self.questions_note, self.scores_note = _theme.note(), _theme.note()
        controls = _theme.row(
            _theme.field("Questions", self.order, width="14rem"),
            _theme.field("Intervals over", self.interval, width="17rem"),
        )
        self.by_question = _theme.column(_theme.heading("By question"), controls,
                                         self.questions.pane, self.questions_note)  # fmt: skip
        self.by_label = _theme.column(_theme.heading("By label"), self.labels.pane)
        self.by_score = _theme.column(_theme.heading("Alignment and coherence"), self.scores.pane,
                                      self.scores_note)  # fmt: skip
        self.figures = _theme.split(self.by_question, _theme.column(self.by_score, self.by_label))
        return self.headline, self.figures

    def _second(self) -> tuple[W.Widget, ...]:
        self.other = W.Dropdown()
        self.on_what = W.Dropdown(options=_ON)
        self.judge_again = _theme.button("Judge again", icon="gavel",
                                         tooltip="let it judge the same answers")  # fmt: skip
        self.show_differing = _theme.button("Show where they differ", icon="filter")
        self.agreed = W.HTML()
        self.on(self.judge_again, self.run_second)
        self.on(self.show_differing, self._filter_differing)
        self.link(self.on_what, "value", lambda new: (self._draw_second(), self._draw_answers()))
        row = _theme.row(
            _theme.field("Second judge", self.other, grow=True),
            _theme.field("Compare", self.on_what, width="15rem"),
            self.judge_again, self.show_differing,
        )  # fmt: skip
        return row, self.agreed

    def _answers(self) -> tuple[W.Widget, ...]:
        self.cell = W.Dropdown(options=[("all", "")])
        self.show = W.Dropdown(options=SHOW)
        self.label = W.Dropdown(options=[("all", "")])
        self.search = W.Text(placeholder="in question or answer", continuous_update=False)
        self.clear = _theme.button("Clear", tooltip="show all answers again")
        self.back = _theme.button("Previous", icon="chevron-left")
        self.ahead = _theme.button("Next", icon="chevron-right")
        self.count = _theme.note()
        self.view = AnswerView(blank=_BLANK)
        for control in (self.cell, self.show, self.label, self.search):
            self.link(control, "value", lambda new: self._filtered())
        self.on(self.clear, self.clear_filters)
        self.on(self.back, lambda: self._turn(-1))
        self.on(self.ahead, lambda: self._turn(1))
        filters = _theme.row(
            _theme.field("Cell", self.cell, width="13rem"),
            _theme.field("Show", self.show, width="14.5rem"),
            _theme.field("Label", self.label, width="11rem"),
            _theme.field("Search", self.search, grow=True),
            self.clear,
        )
        return filters, _theme.row(self.back, self.ahead, self.count), self.view

    # -- what one can do

    def run(self) -> Job:
        """Ask and judge with the settings as they are."""
        asked = self._asked()
        return self.submit(lambda job: self._measure(job, asked), label="behaviour")

    def run_second(self) -> Job:
        """Let the second judge judge the answers that are shown.

        Raises:
            JudgeError: If there are no answers, or no other judge.
        """
        measured = self.measured
        if measured is None or not self.other.value:
            raise JudgeError("there is nothing to judge again: run first, and choose a judge.")
        judge = self._others()[str(self.other.value)]

        def done(job: Job) -> None:
            if self.measured is measured:  # not another run's answers
                self.measured = job.result
                self._draw_second()
                self._draw_answers()

        return self.submit(
            lambda job: measured.judged_again(judge, job), key="second judge", on_done=done,
            label="second judge",
        )  # fmt: skip

    def clear_filters(self) -> None:
        """Show all answers again."""
        self._filling = threading.get_ident()
        try:
            for control in (self.cell, self.show, self.label, self.search):
                control.value = ""
        finally:
            self._filling = 0
        self._picked = None
        self.scores.clear()
        self._filtered()

    # -- the worker's part

    def _asked(self) -> Asked:
        base, tuned, edited = (box.value for box in self.cells.values())
        edits = self.state.grid() if edited else {}
        if not (base or tuned or edits):
            raise InterventionError("nobody is asked: tick at least one model.")
        chosen = self.known[str(self.behaviour.value)]
        return Asked(
            chosen, judges_for(chosen, self.judges)[str(self.judge.value)], self.n_prompts.value,
            (base, tuned), edits, self.state.grid_code() if edits else "", self.samples.value,
            self.state.seed, self.temperature.value, self.length.value,
        )  # fmt: skip

    def _measure(self, job: Job, asked: Asked) -> Measured:
        found, total = Measured(asked), len(asked.behaviour.prompts)
        try:
            while found.stopped:
                job.report(found.n_done / total, f"{found.n_done} of {total} questions")
                found = found.more(self.pair, job)
                self._tell(f"{found.n_done} of {total} questions are answered …")
                self.headline.value = headline_html(found)
        finally:
            if found.judged:
                self.measured = found
            self._fill_filters()
            self._draw()
            self.refresh_code()
            if not found.judged:
                self._tell(f"Stopped before a question was answered. {self._said()}")
        return found

    # -- controls that follow

    def _choose(self) -> None:
        """Another behaviour: its judges, and its own way of sampling."""
        chosen = self.known[str(self.behaviour.value)]
        behaviour, n = chosen.behaviour, len(chosen.behaviour.prompts)
        names = list(judges_for(chosen, self.judges))
        _offer(self.judge, [(visible(name), name) for name in names])
        meaning = f"A rate of 100 % means: {behaviour.meaning}. {n} prompts."
        self.meaning.value = _render.note(meaning)
        self.n_prompts.max = n
        self.n_prompts.value = min(20, n)
        self.temperature.value, self.length.value = behaviour.temperature, behaviour.max_new_tokens

    def _describe_edits(self) -> None:
        box = self.cells["with the edits"]
        try:
            plan = self.state.plan()
            said = "" if plan is None else f"Edits of the fine-tune: {plan.describe()}"
        except ModelDiffError as error:
            plan, said = None, f"The edits cannot be made: {error}"
        if box.disabled != (plan is None):
            box.value, box.disabled = plan is not None, plan is None
        self.control.disabled = plan is None
        self.edits_note.value = _render.note(said or _NO_EDITS)

    def _fill_filters(self) -> None:
        """Offer the cells and labels that there are, and the other judges."""
        if self.measured is None:
            return
        self._filling, self._picked, self.page = threading.get_ident(), None, 0
        try:
            keys = [(title(key), key) for key in self.measured.asked.keys]
            labels = self.measured.table["label"].astype(str).value_counts()
            names = [(f"{shortened(visible(str(name)), 40)} ({n})", str(name))
                     for name, n in labels.items()]  # fmt: skip
            _offer(self.cell, [("all", ""), *keys])
            _offer(self.label, [("all", ""), *names])
            _offer(self.other, [(visible(name), name) for name in self._others()] or [_NONE])
        finally:
            self._filling = 0

    def _others(self) -> dict[str, Any]:
        asked = None if self.measured is None else self.measured.asked
        chosen = self.known[str(self.behaviour.value)] if asked is None else asked.known
        return second_judges(chosen, self.judges, asked.judge.name if asked else "")

    def _pick(self, rows: list[int]) -> None:
        """Show the answers that are tapped in the figure."""
        self._picked = tuple(rows) or None
        self._filtered()

    def _filter_differing(self) -> None:
        self.clear_filters()
        self.show.value = "differ"

    def _filtered(self) -> None:
        if self._filling != threading.get_ident():
            self.page = 0
            self._draw_answers()

    def _turn(self, step: int) -> None:
        self.page += step
        self._draw_answers()

    def _show_buttons(self, job: Job | None) -> None:
        if job is None or job.key == self.title:
            self.stop.disabled = job is None or job.finished
        nothing = self.measured is None
        self.judge_again.disabled = nothing
        self.show_differing.disabled = nothing or self.measured.second is None  # pyright: ignore

    # -- what is shown

    @property
    def filter(self) -> Filter:
        """Which answers are shown."""
        cell: Any = self.cell.value
        return Filter(
            cell or None, str(self.show.value), str(self.label.value), self.search.value.strip(),
            self._picked, str(self.on_what.value),
        )  # fmt: skip

    def _tell(self, text: str) -> None:
        self.status.value = _render.note(text)

    def _said(self) -> str:
        measured = self.measured
        if measured is None:
            return "Nothing is measured yet."
        asked, n = measured.asked, len(measured.judged)
        stop = (
            f" Stopped: {measured.n_done} of {len(asked.behaviour.prompts)} questions are answered."
            if measured.stopped else ""
        )  # fmt: skip
        return f"{asked.behaviour.name}: {n} answers, judged by {asked.judge.name}.{stop}"

    def _draw(self) -> None:
        """Show the run."""
        measured = self.measured
        self._tell(self._said())
        empty = measured is None
        self.figures.layout.display = "none" if empty else ""
        self.headline.value = (
            _render.note("No rates yet.") if measured is None else headline_html(measured)
        )
        if measured is not None:
            scored = has_scores(measured)
            self.by_score.layout.display = "" if scored else "none"
            self.by_label.layout.display = "none" if scored else ""
            if scored:
                keys = [(answer.side, answer.edit) for answer in measured.answers]
                self.scores.show(measured.table, [(title(key), kind(key)) for key in keys])
                missing = self.scores.n_missing
                left = f" {missing} answers lack a score and are not drawn." if missing else ""
                self.scores_note.value = f"Tap a point to see its answer below.{left}"
            else:
                self.labels.show(label_bars(measured))
            self._draw_questions()
        self._draw_second()
        self._draw_answers()

    def _draw_questions(self) -> None:
        if self.measured is None:
            return
        which, order = str(self.interval.value), str(self.order.value)
        bars, left = question_bars(self.measured, which, order)
        self.questions.show(bars)
        narrow = " A question with one wording has no such interval." if which else ""
        more = f" {left} more questions are not drawn." if left else ""
        self.questions_note.value = f"95 % intervals.{narrow}{more}"

    def _draw_second(self) -> None:
        measured, on = self.measured, str(self.on_what.value)
        self._show_buttons(None)
        if measured is None or measured.second is None:
            self.agreed.value = _render.note(_SECOND)
            return
        try:
            found = measured.agreement(on)
            self.agreed.value = "" if found is None else agreement_html(measured, found, on)
        except JudgeError as error:
            self.agreed.value = _render.alert(str(error))
        self.refresh_code()

    def _draw_answers(self) -> None:
        measured = self.measured
        if measured is None:
            self.back.disabled = self.ahead.disabled = True
            return
        chosen = self.filter
        keys, rows = answer_rows(measured, chosen)
        last = max(0, (len(rows) - 1) // PAGE)
        self.page = min(max(self.page, 0), last)
        self.back.disabled, self.ahead.disabled = self.page == 0, self.page == last
        shown = sum(chosen.rows(measured))
        place = f" · page {self.page + 1} of {last + 1}" if last else ""
        self.count.value = f"{shown} of {len(measured.judged)} answers{place}"
        self.view.blank = "No answer is left by the filters."
        first = self.page * PAGE
        self.view.show(answer_columns(measured, keys), rows[first : first + PAGE])

    # -- what stays

    def code(self) -> str:
        """Python for the rates that are shown; before the first run, for what Run would do.

        Raises:
            InterventionError: If nobody is asked, or an edit cannot be made.
        """
        shown = self.measured or Measured(self._asked())
        return shown.code(str(self.on_what.value))

    def snapshot_html(self) -> str:
        """Settings, rates, figures, agreement, and the answers of the page that is shown."""
        measured = self.measured
        if measured is None:
            return _render.section(self.title, [_render.note("Nothing was measured.")])
        asked = measured.asked
        facts = {
            "behaviour": asked.behaviour.name, "judge": asked.judge.name,
            "prompts": measured.n_done, "samples of each": asked.n,
            "temperature": asked.temperature, "new tokens at most": asked.limit,
            "seed": asked.seed,
            "edits": "; ".join(plan.describe() for plan in asked.edits.values()) or "none",
        }  # fmt: skip
        figure = self.scores if has_scores(measured) else self.labels
        parts = [
            _render.paragraph(f"A rate of 100 % means: {asked.behaviour.meaning}."),
            _render.facts(facts), self.headline.value, self.questions.snapshot_html(),
            figure.snapshot_html(), self.agreed.value if measured.second else "",
            _render.note(self.count.value), self.view.snapshot_html(),
        ]  # fmt: skip
        return _render.section(self.title, parts, code=self.shown_code(), when=True)


def _named(name: str, box: W.Box) -> W.Box:
    """A name above several controls."""
    label = W.Label(name)
    label.add_class("mdw-name")
    both = W.Box((label, box))
    both.add_class("mdw-field")
    return both


def _offer(control: W.Dropdown, options: Sequence[tuple[str, Any]]) -> None:
    """Other options; what was chosen stays chosen if it is still there."""
    before = control.value
    control.options = options
    values = [value for _, value in options]
    control.value = before if before in values else values[0]


def _check(name: str, tooltip: str = "") -> W.Checkbox:
    box = W.Checkbox(value=name in ("base", "fine-tuned"), description=name, indent=False)
    box.tooltip = tooltip or f"whether the {name} model answers"
    box.layout.width = "auto"
    return box
