"""The methods of the table, one small module each; a new module here is a new method.

A module holds

- ``TITLE``: the public functions that it calls, in words;
- ``ALPHA``: the false alarm rate that its decision rule is made for; 0 where the decision is
  exact, None where it takes none (then it is not run on null pairs);
- ``measure(case, budget, seed)``: the scores on one pair, a list of `modeldiff.bench.scores.Row`.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol

from modeldiff._files import file_digest
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row
from modeldiff.errors import SetupError


class Measure(Protocol):
    """Scores a method on a pair."""

    def __call__(self, case: Case, budget: Budget, seed: int) -> list[Row]:
        """Return the scores."""
        ...


@dataclass(frozen=True)
class Method:
    """A method of the table.

    Args:
        name: Its name.
        title: The public functions that it calls, in words.
        alpha: The false alarm rate that its decisions are made for; None if it takes none.
        measure: Scores it on a pair.
        key: Hash of its source: when that changes, its scores are measured again.
    """

    name: str
    title: str
    alpha: float | None
    measure: Measure
    key: str = ""


def method_names() -> tuple[str, ...]:
    """List the methods: the modules of this folder."""
    return tuple(sorted(each.name for each in iter_modules(__path__)))


def find_method(name: str) -> Method:
    """Find a method by its name.

    Raises:
        SetupError: If there is none.

    Example:
        >>> find_method("pca_difference").alpha
        0.05
    """
    if name not in method_names():
        raise SetupError(f"no method is called {name!r}. Known: {', '.join(method_names())}.")
    module = import_module(f"{__name__}.{name}")
    source = file_digest(Path(__path__[0]) / f"{name}.py")
    return Method(name, module.TITLE, module.ALPHA, module.measure, source)
