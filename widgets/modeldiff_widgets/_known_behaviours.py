"""The behaviours that a panel can measure: those that it was given, or an organism's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import modeldiff as md
from modeldiff.behaviours import Behaviour, Prompt, Verdict
from modeldiff.errors import JudgeError, SetupError
from modeldiff.models import ModelPair

_ORGANISM = "organism:"


@dataclass(frozen=True)
class KnownBehaviour:
    """A behaviour and how to write it.

    Args:
        behaviour: What is asked, and who judges.
        code: A Python expression for it, with ``md`` in scope; ``behaviour`` if only whoever gave
            it can say.
    """

    behaviour: Behaviour
    code: str = "behaviour"
    written: bool = False
    """Whether the code makes it on its own."""

    def some(self, n: int) -> "KnownBehaviour":
        """The same with at most ``n`` prompts."""
        code = f"md.with_prompts({self.code}, {n})"
        return KnownBehaviour(md.with_prompts(self.behaviour, n), code, self.written)


def known_behaviours(
    pair: ModelPair, given: Sequence[Behaviour] | None = None
) -> dict[str, KnownBehaviour]:
    """Behaviours by name: the given ones, or those of the organism that the pair is."""
    if given is not None:
        return {each.name: KnownBehaviour(each) for each in given}
    name = pair.sides.names[1]
    if not name.startswith(_ORGANISM):
        return {}
    organism = name.removeprefix(_ORGANISM)
    try:
        found = md.organism_behaviours(organism)
    except (SetupError, KeyError):
        return {}  # an organism without behaviours of its own, such as a bare base
    return {
        each.name: KnownBehaviour(each, f"md.organism_behaviours({organism!r})[{index}]", True)
        for index, each in enumerate(found)
    }


def verdict_of(known: dict[str, KnownBehaviour], item: Any, answer: str) -> Verdict | None:
    """What the first behaviour's judge says of an answer; None if it does not know the question."""
    if not known:
        return None
    behaviour = next(iter(known.values())).behaviour
    asked: Any = item if isinstance(item, str) else _pairs(item)
    try:
        return behaviour.judge(Prompt(asked), answer)
    except (JudgeError, StopIteration):
        return None


def _pairs(item: Any) -> tuple[tuple[str, str], ...]:
    messages = getattr(item, "messages", item)
    return tuple((str(m["role"]), str(m["content"])) for m in messages)
