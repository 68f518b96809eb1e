"""*Lens*: what a direction, or the pair's difference, says in words, beside its controls."""

import threading
from typing import Any

import ipywidgets as W
import pandas as pd

from modeldiff.errors import MismatchError, ModelDiffError
from modeldiff.interventions import Side
from modeldiff.lens_queries import token_query
from modeldiff.patchscope import Patchscope, patchscope
from modeldiff.relevance import frequent_ids, keyword_ids, relevance, relevance_test
from modeldiff.report_text import visible
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._find_direction import first_layer
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._lens_reading import TEXTS, Asked, Reading
from modeldiff_widgets._lens_views import (
    patchscope_html,
    positions_html,
    query_html,
    relevance_html,
    words_html,
)
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._prompt_box import tidy

SOURCES = (("A direction of the library", "direction"), ("Difference of the pair", "difference"))
SIDES = (("the fine-tune", "finetuned"), ("the base", "base"))
PATCHSCOPE_TOKENS = 10
_NONE = ("none yet: see Directions", "")
_MOST = 8  # tokens that one question asks for
_QUERY = "Where any token stands under the lens, with and without a space before it."
_TOPIC = "Whether the promoted tokens are of a topic more often than those of the controls."
_SCOPE = (
    "The vector is put in the place of a token in prompts that repeat tokens; what the model then "
    "expects is what it takes the vector for. Of the lengths that are tried the one is shown at "
    "which it is read most sharply, beyond its controls."
)


