"""Running a recipe: its script with its settings, what it found, and whether that was expected."""

import json
import math
import os
import runpy
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event

import pandas as pd

from modeldiff._files import PathLike, atomic_write
from modeldiff._version import __version__
from modeldiff.errors import MismatchError
from modeldiff.recipe_files import find, read, script_of
from modeldiff.recipe_settings import Recipe
from modeldiff.sft_files import without_bars

Say = Callable[[str], None]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass(eq=False)
class Run:
    """A recipe on its way.

    Args:
        recipe: What is carried out.
        out: Folder for tables, models and the result.
        smoke: Whether it only has to run: the outcome of few steps and prompts says nothing.
        say: Is told what goes on.
        cancel: Stops the steps that look at it, when set.
        found: Outcomes so far.
    """

    recipe: Recipe
    out: Path
    smoke: bool = False
    say: Say = _say
    cancel: Event = field(default_factory=Event)
    found: dict[str, float] = field(default_factory=dict)

    def show(self, name: str, table: pd.DataFrame, digits: int = 3) -> None:
        """Print a table, and write it to ``<out>/<name>.csv``."""
        self.say(f"\n{name}\n{table.round(digits).to_string(index=False)}")
        with atomic_write(self.out / f"{name.replace(' ', '_')}.csv") as temporary:
            table.to_csv(temporary, index=False)

    @property
    def expected(self) -> tuple[str, ...]:
        """Names of the outcomes that the recipe expects."""
        return tuple(each.what for each in self.recipe.outcomes)

    def outcome(self, what: str, value: float) -> None:
        """Report an outcome.

        Raises:
            MismatchError: If the recipe does not expect one of this name.
        """
        if what not in self.expected:
            raise MismatchError(
                f"the recipe expects no outcome {what!r}, but {', '.join(self.expected)}."
            )
        self.found[what] = float(value)

    def outcomes(self) -> pd.DataFrame:
        """Compare what was found with what is expected.

        Returns:
            One row an outcome: what, found (NaN: the script did not report it), expected, within
            (None in a smoke run).
        """
        rows = []
        for each in self.recipe.outcomes:
            found = self.found.get(each.what, math.nan)
            within = None if self.smoke else each.within(found)
            rows.append(
                {"what": each.what, "found": found, "expected": str(each), "within": within}
            )
        return pd.DataFrame(rows).astype({"within": object})

    @property
    def within(self) -> bool | None:
        """Whether every outcome is as expected; None in a smoke run."""
        return None if self.smoke else bool(self.outcomes()["within"].all())

    def save_result(self) -> Path:
        """Write settings and outcomes to ``<out>/result.json``."""
        record = {
            "recipe": asdict(self.recipe), "smoke": self.smoke, "within": self.within,
            "outcomes": [_in_json(row) for row in self.outcomes().to_dict("records")],
            "modeldiff": __version__,
        }  # fmt: skip
        path = self.out / "result.json"
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return path


def _in_json(row: Mapping[Hashable, object]) -> dict[str, object]:
    """A row without numbers that JSON does not know."""
    return {
        str(key): value if not isinstance(value, float) or math.isfinite(value) else None
        for key, value in row.items()
    }


_RUNNING: ContextVar[Run | None] = ContextVar("running recipe", default=None)


def started(name: str, *, smoke: bool = False, out: PathLike | None = None) -> Run:
    """Give a script its run: that of `carry_out`, or in a notebook a new one.

    Args:
        name: The recipe's.
        smoke: For a new one.
        out: For a new one; default ``runs/<name>`` in the working folder.
    """
    running = _RUNNING.get()
    if running is not None:
        return running
    return Run(read(name, smoke=smoke), folder_of(name, smoke, out), smoke)


def folder_of(name: str, smoke: bool, out: PathLike | None = None) -> Path:
    """Folder of a run's results: the given one, or ``runs/<name>`` in the working folder.

    Example:
        >>> folder_of("example", True, "somewhere").name
        'somewhere'
    """
    return Path(out) if out is not None else Path("runs") / (name + "-smoke" * smoke)


def carry_out(
    name_or_path: PathLike,
    *,
    smoke: bool = False,
    out: PathLike | None = None,
    changes: Mapping[str, str] | None = None,
    say: Say = _say,
    cancel: Event | None = None,
) -> Run:
    """Run a recipe's script with its settings, and write the result.

    Nothing of the TOML file is code: the script alone is carried out, the one beside the file or
    else the shipped one of its name.

    Args:
        name_or_path: As for `modeldiff.recipe_files.find`.
        smoke: A run of seconds that only shows that everything works.
        out: Folder for the results, see `folder_of`. A result that is there is taken away first:
            a run that is stopped has none.
        changes: See `modeldiff.recipe_files.read`.
        say: Is told what goes on.
        cancel: Stops the run when set.

    Returns:
        The run; see `Run.outcomes` and `Run.within`.

    Raises:
        FileFormatError: If the file is no recipe.
        SetupError: If it cannot be found, or needs what is not there.
        MismatchError: If the script reports what nobody expects.
        Cancelled: If the event is set.
    """
    toml = find(name_or_path)
    recipe = read(toml, smoke=smoke, changes=changes)
    run = Run(recipe, folder_of(recipe.name, smoke, out), smoke, say, cancel or Event())
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "result.json").unlink(missing_ok=True)  # an earlier run's, if this one is stopped
    with _running(run), without_bars():
        runpy.run_path(str(script_of(toml)), run_name=f"recipe {recipe.name}")
    run.save_result()
    return run


@contextmanager
def _running(run: Run) -> Iterator[None]:
    token = _RUNNING.set(run)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def summary(run: Run) -> str:
    """Outcomes beside what is expected, for a terminal."""
    lines = [f"\noutcomes of {run.recipe.name}"]
    words = {True: "within", False: "OUTSIDE", None: "not judged"}
    for row in run.outcomes().to_dict("records"):
        found = f"{row['found']:.4g}" if row["what"] in run.found else "not reported"
        lines.append(
            f"  {row['what']}: {found} (expected {row['expected']}): {words[row['within']]}"
        )
    told = {True: "as expected", False: "NOT as expected",
            None: "a smoke run: too small for its outcome to be judged"}  # fmt: skip
    return "\n".join([*lines, f"{told[run.within]}; tables and settings: {os.fspath(run.out)}"])
