"""A conversation with several models at once: values only, and the Python that repeats it.

Every column has its own answers to the same user's messages. An answer keeps the recipe it was made
by, so that whatever changes before it, it can be made again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modeldiff.interventions import Cell, Plan

COLUMNS = ("base", "fine-tuned", "edited")
"""Names of the columns, in order; a conversation has the first two or all three."""


@dataclass(frozen=True)
class Recipe:
    """How an answer is made.

    Args:
        column: Whose model and edits.
        follows: Whose answers stand in the history.
        seed: Of the noise.
        temperature: 0 is greedy.
        limit: Tokens at most.
        edits_code: Python that defines ``do``; "" without edits.
        plan: The same edits.
    """

    column: int
    follows: int
    seed: int
    temperature: float
    limit: int
    edits_code: str = ""
    plan: Plan = field(default_factory=Plan)

    @property
    def cell(self) -> Cell:
        """What `ModelPair.generate` runs."""
        if self.column < 2:
            return Cell(("base", "finetuned")[self.column])  # pyright: ignore[reportArgumentType]
        return Cell("finetuned", "edited", self.plan)

    @property
    def cell_key(self) -> tuple[int, str]:
        """The same for recipes of the same model and edits."""
        return self.column, self.edits_code

    @property
    def shared(self) -> tuple[int, float, int]:
        """What answers that are generated together have in common."""
        return self.seed, self.temperature, self.limit


@dataclass(frozen=True)
class Reply:
    """An answer.

    Args:
        text: What it says.
        recipe: How it was made; None if it was written by hand.
        n_tokens: Its tokens, the end token included.
        how: "ended", "cut at the limit", "stopped", or "written by hand".
    """

    text: str
    recipe: Recipe | None = None
    n_tokens: int = 0
    how: str = "written by hand"


@dataclass(frozen=True)
class Turn:
    """What the user says, and what each column answers.

    Args:
        user: The message.
        replies: One a column; None where it is not answered yet.
    """

    user: str
    replies: tuple[Reply | None, ...]


@dataclass(frozen=True)
class Talk:
    """A conversation.

    Args:
        turns: In order.
        system: The message before the first turn; "" for none.
        n_columns: 2 or 3.
    """

    turns: tuple[Turn, ...] = ()
    system: str = ""
    n_columns: int = 2

    def messages(self, turn: int, column: int) -> list[dict[str, str]]:
        """What a column sees when it answers a turn: its own answers to those before.

        Answers that are missing are left out together with their question.
        """
        found = [{"role": "system", "content": self.system}] if self.system.strip() else []
        for each in self.turns[:turn]:
            reply = each.replies[column]
            if reply is not None:
                found += [
                    {"role": "user", "content": each.user},
                    {"role": "assistant", "content": reply.text},
                ]
        return [*found, {"role": "user", "content": self.turns[turn].user}]

    def said(self, user: str) -> "Talk":
        """With a message more."""
        return replace(self, turns=(*self.turns, Turn(user, (None,) * self.n_columns)))

    def put(self, turn: int, column: int, reply: Reply | None) -> "Talk":
        """With another answer in a place."""
        replies = list(self.turns[turn].replies)
        replies[column] = reply
        return self._with(turn, replace(self.turns[turn], replies=tuple(replies)))

    def asked(self, turn: int, user: str) -> "Talk":
        """With another message of the user in a turn."""
        return self._with(turn, replace(self.turns[turn], user=user))

    def until(self, turn: int) -> "Talk":
        """Without this turn and all after it."""
        return replace(self, turns=self.turns[:turn])

    def equal(self, column: int, turn: int) -> "Talk":
        """With one column's answers, up to a turn, in every column."""
        turns = tuple(
            replace(each, replies=(each.replies[column],) * self.n_columns) if i <= turn else each
            for i, each in enumerate(self.turns)
        )
        return replace(self, turns=turns)

    def widened(self, n_columns: int) -> "Talk":
        """With two or three columns; the third begins with what the fine-tune said."""
        turns = tuple(
            replace(each, replies=(*each.replies, each.replies[1])[:n_columns])
            for each in self.turns
        )
        return replace(self, turns=turns, n_columns=n_columns)

    def after(self, turn: int, columns: Iterable[int]) -> list[tuple[int, int]]:
        """Places ``(turn, column)`` later on whose history has changed with these columns' turn."""
        changed, places = set(columns), []
        for number in range(turn + 1, len(self.turns)):
            for column, reply in enumerate(self.turns[number].replies):
                if reply is not None and reply.recipe and reply.recipe.follows in changed:
                    places.append((number, column))
            changed |= {column for at, column in places if at == number}
        return places

    def _with(self, turn: int, changed: Turn) -> "Talk":
        return replace(self, turns=(*self.turns[:turn], changed, *self.turns[turn + 1 :]))


