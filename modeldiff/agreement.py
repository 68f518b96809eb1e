"""How far two judges agree on the same answers, and where they do not."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from modeldiff.errors import JudgeError, MismatchError
from modeldiff.stats import Interval

UNSCORED = "unscored"
"""Row and column of answers that a judge could not score."""
_KEYS = ("side", "edit", "prompt_index", "prompt", "sample")


@dataclass(frozen=True, eq=False)
class Agreement:
    """Agreement of two judges.

    Args:
        kappa: Cohen's kappa over answers that both scored: 1 is agreement, 0 what their rates
            give by chance, NaN where both say one and the same thing throughout. The interval
            resamples whole questions; of few it is too narrow: 95 % covered 60 to 81 % of the time
            with 5 questions of 4 answers, 83 to 89 % with 10, 91 % with 20, 94 % with 40. Judges
            that agree on everything leave no width at all.
        observed: Share of those answers on which they agree.
        n: Number of those answers.
        confusion: How often each pair of verdicts was given; rows are the first judge's. It counts
            all answers, those that a judge left unscored in a row and column of their own.
        disagreements: Answers on which they differ, with both verdicts; those that one of the two
            left unscored too.
    """

    kappa: Interval
    observed: float
    n: int
    confusion: pd.DataFrame
    disagreements: pd.DataFrame

    def __str__(self) -> str:
        return (
            f"kappa {self.kappa} over {self.kappa.n} questions; {self.observed:.1%} of {self.n} "
            f"answers alike, {len(self.disagreements)} differ or lack a verdict"
        )


def agreement(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    on: str = "exhibits",
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> Agreement:
    """Compare two judges' verdicts on the same answers.

    Args:
        first: One judge's table from `modeldiff.behaviours.judge_answers`.
        second: The other's, of the same generations; its rows may be in another order.
        on: "exhibits", "coherent" or "label".
        seed: Of the bootstrap.
        n_resamples: Number of resamples.
        level: Nominal coverage.

    Raises:
        JudgeError: If there is no answer that both scored.
        MismatchError: If the two tables are not of the same answers.

    Source:
        Cohen 1960, Educational and Psychological Measurement 20:37.
    """
    a, b = _aligned(first, second)
    said = [_verdicts(table, on) for table in (a, b)]
    both = [each != UNSCORED for each in said]
    scored = both[0] & both[1]
    if not scored.any():
        raise JudgeError(f"there is no answer of {len(a)} that both judges scored on {on!r}.")
    words = sorted({*said[0], *said[1]} - {UNSCORED})
    questions = a["question_id" if "question_id" in a else "prompt"]
    counts = _tables(said[0][scored], said[1][scored], questions[scored], words)
    whole = counts.sum(0)
    return Agreement(
        kappa=_interval(counts, seed, n_resamples, level),
        observed=float(np.trace(whole) / whole.sum()),
        n=int(whole.sum()),
        confusion=_confusion(said[0], said[1], words),
        disagreements=_disagreements(a, b, said[0], said[1]),
    )


def cohens_kappa(table: np.ndarray) -> np.ndarray:
    """Cohen's kappa of square tables of counts, ``[..., word, word]``.

    Returns:
        One number a table; NaN where chance agreement is 1, or nothing was counted.

    Example:
        >>> round(float(cohens_kappa(np.array([[20, 5], [10, 15]]))), 3)
        0.4
    """
    total = table.sum((-2, -1))
    whole = np.where(total > 0, total, np.nan)
    observed = np.trace(table, axis1=-2, axis2=-1) / whole
    chance = (table.sum(-1) * table.sum(-2)).sum(-1) / whole**2
    return (observed - chance) / np.where(chance < 1, 1 - chance, np.nan)


def _aligned(first: pd.DataFrame, second: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables in the first's order, after a check that they hold the same answers."""
    keys = [name for name in _KEYS if name in first.columns and name in second.columns]
    if not keys:
        raise MismatchError(f"the tables share none of the columns {', '.join(_KEYS)}.")
    a, b = (table.set_index(keys, drop=False) for table in (first, second))
    for name, table in (("first", a), ("second", b)):
        if table.index.has_duplicates:
            raise MismatchError(
                f"the {name} table holds several answers with the same {', '.join(keys)}; rows "
                "cannot be told apart. Compare tables of one run."
            )
    if len(a) != len(b) or not a.index.isin(b.index).all():
        raise MismatchError(
            f"the tables are of {len(a)} and {len(b)} answers, {int(a.index.isin(b.index).sum())} "
            "of them in both. Let both judges judge the same generations."
        )
    b = b.loc[a.index]
    differs = a["text"].to_numpy() != b["text"].to_numpy()
    if differs.any():
        raise MismatchError(
            f"{int(differs.sum())} answers have another text in the second table; both judges "
            "must judge the same generations."
        )
    return a.reset_index(drop=True), b.reset_index(drop=True)


def _verdicts(table: pd.DataFrame, on: str) -> pd.Series:
    """Verdicts as words; labels of answers without a verdict count as unscored."""
    if on not in ("exhibits", "coherent", "label"):
        raise MismatchError(f"on={on!r}: must be 'exhibits', 'coherent' or 'label'.")
    unknown = table["exhibits" if on == "label" else on].isna()
    if on == "label":
        return table[on].astype(str).mask(unknown, UNSCORED)
    spoken = table[on].astype("boolean").fillna(False).astype(bool)
    return pd.Series(np.where(spoken, "yes", "no"), table.index).mask(unknown, UNSCORED)


def _tables(
    first: pd.Series, second: pd.Series, questions: pd.Series, words: list[str]
) -> np.ndarray:
    """Counts of each pair of verdicts, ``[question, word, word]``."""
    place = {word: i for i, word in enumerate(words)}
    of = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    counts = np.zeros((len(of), len(words), len(words)))
    where = [[table[each] for each in column] for table, column in
             ((of, questions), (place, first), (place, second))]  # fmt: skip
    np.add.at(counts, tuple(where), 1)
    return counts


def _interval(counts: np.ndarray, seed: int, n_resamples: int, level: float) -> Interval:
    estimate, n = float(cohens_kappa(counts.sum(0))), len(counts)
    if n < 2:
        return Interval(estimate, math.nan, math.nan, n, level)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    several = cohens_kappa((weights @ counts.reshape(n, -1)).reshape(-1, *counts.shape[1:]))
    known = several[np.isfinite(several)]
    if not len(known):
        return Interval(estimate, math.nan, math.nan, n, level)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), n, level)


def _confusion(first: pd.Series, second: pd.Series, words: list[str]) -> pd.DataFrame:
    every = [*words, UNSCORED]
    counts = pd.crosstab(first, second).reindex(index=every, columns=every, fill_value=0)
    return counts.rename_axis(index="first", columns="second")


def _disagreements(
    a: pd.DataFrame, b: pd.DataFrame, first: pd.Series, second: pd.Series
) -> pd.DataFrame:
    shown = [name for name in (*_KEYS, "question_id", "text") if name in a.columns]
    scores = [name for name in a.columns if name.endswith("_score")]
    others = [name for name in b.columns if name.endswith("_score")]
    whole = a[shown].assign(
        first=first, second=second, first_label=a["label"], second_label=b["label"],
        **{f"first_{name}": a[name] for name in scores},
        **{f"second_{name}": b[name] for name in others},
    )  # fmt: skip
    return whole[(first != second).to_numpy()].reset_index(drop=True)
