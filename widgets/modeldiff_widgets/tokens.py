"""The panel *Tokens*: every token of a text under both models, with and without the edits."""

from typing import Any

import ipywidgets as W

from modeldiff.report_text import token_text
from modeldiff.sites import Site
from modeldiff.token_scores import TokenScores
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._pair_view import PairView
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._prompt_box import PromptBox
from modeldiff_widgets._token_values import (
    COMPARED,
    METRICS,
    PROJECTED,
    Request,
    Shown,
    cells_of,
    kind_of,
    name_of,
    short_name_of,
    waiting,
)


class Tokens(Panel):
    """Teacher-forced heat of a prompt, chat or text.

    The values of a prediction stand at the token that is predicted, given the tokens before it;
    projections and adapter scalars stand at their own token.

    Example:
        >>> with Tokens(pair) as panel:  # doctest: +SKIP
        ...     panel.run()
        ...     panel.jobs.wait(60)
        ...     panel.scores[0].table
    """

    title = "Tokens"

    def build(self) -> W.Widget:
        """Make the controls, the heat and the table beside it."""
        self.shown: Shown | None = None
        self.prompt = PromptBox(self)
        self.go = _theme.button("Compare tokens", primary=True, icon="align-left")
        self.prompt.options.children = (*self.prompt.options.children, self.go)
        self.view = PairView(
            height="24rem", details=False, linked=True,
            labels={name: each[:2] for name, each in METRICS.items()},
            blank="Nothing is compared yet: press “Compare tokens”.",
        )  # fmt: skip
        self.view.set_columns([waiting()])
        self.detail = W.HTML(_hint())
        self.status = _theme.note()
        self._connect()
        return _theme.column(self.prompt.box, self._colours(), self.view, self.status, self.detail)

    def _colours(self) -> W.Box:
        names = [(long, name) for name, (_, long, *_) in METRICS.items()]
        lora = [] if self.pair.sides.lora else ["lora"]
        self.metric = W.Dropdown(options=[each for each in names if each[1] not in lora])
        self.scale = W.FloatSlider(value=1.0, min=0.0, max=12.0, step=0.05, readout_format=".2f")
        self.direction = W.Dropdown(options=[("none yet: see Directions", "")])
        self.site = W.Dropdown(options=[(_site_name(s), str(s)) for s in self.pair.sides.lora])
        self.component = W.BoundedIntText(min=0, max=max(0, _rank(self.pair) - 1))
        self.edited = W.ToggleButtons(
            options=[("Without", "none"), ("Fine-tune", "finetuned"), ("Both", "both")],
            value="finetuned", tooltips=["no edits", "edits on the fine-tune", "on both models"],
        )  # fmt: skip
        self.edited.style.button_width = "5.6rem"
        self._along = _theme.field("Direction", self.direction, width="13rem")
        self._module = _theme.field("Adapted module", self.site, width="13rem")
        self._part = _theme.field("Component", self.component, width="6rem")
        self._follow_colours()
        return _theme.row(
            _theme.field("Colour by", self.metric, width="24rem"),
            _theme.field("Full colour at (0: the largest value)", self.scale, width="17rem"),
            self._along, self._module, self._part,
            _theme.field("Columns with the current edits", self.edited),
        )  # fmt: skip

    def _follow_colours(self) -> None:
        if self.state.metric in self._offered():
            self.metric.value = self.state.metric
        self._ranges(self.measured, self.state.scale)
        self.bind(self.scale, "scale")
        self.jslink((self.scale, "value"), (self.view, "scale"))
        self.link(self.metric, "value", self._recolour)
        self.link(self.state, "metric", self._metric_set)
        self.link(self.state, "directions", lambda found: self._list_directions())
        self.link(self.direction, "value", lambda name: self.state.set_trait("direction", name))
        self.link(self.state, "direction", self._direction_set)
        self.link(self.site, "value", lambda site: self._show())
        self.link(self.component, "value", lambda number: self._show())
        self._list_directions()
        self.view.metric = self.measured
        self._fit()

    def _connect(self) -> None:
        self.on(self.go, self.run)
        self.link(self.state, "token", self._select)
        self.link(self.state, "edits", lambda edits: self._describe())
        self.undo(self.view.on_select(lambda column, index: self._clicked(index)))

    # -- what is computed

    @property
    def measured(self) -> str:
        """The metric that colours the tokens."""
        return str(self.metric.value)

    @property
    def scores(self) -> tuple[TokenScores, ...]:
        """What the last run found: the fine-tune, then models with edits, against the base."""
        return self.shown.scores if self.shown else ()

    def run(self) -> Job:
        """Read the text with both models, and with the edits that are on; returns at once."""
        request = self._request()

        def work(job: Job) -> Shown:
            text = self.prompt.text(request.asked, job, self._stream)
            return Shown.of(self.pair, request, text, job)

        return self.submit(work, on_done=lambda job: self._done(job.result), label="compare tokens")

    def _request(self) -> Request:
        which = str(self.edited.value)
        plan = None if which == "none" else self.state.plan()
        direction = self.state.directions.get(self.state.direction)
        return Request(
            self.prompt.asked(), cells_of(plan, which), self.state.code() if plan else "",
            direction, self.state.directions_code([direction.name]) if direction else "",
        )  # fmt: skip

    def _project(self) -> None:
        """Project what is shown on the direction that is chosen now."""
        shown, direction = self.shown, self.state.directions.get(self.state.direction)
        if shown is None or direction is None:
            return
        before, request = shown.request.direction, self._request()
        if before is None or before.content_key != direction.content_key:
            self.submit(
                lambda job: shown.projected_on(self.pair, request), key="project",
                on_done=lambda job: self._done(job.result), label="project",
            )  # fmt: skip

    def _stream(self, pieces: list[str]) -> None:
        """Show the prompt, then the answer's tokens as they come; in the worker."""
        if self.view.columns[0]["streaming"]:
            self.view.append(0, pieces)
        else:
            self.view.set_columns([waiting(pieces, streaming=True)])

    # -- what is shown

    def _done(self, found: Shown) -> None:
        self.shown = found
        self.state.results = {**self.state.results, "tokens": found.scores}
        self._show()

    def _show(self) -> None:
        if self.shown is None:
            return
        where = self.pair.tokenizer, str(self.site.value), self.component.value
        several = range(len(self.shown.scores))
        self.view.set_columns([self.shown.column(i, *where) for i in several])
        self._select(self.state.token)
        self._describe()

    def _describe(self) -> None:
        """The line below: what is shown, and whether it is still what is set."""
        if self.shown is None:
            return
        table = self.shown.scores[0].table
        parts = [
            f"{self.shown.text.n_tokens} tokens; the values of a prediction stand at the token "
            f"that is predicted. Underlined: the models’ likeliest tokens differ, "
            f"{table['top1_flip'].sum()} of {len(table)}. "
            f"Mean KL(fine-tuned ‖ base) {table['kl_ft_base'].mean():.3g} nats."
        ]
        if self.measured in PROJECTED and self.shown.request.direction is None:
            parts.append("No direction is chosen: find or load one in Directions.")
        elif self.measured in PROJECTED and self.shown.request.direction is not None:
            parts.append(f"Projection on {self.shown.request.direction!r}.")
        if (self.state.code() if self._edits_on() else "") != self.shown.request.plan_code:
            parts.append("The edits have changed since: compare again to see their effect.")
        self.status.value = " ".join(parts)

    def _edits_on(self) -> bool:
        return self.edited.value != "none" and any(each["on"] for each in self.state.edits)

    # -- selecting and colouring

    def _clicked(self, index: int) -> None:
        self.state.token = index
        self._select(index)

    def _select(self, index: int) -> None:
        if self.shown is None or not 0 <= index < self.shown.text.n_tokens:
            self.view.selected, self.detail.value = [], _hint()
            return
        column = self.view.selected[0] if self.view.selected else 0
        self.view.selected = [column, index]
        self.detail.value = self._detail(index)

    def _detail(self, index: int) -> str:
        assert self.shown is not None
        head = _render.columns([(self._token_title(index), "neutral", self._value_table(index))])
        if index == 0:
            return head + _render.note("The first token is not predicted from anything.")
        tokenizer, scores = self.pair.tokenizer, self.shown.scores
        several: list[tuple[str, _render.Tone, list[tuple[str, float]]]]
        several = [("base", "base", scores[0].tops(0, tokenizer)[index])]
        for each in scores:
            several.append((name_of(each.cell), kind_of(each.cell), each.tops(1, tokenizer)[index]))
        blocks = [
            (f"{who} says", tone, _render.token_bars([(t, p, f"{p:.3f}") for t, p in top], tone))
            for who, tone, top in several
        ]
        return head + _render.columns(blocks)

    def _token_title(self, index: int) -> str:
        assert self.shown is not None
        text = self.shown.text
        before = f" after {token_text(text.pieces[index - 1])}" if index else ""
        return f"{token_text(text.pieces[index])}{before} · token {index}, {text.roles[index]}"

    def _value_table(self, index: int) -> str:
        columns = [each["values"] for each in self.view.columns]
        names = [name for name in METRICS if any(name in values for values in columns)]
        rows = [
            [short_name_of(scores.cell),
             *(values[name][index] if name in values else None for name in names)]
            for scores, values in zip(self.scores, columns, strict=True)
        ]  # fmt: skip
        return _render.table(["against base", *(METRICS[name][0] for name in names)], rows,
                             numeric=range(1, 1 + len(names)))  # fmt: skip

    def _offered(self) -> list[str]:
        return [name for _, name in self.metric.options]

    def _metric_set(self, metric: str) -> None:
        if metric in self._offered():
            self.metric.value = metric

    def _recolour(self, metric: str) -> None:
        self.state.metric = self.view.metric = metric
        self._ranges(metric, METRICS[metric][2])
        self._fit()
        if metric in PROJECTED:
            self._project()
        self._select(self.state.token)
        self._describe()

    def _ranges(self, metric: str, full: float) -> None:
        """Set what the slider can be; where units differ from model to model, by the values.

        It goes over 0, which every range and step has: from any other value the slider in the
        browser would answer with the nearest one that it still has, and that would stay.
        """
        usual, most = METRICS[metric][2:]
        known = [abs(v) for c in self.view.columns for v in c["values"].get(metric, [])[1:] if v]
        if metric not in COMPARED and known:  # the first token is an outlier of every model
            full = usual = max(known)
            most = 2 * full
        self.scale.value = 0.0
        self.scale.max, self.scale.step = most, (usual or most / 10) / 20
        self.scale.value = min(full, most)

    def _fit(self) -> None:
        """Show the controls that the metric needs."""
        metric = self.measured
        for box, needed in (
            (self._along, metric in PROJECTED),
            (self._module, metric == "lora"),
            (self._part, metric == "lora" and self.component.max > 0),
        ):
            box.layout.display = "" if needed else "none"

    def _list_directions(self) -> None:
        names = list(self.state.directions)
        self.direction.options = names or [("none yet: see Directions", "")]
        if self.state.direction in names:
            self.direction.value = self.state.direction

    def _direction_set(self, name: str) -> None:
        if name in self.state.directions:
            self.direction.value = name
        if self.measured in PROJECTED:
            self._project()

    # -- what remains of it

    def code(self) -> str:
        """Python that reproduces the values that are shown as ``values``, one list a column."""
        request = self.shown.request if self.shown else self._request()
        return request.code(self.measured, str(self.site.value), self.component.value)

    def snapshot_html(self) -> str:
        """The heat, what is known of the selected token, and the code."""
        if self.shown is None:
            return _render.section(self.title, [_render.note("Nothing was compared.")])
        parts = [
            _render.note(METRICS[self.measured][1]),
            self.view.snapshot_html(),
            self.detail.value if self.view.selected else "",
            _render.note(self.status.value),
        ]
        return _render.section(self.title, parts, code=self.shown_code(), when=True)


def _site_name(site: Site) -> str:
    return f"layer {site.layer} · {site.module}"


def _rank(pair: Any) -> int:
    sides = pair.sides
    holder = sides.roots[1] if sides.kind == "remote" else sides.peft
    return int(holder.peft_config[sides.adapter].r) if sides.lora else 1


def _hint() -> str:
    return _render.note(
        "Click a token, or move to it with Tab and the arrow keys and press Enter, to see what "
        "each model would have said in its place."
    )
