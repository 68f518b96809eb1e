"""What is generated side by side: how it is asked, how it comes in, how it is repeated."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modeldiff.generation import Answer, Row, end_ids
from modeldiff.interventions import Cell, Plan, Side, grid
from modeldiff.models import ModelPair
from modeldiff.report_text import shortened
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._state import AuditState

SIDE_NAMES = {"base": "base", "finetuned": "fine-tuned"}
EDIT_NAMES = {"none": "", "edited": ", edited", "random": ", random control"}
_EVERY = 0.05  # seconds between two looks at what came


def column_of(cell: Cell) -> dict[str, str]:
    """How a cell of the grid is headed in an `AnswerView`."""
    kind = cell.side if cell.name == "none" else cell.name
    note = shortened(cell.plan.describe(), 60) if cell.name == "edited" else ""
    return {"title": title_of(cell.side, cell.name), "kind": kind, "note": note}


def title_of(side: str, edit: str) -> str:
    """Name of a cell of the grid."""
    return SIDE_NAMES[side] + EDIT_NAMES.get(edit, f", {edit}")


@dataclass(frozen=True)
class Said:
    """An answer, perhaps not a complete one.

    Args:
        ids: Its tokens so far, the end token included.
        text: What they say.
        ended: Whether the model ended it.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True, eq=False)
class Request:
    """What is generated, as it was set when it was asked for.

    Args:
        item: The prompt.
        item_code: Python for it.
        edits: Plans by name.
        edits_code: Python that defines ``do``.
        models: Which sides.
        n: Samples.
        seed: Of the noise.
        temperature: 0 is greedy.
        limit: Tokens of an answer at most.
        settings: All settings of the state then.
    """

    item: Any
    item_code: str
    edits: Mapping[str, Plan]
    edits_code: str
    models: tuple[Side, ...]
    n: int
    seed: int
    temperature: float
    limit: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, state: AuditState, models: Sequence[Side] = ("base", "finetuned")) -> "Request":
        """Read the state.

        Raises:
            InterventionError: If an edit of the stack cannot be made.
        """
        edits = state.grid()
        code = state.grid_code() if edits else ""
        return cls(
            state.item(), state.item_code(), edits, code, tuple(models), state.n_samples,
            state.seed, state.temperature, state.max_new_tokens, state.to_dict(),
        )  # fmt: skip

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The grid, unedited cells first."""
        return grid(self.edits, self.models)

    def code(self, limits: Mapping[Side, int] | None = None) -> str:
        """Python that defines ``answers``, in the order of the grid.

        Args:
            limits: Tokens that each side got, where an answer was stopped; `limit` if None.
        """
        shared = dict.fromkeys(self.models, self.limit) | dict(limits or {})
        asked = {side: limit for side, limit in shared.items() if limit > 0}
        head = self.edits_code or "import modeldiff as md"
        if len(set(asked.values())) == 1:
            models, limit = list(asked), next(iter(asked.values()))
            return (
                f"{head}\n{self._call('found', repr(models), repr(limit))}\nanswers = found.answers"
            )
        lines = self._call("found", "[side]", "limit").splitlines()
        return "\n".join([
            head, "answers = []", f"for side, limit in {asked!r}.items():",
            *(f"    {line}" for line in lines), "    answers += found.answers",
        ])  # fmt: skip

    def _call(self, name: str, models: str, limit: str) -> str:
        edits = "    do=do,\n" if self.edits else ""
        return (
            f"{name} = pair.generate(\n    [{self.item_code}],\n{edits}    models={models},\n"
            f"    n={self.n},\n    seed={self.seed},\n    temperature={self.temperature!r},\n"
            f"    max_new_tokens={limit},\n)"
        )


@dataclass(eq=False)
class Stream:
    """Collects the tokens of one call of `ModelPair.generate`; give it as ``on_step``.

    Args:
        pair: The pair.
        job: Whose progress it is; a cancelled one ends the call.
        limit: Tokens of an answer at most.
        show: Called with the texts of the rows that have grown.
        known: Tokens of each row that are shown already.
    """

    pair: ModelPair
    job: Job
    limit: int
    show: Callable[[dict[Row, str]], None]
    known: Mapping[Row, int] = field(default_factory=dict)
    ids: dict[Row, list[int]] = field(default_factory=dict)
    _grown: set[Row] = field(default_factory=set)
    _shown: float = 0.0

    def __call__(self, got: Sequence[tuple[Row, int]]) -> None:
        """Take one token of each row that is still open."""
        for row, token in got:
            mine = self.ids.setdefault(row, [])
            mine.append(token)
            if len(mine) > self.known.get(row, 0):
                self._grown.add(row)
        now = time.monotonic()
        if now - self._shown >= _EVERY and self._grown:
            self._shown = now
            self.show({row: self.text(self.ids[row]) for row in self._grown})
            self._grown.clear()
        step = max(len(self.ids[row]) for row, _ in got) if got else 0
        behind = step <= min((self.known.get(row, 0) for row, _ in got), default=0)
        what = "catching up: token" if behind else "token"
        self.job.report(step / self.limit, f"{what} {step} of at most {self.limit}")

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say, without control tokens."""
        return str(self.pair.tokenizer.decode(list(ids), skip_special_tokens=True))

    def said(self) -> dict[Row, Said]:
        """What came so far."""
        ends = set(end_ids(self.pair.sides))
        return {
            row: Said(tuple(ids), self.text(ids), ids[-1] in ends) for row, ids in self.ids.items()
        }


def said_of(answers: Sequence[Answer], cells: Sequence[Cell]) -> dict[Row, Said]:
    """Complete answers by their place in a grid of one prompt."""
    place = {(cell.side, cell.name): number for number, cell in enumerate(cells)}
    return {
        Row(place[each.side, each.edit], each.prompt, each.sample): Said(
            each.ids, each.text, each.finished
        )
        for each in answers
    }
