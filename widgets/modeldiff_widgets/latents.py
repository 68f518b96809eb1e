"""*Latents*: what a dictionary found, which model has it, where it fires, what it says."""

from typing import Any

import ipywidgets as W

from modeldiff.dictionaries.latents import latent_direction, latent_lens
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.readers import read
from modeldiff.directions import Direction
from modeldiff.errors import FileFormatError, MismatchError, ModelDiffError
from modeldiff.logit_lens import LogitLens
from modeldiff.models import ModelPair
from modeldiff.report_text import visible
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._latent_card import (
    LENS,
    N_RANDOM,
    LatentCard,
    heavier,
    sides_of,
)
from modeldiff_widgets._latent_labels import FILE, read_labels, write_labels
from modeldiff_widgets._latent_list import ANY, Filters, Order, fill
from modeldiff_widgets._latent_map import COLOURS, LatentMap
from modeldiff_widgets._latent_measure import Measured, code_of, measure, number_of, unmeasured
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._row_table import RowTable
from modeldiff_widgets._stack import new_edit
from modeldiff_widgets._state import AuditState

RATES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
HOW = """from modeldiff.dictionaries.models import crosscoder
from modeldiff.dictionaries.training import TrainConfig, train
dictionary = crosscoder(rows.d_model, 4096, k=32, site="resid_post.3")
train(dictionary, rows, TrainConfig(steps=5000))  # rows: store.source("resid_post.3")
wb = Workbench(pair, dictionary=dictionary, store=rows)"""
_EMPTY = "There is no dictionary yet: open a folder below, train one in Training, or in code:"