def together(
    talk: Talk, turn: int, recipes: Mapping[int, Recipe]
) -> list[tuple[list[dict[str, str]], list[int]]]:
    """Group the columns of a turn that can be generated in one call: history and columns."""
    groups: list[tuple[Any, list[dict[str, str]], list[int]]] = []
    for column, recipe in recipes.items():
        history = talk.messages(turn, recipe.follows)
        for shared, known, columns in groups:
            if known == history and shared == recipe.shared:
                columns.append(column)
                break
        else:
            groups.append((recipe.shared, history, [column]))
    return [(history, columns) for _, history, columns in groups]


_REPLAY = """
def history(turn, follows):
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for (user, _), said in zip(turns[:turn], answers[follows]):
        if said is not None:
            messages += [
                {"role": "user", "content": user}, {"role": "assistant", "content": said},
            ]
    return [*messages, {"role": "user", "content": turns[turn][0]}]

for turn, (user, recipes) in enumerate(turns):
    for name, recipe in recipes.items():
        if isinstance(recipe, dict):
            found = pair.generate(
                [history(turn, recipe["follows"])],
                cells=[cells[recipe["cell"]]],
                seed=recipe["seed"],
                temperature=recipe["temperature"],
                max_new_tokens=recipe["max_new_tokens"],
            )
            recipe = found.answers[0].text
        answers[name].append(recipe)
"""


def code_of(talk: Talk) -> str:
    """Python that says it all again; it leaves ``answers``, texts by column."""
    names = COLUMNS[: talk.n_columns]
    edits = _edits(talk)
    lines = ["import modeldiff as md", 'cells = {"base": md.Cell("base"), "fine-tuned": '
             'md.Cell("finetuned")}']  # fmt: skip
    for code, name in edits.items():
        made = (code or "do = None").removeprefix("import modeldiff as md\n")
        lines += [made, "from modeldiff.interventions import as_plan",
                  f'cells[{name!r}] = md.Cell("finetuned", "edited", as_plan(do))']  # fmt: skip
    lines += [f"system = {talk.system!r}", "turns = ["]
    for turn in talk.turns:
        lines.append(f"    ({turn.user!r}, {{")
        for name, reply in zip(names, turn.replies, strict=True):
            lines.append(f"        {name!r}: {_recipe(reply, edits)},")
        lines.append("    }),")
    lines += ["]", f"answers = {{name: [] for name in {list(names)!r}}}"]
    return "\n".join(lines) + "\n" + _REPLAY.strip("\n")


def _edits(talk: Talk) -> dict[str, str]:
    """Name of each different stack of edits, by its code."""
    replies = [reply for turn in talk.turns for reply in turn.replies]
    codes = [r.recipe.edits_code for r in replies if r and r.recipe and r.recipe.column == 2]
    distinct: Sequence[str] = list(dict.fromkeys(codes))
    return {code: f"edited {i + 1}" if i else "edited" for i, code in enumerate(distinct)}


def _recipe(reply: Reply | None, edits: Mapping[str, str]) -> str:
    if reply is None or reply.recipe is None:
        return repr(None if reply is None else reply.text)
    recipe = reply.recipe
    cell = edits[recipe.edits_code] if recipe.column == 2 else COLUMNS[recipe.column]
    return repr({
        "cell": cell, "follows": COLUMNS[recipe.follows], "seed": recipe.seed,
        "temperature": recipe.temperature, "max_new_tokens": recipe.limit,
    })  # fmt: skip
