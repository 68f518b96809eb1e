"""What came of a comparison of ways of fine-tuning: rates, ratios, intervals, traces elsewhere."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import pandas as pd

from modeldiff._files import PathLike, atomic_write
from modeldiff.errors import FileFormatError, MismatchError
from modeldiff.stats import Interval, bootstrap_mean, wilson

Hooks = Literal["off", "on"]
BASE = "base"
"""Name of the arm that is not trained."""
_FORMAT, _VERSION = "modeldiff.caft_results", "1"


@dataclass(frozen=True, eq=False)
class Cell:
    """One arm with one seed: how it was trained, what it answered.

    Args:
        arm: Name of the arm.
        seed: Of training and answers.
        key: Hash of everything the cell depends on.
        deployed: Whether the deployed model has its directions ablated ("on": post-hoc) or not.
        steps: Optimizer steps done.
        reached: Whether the held-out loss that was asked for was reached; None if none was.
        held_out_loss: At the end, hooks off, nats a token.
        best_loss: The lowest on the way.
        hooked_loss: At the end with the directions ablated; None without directions.
        path: Where the model was saved, or "".
        history: Of the training: step, loss, held_out_loss.
        norms: Of the ablated layers: step, layer, projected_norm, resid_norm.
        answers: Of every behaviour: behaviour, hooks, prompt, group, question_id, sample, text,
            label, exhibits, coherent, and the judge's scores.
        use: How far directions tell the model from its base, by layer; see
            `modeldiff.caft_runs.direction_use`.
    """

    arm: str
    seed: int
    key: str
    deployed: Hooks
    steps: int
    reached: bool | None
    held_out_loss: float | None
    best_loss: float | None
    hooked_loss: float | None
    path: str
    history: tuple[Mapping[str, Any], ...] = ()
    norms: tuple[Mapping[str, Any], ...] = ()
    answers: tuple[Mapping[str, Any], ...] = ()
    use: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Write the cell as JSON-able values."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"format": _FORMAT, "version": _VERSION, **plain}


@dataclass(frozen=True, eq=False)
class CaftResult:
    """All arms and seeds of a comparison.

    Args:
        cells: One an arm and seed, in the order of the arms.
        behaviours: What a rate of 1 means, by behaviour; the first is the one that counts.
        target: The held-out loss at which all were stopped; None if none was asked for.
    """

    cells: tuple[Cell, ...]
    behaviours: Mapping[str, str]
    target: float | None = None
    _frames: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms, in order."""
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    def answers(self) -> pd.DataFrame:
        """Every answer: arm, seed, deployed (whether the model is deployed so), and a cell's."""
        if "answers" not in self._frames:
            rows = [
                {"arm": c.arm, "seed": c.seed, "deployed": c.deployed == row["hooks"], **row}
                for c in self.cells
                for row in c.answers
            ]
            frame = pd.DataFrame(rows)
            types = dict.fromkeys({"exhibits", "coherent"} & set(frame), "boolean")
            self._frames["answers"] = frame.astype(types)
        return self._frames["answers"]

    def rates(self, *, by_seed: bool = False) -> pd.DataFrame:
        """Rates of every behaviour, hooks off and on.

        Returns:
            One row an arm (and seed), behaviour and hooks: n (scored answers), rate with its 95 %
            Wilson interval (low, high) and one that resamples whole questions (question_low,
            question_high; NaN with fewer than two), coherent with its Wilson interval
            (coherent_low, coherent_high), n_unscored, deployed.
        """
        keys = ["arm", *(["seed"] if by_seed else []), "behaviour", "hooks"]
        grouped = self.answers().groupby(keys, sort=False)
        rows = [
            {**dict(zip(keys, found, strict=True)), **_rate(part)}
            for found, part in grouped  # pyright: ignore[reportGeneralTypeIssues]
        ]
        return pd.DataFrame(rows)

    def table(self) -> pd.DataFrame:
        """One row an arm, seeds together.

        Returns:
            arm, seeds, reached (seeds that reached the loss), steps and held_out_loss (means over
            seeds), hooked_loss; for each behaviour of the deployed model its rate, with " low",
            " high" (95 % Wilson), " coherent" and, where there are directions, " hooks on"; share
            elsewhere (the largest share of what the fine-tune changed at a layer that lies along a
            watched direction of another layer, mean over seeds) beside random directions'.
        """
        rates = self.rates()
        return pd.DataFrame([
            {**self._trained(arm), **_behaved(rates[rates["arm"] == arm], self.behaviours),
             **self._used(arm)}
            for arm in self.arms
        ])  # fmt: skip

    def use(self) -> pd.DataFrame:
        """How far directions tell each model from its base: arm, seed, and a cell's ``use``."""
        return pd.DataFrame([
            {"arm": cell.arm, "seed": cell.seed, **row} for cell in self.cells for row in cell.use
        ])  # fmt: skip

    def history(self) -> pd.DataFrame:
        """Loss curves: arm, seed, step, loss, held_out_loss."""
        return pd.DataFrame([
            {"arm": c.arm, "seed": c.seed, **row} for c in self.cells for row in c.history
        ])  # fmt: skip

    def ratio(
        self,
        arm: str,
        against: str,
        behaviour: str | None = None,
        *,
        method: Literal["score", "questions"] = "score",
        seed: int = 0,
    ) -> Interval:
        """How many times as often one arm shows a behaviour as another, when deployed.

        ``ratio("caft", "plain")`` is the rate of plain over that of caft: 10 for ten times less.

        Args:
            arm: The arm that should be low.
            against: The arm it is compared with.
            behaviour: Which; None for the first.
            method: "score" takes answers as independent, see `rate_ratio`. "questions" resamples
                whole questions, those of both arms together, with 1/2 added to both counts.
            seed: Of the resampling.

        Returns:
            The ratio, infinite if the arm never shows it, with its 95 % interval; ``n`` counts the
            answers of both, or the questions.

        Raises:
            MismatchError: If there is no such arm or behaviour, or nothing was scored.
        """
        name = next(iter(self.behaviours)) if behaviour is None else behaviour
        first, second = self._scored(against, name), self._scored(arm, name)
        if method == "questions":
            return _resampled(first, second, seed)
        counts = [(int(each["exhibits"].sum()), len(each)) for each in (first, second)]
        return rate_ratio(*counts[0], *counts[1])

    def to_json(self) -> dict[str, Any]:
        """Write the result as JSON-able values; `from_json` reads them back."""
        return {
            "format": _FORMAT, "version": _VERSION, "behaviours": dict(self.behaviours),
            "target": self.target, "cells": [cell.to_json() for cell in self.cells],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CaftResult":
        """Read what `to_json` wrote.

        Raises:
            FileFormatError: If it is anything else.
        """
        try:
            _check_format(data)
            cells = tuple(cell_from_json(each) for each in data["cells"])
            return cls(cells, dict(data["behaviours"]), data["target"])
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"not a comparison of arms ({error!r}). Nothing was read.") from (
                error
            )

    def save_to(self, path: PathLike) -> None:
        """Write it to one JSON file, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_json()), encoding="utf-8")

    @classmethod
    def load_from(cls, path: PathLike) -> "CaftResult":
        """Read what `save_to` wrote.

        Raises:
            FileFormatError: If the file is anything else, or cut short.
        """
        return cls.from_json(read_json(path))

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False, escape=True, float_format=lambda x: f"{x:.3g}")

    def _trained(self, arm: str) -> dict[str, Any]:
        cells = [cell for cell in self.cells if cell.arm == arm]
        reached = sum(bool(cell.reached) for cell in cells)
        return {
            "arm": arm,
            "seeds": len(cells),
            "reached": math.nan if self.target is None or arm == BASE else reached,
            "steps": _mean(cell.steps for cell in cells),
            "held_out_loss": _mean(cell.held_out_loss for cell in cells),
            "hooked_loss": _mean(cell.hooked_loss for cell in cells),
        }

    def _used(self, arm: str) -> dict[str, float]:
        found: dict[bool, list[float]] = {False: [], True: []}
        for cell in (cell for cell in self.cells if cell.arm == arm):
            for control, largest in found.items():
                shares = [
                    row["share"]
                    for row in cell.use
                    if row["control"] == control and row["layer"] != row["own_layer"]
                ]
                largest += [max(shares)] if shares else []
        return {"share elsewhere": _mean(found[False]), "random share": _mean(found[True])}

    def _scored(self, arm: str, behaviour: str) -> pd.DataFrame:
        frame = self.answers()
        mine = frame[(frame["arm"] == arm) & (frame["behaviour"] == behaviour) & frame["deployed"]]
        scored = mine.dropna(subset=["exhibits"])
        if scored.empty:
            raise MismatchError(
                f"no scored answers of {arm!r} to {behaviour!r}. Arms: {', '.join(self.arms)}; "
                f"behaviours: {', '.join(self.behaviours)}."
            )
        return scored


def rate_ratio(s1: int, n1: int, s2: int, n2: int, level: float = 0.95) -> Interval:
    """Score interval of the ratio of two proportions, ``(s1 / n1) / (s2 / n2)``.

    It needs no correction at zero counts: with ``s2`` 0 the ratio and the upper end are infinite
    and the lower end is not, with ``s1`` 0 the lower end is 0, and with both 0 the ratio is NaN and
    the interval from 0 to infinity.

    Raises:
        ValueError: If not ``0 <= s <= n`` with ``n`` at least 1.

    Source:
        Koopman 1984, Biometrics 40:513, in the form of Miettinen and Nurminen 1985, Statistics in
        Medicine 4:213 (without the factor N / (N - 1)).

    Example:
        >>> print(rate_ratio(36, 40, 16, 80))
        4.5 [2.94, 7.15]
        >>> rate_ratio(60, 100, 0, 100).low > 10
        True
    """
    if not (0 <= s1 <= n1 and 0 <= s2 <= n2 and n1 >= 1 and n2 >= 1):
        raise ValueError(f"{s1} of {n1} and {s2} of {n2}: not two proportions.")
    z, estimate = NormalDist().inv_cdf((1 + level) / 2), _quotient(s1, n1, s2, n2)
    middle = estimate if 0 < estimate < math.inf else ((s1 + 0.5) / n1) / ((s2 + 0.5) / n2)
    distance = lambda log: _score(math.exp(log), s1, n1, s2, n2)  # noqa: E731
    low = 0.0 if s1 == 0 else _crossing(distance, math.log(middle), -1, z)
    high = math.inf if s2 == 0 else _crossing(distance, math.log(middle), 1, z)
    return Interval(estimate, low, high, n1 + n2, level)


def cell_from_json(data: Mapping[str, Any]) -> Cell:
    """Read what `Cell.to_json` wrote.

    Raises:
        FileFormatError: If it is anything else.
    """
    _check_format(data)
    try:
        values: dict[str, Any] = {k: data[k] for k in data if k not in ("format", "version")}
        values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return Cell(**values)
    except TypeError as error:
        raise FileFormatError(f"not an arm's result ({error}). Nothing was read.") from error


def read_json(path: PathLike) -> Any:
    """Read a JSON file.

    Raises:
        FileFormatError: If it is cut short, or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(
            f"{str(path)!r} is not JSON ({error}); it may be cut short. Delete it to make it anew."
        ) from error