class Lens(Panel):
    """A direction or a difference read as tokens, always beside random and random-difference ones.

    Example:
        >>> with Lens(pair) as panel:  # doctest: +SKIP
        ...     panel.source.value = "difference"
        ...     panel.read()
        ...     panel.jobs.wait(60)
        ...     panel.reading.lens.words()
    """

    title = "Lens"

    def build(self) -> W.Widget:
        """Make everything."""
        self.reading: Reading | None = None
        self.asked: Asked | None = None
        self._showing = 0
        source = _theme.card(*self._source(), title="What is read")
        words = _theme.card(*self._words(), title="Promoted and suppressed tokens")
        query, topic = self._query(), self._topic()
        scope = _theme.card(*self._patchscope(), title="Patchscope")
        for trait in ("directions", "direction"):
            self.link(self.state, trait, lambda new: self._offer())
        self._offer()
        self.source.value = "direction" if self.state.directions else "difference"
        self._fit()
        self._forget()
        self._show()
        return _theme.column(
            source, words, _theme.card(*query, title="Ask for a token"),
            _theme.card(*topic, title="Ask for a topic"), scope,
        )  # fmt: skip

    # -- controls

    def _source(self) -> tuple[W.Widget, ...]:
        self.source = W.ToggleButtons(options=SOURCES)
        self.source.style.button_width = "13rem"
        self.direction = W.Dropdown(options=[_NONE])
        last = self.pair.n_layers - 1
        self.layer = W.BoundedIntText(value=max(first_layer(self.pair), last // 2), max=last)
        self.n_positions = W.BoundedIntText(value=5, min=1, max=32)
        self.side = W.Dropdown(options=SIDES)
        self.k = W.BoundedIntText(value=10, min=1, max=100)
        self.n_random = W.BoundedIntText(value=19, min=2, max=199)
        self.texts = W.Textarea(value="\n".join(TEXTS), rows=4, continuous_update=False)
        self.go = _theme.button("Read", primary=True, icon="search")
        self.on(self.go, self.read)
        self.link(self.source, "value", lambda new: self._fit())
        self.link(self.direction, "value", self._choose)
        self._of_library = _theme.field("Direction", self.direction, width="24rem")
        self._of_pair = _theme.row(
            _theme.field("After layer", self.layer, width="6rem"),
            _theme.field("First positions", self.n_positions, width="7rem"),
        )
        rest = _theme.row(
            self.go, self._of_library, self._of_pair,
            _theme.field("Read by", self.side, width="9rem"),
            _theme.field("Tokens", self.k, width="5rem"),
            _theme.field("Controls of each kind", self.n_random, width="9.5rem"),
        )  # fmt: skip
        name = "Unrelated texts, one a line: for the difference, and for random differences"
        self.status = _theme.note()
        return self.source, rest, _theme.field(name, self.texts), self.status

    def _words(self) -> tuple[W.Widget, ...]:
        self.position = W.Dropdown(options=[("–", -1)])
        self.control = W.BoundedIntText(value=0, min=0, max=0)
        self.add = _theme.button("Add it to the library", icon="plus")
        self.on(self.add, self.add_direction)
        for control in (self.position, self.control):
            self.link(control, "value", lambda new: self._show())
        self._of_position = _theme.row(_theme.field("Position", self.position, width="13rem"),
                                       self.add)  # fmt: skip
        which = _theme.field("Control shown", self.control, width="7rem")
        self.words = W.HTML()
        return _theme.row(self._of_position, which), self.words

    def _query(self) -> tuple[W.Widget, ...]:
        self.token = W.Text(placeholder="a word or a token", continuous_update=False)
        self.ask = _theme.button("Ask", icon="question")
        self.on(self.ask, self.query)
        self.answer = W.HTML()
        return _theme.row(_theme.field("Token", self.token, grow=True), self.ask), self.answer

    def _topic(self) -> tuple[W.Widget, ...]:
        self.keywords = W.Text(placeholder="words of it, with commas", continuous_update=False)
        self.test = _theme.button("Test", icon="balance-scale")
        self.on(self.test, self.test_topic)
        self.verdict = W.HTML()
        return _theme.row(_theme.field("Topic", self.keywords, grow=True), self.test), self.verdict

    def _patchscope(self) -> tuple[W.Widget, ...]:
        self.scope_go = _theme.button("Read by patchscope", icon="eye")
        self.on(self.scope_go, self.read_patchscope)
        self.scope_view = W.HTML()
        return self.scope_view, _theme.row(self.scope_go)

    # -- what the buttons do

    def read(self) -> Job:
        """Read what is set; returns at once."""
        asked = self._asked()
        if asked.source == "direction":
            asked.code(0)  # says what is missing

        def done(job: Job) -> None:
            self.asked, self.reading = asked, job.result
            self._forget()
            self._offer_positions()
            self._show()

        return self.submit(lambda job: asked.run(self.pair, job), key="read", on_done=done,
                           label="lens")  # fmt: skip

    def query(self) -> Job:
        """Ask where a token stands; as typed, and with a space before it."""
        reading, asked, at = self._known()
        ids = self._token_ids(self.token.value)
        direction, controls = reading.at(at)

        def work(job: Job) -> pd.DataFrame:
            return token_query(self.pair.sides, direction, controls, ids, seed=asked.seed,
                               side=asked.side)  # fmt: skip

        def done(job: Job) -> None:
            self.queried = (job.result, at)
            self._show_answers()

        return self.submit(work, key="query", on_done=done, label="ask for a token")

    def test_topic(self) -> Job:
        """Test whether the promoted tokens are about the topic."""
        reading, asked, _ = self._known()
        words = tuple(w.strip() for w in self.keywords.value.split(",") if w.strip())
        if not words:
            raise MismatchError("there is no topic: write words of it, with commas between them.")

        def work(job: Job) -> pd.DataFrame:
            frequent = frequent_ids(self.pair.texts(asked.texts))
            wanted = keyword_ids(self.pair.tokenizer, words, without=frequent)
            return relevance_test(relevance(reading.lens.tokens, wanted, frequent=frequent))

        def done(job: Job) -> None:
            self.topic = (job.result, words)
            self._show_answers()

        return self.submit(work, key="topic", on_done=done, label="ask for a topic")

    def read_patchscope(self) -> Job:
        """Let the model itself read the vector; one step, which cannot be stopped halfway."""
        reading, asked, at = self._known()
        direction, controls = reading.at(at)
        placed = direction.at(f"resid_post.{direction.site.layer}")

        def work(job: Job) -> Patchscope:
            job.report(0.0, "every length, vector and prompt")
            return patchscope(self.pair.sides, placed, k=PATCHSCOPE_TOKENS, controls=controls,
                              seed=asked.seed, side=asked.side)  # fmt: skip

        def done(job: Job) -> None:
            self.scope = (job.result, at)
            self._show_answers()

        return self.submit(work, key="patchscope", on_done=done, label="patchscope")

    def add_direction(self) -> str:
        """Add the difference at the chosen position to the library; returns its name there."""
        reading, _, at = self._known()
        direction = reading.at(at)[0]
        return self.state.add_direction(
            direction.renamed(f"{direction.name}, layer {direction.site.layer}")
        )

    def _asked(self) -> Asked:
        name, state = self.state.direction, self.state
        known = state.directions.get(name)
        side: Side = "base" if self.side.value == "base" else "finetuned"
        texts = tuple(line.strip() for line in self.texts.value.splitlines() if line.strip())
        return Asked(
            "difference" if self.source.value == "difference" else "direction",
            known.renamed(name) if known is not None else None,
            state.directions_code([name]) if known is not None else "",
            texts, self.layer.value, self.n_positions.value, self.k.value, self.n_random.value,
            state.seed, side,
        )  # fmt: skip

    def _known(self) -> tuple[Reading, Asked, int]:
        """What was read, how, and the position that is looked at."""
        at = int(self.position.value)  # pyright: ignore[reportArgumentType]
        if self.reading is None or self.asked is None or at < 0:
            raise MismatchError("nothing was read yet, or the models do not differ: press Read.")
        return self.reading, self.asked, at

    def _token_ids(self, text: str) -> list[int]:
        if not text.strip():
            raise MismatchError("there is no token to ask for: write some text.")
        forms = dict.fromkeys((text, f" {text.strip()}"))
        rows = self.pair.tokenizer(list(forms), add_special_tokens=False).input_ids
        found = list(dict.fromkeys(each for row in rows for each in row))
        if len(found) > _MOST:
            raise MismatchError(f"{len(found)} tokens in {text!r}: ask for {_MOST} at most.")
        return found

    # -- what is shown

    def _offer(self) -> None:
        """Offer the directions that there are; new options select the first, which is no choice."""
        found, chosen = self.state.directions, self.state.direction
        self._showing = threading.get_ident()
        try:
            self.direction.options = [
                (f"{visible(name)} @ {each.site}", name) for name, each in found.items()
            ] or [_NONE]
            self.direction.value = chosen if chosen in found else next(iter(found), "")
        finally:
            self._showing = 0

    def _choose(self, name: Any) -> None:
        if name and name != self.state.direction and self._showing != threading.get_ident():
            self.state.direction = name

    def _offer_positions(self) -> None:
        reading = self.reading
        if reading is None:
            return
        flags = {} if reading.trace is None else dict(enumerate(reading.trace.table()["flagged"]))
        options = [(f"{i}{' (may be an artefact)' if flags.get(i) else ''}", i)
                   for i in reading.positions]  # fmt: skip
        self.position.options = options or [("none differs", -1)]
        other = options[0][1] if options else -1
        self.position.value = next((i for i in reading.positions if not flags.get(i)), other)
        self.control.max = max(0, int(reading.lens.tokens["control"].max())) if options else 0

    def _fit(self) -> None:
        library = self.source.value == "direction"
        self._of_library.layout.display = "" if library else "none"
        self._of_pair.layout.display = "none" if library else ""

    def _show(self) -> None:
        reading, asked = self.reading, self.asked
        self._of_position.layout.display = (
            "none" if reading is None or reading.trace is None else ""
        )
        known = reading is not None and bool(reading.positions)
        for button in (self.ask, self.test, self.scope_go, self.add):
            button.disabled = not known
        if reading is None or asked is None:
            self.words.value = _render.note("Nothing is read yet: press “Read”.")
            return
        at = int(self.position.value)  # pyright: ignore[reportArgumentType]
        self.status.value = self._said(reading, asked)
        over = "" if reading.trace is None else positions_html(reading.lens, reading.trace, at)
        beside = words_html(reading.lens, at, int(self.control.value), asked.n_random)
        self.words.value = over + beside
        self._show_answers()
        self.refresh_code()

    def _said(self, reading: Reading, asked: Asked) -> str:
        by = "the base" if asked.side == "base" else "the fine-tune"
        if reading.trace is None:
            n = asked.n_random
            beside = f"{n} random directions and {n} random differences"
            return f"{self._name(reading)} is read by {by}, beside {beside}."
        where = f"after layer {asked.layer}, {reading.trace.n_texts} texts"
        if not reading.positions:
            return f"The models do not differ {where}: there is nothing to read."
        left = ", ".join(map(str, reading.alike))
        out = f" Left out: position {left}, where all texts are alike." if left else ""
        return f"Mean difference fine-tuned − base {where}; read by {by}.{out}"

    def _name(self, reading: Reading) -> str:
        return "" if reading.direction is None else (
            f"{visible(reading.direction.name)} @ {reading.direction.site}"
        )  # fmt: skip

    def _forget(self) -> None:
        """Something else is read: no answer is of it."""
        self.queried: tuple[pd.DataFrame, int] | None = None
        self.topic: tuple[pd.DataFrame, tuple[str, ...]] | None = None
        self.scope: tuple[Patchscope, int] | None = None
        views = (self.answer, _QUERY), (self.verdict, _TOPIC), (self.scope_view, _SCOPE)
        for view, hint in views:
            view.value = _render.note(hint)

    def _show_answers(self) -> None:
        """Token, topic and patchscope, as far as they are of what is read."""
        at = int(self.position.value)  # pyright: ignore[reportArgumentType]
        if self.queried is not None:
            table, of = self.queried
            stale = "" if of == at else f"Of position {of}: ask again. "
            self.answer.value = query_html(table, stale)
        if self.topic is not None:
            self.verdict.value = relevance_html(*self.topic)
        if self.scope is not None:
            found, of = self.scope
            stale = "" if of == at else f"Of position {of}: read again. "
            self.scope_view.value = patchscope_html(found, stale)

    # -- what stays

    def code(self) -> str:
        """Python for the tokens, and for the answers that are shown.

        Raises:
            DirectionError: If a direction is to be read and the library has none.
        """
        asked = self.asked or self._asked()
        at = max(0, int(self.position.value))  # pyright: ignore[reportArgumentType]
        if self.reading is not None and not self.reading.positions:
            return asked.code(0).split("\ndirection =")[0]
        blocks = [asked.code(at)]
        common = f"seed={asked.seed}, side={asked.side!r}"
        if self.queried is not None and self.queried[1] == at:
            ids = self.queried[0]["token_id"].tolist()
            blocks += [
                "from modeldiff.lens_queries import token_query",
                f"query = token_query(pair.sides, direction, controls, {ids}, {common})",
            ]
        if self.topic is not None:
            blocks += [
                "from modeldiff.relevance import frequent_ids, keyword_ids, relevance, "
                "relevance_test",
                "frequent = frequent_ids(pair.texts(texts))",
                f"wanted = keyword_ids(pair.tokenizer, {self.topic[1]!r}, without=frequent)",
                "topic = relevance_test(relevance(lens.tokens, wanted, frequent=frequent))",
            ]
        if self.scope is not None and self.scope[1] == at:
            blocks += [
                "from modeldiff.patchscope import patchscope",
                "placed = direction.at(f'resid_post.{direction.site.layer}')",
                f"scope = patchscope(pair.sides, placed, k={PATCHSCOPE_TOKENS}, controls=controls, "
                f"{common})",
            ]
        return tidy(blocks)

    def snapshot_html(self) -> str:
        """Tokens and answers."""
        if self.reading is None:
            return _render.section(self.title, [_render.note("Nothing was read.")])
        parts = [_render.note(self.status.value), self.words.value]
        shown = ((self.queried, self.answer), (self.topic, self.verdict),
                 (self.scope, self.scope_view))  # fmt: skip
        parts += [view.value for found, view in shown if found is not None]
        return _render.section(self.title, parts, code=self._safe_code(), when=True)

    def _safe_code(self) -> str:
        try:
            return self.code()
        except ModelDiffError:
            return ""
