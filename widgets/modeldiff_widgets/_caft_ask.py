"""What the panel CAFT was asked for: a search for candidates, a comparison of arms; never changed.

Each also writes the Python that does the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

from modeldiff.caft_arms import Arm, standard_arms
from modeldiff.caft_candidates import Candidate, candidates
from modeldiff.caft_controls import covariances_of, same_variance
from modeldiff.caft_reading import Choice, Reading, interpretation
from modeldiff.caft_results import CaftResult, Cell
from modeldiff.caft_runs import run_arms
from modeldiff.dictionaries.models import Dictionary
from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, SetupError
from modeldiff.models import ModelPair
from modeldiff.sft_plans import SFTPlan
from modeldiff_widgets._caft_data import Data, Rows, Texts
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._known_behaviours import KnownBehaviour

ARMS = (
    "caft", "plain", "unchosen", "random choice", "matched random", "all", "post-hoc",
    "gradient only", "forward only", "steering", "narrow KL",
)  # fmt: skip
"""What can be run, in the panel's order; see `modeldiff.caft_arms.standard_arms`."""
LIBRARY = "library"
"""Source of candidates that come from the directions of the workbench."""
KEEP, STEER = 1.0, 1.0
PASSAGES = 12
Stop = Literal["caft", "plan", "loss"]
Told = Callable[[int, int, str], None]


def library(directions: Mapping[str, Direction], without: Sequence[str] = ()) -> list[Candidate]:
    """Directions of the workbench that can be ablated: those at the output of a layer."""
    return [
        Candidate(name, each.renamed(name), LIBRARY, each.scale, math.nan)
        for name, each in directions.items()
        if each.site.kind == "resid_post" and name not in without
    ]


def own_lines(names: Sequence[str], directions_code: str) -> list[str]:
    """Python that defines ``own``, candidates of the library."""
    if not names:
        return ["own = []"]
    return [
        *directions_code.splitlines(),
        f"own = [Candidate(name, directions[name].renamed(name), {LIBRARY!r}, "
        f"directions[name].scale, float('nan')) for name in {list(names)!r}]",
    ]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Search:
    """Which candidates are computed and read.

    Args:
        texts: Where they are found.
        layers: After which layers differences are looked at.
        n_components: Components of each after the mean.
        dictionary: Whose latents are candidates too, or None.
        dictionary_code: Lines that define ``dictionary``.
        own: Directions of the library that are read too.
        directions_code: Lines that define ``directions`` with them.
    """

    texts: Texts
    layers: tuple[int, ...]
    n_components: int
    dictionary: Dictionary | None
    dictionary_code: str
    own: tuple[Candidate, ...]
    directions_code: str

    @property
    def computes(self) -> bool:
        """Whether candidates are computed, and not the library's alone."""
        return bool(self.layers) or self.dictionary is not None

    def run(
        self, pair: ModelPair, items: Sequence[Any], job: Job, say: Callable[[float, float], Told]
    ) -> tuple[tuple[Candidate, ...], Reading]:
        """Find candidates, and read them and those of the library."""
        found: tuple[Candidate, ...] = ()
        if self.computes:
            found = candidates(
                pair, items, layers=self.layers, n_components=self.n_components,
                dictionaries=() if self.dictionary is None else (self.dictionary,),
                progress=say(0.4, 0.3), cancel=job.cancel,
            )  # fmt: skip
        several = (*self.apart(found), *found)
        reading = interpretation(pair, items, several, k=PASSAGES, progress=say(0.7, 0.3),
                                 cancel=job.cancel)  # fmt: skip
        return found, reading

    def apart(self, found: Sequence[Candidate]) -> list[Candidate]:
        """Those of the library whose name no found one has."""
        taken = {each.name for each in found}
        return [each for each in self.own if each.name not in taken]

    def lines(self, found: Sequence[Candidate]) -> list[str]:
        """Python from the texts to ``found`` and ``reading``."""
        names = [each.name for each in self.apart(found)]
        more = "" if self.dictionary is None else ", dictionaries=[dictionary]"
        options = f"layers={self.layers!r}, n_components={self.n_components}{more}"
        computed = f"candidates(pair, items, {options})" if self.computes else "()"
        return [
            *self.texts.lines(), *own_lines(names, self.directions_code),
            *self.dictionary_code.splitlines(), f"computed = {computed}",
            "found = [*own, *computed]",
            f"reading = interpretation(pair, items, found, k={PASSAGES})",
        ]  # fmt: skip


def choice_line(choice: Choice) -> str:
    """Python that makes a choice."""
    return (
        f"choice = Choice({choice.ticked!r}, {choice.rationale!r}, {choice.reading!r}, "
        f"{choice.reasons!r})"
    )