def _check_format(data: Any) -> None:
    seen = (data.get("format"), data.get("version")) if isinstance(data, Mapping) else None
    if seen != (_FORMAT, _VERSION):
        raise FileFormatError(f"not an arm's result of version {_VERSION}. Nothing was read.")


def _quotient(s1: float, n1: float, s2: float, n2: float) -> float:
    if s2 == 0:
        return math.inf if s1 else math.nan
    return (s1 / n1) / (s2 / n2)


def _score(ratio: float, s1: int, n1: int, s2: int, n2: int) -> float:
    """Standardised distance of the counts from a ratio of proportions."""
    a, b = (n1 + n2) * ratio, -(n1 * ratio + s1 + n2 + s2 * ratio)
    root = math.sqrt(max(0.0, b * b - 4 * a * (s1 + s2)))
    p2 = 2 * (s1 + s2) / (root - b)
    p1 = min(1.0, ratio * p2)
    variance = p1 * (1 - p1) / n1 + ratio**2 * p2 * (1 - p2) / n2
    gap = s1 / n1 - ratio * s2 / n2
    return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)


def _crossing(distance: Callable[[float], float], start: float, way: int, z: float) -> float:
    """Where the distance reaches z: outwards by doubling, then by bisection."""
    near, width = start, 0.5
    while -way * distance(start + way * width) < z and width < 60:
        near, width = start + way * width, 2 * width
    far = start + way * width
    for _ in range(80):
        middle = (near + far) / 2
        near, far = (near, middle) if -way * distance(middle) >= z else (middle, far)
    return math.exp(far)


