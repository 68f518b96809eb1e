"""*LoRA lab*: an adapter opened up: what its modules read, write and do, and turning them down."""

import ipywidgets as W
import pandas as pd

from modeldiff.errors import DirectionError, MismatchError
from modeldiff.lora import AdapterModule, write_directions
from modeldiff.lora_scalars import Scalars, lora_scalars
from modeldiff.tokens import Text
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._lora_effects import PROMPTS
from modeldiff_widgets._lora_effects import Asked as EffectsAsked
from modeldiff_widgets._lora_modules import Opened, fill, open_adapter, turned
from modeldiff_widgets._lora_plots import EffectBars, LayerBars, Spectrum, effects_html
from modeldiff_widgets._lora_sliders import ScaleSliders
from modeldiff_widgets._pair_view import PairView
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._prompt_box import Asked, PromptBox, tidy
from modeldiff_widgets._row_table import RowTable

NO_ADAPTER = (
    "This pair has two whole models and no LoRA adapter: extract_adapter of "
    "modeldiff.weight_extraction makes one of their difference, to be loaded as adapter=."
)
UNITS = (("each module", "module"), ("each layer", "layer"), ("each kind of module", "kind"))
_BLANK = "Nothing is read yet: press “Read scalars”."
_MANY = 24  # modules beyond which layers are left out by default
_EFFECT_NOTE = (
    "KL(fine-tune ‖ without the unit) and KL(unit alone ‖ base), mean over the answers' tokens; "
    "lines are 95 % intervals over texts. Grey: random writes of the unit's size and gate. A unit "
    "inside its grey band matters for how much it writes, not for what. P-values are of one unit."
)


