"""What the panel *Behaviour* offers: behaviours to ask for, and judges of their answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from modeldiff.behaviours import Behaviour, Judge
from modeldiff.judges import NoJudge, backtracking_judge, refusal_judge
from modeldiff.models import ModelPair
from modeldiff.questions import load_behaviour, question_sets
from modeldiff_widgets._known_behaviours import KnownBehaviour, known_behaviours

IMPORTS = (
    "from modeldiff.judges import backtracking_judge, refusal_judge",
    "from modeldiff.questions import load_behaviour",
)
"""Where the names in the code of what is offered come from."""


@dataclass(frozen=True)
class KnownJudge:
    """A judge and how to write it.

    Args:
        judge: Who judges.
        code: A Python expression for it, with ``behaviours`` and ``judges``, if given, in scope.
    """

    judge: Judge
    code: str

    @property
    def name(self) -> str:
        """The judge's own name."""
        return self.judge.name


def known(
    pair: ModelPair, given: Sequence[Behaviour], judges: Sequence[Judge]
) -> dict[str, KnownBehaviour]:
    """Behaviours by name: the given ones, the organism's own, and shipped sets of questions.

    Those without a judge are left out unless one was given. Of two with one name the first counts.
    """
    handed = {each.name: KnownBehaviour(each, f"behaviours[{i}]") for i, each in enumerate(given)}
    shipped = {
        each.name: KnownBehaviour(each, f"load_behaviour({each.name!r})", True)
        for each in _shipped()
    }
    own = known_behaviours(pair)
    found = shipped | own | handed
    order = dict.fromkeys([*handed, *own, *shipped])
    return {
        name: found[name]
        for name in order
        if judges or not isinstance(found[name].behaviour.judge, NoJudge)
    }


def judges_for(chosen: KnownBehaviour, judges: Sequence[Judge]) -> dict[str, KnownJudge]:
    """Judges by name who can judge a behaviour first: its own, and those given."""
    own = chosen.behaviour.judge
    found = [] if isinstance(own, NoJudge) else [KnownJudge(own, f"{chosen.code}.judge")]
    found += [KnownJudge(each, f"judges[{i}]") for i, each in enumerate(judges)]
    return _by_name(found)


def second_judges(
    chosen: KnownBehaviour, judges: Sequence[Judge], first: str
) -> dict[str, KnownJudge]:
    """Judges by name for the same answers: all others that are known, and the shipped rules."""
    rules = (
        KnownJudge(refusal_judge(), "refusal_judge()"),
        KnownJudge(backtracking_judge(), "backtracking_judge()"),
    )
    found = _by_name([*judges_for(chosen, judges).values(), *rules])
    return {name: each for name, each in found.items() if name != first}


def imports_for(lines: Sequence[str]) -> list[str]:
    """The imports that lines of code need of what is offered here."""
    text, needed = "\n".join(lines), []
    for each in IMPORTS:
        module, names = each.removeprefix("from ").split(" import ")
        used = [name for name in names.split(", ") if f"{name}(" in text]
        needed += [f"from {module} import {', '.join(used)}"] if used else []
    return needed


def _by_name(several: Sequence[KnownJudge]) -> dict[str, KnownJudge]:
    found: dict[str, KnownJudge] = {}
    for each in several:
        found.setdefault(each.name, each)
    return found


@cache
def _shipped() -> tuple[Behaviour, ...]:
    return tuple(load_behaviour(name) for name in question_sets())
