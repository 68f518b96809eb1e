"""Logs of one Inspect task on several cells, sample by sample."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from modeldiff.errors import MismatchError
from modeldiff.inspect_requests import inspect
from modeldiff.stats import bootstrap_mean, paired_bootstrap, permutation_test, wilson


@dataclass(frozen=True, eq=False)
class LogComparison:
    """The same samples under several models.

    Args:
        cells: The models' names; the first is what the others are compared with.
        scorer: Whose scores.
        answers: A row a sample, epoch and cell: sample, epoch, cell, input, target, answer, value
            (1 correct, 0 incorrect, NaN unscored).
        seed: Of the bootstrap.
    """

    cells: tuple[str, ...]
    scorer: str
    answers: pd.DataFrame
    seed: int

    def values(self) -> pd.DataFrame:
        """Values by (sample, epoch), a column a cell."""
        wide = self.answers.pivot(index=["sample", "epoch"], columns="cell", values="value")
        return wide[list(self.cells)]

    def table(self) -> pd.DataFrame:
        """A row a cell: its score, and how it differs from the first cell on the same samples.

        Returns:
            cell, n, score with ``low`` and ``high`` (Wilson if every answer is right or wrong and
            there is one epoch, else a bootstrap over samples), difference with ``difference_low``
            and ``difference_high`` (paired bootstrap over samples), gained and lost (answers
            that got better or worse), p and the test it is of (exact McNemar, or a paired
            permutation of the samples' means), n_unscored.
        """
        return pd.DataFrame([self._row(cell) for cell in self.cells])

    def _row(self, cell: str) -> dict[str, Any]:
        wide = self.values()
        own = wide[cell].dropna()
        row = {"cell": cell, "n": len(own), **self._score(own)}
        unscored = {"n_unscored": len(wide) - len(own)}
        if cell == self.cells[0]:
            return {**row, **unscored}
        both = wide[[self.cells[0], cell]].dropna()
        before, after = both[self.cells[0]], both[cell]
        samples = both.index.get_level_values("sample")
        found = paired_bootstrap(
            before.to_numpy(), after.to_numpy(), clusters=samples, seed=self.seed
        )
        return {
            **row,
            "difference": found.estimate,
            "difference_low": found.low,
            "difference_high": found.high,
            "gained": int((after > before).sum()),
            "lost": int((after < before).sum()),
            **self._test(both),
            **unscored,
        }

    def _score(self, values: "pd.Series[float]") -> dict[str, float]:
        if _binary(values.to_frame()):
            found = wilson(int(values.sum()), len(values))
        else:
            samples = values.index.get_level_values("sample")
            found = bootstrap_mean(values.to_numpy(), clusters=samples, seed=self.seed)
        return {"score": found.estimate, "low": found.low, "high": found.high}

    def _test(self, both: pd.DataFrame) -> dict[str, Any]:
        if _binary(both):
            gained = int((both.iloc[:, 1] > both.iloc[:, 0]).sum())
            lost = int((both.iloc[:, 1] < both.iloc[:, 0]).sum())
            return {"p": mcnemar(gained, lost), "test": "McNemar"}
        means = both.groupby(level="sample").mean()
        before, after = (means.iloc[:, i].to_numpy() for i in (0, 1))
        p = permutation_test(before, after, paired=True, seed=self.seed) if len(means) else math.nan
        return {"p": p, "test": "permutation"}

    def flips(self) -> pd.DataFrame:
        """Answers whose value is another than in the first cell.

        Returns:
            sample, epoch, cell, input, target, before, after, answer_before, answer_after.
        """
        keys = ["sample", "epoch"]
        first = self.answers[self.answers["cell"] == self.cells[0]]
        others = self.answers[self.answers["cell"] != self.cells[0]]
        joined = others.merge(first[[*keys, "value", "answer"]], on=keys, suffixes=("", "_before"))
        known = joined[["value", "value_before"]].notna().all(axis=1)
        changed = joined[known & (joined["value"] != joined["value_before"])]
        renamed = changed.rename(
            columns={"value_before": "before", "value": "after", "answer": "answer_after"}
        )
        wanted = ["cell", "input", "target", "before", "after", "answer_before", "answer_after"]
        return renamed[[*keys, *wanted]].reset_index(drop=True)


def compare(
    logs: Sequence[Any],
    *,
    against: str | None = None,
    scorer: str | None = None,
    seed: int = 0,
) -> LogComparison:
    """Hold logs of one task against each other, sample by sample.

    Args:
        logs: Inspect's logs or their paths, each of another model.
        against: Name of the model that the others are compared with; default the first log's.
        scorer: Whose scores, if the task has several.
        seed: Of the bootstrap.

    Raises:
        MismatchError: If the logs are not of one task and the same samples, a run did not
            succeed, or a score is no single value.
    """
    read = [_opened(log) for log in logs]
    cells = [name_of(log) for log in read]
    if len(set(cells)) < max(2, len(cells)):
        raise MismatchError(f"the logs are of {cells}; needed are two models or more, each once.")
    first = cells[0] if against is None else against
    if first not in cells:
        raise MismatchError(f"no log of {first!r}; there are logs of {', '.join(cells)}.")
    chosen = _scorer(read, scorer)
    rows = [row for log in read for row in _rows(log, chosen)]
    _check_same(read, cells)
    ordered = (first, *(cell for cell in cells if cell != first))
    return LogComparison(ordered, chosen, pd.DataFrame(rows), seed)


def name_of(log: Any) -> str:
    """Side and edit of a log, or the model's whole name if it is of no pair."""
    return str(log.eval.model).removeprefix("modeldiff/")


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test of answers that changed.

    Example:
        >>> mcnemar(0, 5), mcnemar(3, 3)
        (0.0625, 1.0)
    """
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2.0 * tail / 2**n)


def _opened(log: Any) -> Any:
    if isinstance(log, str | os.PathLike):
        log = inspect(".log").read_eval_log(str(log))
    if log.status != "success" or not log.samples:
        raise MismatchError(
            f"the log of {name_of(log)!r} has status {log.status!r} and "
            f"{len(log.samples or [])} samples; needed is a finished run, read with its samples."
        )
    return log


def _scorer(logs: Sequence[Any], scorer: str | None) -> str:
    have = list(dict.fromkeys(name for log in logs for s in log.samples for name in s.scores or {}))
    if len(have) != 1 if scorer is None else scorer not in have:
        raise MismatchError(f"scorer={scorer!r}; the logs have scores of {have}. Name one.")
    return scorer or have[0]


def _rows(log: Any, scorer: str) -> Iterator[dict[str, Any]]:
    for sample in log.samples:
        score = (sample.scores or {}).get(scorer)
        yield {
            "sample": sample.id,
            "epoch": sample.epoch,
            "cell": name_of(log),
            "input": _text(sample.input),
            "target": _text(sample.target),
            "answer": sample.output.completion,
            "value": math.nan if score is None else _value(score.value),
        }


def _value(value: Any) -> float:
    if isinstance(value, dict | list):
        raise MismatchError(f"a score is {str(value)[:60]!r}; needed is a single value a sample.")
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    return float(inspect(".scorer").value_to_float()(value))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "\n".join(each if isinstance(each, str) else each.text for each in value)


def _check_same(logs: Sequence[Any], cells: Sequence[str]) -> None:
    """Refuse logs of other tasks or samples: pairs would be of different questions."""
    tasks = sorted({log.eval.task for log in logs})
    if len(tasks) > 1:
        raise MismatchError(f"the logs are of different tasks: {', '.join(tasks)}.")
    asked = [
        {(s.id, s.epoch): (_text(s.input), _text(s.target)) for s in log.samples} for log in logs
    ]
    for cell, mine in zip(cells[1:], asked[1:], strict=True):
        wrong = [key for key in mine.keys() | asked[0].keys() if mine.get(key) != asked[0].get(key)]
        if wrong:
            raise MismatchError(
                f"{cell!r} and {cells[0]!r} differ in what {len(wrong)} samples ask, e.g. (sample, "
                f"epoch) {sorted(wrong, key=str)[0]}. Run both on the same samples and epochs."
            )


def _binary(values: pd.DataFrame) -> bool:
    """Whether every answer is right or wrong, and no sample has several."""
    once = not values.index.get_level_values("sample").duplicated().any()
    return once and bool(values.isin([0.0, 1.0]).all(axis=None))