class Latents(Panel):
    """The latents of the dictionary in the state.

    Args:
        pair: The pair.
        state: Shared settings; its ``dictionary`` is read and its ``rows`` measured.
        jobs: The runner of a workbench.
    """

    title = "Latents"

    def __init__(
        self, pair: ModelPair, state: AuditState | None = None, jobs: JobRunner | None = None
    ) -> None:
        self.found: Measured | None = None
        self.labels: dict[int, str] = {}
        self.lenses: dict[Any, LogitLens] = {}
        self.boxed: list[int] = []
        self.order = Order()
        self._lens_of = -1
        super().__init__(pair, state, jobs)

    # -- controls

    def build(self) -> W.Widget:
        """Make everything."""
        self.about = _theme.note()
        self.empty = W.HTML(_render.note(_EMPTY) + _render.code_block(HOW))
        self.map = LatentMap(self._guarded(self._picked))
        self.list = RowTable(label="Latents")
        self.card = LatentCard()
        head, self.filters, card, files = self._head(), self._filters(), self._card(), self._files()
        both = _theme.split(self.map.pane, self.list)
        self.whole = _theme.column(head, self.filters, both, card)
        for trait in ("dictionary", "rows"):
            self.link(self.state, trait, lambda new: self._begin())
        self.link(self.state, "latent", lambda new: self._choose())
        for trait in ("directions", "edits", "caft"):
            self.link(self.state, trait, lambda new: self._show_use())
        self.link(self.state, "seed", lambda new: self._ask_lens())
        self.listen(self.list.on_choose, lambda latent: setattr(self.state, "latent", latent))
        self.listen(self.list.on_sort, self._sort)
        self._begin()
        return _theme.column(self.about, self.empty, self.whole, _theme.card(*files, title="File"))

    def _head(self) -> W.Widget:
        self.go = _theme.button("Measure", primary=True, icon="play")
        self.go.tooltip = "how often each latent fires, which model has it, and its strongest texts"
        self.up = W.Dropdown(options=[("", "firing_rate")])
        self.measured_note = _theme.note()
        self.on(self.go, self.run)
        self.link(self.up, "value", lambda column: self._draw())
        return _theme.row(
            self.go, _theme.field("Vertical axis", self.up, width="15rem"), self.measured_note
        )

    def _filters(self) -> W.Widget:
        self.kind = W.Dropdown(options=[ANY, *COLOURS])
        rates = [("0 %", 0.0)] + [(f"{100 * r:g} %", r) for r in RATES[1:]]
        self.rate = W.SelectionRangeSlider(options=rates, index=(0, len(rates) - 1))
        self.words = W.Text(placeholder="text in the label, or a number", continuous_update=False)
        self.unbox = _theme.button("Clear selection", icon="times")
        self.unbox.disabled = True
        for control in (self.kind, self.rate, self.words):
            self.link(control, "value", lambda new: self._draw())
        self.on(self.unbox, self._clear)
        return _theme.row(
            _theme.field("Class", self.kind, width="10rem"),
            _theme.field("Fires on, share of rows", self.rate, width="20rem"),
            _theme.field("Find", self.words, width="15rem"), self.unbox,
        )  # fmt: skip

    def _card(self) -> W.Widget:
        self.latent = W.BoundedIntText(min=0, max=1 << 24)
        self.label = W.Text(placeholder="what it stands for", continuous_update=False)
        self.side = W.Dropdown(options=[("fine-tuned", "finetuned"), ("base", "base")])
        self.examples = W.ToggleButtons(options=[("Strongest", "max"), ("Sample of all", "sample")])
        self.examples.style.button_width = "7.5rem"
        self.back = _theme.button("", icon="chevron-left", tooltip="earlier texts")
        self.on_ = _theme.button("", icon="chevron-right", tooltip="further texts")
        self.steer = _theme.button("Steer with it", icon="arrow-right")
        self.ablate = _theme.button("Ablate it", icon="minus-circle")
        self.caft = _theme.button("Use in CAFT", icon="graduation-cap")
        self.caft.tooltip = "mark its direction, to be ablated while fine-tuning"
        self.used = _theme.note()
        self.bind(self.latent, "latent")
        self.link(self.label, "value", self._write_label)
        self.link(self.examples, "value", lambda kind: self._show_examples())
        self.on(self.back, lambda: self.card.turn(-1))
        self.on(self.on_, lambda: self.card.turn(1))
        self.on(self.steer, lambda: self.use("steer"))
        self.on(self.ablate, lambda: self.use("ablate"))
        self.on(self.caft, self.use_in_caft)
        return _theme.card(
            _theme.row(
                _theme.field("Latent", self.latent, width="6.5rem"),
                _theme.field("Label", self.label, grow=True),
                _theme.field("Decoder", self.side, width="8rem"),
                self.steer, self.ablate, self.caft,
            ),
            self.used, self.card.head,
            _theme.row(self.examples, self.back, self.on_, self.card.place),
            self.card.view, _theme.heading("In words (logit lens)"), self.card.lens_view,
        )  # fmt: skip

    def _files(self) -> tuple[W.Widget, ...]:
        self.path = W.Text(placeholder="folder of a dictionary", continuous_update=False)
        self.open = _theme.button("Open", icon="folder-open")
        self.write = _theme.button("Save", icon="download")
        self.file_note = _theme.note()
        self.on(self.open, self.load)
        self.on(self.write, self.save)
        return (
            _theme.row(_theme.field("Folder", self.path, grow=True), self.open, self.write),
            self.file_note,
        )

    # -- what the buttons do

    def run(self) -> Job:
        """Measure all latents on the rows of the state; returns at once."""
        dictionary, rows = self._dictionary(), self.state.rows
        if rows is None:
            raise MismatchError(
                "there are no activations to measure on: Workbench(pair, dictionary=..., "
                "store=...), or state.use_rows(store)."
            )
        return self.submit(
            lambda job: measure(job, dictionary, rows, self._take), key="measure",
            label="measure latents",
        )  # fmt: skip

    def use(self, kind: str) -> str:
        """Put an edit along the latent's direction on the stack; returns its name."""
        name = self._keep_direction()
        layers: Any = "all" if kind == "ablate" else None
        self.state.edits = [*self.state.edits, new_edit(kind, name, layers=layers)]
        return name

    def use_in_caft(self) -> str:
        """Keep the latent's direction and mark it for CAFT; returns its name."""
        name = self._keep_direction()
        self.state.caft = list(dict.fromkeys([*self.state.caft, name]))
        return name

    def load(self) -> Job:
        """Open the folder that is written; any layout that can be read."""
        path = self.path.value.strip()
        if not path:
            raise FileFormatError("write the folder of a dictionary, then open it.")

        def work(job: Job) -> Dictionary:
            read_labels(path)  # before anything changes
            return read(path)

        return self.submit(
            work, key="open", label="open a dictionary",
            on_done=lambda job: self.state.use_dictionary(job.result, path),
        )  # fmt: skip

    def save(self) -> str:
        """Write dictionary and labels into the folder that is written; returns it."""
        path = self.path.value.strip()
        if not path:
            raise FileFormatError("write a folder to save the dictionary in.")
        self._dictionary().save_to(path)
        write_labels(path, self.labels)
        self.state.dictionary_folder = path
        self._show_file(f"Saved, with {len(self.labels)} labels, in {path}")
        return path

    # -- the parts

    def _dictionary(self) -> Dictionary:
        if self.state.dictionary is None:
            raise MismatchError("there is no dictionary: open or train one.")
        return self.state.dictionary

    def direction(self) -> Direction:
        """The chosen latent's decoder as a direction, as long as at its largest value.

        Raises:
            DirectionError: If that decoder is zero, or the dictionary does not know its site.
        """
        dictionary, latent = self._dictionary(), self.state.latent
        side: Any = self.side.value
        strength = 1.0 if self.found is None else self.found.strength(latent)
        return latent_direction(
            dictionary, latent, side=side, strength=strength, sides=self.pair.sides
        )

    def _keep_direction(self) -> str:
        return self.state.add_direction(self.direction())

    def _row(self) -> dict[str, Any]:
        assert self.found is not None
        row = self.found.table.iloc[self.state.latent].to_dict()
        return {str(name): getattr(value, "item", lambda v=value: v)() for name, value in
                row.items()}  # fmt: skip

    def _begin(self) -> None:
        """Another dictionary, or other rows: what was measured is not of them."""
        dictionary = self.state.dictionary
        self.empty.layout.display = "none" if dictionary else ""
        self.whole.layout.display = "" if dictionary else "none"
        self.write.disabled = dictionary is None
        self.go.disabled = dictionary is None or self.state.rows is None
        self.about.value = repr(dictionary) if dictionary else ""
        self.measured_note.value = self._not_yet()
        self.found = None
        if dictionary is None:
            return
        last = dictionary.config.n_latents - 1
        self.state.latent = min(self.state.latent, last)
        self.latent.max = last
        folder = self.state.dictionary_folder
        self.labels = read_labels(folder) if folder else {}
        self.path.value = folder or self.path.value
        self._show_file(f"Labels are kept in {FILE}." if folder else
                        "Not saved yet: labels are lost unless it is.")  # fmt: skip
        self._offer(dictionary)
        self.boxed = []
        self.order = Order(self._across(), self._across() != "nu_activation")
        self._take(unmeasured(dictionary))

    def _not_yet(self) -> str:
        if self.state.rows is None:
            return "No activations to measure on: state.use_rows(store) gives some."
        return f"Not measured yet. {self.state.rows.n_rows:,} rows to measure on."

    def _offer(self, dictionary: Dictionary) -> None:
        names = {"firing_rate": "firing rate"}
        if dictionary.config.is_crosscoder:
            names |= {"nu_error": "ν error", "nu_reconstruction": "ν reconstruction"}
        else:
            names |= {"max_activation": "largest activation"}
        self.up.options = [(text, column) for column, text in names.items()]
        sides = sides_of(dictionary)
        of_difference = dictionary.config.inputs == "difference"
        names = {"base": "base", "finetuned": "difference" if of_difference else "fine-tuned"}
        self.side.options = [(names[side], side) for side in reversed(sides)]

    def _across(self) -> str:
        crosscoder = self._dictionary().config.is_crosscoder
        return "relative_decoder_norm" if crosscoder else "nu_activation"

    # -- what is shown

    def _take(self, found: Measured) -> None:
        """Show what was measured; in the worker."""
        if found.dictionary is not self.state.dictionary:
            return
        self.found = found
        self.state.results = {**self.state.results, "latents": found}
        if found.rows is not None:
            texts = "" if found.examples is None else f", {found.k} texts each at most"
            self.measured_note.value = f"Measured on {found.n_rows:,} rows{texts}."
        self._draw()
        self._show_latent()

    def _passing(self) -> Any:
        """Rows of the table that pass the filters, in order."""
        assert self.found is not None
        low, high = self.rate.value
        filters = Filters(str(self.kind.value), (low, high), self.words.value)
        return filters.passing(self.found.table, self.labels, self.order)

    def _draw(self) -> None:
        if self.found is None:
            return
        passing = self._passing()
        drawn = self.map.show(passing, self._across(), str(self.up.value), list(passing["label"]))
        self.boxed = []
        left = len(passing) - drawn
        self._list(passing, f"; {left:,} have no place in the plot" if left else "")
        self.map.choose(self.state.latent)

    def _list(self, passing: Any = None, left: str = "") -> None:
        if self.found is None:
            return
        passing = self._passing() if passing is None else passing
        shown = passing[passing["latent"].isin(self.boxed)] if self.boxed else passing
        note = f"of {len(self.found.table):,} latents{left}"
        fill(self.list, shown, self.order, self.state.latent, note)
        self.unbox.disabled = not self.boxed

    def _picked(self, latents: list[int]) -> None:
        self.boxed = latents if len(latents) > 1 else []
        if latents and self.state.latent not in latents:
            self.state.latent = latents[0]
        self._list()

    def _clear(self) -> None:
        self.boxed = []
        self.map.clear()
        self._list()

    def _sort(self, column: int) -> None:
        self.order = self.order.turned(self.list.headings[column])
        self._list()

    def _choose(self) -> None:
        """Another latent was chosen."""
        dictionary = self.state.dictionary
        if dictionary is None or self.found is None:
            return
        if self.state.latent >= len(self.found.table):
            self.state.latent = len(self.found.table) - 1
            return
        self.list.selected = self.state.latent
        self.map.choose(self.state.latent)
        self.side.value = heavier(dictionary, self.state.latent)
        self._show_latent()

    def _show_latent(self) -> None:
        assert self.found is not None
        latent = self.state.latent
        self.card.show_facts(self.found, latent)
        self.label.value = self.labels.get(latent, "")
        self._show_examples()
        self._show_use()
        self._ask_lens()

    def _show_examples(self) -> None:
        if self.found is None:
            return
        kind = str(self.examples.value)
        peak = number_of(self._row().get("max_activation")) or 0.0
        texts = self.found.of(self.state.latent, kind, self.pair.tokenizer)
        blank = "press Measure" if self.found.examples is None else "it fires in no text"
        self.card.show_examples(texts, peak, blank)

    def _write_label(self, text: str) -> None:
        latent = self.state.latent
        if self.state.dictionary is None or self.labels.get(latent, "") == text.strip():
            return
        self.labels[latent] = text.strip()
        if self.state.dictionary_folder:
            write_labels(self.state.dictionary_folder, self.labels)
            self._show_file(f"Label of latent {latent} written to {FILE}.")
        self._list()

    def _show_file(self, text: str) -> None:
        self.file_note.value = text

    def _show_use(self) -> None:
        """Say what the buttons did with this latent."""
        start = f"latent {self.state.latent} "
        names = [name for name in self.state.directions if name.startswith(start)]
        stack = [f"{e['kind']} ({i + 1})" for i, e in enumerate(self.state.edits)
                 if e["direction"] in names]  # fmt: skip
        parts = [f"In the stack of edits: {', '.join(stack)}."] if stack else []
        marked = [visible(name) for name in names if name in self.state.caft]
        parts += [f"Marked for CAFT: {', '.join(marked)}."] if marked else []
        self.used.value = " ".join(parts)

    # -- the lens

    def _ask_lens(self) -> None:
        dictionary, latent, seed = self.state.dictionary, self.state.latent, self.state.seed
        if dictionary is not None:
            self.submit(lambda job: self._read_lenses(dictionary, latent, seed), key="lens",
                        label="logit lens")  # fmt: skip

    def _read_lenses(self, dictionary: Dictionary, latent: int, seed: int) -> None:
        try:
            found = latent_lens(
                self.pair.sides, dictionary, latent, k=LENS, n_random=N_RANDOM, seed=seed
            )
        except ModelDiffError as error:
            self.lenses, self._lens_of = {}, -1
            self.card.show_lenses(dictionary, {}, str(error))
            return
        self.lenses, self._lens_of = found, latent
        self.card.show_lenses(dictionary, found)

    # -- what stays

    def code(self) -> str:
        """Python for the table, the chosen latent's texts, its direction and logit lenses."""
        if self.state.dictionary is None or self.found is None:
            return "\n".join(["from modeldiff_widgets import Workbench", *HOW.splitlines()])
        latent = self.state.latent
        lines = [self.state.dictionary_code()]
        if self.found.rows is not None:
            lines.append(self.state.source_code())
        lines += code_of(self.found, latent, str(self.side.value))
        if self._lens_of == latent:
            lines.append(
                f"lenses = latent_lens(pair.sides, dictionary, {latent}, k={LENS}, "
                f"n_random={N_RANDOM}, seed={self.state.seed})"
            )
        return "\n".join(lines)

    def snapshot_html(self) -> str:
        """Plot, table and the chosen latent."""
        if self.found is None:
            return _render.section(self.title, [_render.note("There was no dictionary.")])
        name = self.labels.get(self.state.latent, "")
        parts = [
            _render.note(self.about.value), _render.note(self.measured_note.value),
            self.map.snapshot_html(), self.list.snapshot_html(),
            _render.heading(f"Latent {self.state.latent} {name}"), self.card.snapshot_html(),
        ]  # fmt: skip
        return _render.section(self.title, parts, code=self.shown_code(), when=True)
