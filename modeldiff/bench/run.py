"""Running the table: every method on every case and on the null pairs, kept as it goes.

A cell is one method on one pair. Finished cells are kept by content (models, prompts, budget,
seed, the source of the method and of the scores), so that a run that was stopped goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import pandas as pd

from modeldiff._files import PathLike, file_digest
from modeldiff._progress import Progress, check, reporter
from modeldiff.audit import versions
from modeldiff.bench.cases import Budget, Case, case_names, make_case
from modeldiff.bench.meter import Cost, measured
from modeldiff.bench.methods import Method, find_method, method_names
from modeldiff.bench.nulls import null_case, schedule
from modeldiff.bench.scores import Row, no_truth
from modeldiff.bench.table import Bench
from modeldiff.cache import Cache
from modeldiff.errors import Cancelled, ModelDiffError, SetupError
from modeldiff.organisms.nulls import embedded_base, null_pair

ANSWERS = "(answers)"
"""Name of the cell that asks both models what most methods then read."""


_NULLS = Budget(prompts=24, n_random=5, n_scan=1, n_texts=24)


@dataclass(frozen=True)
class Plan:
    """How large a run is.

    Args:
        seed: Of everything random.
        budget: Of a method on a case.
        null_budget: Of a method on a null pair.
        n_same: Null pairs of each kind in which both sides are the same function.
        n_other: Null pairs of each other kind.
    """

    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    null_budget: Budget = field(default_factory=lambda: _NULLS)
    n_same: int = 50
    n_other: int = 20


QUICK = Plan(
    budget=Budget(prompts=36, samples=2, n_random=4, n_scan=1, n_texts=32),
    null_budget=Budget(prompts=20, n_random=4, n_scan=1, n_texts=16),
    n_same=5,
    n_other=2,
)
"""A look at everything in some minutes; intervals are wide."""


def bench(
    plan: Plan | None = None,
    *,
    only: Sequence[str | Method] = (),
    organisms: Sequence[str] = (),
    out: PathLike | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Bench:
    """Score methods on cases and count their false alarms.

    Args:
        plan: How large; the full one by default.
        only: Methods, by name or as given; all if empty.
        organisms: Cases; all embedded organisms and plants if empty.
        out: Folder in which finished cells are kept; nothing is kept if None.
        progress: Where to report.
        cancel: Event that stops at the next batch.

    Returns:
        The result; ``complete`` is False if it was cancelled, with what was finished.

    Raises:
        SetupError: If there is no such method or case.
    """
    plan = plan or Plan()
    methods = [find_method(each) if isinstance(each, str) else each
               for each in only or method_names()]  # fmt: skip
    names = tuple(organisms) or case_names()
    if unknown := sorted(set(names) - set(case_names())):
        raise SetupError(f"no case is called {unknown[0]!r}. Known: {', '.join(case_names())}.")
    report = reporter(progress, "bench")
    work = _Work(plan, methods, Cache(None if out is None else Path(out) / "cells"), cancel)
    pairs = list(schedule(plan.n_same, plan.n_other, plan.seed))
    total = len(names) + len(pairs)
    try:
        for i, name in enumerate(names):
            report(i, total, name)
            work.case(name)
        for i, (kind, seed) in enumerate(pairs):
            report(len(names) + i, total, f"null {kind} {seed}")
            work.null(kind, seed)
        report(total, total, "done")
    except Cancelled:
        return work.result(complete=False)
    return work.result(complete=True)


@dataclass(eq=False)
class _Work:
    """What one run has found so far."""

    plan: Plan
    methods: list[Method]
    cache: Cache
    cancel: Event | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    cases: dict[str, dict[str, str]] = field(default_factory=dict)
    base: Any = None
    base_digest: str = ""

    def __post_init__(self) -> None:
        here = Path(__file__).parent
        names = ("scores", "cases", "ablation", "nulls", "../organisms/nulls")
        self.shared = [file_digest(here / f"{name}.py") for name in names]

    def case(self, name: str) -> None:
        """Run all methods on one case."""
        check(self.cancel)
        budget, seed = self.plan.budget, self.plan.seed
        try:
            case = make_case(name, budget, seed, self.cancel)
            keys = {m: [m.key, case.key, asdict(budget), seed] for m in self.methods}
            if case.behaviours:
                self._answers(case, keys, budget)
        except Cancelled:
            raise
        except ModelDiffError as error:
            self.rows.append({"method": "", "organism": name, **asdict(_failed(error))})
            return  # without models or answers there is nothing to score
        self.cases[name] = dict(case.pair.digests)
        for method, key in keys.items():
            self.rows += self._cell(
                method.name, key, name, lambda m=method: m.measure(case, budget, seed)
            )

    def null(self, kind: str, seed: int) -> None:
        """Run the methods that take decisions on one null pair."""
        check(self.cancel)
        if self.base is None:
            self.base = embedded_base()
            self.base_digest = null_pair("identical", 0, self.base).pair.digests["base"]
        budget = self.plan.null_budget
        about = ["null", kind, seed, self.base_digest, asdict(budget)]
        keys = {m: [m.key, *about] for m in self.methods if m.alpha is not None}
        made: list[Case] = []
        if self._missing(keys):
            made.append(null_case(null_pair(kind, seed, self.base), budget, self.cancel))
            made[0].answers(budget, seed)
        for method, key in keys.items():
            found = self._cell(
                method.name, key, f"null {kind}", lambda m=method: m.measure(made[0], budget, seed)
            )
            self.claims += [{"kind": kind, "seed": seed, **row} for row in found
                            if row["claim"] is not None]  # fmt: skip

    def _answers(self, case: Case, keys: Mapping[Method, list[Any]], budget: Budget) -> None:
        """Ask first, so that no method pays for what all of them read; not if none will."""
        key = [ANSWERS, [case.key, asdict(budget), self.plan.seed], self.shared]
        rows = self.cache.get("cell", key)
        if self._missing(keys):
            with measured() as cost:
                judged = case.answers(budget, self.plan.seed)
            n = sum(len(each.table) for each in judged)
            row = Row("answers of both models to the discovery prompts, judged", n=n)
            rows = rows or [_record(ANSWERS, case.name, row, cost)]
            self.cache.put("cell", key, rows)
        self.rows += rows or []

    def _missing(self, keys: Mapping[Method, list[Any]]) -> bool:
        """Whether a cell of a pair is not kept."""
        return any(
            self.cache.get("cell", [m.name, key, self.shared]) is None for m, key in keys.items()
        )

    def _cell(
        self, method: str, key: list[Any], organism: str, measure: Callable[[], list[Row]]
    ) -> list[dict[str, Any]]:
        """Rows of one cell, from the cache or measured now."""
        check(self.cancel)
        whole = [method, key, self.shared]
        known = self.cache.get("cell", whole)
        if known is not None:
            return known
        with measured() as cost:
            try:
                rows = measure()
            except Cancelled:
                raise
            except ModelDiffError as error:
                rows = [_failed(error)]
        made = [_record(method, organism, row, cost) for row in rows]
        self.cache.put("cell", whole, made)
        return made

    def result(self, complete: bool) -> Bench:
        """What was found, with everything that it depends on."""
        about = {
            "versions": versions(),
            "plan": asdict(self.plan),
            "methods": {m.name: {"title": m.title, "alpha": m.alpha, "source": m.key}
                        for m in self.methods},
            "cases": self.cases,
            "null_base": self.base_digest,
            "complete": complete,
        }  # fmt: skip
        return Bench(pd.DataFrame(self.rows), pd.DataFrame(self.claims), about)


def _record(method: str, organism: str, row: Row, cost: Cost) -> dict[str, Any]:
    return {"method": method, "organism": organism, **asdict(row), **asdict(cost)}


def _failed(error: ModelDiffError) -> Row:
    return no_truth("(no score)", f"{type(error).__name__}: {error}")
