"""Where the checkpoints of a training come from: a folder of adapters, or an organism's series."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from modeldiff import embedded
from modeldiff.errors import MismatchError, SetupError
from modeldiff.organisms.checkpoints import FILE, read_series, write_adapter
from modeldiff.series import (
    Part,
    Series,
    Turns,
    find_checkpoints,
    read_adapters,
    resampled,
    turns,
)

ORGANISM = "organism:"
_LOGGED = ("learning_rate", "gradient_norm")


@dataclass(frozen=True, eq=False)
class Training:
    """Checkpoints, and how to get at them again.

    Args:
        where: What was asked for: a folder, or ``"organism:<name>"``.
        base: The base model.
        paths: Folders of adapters by step.
        log: What was logged where the folders do not say it.
        code: Python that defines ``base``, ``checkpoints`` and, for an organism, ``log``.
    """

    where: str
    base: str
    paths: Mapping[int, Path]
    code: str
    log: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that were kept."""
        return tuple(self.paths)

    def series(self, part: Part) -> dict[str, Series]:
        """The vectors of every step, by module."""
        found = read_adapters(self.paths, part)
        if not len(self.log):
            return found
        return {name: replace(each, log=self.log) for name, each in found.items()}


def open_training(where: str, base: str, folder: Path) -> Training:
    """Find the checkpoints.

    Args:
        where: A folder of PEFT checkpoints, or ``"organism:<name>"`` of one that keeps its steps.
        base: Path or hub id of the base; an organism knows its own.
        folder: Where adapters of an organism are written, a folder each.

    Raises:
        SetupError: If there are no checkpoints.
    """
    if not where:
        raise SetupError("no checkpoints are named: give the folder that holds checkpoint-10 etc.")
    if not where.startswith(ORGANISM):
        own = base.startswith(ORGANISM)
        name = base.removeprefix(ORGANISM)
        lines = [
            "from modeldiff import embedded" if own else "",
            "from modeldiff.series import find_checkpoints",
            f"base = embedded.find({name!r}).base" if own else f"base = {base!r}",
            f"checkpoints = find_checkpoints({where!r})",
        ]
        base = str(embedded.find(name).base) if own else base
        return Training(where, base, find_checkpoints(where), "\n".join(lines))
    name = where.removeprefix(ORGANISM)
    organism = embedded.find(name)
    if organism.adapter is None or not (organism.adapter / FILE).is_file():
        raise SetupError(
            f"the organism {name!r} keeps no steps of its training: try 'checkpoints'."
        )
    kept = read_series(organism.adapter)
    paths = {s: write_adapter(kept, s, folder / f"checkpoint-{s}") for s in kept.steps}
    lines = [
        "import tempfile",
        "from pathlib import Path",
        "from modeldiff import embedded",
        "from modeldiff.organisms.checkpoints import read_series, write_adapter",
        f"organism, folder = embedded.find({name!r}), Path(tempfile.mkdtemp())",
        "base, kept = organism.base, read_series(organism.adapter)",
        "checkpoints = {s: write_adapter(kept, s, folder / f'checkpoint-{s}') for s in kept.steps}",
        f"log = kept.rows[{['step', *_LOGGED]!r}]",
    ]
    log = kept.rows[["step", *_LOGGED]]
    return Training(where, str(organism.base), paths, "\n".join(lines), log)


@dataclass(frozen=True)
class Look:
    """Which vector of a training is looked at, and how.

    Args:
        part: "B", "A" or "adapter".
        module: Adapted module; "" for the first.
        equal: Interpolate to equal spacing.
    """

    part: Part = "B"
    module: str = ""
    equal: bool = False


@dataclass(frozen=True, eq=False)
class Course:
    """The course of a training: its vectors, and how it turns.

    Args:
        training: Of what.
        look: Which vector.
        modules: Modules that there are.
        series: At equal spacing.
        turns: How it turns, beside random walks.
        table: Everything known along it.
    """

    training: Training
    look: Look
    modules: tuple[str, ...]
    series: Series
    turns: Turns
    table: pd.DataFrame

    @classmethod
    def of(cls, training: Training, look: Look) -> "Course":
        """Read the vectors and walk at random beside them; in a job.

        Raises:
            MismatchError: If spacings are unequal, or there is no such module.
        """
        several = training.series(look.part)
        if look.module and look.module not in several:
            look = replace(look, module="")
        if not several:
            raise MismatchError(f"{training.where}: no adapted module has a part {look.part!r}.")
        look = replace(look, module=look.module or next(iter(several)))
        series = several[look.module]
        if look.equal:
            series = resampled(series)
        else:
            _ = series.spacing  # refuses unequal spacing before anything is computed
        return cls(training, look, tuple(several), series, turns(series), series.table())

    def code(self) -> str:
        """Python that defines ``series``, ``found`` (its turns) and ``table``."""
        look, logged = self.look, len(self.training.log) > 0
        names = ["read_adapters", *(["resampled"] if look.equal else []), "turns"]
        lines = [
            "import modeldiff as md",
            "from dataclasses import replace" if logged else "",
            f"from modeldiff.series import {', '.join(names)}",
            self.training.code,
            f"series = read_adapters(checkpoints, {look.part!r})[{look.module!r}]",
            "series = replace(series, log=log)" if logged else "",
            "series = resampled(series)" if look.equal else "",
            "found = turns(series)",
            "table = series.table()",
            "verdict = found.verdict()",
        ]
        return "\n".join(line for line in lines if line)
