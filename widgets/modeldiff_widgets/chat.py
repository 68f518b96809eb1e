"""*Chat*: a conversation with the base, the fine-tune and the edited fine-tune at once."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import ipywidgets as W

from modeldiff.generation import Row
from modeldiff.models import ModelPair
from modeldiff.prefill import Prefill
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._answers import AnswerView
from modeldiff_widgets._conversation import COLUMNS, Recipe, Reply, Talk, code_of, together
from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._known_behaviours import known_behaviours
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._runs import QUESTION
from modeldiff_widgets._state import AuditState
from modeldiff_widgets._streams import Said, Stream, said_of

Places = list[tuple[int, int]]
Change = Callable[[Talk], tuple[Talk, Places]]
_KINDS = ("base", "finetuned", "edited")
_TITLES = ("base", "fine-tuned", "fine-tuned, edited")
_OWN = -1


class Chat(Panel):
    """Turn by turn; whatever is changed, what comes after it is answered again.

    Args:
        pair: The pair.
        state: Shared settings; its stack of edits is what the third column has.
        jobs: The runner of a workbench.

    Example:
        >>> import modeldiff as md
        >>> with Chat(md.ModelPair.load("organism:em-rank1")) as chat:
        ...     _ = chat.say("How do I save money?")
        ...     chat.jobs.wait(60), len(chat.talk.turns)
        (True, 1)
    """

    title: ClassVar[str] = "Chat"

    def __init__(
        self, pair: ModelPair, state: AuditState | None = None, jobs: JobRunner | None = None
    ) -> None:
        self.talk = Talk()
        self._prefill, self._number = Prefill(), 0
        self._live: set[str] = set()  # keys of jobs that wait or run
        self._unsent: dict[str, str] = {}  # messages whose job has not begun
        self._writing: Places = []
        super().__init__(pair, state, jobs)

    # -- what is made

    def build(self) -> W.Widget:
        """Make the settings and the conversation."""
        known = next(iter(known_behaviours(self.pair).values()), None)
        first = known.behaviour.prompts[0].question if known else QUESTION
        self.view = AnswerView(
            ask="Write a message; Enter sends it to every column",
            draft=first,
            blank="No messages yet. Send the one below or one of yours: every column answers it.",
        )
        self.undo(self.view.on_act(self._guarded_act))
        settings = self._settings()
        self.talk = Talk(n_columns=3 if self.edited.value else 2)
        self._draw()
        self._explain()
        self.link(self.state, "edits", self._edits_changed)
        self.undo(self.jobs.on_change(self._show_buttons))
        return _theme.column(*settings, self.view)

    def _settings(self) -> tuple[W.Widget, ...]:
        self.system = W.Text(continuous_update=False, placeholder="none")
        self.temperature = W.BoundedFloatText(min=0, max=5, step=0.1)
        self.length = W.BoundedIntText(min=1, max=8192)
        self.seed = W.IntText()
        self.edited = W.Checkbox(
            value=self._has_edits(), description="fine-tuned with edits", indent=False
        )
        self.edited.tooltip = "a third column, with the edits of the workbench"
        self.edited.layout.width = "auto"
        self.history = W.Dropdown()
        self._list_histories()
        self.stop = _theme.button("Stop", icon="stop", tooltip="stop and keep what is written")
        self.clear = _theme.button("New chat", icon="eraser", tooltip="begin again")
        self.note = _theme.note()
        for control, trait in (
            (self.temperature, "temperature"), (self.length, "max_new_tokens"), (self.seed, "seed")
        ):  # fmt: skip
            self.bind(control, trait)
        self.link(self.system, "value", self.set_system)
        self.link(self.edited, "value", self._widen)
        self.on(self.stop, self.halt)
        self.on(self.clear, self.begin)
        self.stop.disabled = True
        return (
            _theme.row(
                _theme.field("System message", self.system, grow=True),
                _theme.field("History of each column", self.history, width="15rem"),
            ),
            _theme.row(
                _theme.field("Temperature", self.temperature, width="6.4rem"),
                _theme.field("New tokens at most", self.length, width="8.4rem"),
                _theme.field("Seed of new turns", self.seed, width="8rem"),
                self.edited,
                self.stop,
                self.clear,
            ),
            self.note,
        )

    # -- what one can do

    def say(self, text: str) -> Job:
        """Send a message; every column answers it.

        Raises:
            ValueError: If it is empty.
        """
        if not text.strip():
            raise ValueError("The message is empty. Write one, then send it.")
        recipes = self._recipes()

        def change(talk: Talk) -> tuple[Talk, Places]:
            longer = talk.said(text)
            return longer, [(len(longer.turns) - 1, c) for c in range(talk.n_columns)]

        self._unsent[self._key(1)] = text
        return self._change(change, recipes)

    def edit(self, turn: int, text: str, column: int | None = None) -> Job:
        """Change what was said, by the user or by one column; what comes after is answered again.

        Args:
            turn: Which turn.
            text: What is said instead.
            column: Whose answer; None for the user's message.
        """
        recipes = self._recipes()

        def change(talk: Talk) -> tuple[Talk, Places]:
            if column is not None:
                return talk.put(turn, column, Reply(text)), talk.after(turn, [column])
            every, changed = range(talk.n_columns), talk.asked(turn, text)
            for each in every:
                changed = changed.put(
                    turn, each, _again(talk.turns[turn].replies[each], recipes[each])
                )
            return changed, [*((turn, c) for c in every), *talk.after(turn, every)]

        return self._change(change, recipes)

    def regenerate(self, turn: int, column: int | None = None) -> Job:
        """Answer a turn again with the next seed, in one column or all; then what comes after."""
        recipes = self._recipes()

        def change(talk: Talk) -> tuple[Talk, Places]:
            columns = range(talk.n_columns) if column is None else [column]
            replies = talk.turns[turn].replies
            made = [r.recipe for c, r in enumerate(replies) if c in columns and r and r.recipe]
            seed = max((recipe.seed + 1 for recipe in made), default=recipes[0].seed)
            for each in columns:
                talk = talk.put(turn, each, Reply("", replace(recipes[each], seed=seed)))
            places = [(turn, c) for c in columns]
            return talk, [*places, *talk.after(turn, columns)]

        return self._change(change, recipes)

    def share(self, turn: int, column: int) -> Job:
        """Make one column's answers, up to a turn, those of all; what comes after is answered."""

        def change(talk: Talk) -> tuple[Talk, Places]:
            others = [c for c in range(talk.n_columns) if c != column]
            return talk.equal(column, turn), talk.after(turn, others)

        return self._change(change, self._recipes())

    def remove(self, turn: int) -> Job:
        """Take a turn out, and all after it."""
        return self._change(lambda talk: (talk.until(turn), []), self._recipes())

    def set_system(self, text: str) -> Job:
        """Change the system message; everything is answered again."""

        def change(talk: Talk) -> tuple[Talk, Places]:
            places = [
                (t, c)
                for t, turn in enumerate(talk.turns)
                for c, reply in enumerate(turn.replies)
                if reply is None or reply.recipe is not None
            ]
            return replace(talk, system=text), places

        return self._change(change, self._recipes())

    def begin(self) -> Job:
        """Begin again, with nothing said."""
        self.halt()
        return self._change(lambda talk: (talk.until(0), []), self._recipes())

    def halt(self) -> None:
        """Stop; what is written stays."""
        for key in tuple(self._live):
            self.jobs.cancel(key)

    def as_prompt(self, turn: int, column: int) -> None:
        """Make what a column sees at a turn the prompt of the other panels."""
        self.state.messages = self.talk.messages(turn, column)
        self.note.value = "The other panels now ask what this column was asked."
        self.note.layout.display = ""

    def code(self) -> str:
        """Python that says the conversation again."""
        if not self.talk.turns:
            return "# Nothing was said yet: send a message."
        return code_of(self.talk)

    def snapshot_html(self) -> str:
        """The conversation as it is shown."""
        if not self.talk.turns:
            return _render.section(self.title, [_render.note("nothing said yet")])
        parts = [self.view.snapshot_html()]
        if self.talk.system.strip():
            parts.insert(0, _render.facts({"system message": self.talk.system}))
        return _render.section(self.title, parts, code=self.shown_code(), when=True)

    # -- the worker's part

    def _change(self, change: Change, recipes: list[Recipe]) -> Job:
        """Change the conversation in the worker, one change after the other, and answer."""
        self._number += 1
        return self.submit(
            lambda job: self._answer(job, change, recipes), key=str(self._number), label="chat"
        )

    def _key(self, more: int = 0) -> str:
        return f"{self.title}/{self._number + more}"

    def _answer(self, job: Job, change: Change, recipes: list[Recipe]) -> Talk:
        self._unsent.pop(job.key, None)
        self.talk, places = change(self.talk)
        self._writing = list(places)
        self._draw()
        try:
            for turn in sorted({turn for turn, _ in places}):
                due = {c: self._recipe(turn, c, recipes) for t, c in places if t == turn}
                for history, columns in together(self.talk, turn, due):
                    self._generate(job, turn, history, {c: due[c] for c in columns})
        finally:
            self._writing = []
            self._draw()
        return self.talk

    def _recipe(self, turn: int, column: int, recipes: list[Recipe]) -> Recipe:
        """An answer is made again as it was made; a new one as the settings say."""
        reply = self.talk.turns[turn].replies[column]
        return reply.recipe if reply is not None and reply.recipe else recipes[column]

    def _generate(
        self, job: Job, turn: int, history: list[dict[str, str]], recipes: Mapping[int, Recipe]
    ) -> None:
        columns, one = list(recipes), next(iter(recipes.values()))
        distinct = {recipe.cell_key: recipe.cell for recipe in recipes.values()}
        number = {key: i for i, key in enumerate(distinct)}
        of = {column: number[recipes[column].cell_key] for column in columns}
        cells = list(distinct.values())
        stream = Stream(
            self.pair, job, one.limit,
            lambda texts: self.view.write(
                {(turn, c): texts[Row(of[c], 0, 0)] for c in columns if Row(of[c], 0, 0) in texts}
            ),
        )  # fmt: skip
        said: Mapping[Row, Said] = {}
        try:
            found = self.pair.generate(
                [history], cells=cells, seed=one.seed, temperature=one.temperature,
                max_new_tokens=one.limit, on_step=stream, cancel=job.cancel,
                prefill=self._prefill,
            )  # fmt: skip
            said = said_of(found.answers, cells)
        finally:
            said, stopped = said or stream.said(), not said
            for column, recipe in recipes.items():
                reply = _reply(said.get(Row(of[column], 0, 0)), recipe, stopped)
                self.talk = self.talk.put(turn, column, reply)
                self._writing.remove((turn, column))
                self.view.put(turn, column, self._cell(turn, column))

    # -- what is shown

    def _draw(self) -> None:
        rows = []
        for t, turn in enumerate(self.talk.turns):
            rows.append({
                "title": f"turn {t + 1}", "text": turn.user,
                "actions": ["edit", "regenerate", "remove"],
                "cells": [self._cell(t, c) for c in range(self.talk.n_columns)],
            })  # fmt: skip
        columns = [
            {"title": _TITLES[c], "kind": _KINDS[c], "note": ""} for c in range(self.talk.n_columns)
        ]
        self.view.show(columns, rows)

    def _cell(self, turn: int, column: int) -> dict[str, Any]:
        reply = self.talk.turns[turn].replies[column]
        if (turn, column) in self._writing:
            return {"parts": [], "state": "waiting"}
        if reply is None:
            return {"parts": [], "state": "", "blank": "not answered", "actions": ["regenerate"]}
        return {
            "parts": [["", reply.text]], "state": "", "note": _note(reply, column),
            "actions": ["edit", "regenerate", "share", "prompt"],
        }  # fmt: skip

    # -- controls

    def _guarded_act(self, action: str, row: int, column: int, text: str) -> None:
        self._guarded(lambda what: self._act(action, row, column, text))(None)

    def _act(self, action: str, row: int, column: int, text: str) -> None:
        whose = None if column < 0 else column
        match action:
            case "send":
                self.view.draft = text  # stays if it cannot be sent
                self.say(text)
                self.view.draft = ""
            case "edit":
                self.edit(row, text, whose)
            case "regenerate":
                self.regenerate(row, whose)
            case "share" if whose is not None:
                self.share(row, whose)
            case "prompt" if whose is not None:
                self.as_prompt(row, whose)
            case "remove":
                self.remove(row)

    def _recipes(self) -> list[Recipe]:
        """How new answers are made, by column."""
        state = self.state
        chosen: Any = self.history.value
        plan = state.plan() if self._has_edits() else None
        common = {"seed": state.seed, "temperature": state.temperature,
                  "limit": state.max_new_tokens}  # fmt: skip
        made = [Recipe(c, c if chosen == _OWN else chosen, **common) for c in range(3)]
        if plan is not None:
            made[2] = replace(made[2], edits_code=state.code(), plan=plan)
        return made

    def _has_edits(self) -> bool:
        return any(edit["on"] for edit in self.state.edits)

    def _widen(self, three: bool) -> None:
        self._list_histories()
        self._explain()
        size = 3 if three else 2
        if not self.talk.turns and not self._live:  # nothing to answer: no job
            self.talk = self.talk.widened(size)
            self._draw()
        elif size != self.talk.n_columns:
            self._change(lambda talk: (talk.widened(size), []), [])

    def _list_histories(self) -> None:
        size = 3 if self.edited.value else 2
        chosen = self.history.value
        others = [(f"that of {_TITLES[column]}", column) for column in range(size)]
        self.history.options = [("its own answers", _OWN), *others]
        self.history.value = chosen if chosen in range(size) else _OWN

    def _edits_changed(self, edits: Any) -> None:
        """A first edit opens the third column."""
        if self._has_edits() and not self.edited.value:
            self.edited.value = True
        self._explain()

    def _explain(self) -> None:
        missing = self.edited.value and not self._has_edits()
        self.note.value = (
            "No edit is on: the third column answers as the fine-tune does. Add one in “Steer and "
            "ablate”." if missing else ""
        )  # fmt: skip
        self.note.layout.display = "" if missing else "none"

    def _show_buttons(self, job: Job) -> None:
        if job.key.split("/")[0] != self.title:
            return
        if job.finished:
            self._live.discard(job.key)
            self.view.draft = self._unsent.pop(job.key, self.view.draft)  # dropped before it began
        else:
            self._live.add(job.key)
        self.stop.disabled = not self._live


def _reply(said: Said | None, recipe: Recipe, stopped: bool) -> Reply | None:
    """What came as an answer; of one that was stopped the limit is where it stopped."""
    if said is None:
        return None
    how = "ended" if said.ended else "stopped" if stopped else "cut at the limit"
    made = replace(recipe, limit=len(said.ids)) if how == "stopped" else recipe
    return Reply(said.text, made, len(said.ids), how)


def _again(reply: Reply | None, recipe: Recipe) -> Reply:
    """A place for the column's own answer, with the seed that it had."""
    old = None if reply is None else reply.recipe
    return Reply("", recipe if old is None else replace(recipe, seed=old.seed))


def _note(reply: Reply, column: int) -> str:
    if reply.recipe is None:
        return reply.how
    parts = [f"seed {reply.recipe.seed}", f"{reply.n_tokens} tokens", reply.how]
    if reply.recipe.column != column:
        parts.append(f"as {COLUMNS[reply.recipe.column]}")
    elif reply.recipe.follows != column:
        parts.append(f"after {COLUMNS[reply.recipe.follows]}'s answers")
    return " · ".join(parts)