def plan_line(plan: SFTPlan) -> str:
    """Python that makes a plan: what differs from the defaults."""
    told = [
        f"{each.name}={getattr(plan, each.name)!r}"
        for each in fields(plan)
        if each.default is MISSING or getattr(plan, each.name) != each.default
    ]
    return f"plan = SFTPlan({', '.join(told)})"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Arms to train, and how.

    Args:
        data: Rows and base.
        found: All candidates.
        choice: The ticked ones.
        arms: Names of the arms, of `ARMS`.
        plan: How each is trained.
        behaviours: What is asked.
        stop: "caft": the others stop at the held-out loss that caft ends with; "plan": all run to
            the end of the plan; "loss": all stop at ``target``.
        target: See ``stop``.
        seeds: Of the trainings.
        n: Answers to each prompt.
        folder: Where models and finished arms are kept; "" for nowhere.
        texts: For the arm "matched random".
        directions_code: Lines that define ``directions`` with those of the library.
    """

    data: Data
    found: tuple[Candidate, ...]
    choice: Choice
    arms: tuple[str, ...]
    plan: SFTPlan
    behaviours: tuple[KnownBehaviour, ...]
    stop: Stop
    target: float | None
    seeds: tuple[int, ...]
    n: int
    folder: str
    texts: Texts
    directions_code: str

    def __post_init__(self) -> None:
        """Say what is missing before anything runs."""
        problems = [
            (not self.arms, "no arm is ticked"),
            (not self.choice.ticked, "no candidate is ticked"),
            (not self.behaviours, "there is nothing to ask: Caft(pair, behaviours=[...])"),
            ("narrow KL" in self.arms and not self.data.has_kept,
             "narrow KL needs rows outside the domain: Caft(pair, kept=...)"),
            (self.stop == "caft" and "caft" not in self.arms,
             "to stop at the loss of caft, tick the arm caft"),
        ]  # fmt: skip
        if found := [text for wrong, text in problems if wrong]:
            raise SetupError(f"cannot compare: {'; '.join(found)}.")

    @property
    def order(self) -> tuple[str, ...]:
        """The arms as results list them."""
        return tuple(each for each in ARMS if each in self.arms)

    def made(self, matched: Sequence[Direction] = ()) -> list[Arm]:
        """The arms."""
        several = standard_arms(
            self.found, self.choice, self.seeds[0], matched=matched,
            keep=KEEP if "narrow KL" in self.arms else 0.0,
            steer=STEER if "steering" in self.arms else 0.0,
        )  # fmt: skip
        made = [each for each in several if each.name in self.arms]
        missing = [each for each in self.arms if each not in {arm.name for arm in made}]
        if missing:
            raise SetupError(
                f"{', '.join(missing)}: no direction is left for it. With all candidates ticked "
                "none is unchosen; untick it, or the arm."
            )
        return made

    def run(
        self, pair: ModelPair, items: Sequence[Any] | None, job: Job, say: Told,
        on_cell: Callable[[Cell], None],
    ) -> CaftResult:  # fmt: skip
        """Train and ask; with what is finished in ``partial`` if it is stopped."""
        rows, matched = self.data.rows(), ()
        if items is not None and "matched random" in self.arms:
            matched = self._matched(pair, items)
        arms = self.made(matched)
        if self.stop != "caft":
            return self._compare(pair, rows, arms, self.target, job, say, on_cell)
        first = [each for each in arms if each.name == "caft"]
        rest = [each for each in arms if each.name != "caft"]
        whole = self._compare(pair, rows, first, None, job, say, on_cell)
        target = max(each.held_out_loss or math.nan for each in whole.cells if each.arm == "caft")
        ours = CaftResult(_reached(whole.cells, target), whole.behaviours, target)
        if not rest:
            return ours
        try:
            beside = self._compare(pair, rows, rest, target, job, say, on_cell)
        except Cancelled as stopped:
            raise Cancelled(str(stopped), _joined(ours, stopped.partial)) from stopped
        return _joined(ours, beside)

    def _compare(
        self, pair: ModelPair, rows: Rows, arms: Sequence[Arm], target: float | None, job: Job,
        say: Told, on_cell: Callable[[Cell], None],
    ) -> CaftResult:  # fmt: skip
        return run_arms(
            self.data.base, pair.tokenizer, rows.train, rows.held_out, arms, self.plan,
            [each.behaviour for each in self.behaviours], stop_at_loss=target,
            exact=target is not None, seeds=self.seeds, n=self.n, kept=self._kept(rows),
            watched=self.watched, out=self.folder or None, on_cell=on_cell, progress=say,
            cancel=job.cancel,
        )  # fmt: skip

    @property
    def watched(self) -> tuple[Direction, ...]:
        """Directions whose use at other layers is looked for."""
        return tuple(each.direction for each in self.choice.of(self.found))

    def _kept(self, rows: Rows) -> Sequence[Any]:
        return rows.kept if "narrow KL" in self.arms else ()

    def _matched(self, pair: ModelPair, items: Sequence[Any]) -> tuple[Direction, ...]:
        chosen = self.choice.directions(self.found)
        spread = covariances_of(pair, items, list(chosen), on="assistant")
        found = same_variance(chosen, spread, seed=self.seeds[0])
        return tuple(each for several in found.values() for each in several)

    # -- as Python

    def found_lines(self, search: Search | None, read: Sequence[Candidate]) -> list[str]:
        """Python that defines ``found``, where a search did not define the same.

        Args:
            search: What was searched for, and is written already; None for nothing.
            read: What was found by it.
        """
        names = [each.name for each in self.found if each.source == LIBRARY]
        texts = self.texts.lines() if search is None and "matched random" in self.arms else []
        if search is not None and names == [each.name for each in search.apart(read)]:
            return []
        computed = ["computed = ()"] if search is None else []
        return [*texts, *own_lines(names, self.directions_code), *computed,
                "found = [*own, *computed]"]  # fmt: skip

    def lines(self) -> list[str]:
        """Python from ``found`` to ``result``; given rows and behaviours are in scope."""
        asked = ", ".join(each.code for each in self.behaviours)
        return [
            *self.data.code.splitlines(), choice_line(self.choice), *self._matched_lines(),
            f"arms = standard_arms(found, choice, {self.seeds[0]}{self._more()})",
            f"arms = [each for each in arms if each.name in {self.arms!r}]",
            plan_line(self.plan),
            f"behaviours = [{asked}]",
            *self._run_lines(),
            "table, rates = result.table(), result.rates()",
            *(["ratios = {name: result.ratio(name, 'plain') for name in "
               f"{tuple(a for a in self.order if a != 'plain')!r}}}"]
              if "plain" in self.arms else []),
        ]  # fmt: skip

    def _more(self) -> str:
        return "".join([
            ", matched=matched" if "matched random" in self.arms else "",
            f", keep={KEEP}" if "narrow KL" in self.arms else "",
            f", steer={STEER}" if "steering" in self.arms else "",
        ])  # fmt: skip

    def _matched_lines(self) -> list[str]:
        if "matched random" not in self.arms:
            return []
        return [
            "from modeldiff.caft_controls import covariances_of, same_variance",
            "chosen = choice.directions(found)",
            "spread = covariances_of(pair, items, list(chosen), on='assistant')",
            f"apart = same_variance(chosen, spread, seed={self.seeds[0]})",
            "matched = [each for several in apart.values() for each in several]",
        ]

    def _run_lines(self) -> list[str]:
        kept = "kept" if "narrow KL" in self.arms else "()"
        options = [
            f"seeds={self.seeds!r}, n={self.n}, kept={kept}",
            "watched=[each.direction for each in choice.of(found)]",
            *([f"out={self.folder!r}"] if self.folder else []),
        ]
        lines = ["def compare(arms, target):", "    return run_arms(",
                 f"        {self.data.base_code}, pair.tokenizer, rows, held_out, arms, plan,",
                 "        behaviours, stop_at_loss=target, exact=target is not None,",
                 *(f"        {each}," for each in options), "    )"]  # fmt: skip
        if self.stop != "caft":
            return [*lines, f"result = compare(arms, {self.target!r})"]
        return [
            *lines,
            "result = compare([each for each in arms if each.name == 'caft'], None)",
            "target = max(each.held_out_loss for each in result.cells if each.arm == 'caft')",
            "ours = [replace(each, reached=each.arm == 'caft' or None) for each in result.cells]",
            "rest = [each for each in arms if each.name != 'caft']",
            "beside = compare(rest, target).cells[1:] if rest else ()  # without the base again",
            "result = CaftResult((*ours, *beside), result.behaviours, target)",
        ]

    def imports(self) -> list[str]:
        """Import lines that `lines` needs."""
        matched = ["from dataclasses import replace",
                   "from modeldiff.caft_results import CaftResult"]  # fmt: skip
        return [
            *(matched if self.stop == "caft" else []),
            "from modeldiff.caft_arms import standard_arms",
            "from modeldiff.caft_runs import run_arms",
            "from modeldiff.sft_plans import SFTPlan",
        ]


def _reached(cells: Sequence[Cell], target: float) -> tuple[Cell, ...]:
    """Cells of which caft is at the loss, as that is where it was taken from."""
    return tuple(replace(each, reached=each.arm == "caft" or None) for each in cells)


def _joined(ours: CaftResult, beside: CaftResult) -> CaftResult:
    """Both, with the base once."""
    return CaftResult((*ours.cells, *beside.cells[1:]), ours.behaviours, ours.target)


@dataclass(eq=False)
class Live:
    """What is finished of a comparison while it runs."""

    asked: Comparison
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)

    def with_cell(self, cell: Cell) -> CaftResult:
        """Add a finished arm; all so far."""
        self.cells.setdefault((cell.arm, cell.seed), cell)
        meanings = {e.behaviour.name: e.behaviour.meaning for e in self.asked.behaviours}
        return CaftResult(tuple(self.cells.values()), meanings, self.asked.target)

    @property
    def fraction(self) -> float:
        """Finished ones of all."""
        return len(self.cells) / (1 + len(self.asked.arms) * len(self.asked.seeds))