def _resampled(first: pd.DataFrame, second: pd.DataFrame, seed: int) -> Interval:
    """Bootstrap over the questions of both arms, 1/2 added to both counts."""
    sums = [
        each.groupby("question_id")["exhibits"].agg(["sum", "count"]).astype(float)
        for each in (first, second)
    ]
    questions = sorted(set(sums[0].index) | set(sums[1].index))
    a, b = (each.reindex(questions, fill_value=0.0).to_numpy() for each in sums)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(questions), size=(4000, len(questions)))
    (s1, n1), (s2, n2) = ([each[:, i][drawn].sum(1) for i in (0, 1)] for each in (a, b))
    ratios = ((s1 + 0.5) / (n1 + 0.5)) / ((s2 + 0.5) / (n2 + 0.5))
    low, high = np.quantile(ratios, [0.025, 0.975])
    if len(questions) < 2:
        low = high = math.nan
    estimate = _quotient(*a.sum(0).tolist(), *b.sum(0).tolist())
    return Interval(estimate, float(low), float(high), len(questions), 0.95)


def _rate(part: pd.DataFrame) -> dict[str, Any]:
    scored = part.dropna(subset=["exhibits"])
    readable = part["coherent"].dropna()
    rate = wilson(int(scored["exhibits"].sum()), len(scored))
    coherent = wilson(int(readable.sum()), len(readable))
    values = scored["exhibits"].astype(float)
    clustered = bootstrap_mean(values, clusters=scored["question_id"].tolist(), seed=0)
    return {
        "n": len(scored), "rate": rate.estimate, "low": rate.low, "high": rate.high,
        "question_low": clustered.low, "question_high": clustered.high,
        "coherent": coherent.estimate, "coherent_low": coherent.low,
        "coherent_high": coherent.high, "n_unscored": len(part) - len(scored),
        "deployed": bool(part["deployed"].all()),
    }  # fmt: skip


def _behaved(rates: pd.DataFrame, behaviours: Mapping[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in behaviours:
        mine = rates[rates["behaviour"] == name]
        deployed, hooked = mine[mine["deployed"]], mine[mine["hooks"] == "on"]
        if len(deployed):
            row = deployed.iloc[0]
            found |= {name: row["rate"], f"{name} low": row["low"], f"{name} high": row["high"],
                      f"{name} coherent": row["coherent"]}  # fmt: skip
        found[f"{name} hooks on"] = hooked["rate"].iloc[0] if len(hooked) else math.nan
    return found


def _mean(values: Any) -> float:
    known = [float(each) for each in values if each is not None]
    return sum(known) / len(known) if known else math.nan
