"""*Directions*: the library as a table, how alike its members are, and what they say in words."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as W

from modeldiff.answer_contrasts import AnswerContrast
from modeldiff.behaviours import Behaviour
from modeldiff.direction_files import read_vectors
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, FileFormatError, ModelDiffError
from modeldiff.logit_lens import LogitLens, logit_lens
from modeldiff.models import ModelPair
from modeldiff.report_text import visible
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._cosine_map import CosineMap
from modeldiff_widgets._find_direction import EVERY_LAYER, find_direction, first_layer
from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._known_behaviours import known_behaviours
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._stack import new_edit
from modeldiff_widgets._state import AuditState

CONTRASTS = (
    ("fine-tuned − base, on its answers", "models"),
    ("answers that show it − normal ones", "answers"),
)
OPERATIONS = (
    ("A + B", "+"), ("A − B", "-"), ("A without B (orthogonal)", "⊥"), ("−A", "neg"),
)  # fmt: skip
SUFFIX = ".safetensors"
_HEADINGS = (
    "#", "name", "method", "site", "norm", "share of residual", "split-half", "text null",
    "tokens", "points",
)  # fmt: skip
_EMPTY = (
    "No directions yet. Press Find to get a first one from the pair, load a file, or add your own: "
    "panel.state.add_direction(direction)."
)
_LENS = 8
_RANDOM = 19


class Directions(Panel):
    """The directions of the workbench.

    Args:
        pair: The pair.
        state: Shared settings.
        jobs: The runner of a workbench.
        behaviours: What a first direction can be found for; an organism brings its own.
    """

    title = "Directions"

    def __init__(
        self, pair: ModelPair, state: AuditState | None = None, jobs: JobRunner | None = None,
        behaviours: Sequence[Behaviour] | None = None,
    ) -> None:  # fmt: skip
        self.behaviours = known_behaviours(pair, behaviours)
        self.lens: LogitLens | None = None
        self._lens_of = ""
        self._showing = 0
        super().__init__(pair, state, jobs)

    # -- controls

    def build(self) -> W.Widget:
        """Make everything."""
        self.table = W.HTML()
        self.selected = W.Dropdown(options=[("none yet", "")])
        self.words = W.HTML()
        self.map = CosineMap(self._tapped)
        self.map_note = _theme.note()
        find, library = self._finding(), self._library()
        algebra, files = self._algebra(), self._files()
        for trait in ("directions", "direction", "seed"):
            self.link(self.state, trait, lambda new: self._show())
        for trait in ("edits", "caft"):
            self.link(self.state, trait, lambda new: self._show_use())
        self.link(self.selected, "value", self._choose)
        self._show()
        return _theme.column(
            _theme.card(find, title="Find a first direction"),
            _theme.card(*library, title="Library"),
            _theme.card(self.words, title="In words (logit lens)"),
            _theme.split(
                _theme.card(self.map_note, self.map.pane, title="Cosines"),
                _theme.column(
                    _theme.card(*algebra, title="Combine"), _theme.card(*files, title="File")
                ),
            ),
        )

    def _finding(self) -> W.Widget:
        names = list(self.behaviours)
        self.behaviour = W.Dropdown(options=names or [("none given", "")])
        self.contrast = W.Dropdown(options=CONTRASTS)
        layers = range(self.pair.n_layers)
        options = [("every layer", EVERY_LAYER), *((f"{i}", i) for i in layers)]
        self.layer = W.Dropdown(options=options, value=first_layer(self.pair))
        self.n_prompts = W.BoundedIntText(value=40, min=2, max=2000)
        self.find = _theme.button("Find", primary=True, icon="search")
        self.find.disabled = not names
        self.on(self.find, self.run)
        hint = (
            "The fine-tune answers the behaviour's prompts, a judge sorts the answers, and the "
            "means of their activations are compared, each beside its controls."
            if names else "Give the panel behaviours: Directions(pair, behaviours=[...])."
        )  # fmt: skip
        return _theme.column(_theme.note(hint), _theme.row(
            self.find,
            _theme.field("Behaviour", self.behaviour, width="13rem"),
            _theme.field("Mean difference", self.contrast, width="17rem"),
            _theme.field("Layer", self.layer, width="7rem"),
            _theme.field("Prompts at most", self.n_prompts, width="7.5rem"),
        ))  # fmt: skip

    def _library(self) -> Sequence[W.Widget]:
        self.steer = _theme.button("Steer with it", icon="arrow-right")
        self.ablate = _theme.button("Ablate it", icon="minus-circle")
        self.remove = _theme.button("Remove", icon="trash")
        marks = "mark it, to be ablated while fine-tuning (concept ablation fine-tuning)"
        self.caft = _theme.button("Use in CAFT", icon="graduation-cap", tooltip=marks)
        self.used = _theme.note()
        self.on(self.steer, lambda: self.use("steer"))
        self.on(self.ablate, lambda: self.use("ablate"))
        self.on(self.caft, self.use_in_caft)
        self.on(self.remove, self.drop)
        actions = _theme.row(
            _theme.field("Selected direction", self.selected, width="30rem"),
            self.steer, self.ablate, self.caft, self.remove,
        )  # fmt: skip
        return self.table, actions, self.used

    def _algebra(self) -> Sequence[W.Widget]:
        self.first, self.second = (W.Dropdown(options=[("none yet", "")]) for _ in "ab")
        self.operation = W.Dropdown(options=OPERATIONS)
        self.make = _theme.button("Make", icon="plus")
        self.on(self.make, self.combine)
        return (
            _theme.row(
                _theme.field("A", self.first, grow=True),
                _theme.field("Operation", self.operation, width="12rem"),
                _theme.field("B", self.second, grow=True),
                self.make,
            ),
            _theme.note("Both must be at one site. The result keeps where it came from."),
        )

    def _files(self) -> Sequence[W.Widget]:
        self.path = W.Text(value=f"directions{SUFFIX}", continuous_update=False)
        self.write = _theme.button("Export all", icon="download")
        self.read = _theme.button("Import", icon="upload")
        self.on(self.write, self.export)
        self.on(self.read, self.load)
        self.file_note = _theme.note(f"In {Path.cwd()}")
        return (
            _theme.row(
                _theme.field(f"File ({SUFFIX})", self.path, grow=True), self.write, self.read
            ),
            self.file_note,
        )

    # -- what the buttons do

    def run(self) -> Job:
        """Find directions from the pair's own answers and keep that of the chosen layer."""
        if not self.behaviours:
            raise DirectionError("there is no behaviour: Directions(pair, behaviours=[...]).")
        known = self.behaviours[str(self.behaviour.value)].some(self.n_prompts.value)
        contrast: AnswerContrast = self.contrast.value  # pyright: ignore[reportAssignmentType]
        return find_direction(self, known, contrast, int(self.layer.value))  # pyright: ignore

    def use(self, kind: str) -> None:
        """Put an edit along the selected direction on the stack."""
        layers: Any = "all" if kind == "ablate" else None
        self.state.edits = [*self.state.edits, new_edit(kind, self._named().name, layers=layers)]

    def use_in_caft(self) -> None:
        """Mark the selected direction for concept ablation fine-tuning; once more unmarks it."""
        name, marked = self._named().name, list(self.state.caft)
        self.state.caft = [n for n in marked if n != name] if name in marked else [*marked, name]

    def drop(self) -> None:
        """Take the selected direction out of the library, unless an edit needs it."""
        name = self._named().name
        users = [str(i + 1) for i, e in enumerate(self.state.edits) if e["direction"] == name]
        if users:
            raise DirectionError(f"{name!r} is used by edit {', '.join(users)}: delete that first.")
        left = {n: d for n, d in self.state.directions.items() if n != name}
        self.state.caft = [each for each in self.state.caft if each != name]
        self.state.direction = next(iter(left), "")
        self.state.directions = left

    def combine(self) -> str:
        """Make a direction of A and B and select it; returns its name."""
        names = str(self.first.value or ""), str(self.second.value or "")
        operation = str(self.operation.value)
        if any(name not in self.state.directions for name in names):
            raise DirectionError("choose two directions of the library, A and B.")
        a, b = (self.state.directions[name] for name in names)
        written = [self.state.direction_code.get(name, "") for name in names]
        made = {
            "+": lambda: a + b, "-": lambda: a - b, "⊥": lambda: a.orthogonal_to(b),
            "neg": lambda: -a,
        }[operation]()  # fmt: skip
        code = {
            "+": "({} + {})", "-": "({} - {})", "⊥": "({}).orthogonal_to({})", "neg": "(-{})",
        }[operation].format(*written)  # fmt: skip
        complete = written[0] and (written[1] or operation == "neg")
        return self.state.add_direction(made, code if complete else "")

    def export(self) -> Path:
        """Write the library to the file; another kind of file is never overwritten."""
        path = safe_path(self.path.value)
        if path.exists():
            read_vectors(path)
        self.state.save_directions(str(path))
        self.file_note.value = f"{len(self.state.directions)} directions written to {path}"
        return path

    def load(self) -> list[str]:
        """Add the directions of the file; returns their names."""
        path = safe_path(self.path.value)
        if not path.is_file():
            raise FileFormatError(f"there is no file {str(path)!r}: export one, or correct it.")
        names = self.state.load_directions(str(path))
        self.state.direction = names[0]
        self.file_note.value = f"{len(names)} directions read from {path}"
        return names

    def _named(self) -> Direction:
        if self.state.direction not in self.state.directions:
            raise DirectionError("select a direction first; Find makes one.")
        return self.state.directions[self.state.direction].renamed(self.state.direction)

    def _choose(self, name: Any) -> None:
        if name and name != self.state.direction and self._showing != threading.get_ident():
            self.state.direction = name

    def _tapped(self, a: str, b: str) -> None:
        self.state.direction = a
        self.first.value, self.second.value = a, b

    # -- what is shown

    def _show(self) -> None:
        directions = self.state.directions
        self.table.value = self._table_html()
        self._showing = threading.get_ident()  # new options select the first; that is no choice
        try:
            for control in (self.selected, self.first, self.second):
                self._offer(control)
        finally:
            self._showing = 0
        for button in (self.steer, self.ablate, self.caft, self.remove, self.make, self.write):
            button.disabled = not directions
        self._show_use()
        self._show_map()
        self._ask_lens()

    def _offer(self, control: W.Dropdown) -> None:
        """Offer the directions that there are; what was chosen stays."""
        directions, kept = self.state.directions, control.value
        options = [(f"{visible(name)} @ {d.site}", name) for name, d in directions.items()]
        control.options = options or [("none yet", "")]
        wanted = self.state.direction if control is self.selected else kept
        control.value = wanted if wanted in directions else next(iter(directions), "")

    def _show_use(self) -> None:
        """Say which edits use the selected direction: what the buttons did."""
        name = self.state.direction
        mine = [f"{e['kind']} ({i + 1})" for i, e in enumerate(self.state.edits)
                if name and e["direction"] == name]  # fmt: skip
        stack = (
            f"In the stack of edits: {', '.join(mine)}." if mine
            else "Not in the stack of edits: the panel Steer and ablate shows what they do."
        )  # fmt: skip
        self.used.value = stack + " Marked for CAFT." * (name in self.state.caft)

    def _table_html(self) -> str:
        if not self.state.directions:
            return _render.note(_EMPTY)
        names = list(self.state.directions)
        rows = [_row(i + 1, name, self.state.directions[name]) for i, name in enumerate(names)]
        chosen = names.index(self.state.direction) if self.state.direction in names else -1
        table = _render.table(_HEADINGS, rows, selected=chosen, numeric=(0, 3, 4, 5, 6, 7, 8))
        notes = self.state.directions[names[chosen]].notes if chosen >= 0 else ()
        return table + "".join(_render.note(each) for each in notes) + _render.note(
            "Share of residual: the norm beside the mean norm of the residual stream there. "
            "Split-half: cosine between the directions of two halves of the data. Text null: "
            "cosine with the same contrast in the base; near 1 it is a property of the texts."
        )  # fmt: skip

    def _show_map(self) -> None:
        several = len(self.state.directions) > 1
        self.map_note.value = (
            "Numbers are those of the table, colours are cosines; a click selects A and B."
            if several else "Two directions or more are compared here."
        )  # fmt: skip
        self.map.pane.layout.display = "" if several else "none"
        self.map.show(self.state.directions)

    # -- the lens

    def _ask_lens(self) -> None:
        name = self.state.direction
        direction = self.state.directions.get(name)
        if direction is None:
            self.lens, self._lens_of = None, ""
            self.words.value = _render.note("Select a direction: its tokens are shown here.")
            return
        seed = self.state.seed
        self.submit(
            lambda job: self._read_lens(direction.renamed(name), seed), key="lens",
            label="logit lens",
        )  # fmt: skip

    def _read_lens(self, direction: Direction, seed: int) -> None:
        try:
            self.lens = logit_lens(self.pair.sides, direction, k=_LENS, n_random=_RANDOM, seed=seed)
        except ModelDiffError as error:
            self.lens, self._lens_of = None, ""
            self.words.value = _render.note(str(error))
            return
        self._lens_of = direction.name
        self.words.value = self._words_html()

    def _words_html(self) -> str:
        if self.lens is None:
            return ""
        lens, reach = self.lens, max(self.lens.random_reach)
        most = max(lens.tokens["logit"].abs().max(), 1e-9)
        blocks = [
            (f"{title}{end}", tone, _tokens_html(lens.of(end, kind), float(most), tone))
            for kind, title, tone in (
                ("direction", "", "finetuned"),
                ("random", "random control: ", "random"),
            )
            for end in ("promoted", "suppressed")
        ]
        verdict = (
            "reaches further than each of them" if lens.p <= 1 / (len(lens.random_reach) + 1)
            else "does not reach further than all of them"
        )  # fmt: skip
        own = float(lens.tokens.loc[lens.tokens["kind"] == "direction", "logit"].abs().max())
        beside = f"{self._lens_of}, beside a random direction of the same length"
        return (
            _render.paragraph(beside)
            + _render.columns(blocks)
            + _render.note(
                f"Its largest logit is {own:.2f}, the largest of {len(lens.random_reach)} random "
                f"directions {reach:.2f}: it {verdict} (p = {lens.p:.2f}). Logits of the direction "
                "at root mean square 1, centred over the vocabulary."
            )
        )

    # -- what stays

    def code(self) -> str:
        """Python for the library, its cosines, and the logit lens of the selected direction."""
        names = list(self.state.directions)
        lines = ["import modeldiff as md"]
        if not names:
            return "\n".join([*lines, "directions = {}"])
        lines += [self.state.directions_code(names), "cosines = md.cosine_table("
                  f"[directions[name].renamed(name) for name in {names!r}])"]  # fmt: skip
        if self._lens_of in names:
            lines += [
                "from modeldiff.logit_lens import logit_lens",
                f"chosen = directions[{self._lens_of!r}].renamed({self._lens_of!r})",
                f"lens = logit_lens(pair.sides, chosen, k={_LENS}, n_random={_RANDOM}, "
                f"seed={self.state.seed})",
            ]
        return "\n".join(lines)

    def snapshot_html(self) -> str:
        """Table, cosines and words."""
        parts = [self._table_html()]
        if self.state.directions:
            parts += [self._words_html(), self.map.snapshot_html()]
        return _render.section(self.title, parts, code=self.shown_code())


