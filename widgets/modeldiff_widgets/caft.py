"""*CAFT*: choose directions on what they say, fine-tune without them, compare at the same loss."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as W

from modeldiff.behaviours import Behaviour, Judge
from modeldiff.caft_candidates import Candidate
from modeldiff.caft_reading import Choice, Reading
from modeldiff.caft_results import CaftResult, Cell
from modeldiff.errors import Cancelled, DirectionError, FileFormatError, SetupError
from modeldiff.models import ModelPair
from modeldiff.report_text import visible
from modeldiff.sft_plans import SFTPlan
from modeldiff.sft_rows import Row
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._caft_ask import LIBRARY, Comparison, Live, Search, library
from modeldiff_widgets._caft_choice import SUFFIX, safe_path
from modeldiff_widgets._caft_choosers import Choosers, judged, known
from modeldiff_widgets._caft_data import Texts, data_of, discovery_of, loaded_pair, named, pair_code
from modeldiff_widgets._caft_form import RunForm
from modeldiff_widgets._caft_plot import RunPlot
from modeldiff_widgets._caft_views import HEADINGS, Histogram, reading_html, result_html, row_of
from modeldiff_widgets._edit_rows import layers_text, read_layers
from modeldiff_widgets._find_direction import first_layer
from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._latent_measure import part
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._row_table import RowTable
from modeldiff_widgets._state import AuditState

_EMPTY = "No candidates yet: press Find, or mark directions for CAFT in Directions or Latents."
_UNREAD = "Press Find to see what the candidates say: passages, logit lens, projections."


class Caft(Panel):
    """Concept ablation fine-tuning, from candidates to the comparison of arms.

    Args:
        pair: Base and an ordinary fine-tune, in which candidates are found.
        state: Shared settings.
        jobs: The runner of a workbench.
        rows: What to train on, see `modeldiff.sft_rows.response_rows`; an embedded organism brings
            its own.
        held_out: Rows of the same domain on which losses are compared.
        kept: Rows outside the domain, for the arm "narrow KL".
        behaviours: What trained models are asked; the first one counts.
        items: Texts with answers in which candidates are found; default the answers of both models
            to prompts of the first behaviour.
        loader: Loads a fresh base; needed for pairs of models without a name.
        plan: Settings to begin with.
        judges: Judges beside the behaviours' own, that candidates can be ticked by.

    Raises:
        SetupError: If rows come without rows held out, or the other way round.

    Example:
        >>> with Caft(pair, rows=rows, held_out=held_out, loader=load) as panel:  # doctest: +SKIP
        ...     panel.search()
        ...     panel.tick(panel.candidates[0].name)
        ...     panel.run()
        ...     panel.jobs.wait(600)
        ...     panel.result.table()
    """

    title = "CAFT"

    def __init__(
        self, pair: ModelPair, state: AuditState | None = None, jobs: JobRunner | None = None, *,
        rows: Sequence[Row] | None = None, held_out: Sequence[Row] | None = None,
        kept: Sequence[Row] | None = None, behaviours: Sequence[Behaviour] | None = None,
        items: Sequence[Any] | None = None, loader: Callable[[], Any] | None = None,
        plan: SFTPlan | None = None, judges: Sequence[Judge] = (),
    ) -> None:  # fmt: skip
        self.data = data_of(pair, rows, held_out, kept, loader, plan)
        self.items = items
        self.known = named(pair, behaviours)
        self.choosers = Choosers((e.behaviour.judge for e in self.known.values()), judges)
        first = next(iter(self.known.values()), None)
        self.discovery: tuple[Behaviour | None, str] = (None, "") if first is None else (
            discovery_of(self.data.organism, first.behaviour, first.code))  # fmt: skip
        self.found: tuple[Candidate, ...] = ()
        self.ticked: tuple[str, ...] = ()
        self.reasons: tuple[tuple[str, str], ...] = ()
        self.reading: Reading | None = None
        self.searched: Search | None = None
        self.asked: Comparison | None = None
        self.result: CaftResult | None = None
        self.new_pair: ModelPair | None = None
        self._made_of: tuple[int, int] | None = None
        self._texts: list[Any] = []
        self._told: Any = None
        self._stopped = False
        super().__init__(pair, state, jobs)

    # -- controls

    def build(self) -> W.Widget:
        """Make everything."""
        find, choose = self._finding(), self._choosing()
        result = self._results()
        self.form = RunForm(self.data, self.pair.n_layers)
        self.bind(self.form.seed, "seed")
        self.on(self.form.start, self.run)
        self.on(self.form.stop, lambda: self.jobs.cancel(f"{self.title}/run"))
        self.link(self.form.stop_at, "value", lambda new: self.form.offer_target())
        self.link(self.state, "directions", lambda new: self._show())
        self.link(self.state, "caft", lambda new: self._marked())
        self.link(self.state, "dictionary", lambda new: self._offer_latents())
        self.undo(self.jobs.on_change(self._heard))
        self._marked()
        self._offer_latents()
        return _theme.column(
            _theme.card(*find, title="1  Candidates"),
            _theme.card(*choose, title="2  What the selected one says, and the choice"),
            _theme.card(*self.form.build(), title="3  Fine-tune without the ticked ones"),
            _theme.card(*result, title="4  Arms side by side"),
        )

    def _finding(self) -> Sequence[W.Widget]:
        middle = first_layer(self.pair)
        layers = [each for each in (middle, middle + 1) if each < self.pair.n_layers]
        self.layers = W.Text(value=layers_text(layers), continuous_update=False)
        self.components = W.BoundedIntText(value=3, min=0, max=64)
        self.computes = W.Checkbox(value=True, description="where the models differ", indent=False)
        self.latents = W.Checkbox(description="latents of the dictionary", indent=False)
        for box in (self.computes, self.latents):
            box.layout.width = "auto"
        self.n_texts = self.own(W.BoundedIntText(value=40, min=1, max=5000))
        self.go = _theme.button("Find", primary=True, icon="search")
        self.go.tooltip = "find candidates and show what they and the marked directions say"
        self.on(self.go, self.search)
        self.table = RowTable(headings=HEADINGS, numeric=[2, 3, 4, 5], tickable=True,
                              label="candidates for ablation")  # fmt: skip
        self.listen(self.table.on_choose, self._choose)
        self.listen(self.table.on_tick, self._tick)
        self.table_note = _theme.note()
        texts = (
            "They are found in the given texts." if self.items is not None
            else "Both models answer prompts of the first behaviour; candidates are found in "
            "these answers."
        )  # fmt: skip
        controls = _theme.row(
            self.go,
            _theme.row(_theme.note("Candidates:"), self.computes, self.latents),
            _theme.field("After layers, such as 2-4", self.layers, width="9.5rem"),
            _theme.field("Components of each", self.components, width="8.5rem"),
            *(() if self.items is not None
              else (_theme.field("Prompts at most", self.n_texts, width="7.5rem"),)),
        )  # fmt: skip
        return _theme.note(texts), controls, self.table, self.table_note

    def _choosing(self) -> Sequence[W.Widget]:
        self.words = W.HTML(_render.note(_UNREAD))
        self.histogram = Histogram()
        self.histogram.pane.layout.display = "none"
        self.on(self.choosers.by_words, self.tick_by_keywords)
        self.on(self.choosers.by_judge, self.tick_by_judge)
        self.rationale = W.Textarea(rows=2, placeholder="why these, before any result is seen")
        self.path = W.Text(value=f"choice{SUFFIX}", continuous_update=False)
        self.save, self.load = (_theme.button(name, icon=icon) for name, icon in (
            ("Save ticks", "download"), ("Load ticks", "upload")))  # fmt: skip
        self.on(self.save, self.save_choice)
        self.on(self.load, self.load_choice)
        self.choice_note = _theme.note(f"In {Path.cwd()}")
        return (
            self.words, self.histogram.pane, *self.choosers.build(),
            _theme.field("Rationale", self.rationale),
            _theme.row(_theme.field(f"File ({SUFFIX})", self.path, grow=True), self.save,
                       self.load),
            self.choice_note,
        )  # fmt: skip

    def _results(self) -> Sequence[W.Widget]:
        self.status = _theme.note("Nothing was trained yet.")
        self.plot = RunPlot()
        self.plot.pane.layout.display = "none"
        self.legend = _theme.note(
            "Left: held-out loss, hooks off (lines), and loss of each step's rows (dotted). "
            "Right: rate of the first behaviour, with its 95 % interval."
        )
        self.legend.layout.display = "none"
        self.outcome = W.HTML()
        self.trained = W.Dropdown(options=[("none yet", "")])
        self.audit = _theme.button("Audit the new model", icon="arrow-right")
        self.audit.tooltip = "load base and new model as a pair: panel.new_pair, and as code"
        self.audit.disabled = True
        self.on(self.audit, self.audit_new)
        self.audit_note = W.HTML()
        return (
            self.status, self.plot.pane, self.legend, self.outcome,
            _theme.row(_theme.field("Trained model", self.trained, width="18rem"), self.audit),
            self.audit_note,
        )  # fmt: skip

    # -- candidates

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """Those of the library and those found."""
        taken = {each.name for each in self.found}
        return (*library(self.state.directions, tuple(taken)), *self.found)

    def search(self) -> Job:
        """Find candidates and read them; returns at once."""
        asked = self._search()
        if not asked.computes and not asked.own:
            raise DirectionError("there is nothing to read: tick where candidates come from.")

        def work(job: Job) -> Any:
            items = self._made(asked.texts, job)
            return asked.run(self.pair, items, job, lambda a, b: part(job, a, b))

        return self.submit(work, key="find", on_done=lambda job: self._read(asked, *job.result),
                           label="find candidates")  # fmt: skip

    def _search(self) -> Search:
        layers = read_layers(self.layers.value, self.pair.n_layers)
        if layers is None:
            layers = [first_layer(self.pair)]
        several = range(self.pair.n_layers) if isinstance(layers, str) else layers
        dictionary = self.state.dictionary if self.latents.value else None
        own = tuple(library(self.state.directions))
        return Search(
            self._wanted(), tuple(several) if self.computes.value else (), self.components.value,
            dictionary, "" if dictionary is None else self.state.dictionary_code(), own,
            self.state.directions_code([each.name for each in own]),
        )  # fmt: skip

    def _wanted(self) -> Texts:
        """The texts that candidates are found in."""
        behaviour, code = self.discovery
        return Texts(self.items, behaviour, code, self.n_texts.value, self.state.seed)

    def _made(self, texts: Texts, job: Job) -> list[Any]:
        """Texts, generated once."""
        wanted = (texts.n, texts.seed)
        if self._made_of != wanted:
            self._texts = texts.made(self.pair, part(job, 0.0, 0.4), job.cancel)
            self._made_of = wanted
        return self._texts

    def _read(self, asked: Search, found: tuple[Candidate, ...], reading: Reading) -> None:
        self.searched, self.found, self.reading = asked, found, reading
        self._show(select=0)

    def tick(self, *names: str) -> None:
        """Tick these candidates alone; those of the library are marked in the state too.

        Raises:
            DirectionError: If there is no such candidate.
        """
        known = [each.name for each in self.candidates]
        missing = [name for name in names if name not in known]
        if missing:
            raise DirectionError(f"no candidates are called {missing}. There are: {known}.")
        self.ticked = tuple(name for name in known if name in names)
        self.reasons = tuple(each for each in self.reasons if each[0] in self.ticked)
        marked = [name for name in self.ticked if name in self.state.directions]
        others = [name for name in self.state.caft if name not in known]
        if set(self.state.caft) != {*marked, *others}:
            self.state.caft = [*marked, *others]
        self._show()

    def tick_by_keywords(self) -> Choice:
        """Tick what tells answers with the keywords from others."""
        reading = known(self.reading)
        choice = self.choosers.from_words(reading, self.rationale.value)
        self._take(choice)
        self.choice_note.value = f"{len(choice.ticked)} of {len(reading.names)} ticked by keywords."
        return choice

    def tick_by_judge(self) -> Job:
        """Tick what tells answers that the chosen judge finds from others; returns at once."""
        reading, judge, why = known(self.reading), self.choosers.chosen, self.rationale.value

        def done(job: Job) -> None:
            self._take(job.result)
            self.choice_note.value = self.choosers.about(judge, job.result, reading)

        return self.submit(lambda job: judged(reading, judge, why, job), key="judge",
                           on_done=done, label="judge passages")  # fmt: skip

    @property
    def choice(self) -> Choice:
        """What is ticked, and why."""
        key = self.reading.key if self.reading else ""
        return Choice(self.ticked, self.rationale.value, key, self.reasons)

    def save_choice(self) -> Path:
        """Write the ticks and the rationale to the file."""
        path = safe_path(self.path.value)
        if path.exists():
            Choice.load_from(path)  # another kind of file is never overwritten
        self.choice.save_to(path)
        self.choice_note.value = f"{len(self.ticked)} ticks and the rationale written to {path}"
        return path

    def load_choice(self) -> Choice:
        """Tick what the file says."""
        path = safe_path(self.path.value)
        if not path.is_file():
            raise FileFormatError(f"there is no file {str(path)!r}: save one, or correct it.")
        choice = Choice.load_from(path)
        self._take(choice)
        same = self.reading is not None and choice.reading == self.reading.key
        seen = "" if same else " It was made on another reading than the one above."
        self.choice_note.value = f"{len(choice.ticked)} ticks read from {path}.{seen}"
        return choice

    def _take(self, choice: Choice) -> None:
        choice.of(self.candidates)
        self.reasons = choice.reasons
        self.tick(*choice.ticked)
        self.rationale.value = choice.rationale

    def _marked(self) -> None:
        """Directions that are marked in the state are ticked."""
        own = {each.name for each in library(self.state.directions)}
        kept = [each for each in self.ticked if each not in own]
        names = {*kept, *(name for name in self.state.caft if name in own)}
        self.ticked = tuple(each.name for each in self.candidates if each.name in names)
        self._show()

    def _choose(self, index: int) -> None:
        self._show(select=index)

    def _tick(self, index: int, on: bool) -> None:
        name = self.candidates[index].name
        names = {*self.ticked, name} if on else set(self.ticked) - {name}
        self.tick(*names)

    def _show(self, select: int | None = None) -> None:
        """Show the table, and what the selected candidate says."""
        several = self.candidates
        self.ticked = tuple(each.name for each in several if each.name in self.ticked)
        at = self.table.selected if select is None else select
        at = min(max(at, 0), len(several) - 1)
        with self.table.hold_sync():
            self.table.show(range(len(several)), [row_of(each, self.reading) for each in several],
                            selected=at)  # fmt: skip
            self.table.ticked = [i for i, e in enumerate(several) if e.name in self.ticked]
        self.table.layout.display = "" if several else "none"
        self.table_note.value = self._said() if several else _EMPTY
        self._show_reading(several[at].name if several else "")

    def _said(self) -> str:
        n = len(self.ticked)
        return (
            f"{n} of {len(self.candidates)} ticked (space ticks the selected row). Variance: share "
            "of the mean squared difference of the models. Shift: of the mean projection, in "
            "standard deviations of the base."
        )

    def _show_reading(self, name: str) -> None:
        told = (name, self.reading, dict(self.reasons).get(name, ""))
        if told == self._told:
            return
        self._told = told
        read = self.reading is not None and name in self.reading.names
        self.histogram.pane.layout.display = "" if read else "none"
        if self.reading is None or not read:
            self.words.value = _render.note(_UNREAD)
            return
        why = told[2]
        head = _render.paragraph(f"{name}, on {self.reading.n_tokens:,} tokens of each model")
        self.words.value = (
            head + (_render.note(f"Ticked: {why}") if why else "") + reading_html(
                self.reading, name)
        )  # fmt: skip
        self.histogram.show(self.reading, name)

    def _offer_latents(self) -> None:
        has = self.state.dictionary is not None
        self.latents.disabled = not has
        if not has:
            self.latents.value = False

    # -- arms

    def run(self) -> Job:
        """Train and ask the ticked arms; returns at once."""
        several = self.candidates
        code = self.state.directions_code([e.name for e in several if e.source == LIBRARY])
        asked = self.form.comparison(
            several, self.choice, tuple(self.known.values()), self._wanted(), code
        )
        self.asked, self.result, self._stopped = asked, None, False
        self.plot.begin(asked.order, asked.behaviours[0].behaviour.name)
        self.outcome.value = ""
        self.plot.pane.layout.display = self.legend.layout.display = ""
        return self.submit(
            lambda job: self._work(job, asked), key="run",
            on_done=lambda job: self._done(job.result), label="fine-tune the arms",
        )  # fmt: skip

    def _work(self, job: Job, asked: Comparison) -> CaftResult:
        """In the worker; what is finished when it is stopped is kept."""
        live = Live(asked)

        def say(done: int, total: int, message: str) -> None:
            self.plot.heard(message)
            self.status.value = message
            if not job.cancel.is_set():  # the training itself stops, and writes where it is
                job.report(live.fraction, message)

        def on_cell(cell: Cell) -> None:
            self.plot.finished(cell)
            self._show_result(live.with_cell(cell))

        items = self._made(asked.texts, job) if "matched random" in asked.arms else None
        try:
            return asked.run(self.pair, items, job, say, on_cell)
        except Cancelled as stopped:
            if not isinstance(stopped.partial, CaftResult) or not stopped.partial.cells:
                raise
            self._stopped = True
            return stopped.partial

    def _done(self, result: CaftResult) -> None:
        self.result = result
        self._show_result(result)
        folder = "" if self.asked is None else self.asked.folder
        where = f" in {folder!r}, from where Run goes on" if folder else ""
        self.status.value = (
            f"Stopped; finished arms are kept{where}." if self._stopped
            else f"Finished: {', '.join(result.arms)}."
        )  # fmt: skip
        saved = [(f"{each.arm}, seed {each.seed}", each.path) for each in result.cells if each.path]
        self.trained.options = saved or [("none was kept", "")]
        self.audit.disabled = not saved
        self.state.results = {**self.state.results, "caft": result}

    def _show_result(self, result: CaftResult) -> None:
        self.plot.show_rates(result)
        self.outcome.value = result_html(result)

    def _heard(self, job: Job) -> None:
        if job.key == f"{self.title}/run":
            self.form.stop.disabled = job.finished
            if job.status == "cancelled":
                self.status.value = "Stopped before anything was finished."
            elif job.status == "failed":
                self.status.value = "It failed, as said above; arms in the folder are kept."

    # -- on with it

    def audit_new(self) -> Job:
        """Make a pair of the base and the trained model: ``new_pair``, and as code."""
        path, asked = str(self.trained.value or ""), self.asked
        if not path or asked is None:
            raise SetupError("there is no trained model: run arms with a folder first.")
        whole, base = asked.plan.rank == 0, self.data.base
        code = f"{pair_code(base, self.data.base_code, path, whole)}\nwb = Workbench(pair)\nwb"
        shown = _render.code_block(f"from modeldiff_widgets import Workbench\n{code}")

        def work(job: Job) -> ModelPair | None:
            return None if callable(base) else loaded_pair(base, path, whole)

        def done(job: Job) -> None:
            self.new_pair = job.result
            here = " It is loaded: panel.new_pair." if self.new_pair is not None else ""
            told = f"Base and new model as a pair, in a cell of its own.{here}"
            self.audit_note.value = _render.note(told) + shown

        return self.submit(work, key="audit", on_done=done, label="load the new model")

    # -- what stays

    def code(self) -> str:
        """Python for candidates, choice and arms, as far as they were asked for."""
        search, asked = self.searched, self.asked
        if search is None and asked is None:
            search = self._search()
        lines = [
            "import modeldiff as md",
            "from modeldiff.caft_candidates import Candidate, candidates",
            "from modeldiff.caft_reading import Choice, interpretation",
            *([] if asked is None else asked.imports()),
            *([] if search is None else search.lines(self.found)),
        ]
        if asked is not None:
            lines += [*asked.found_lines(search, self.found), *asked.lines()]
        return "\n".join(lines)

    def snapshot_html(self) -> str:
        """Candidates, the selected one, curves and the table of arms."""
        several = self.candidates
        if not several:
            return _render.section(self.title, [_render.note(_EMPTY)])
        parts = [self.table.snapshot_html(), self.words.value]
        if self.choice.ticked:
            told = ", ".join(visible(name) for name in self.choice.ticked)
            parts.append(_render.note(f"Ticked: {told}. {self.choice.rationale}"))
        if self.asked is not None:
            parts += [_render.note(self.status.value), self.plot.snapshot_html(),
                      self.outcome.value]  # fmt: skip
        return _render.section(self.title, parts, code=self.shown_code(), when=True)