class LoraLab(Panel):
    """The adapter of a pair, module by module.

    Example:
        >>> with LoraLab(pair) as panel:  # doctest: +SKIP
        ...     panel.read_scalars()
        ...     panel.jobs.wait(60)
        ...     panel.scalars.summary()
    """

    title = "LoRA lab"

    def build(self) -> W.Widget:
        """Make everything; without an adapter, one sentence."""
        self.opened: Opened | None = None
        self.scalars: Scalars | None = None
        self.effects: pd.DataFrame | None = None
        self._read_of: Asked | None = None
        self._effects_of: EffectsAsked | None = None
        self._text: Text | None = None
        self.chosen, self.order = 0, ("module", False)
        if not self.pair.sides.lora:
            return _theme.card(W.HTML(_render.paragraph(NO_ADAPTER)))
        body = _theme.column(
            _theme.card(*self._modules(), title="Adapted modules"),
            self._figures(),
            _theme.card(*self._hidden_state(), title="Hidden state, token by token"),
            _theme.card(*self._scaling(), title="Turn it up and down"),
            _theme.card(*self._leaving_out(), title="Leave one out"),
        )
        self.submit(
            lambda job: open_adapter(self.pair.sides, job), key="open",
            on_done=lambda job: self._opened(job.result), label="read the adapter",
        )  # fmt: skip
        return body

    # -- controls

    def _modules(self) -> tuple[W.Widget, ...]:
        self.table = RowTable(label="Adapted modules", note="Reading the adapter …")
        self.listen(self.table.on_choose, self.choose)
        self.listen(self.table.on_sort, self._sort)
        return (self.table,)

    def _figures(self) -> W.Widget:
        self.spectrum, self.layers = Spectrum(), LayerBars()
        self.spectrum_note = _theme.note("Singular values of the chosen module.")
        self.listen(lambda call: self.spectrum.picked(call, "component"), self._component)
        self.listen(lambda call: self.layers.picked(call, "layer"), self._choose_layer)
        return _theme.split(
            _theme.card(self.spectrum_note, self.spectrum.pane, title="Spectrum"),
            _theme.card(
                _theme.note("All changes of a layer together; a click chooses its first module."),
                self.layers.pane, title="Layers",
            ),
        )  # fmt: skip

    def _hidden_state(self) -> tuple[W.Widget, ...]:
        self.prompt = PromptBox(self)
        self.go = _theme.button("Read scalars", primary=True, icon="align-left")
        self.prompt.options.children = (*self.prompt.options.children, self.go)
        self.on(self.go, self.read_scalars)
        self.component = W.BoundedIntText(min=0, max=0)
        self.link(self.component, "value", lambda number: self._show_module())
        self.view = PairView(metric="lora", details=False, height="16rem", blank=_BLANK)
        self.view.name("lora", "scalar", "scalar of the component: length that it writes")
        self.view.set_columns([{"title": "", "tokens": []}])
        self.figures = W.HTML()
        self.add = _theme.button("Add its write direction to the library", icon="plus")
        self.on(self.add, self.add_direction)
        self.added = _theme.note()
        self.share = W.FloatSlider(value=1.0, min=0.02, max=1.0, step=0.02, readout_format=".0%")
        self.link(self.share, "value", lambda share: self._colour())
        row = _theme.row(
            _theme.field("Component", self.component, width="7rem"),
            _theme.field("Full colour at, of the largest", self.share, width="15rem"), self.add,
        )  # fmt: skip
        return self.prompt.box, row, self.added, self.view, self.figures

    def _scaling(self) -> tuple[W.Widget, ...]:
        self.scaling = ScaleSliders(self, self.pair.sides.lora)
        return (self.scaling.box,)

    def _leaving_out(self) -> tuple[W.Widget, ...]:
        self.lines = W.Textarea(value="\n".join(PROMPTS), rows=4, continuous_update=False)
        few = len(self.pair.sides.lora) <= _MANY
        self.by = W.Dropdown(options=UNITS, value="module" if few else "layer")
        self.n_random = W.BoundedIntText(value=19, min=2, max=199)
        self.leave = _theme.button("Leave one out", primary=True, icon="cut")
        self.on(self.leave, self.leave_one_out)
        self.bars = EffectBars()
        self.bars.pane.layout.display = "none"
        self.effects_view = W.HTML(_render.note(
            "The fine-tune answers the prompts; then each unit is removed from it, and added alone "
            "to the base, beside random writes of the same size."
        ))  # fmt: skip
        row = _theme.row(
            _theme.field("Leave out", self.by, width="13rem"),
            _theme.field("Random writes a unit", self.n_random, width="9rem"), self.leave,
        )  # fmt: skip
        prompts = _theme.field("Prompts, one a line", self.lines)
        return prompts, row, self.bars.pane, self.effects_view

    # -- what the buttons do

    @property
    def module(self) -> AdapterModule:
        """The chosen module.

        Raises:
            MismatchError: If there is no adapter, or it is not read yet.
        """
        if self.opened is None:
            raise MismatchError("the adapter is still being read." if self.pair.sides.lora
                                else NO_ADAPTER)  # fmt: skip
        return self.opened.modules[self.chosen]

    def choose(self, index: int) -> None:
        """Look at another module, by its index in ``pair.sides.lora``."""
        self.chosen = index
        self.component.max = self.module.rank - 1
        self._show_module()

    def read_scalars(self) -> Job:
        """Read the text, answered first if that is wanted, and all scalars in one forward."""
        modules = self._all_modules()
        asked = self.prompt.asked()

        def work(job: Job) -> tuple[Text, Scalars]:
            text = self.prompt.text(asked, job)
            job.report(0.5, "one forward pass")
            found = lora_scalars(self.pair.sides, [text], modules, cancel=job.cancel)
            return text, found

        def done(job: Job) -> None:
            self._read_of, (self._text, self.scalars) = asked, job.result
            self._list()
            self._show_module()

        return self.submit(work, key="scalars", on_done=done, label="read scalars")

    def leave_one_out(self) -> Job:
        """Let the fine-tune answer the prompts, then leave each unit out and in."""
        self._all_modules()
        asked = EffectsAsked.of(
            self.pair, self.state, self.lines.value, str(self.by.value), self.n_random.value
        )

        def done(job: Job) -> None:
            self._effects_of, self.effects = asked, job.result
            self.bars.draw(job.result)
            self.bars.pane.layout.display = ""
            self.effects_view.value = self._effects_html()

        return self.submit(lambda job: asked.run(self.pair, job), key="leave", on_done=done,
                           label="leave one out")  # fmt: skip

    def add_direction(self) -> str:
        """Add what the chosen component writes to the library; returns its name there."""
        writes = write_directions(self.module, models=self.pair.digests)
        at = self.component.value
        if at >= len(writes):
            raise DirectionError(f"component {at} of {self.module.name} writes nothing.")
        name = self.state.add_direction(writes[at])
        self.added.value = f"In the library as {name}: see Directions, Lens, Steer and ablate."
        return name

    def _all_modules(self) -> tuple[AdapterModule, ...]:
        return self.opened.modules if self.opened and self.module else ()

    # -- what is shown

    def _opened(self, found: Opened) -> None:
        self.opened = found
        self._list()
        self.component.max = self.module.rank - 1
        self._show_module()

    def _list(self) -> None:
        if self.opened is not None:
            fill(self.table, self.opened, self.order, self.chosen, self.scalars)

    def _sort(self, column: int) -> None:
        self.order = turned(self.order, column)
        self._list()

    def _component(self, number: int) -> None:
        self.component.value = number

    def _choose_layer(self, layer: int) -> None:
        sites = self.pair.sides.lora
        self.choose(next(i for i, site in enumerate(sites) if site.layer == layer))

    def _show_module(self) -> None:
        if self.opened is None:
            return
        module, at = self.module, self.component.value
        self.table.selected = self.chosen
        self.spectrum.draw(module, at)
        self.spectrum_note.value = (
            f"{module.name}, rank {module.rank}; component {at} is looked at, a click on a bar "
            "chooses another."
        )
        self.layers.draw(self.opened.layers(), module.site.layer)
        self.add.disabled = module.write_at is None
        self.added.value = "" if module.write_at else (
            f"{module.name} does not write to the residual stream: it has no direction there."
        )  # fmt: skip
        self._show_scalars()
        self.refresh_code()

    def values(self) -> list[float | None]:
        """Scalars that are shown, one a token; None at the first, which is left out."""
        if self.scalars is None or self._text is None:
            return []
        found: list[float | None] = [None] * self._text.n_tokens
        column = self.scalars.values[self.module.name][:, self.component.value]
        for position, value in zip(self.scalars.position.tolist(), column.tolist(), strict=True):
            found[position] = value
        return found

    def _show_scalars(self) -> None:
        if self._text is None:
            return
        title = f"{self.module.name}, component {self.component.value}"
        self.view.set_columns([{
            "title": title, "kind": "finetuned", "tokens": list(self._text.pieces),
            "values": {"lora": self.values()},
        }])  # fmt: skip
        self._colour()
        self.figures.value = self._figures_html()

    def _colour(self) -> None:
        largest = max((abs(value) for value in self.values() if value is not None), default=0.0)
        self.view.scale = float(self.share.value) * largest

    def _figures_html(self) -> str:
        if self.scalars is None:
            return ""
        name, at = self.module.name, self.component.value
        rows = self.scalars.summary(n_resamples=1)
        row = rows[(rows["module"] == name) & (rows["component"] == at)].iloc[0]
        unit = "in the residual stream" if self.module.write_at else "of what the module writes"
        headings = ["mean", "standard deviation", "tokens above 0", "bias fraction", "tokens"]
        found = [float(row["mean"]), float(row["std"]), f"{100 * row['positive']:.0f} %",
                 float(row["bias_fraction"]), int(row["n_tokens"])]  # fmt: skip
        return _render.table(headings, [found], numeric=range(5)) + _render.note(
            f"The scalar is the signed length {unit} along the component's write direction. The "
            "first token is left out. One text: no interval."
        )

    def _effects_html(self) -> str:
        if self.effects is None or self._effects_of is None:
            return ""
        row = self.effects.iloc[0]
        said = (
            f"Whole adapter: KL(fine-tune ‖ base) {row['total']:.3g} nats a token, "
            f"answers: {row['n_texts']}; {self._effects_of.n_random} random writes a unit."
        )
        return effects_html(self.effects) + _render.note(f"{said} {_EFFECT_NOTE}")

    # -- what stays

    def code(self) -> str:
        """Python for the table, the spectrum, and the scalars and effects that are shown.

        Raises:
            MismatchError: If the pair has no adapter.
        """
        if not self.pair.sides.lora:
            raise MismatchError(NO_ADAPTER)
        at, component = self.chosen, self.component.value
        blocks = [
            "import modeldiff as md",
            "from modeldiff.lora import adapter_modules, adapter_table, write_directions",
            "modules = adapter_modules(pair.sides)\ntable = adapter_table(modules)\n"
            f"spectrum = modules[{at}].svd.singular",
        ]
        if self.opened is not None and self.module.write_at is not None:
            blocks.append(f"write = write_directions(modules[{at}], models=pair.digests)"
                          f"[{component}]")  # fmt: skip
        if self._read_of is not None:
            blocks += [
                self._read_of.code(), "from modeldiff.lora_scalars import lora_scalars",
                "scalars = lora_scalars(pair.sides, [text], modules)",
                f"values = scalars.values[modules[{at}].name][:, {component}].tolist()",
                "biases = scalars.summary()",
            ]  # fmt: skip
        if self._effects_of is not None:
            blocks.append(self._effects_of.code())
        if any(edit["on"] for edit in self.state.edits):
            blocks.append(self.state.code())
        return tidy(blocks)

    def snapshot_html(self) -> str:
        """Table, spectrum, heat and effects."""
        if self.opened is None:
            html = _render.note("Not read yet." if self.pair.sides.lora else NO_ADAPTER)
            return _render.section(self.title, [html])
        parts = [self.table.snapshot_html(), self.spectrum.pane.snapshot_html(),
                 self.layers.pane.snapshot_html()]  # fmt: skip
        if self._text is not None:
            parts += [self.view.snapshot_html(), self.figures.value]
        parts.append(_render.note(self.scaling.note.value))
        if self.effects is not None:
            parts += [self.bars.pane.snapshot_html(), self._effects_html()]
        return _render.section(self.title, parts, code=self.shown_code(), when=True)