def safe_path(text: str) -> Path:
    """The file that is meant, as an absolute path.

    Raises:
        FileFormatError: If it has not the suffix, climbs out of its folder, or is a folder.
    """
    path = Path(text.strip()).expanduser()
    if path.suffix != SUFFIX or not path.stem.strip("."):
        raise FileFormatError(f"{text!r}: directions are kept in files that end with {SUFFIX!r}.")
    if ".." in path.parts or "\0" in text:
        raise FileFormatError(f"{text!r} leads out of its folder; write the path without '..'.")
    path = path.absolute()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"lies in no folder: make {str(path.parent)!r}"
        raise FileFormatError(f"{str(path)!r} {what}.")
    return path


def _row(number: int, name: str, direction: Direction) -> list[Any]:
    def shown(value: float | None) -> Any:
        return None if value is None else float(value)

    return [
        str(number), name, direction.method, str(direction.site), float(direction.scale),
        shown(direction.relative_scale), shown(direction.split_half), shown(direction.text_null),
        direction.n_tokens or None, direction.sign or None,
    ]  # fmt: skip


def _tokens_html(rows: Any, most: float, tone: Any) -> str:
    pairs = zip(rows["token"], rows["logit"], strict=True)
    return _render.token_bars(
        [(token, abs(logit) / most, f"{logit:+.2f}") for token, logit in pairs], tone
    )
