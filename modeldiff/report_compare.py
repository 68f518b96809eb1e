"""Holding the tables of two reports against each other, column by column."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = (
    "table",
    "column",
    "rows",
    "rows_other",
    "max_difference",
    "n_different",
    "within",
    "note",
)


def compare_frames(
    ours: Mapping[str, pd.DataFrame], theirs: Mapping[str, pd.DataFrame], tolerance: float
) -> pd.DataFrame:
    """One row for every column of every table that either side has.

    What only one side has is a row with ``within=False`` and a note, not an error.

    Example:
        >>> a, b = pd.DataFrame({"x": [1.0, 2.0]}), pd.DataFrame({"x": [1.0, 2.5]})
        >>> compare_frames({"t": a}, {"t": b}, 0.1)[["max_difference", "n_different", "within"]]
           max_difference  n_different  within
        0             0.5            1   False
    """
    rows = []
    for table in dict.fromkeys([*ours, *theirs]):
        nothing = pd.DataFrame()
        pair = ours.get(table, nothing), theirs.get(table, nothing)
        rows += _compare_table(table, *pair, tolerance)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _compare_table(
    table: str, ours: pd.DataFrame, theirs: pd.DataFrame, tolerance: float
) -> Iterator[dict[str, Any]]:
    if not len(ours.columns) or not len(theirs.columns):
        only = "only in the other report" if len(theirs.columns) else "only in this report"
        same = len(ours.columns) == len(theirs.columns)
        note = "no columns" if same else only
        yield _row(table, "", ours, theirs) | {"within": same, "note": note}
        return
    left, right = dict(ours.items()), dict(theirs.items())
    for column in dict.fromkeys([*left, *right]):
        row = _row(table, str(column), ours, theirs)
        if column not in right:
            yield row | {"note": "column only in this report"}
        elif column not in left:
            yield row | {"note": "column only in the other report"}
        elif len(ours) != len(theirs):
            yield row | {"note": f"{len(ours)} rows here, {len(theirs)} in the other report"}
        else:
            yield row | _difference(left[column], right[column], tolerance)


def _row(table: str, column: str, ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, Any]:
    return {
        "table": table,
        "column": column,
        "rows": len(ours),
        "rows_other": len(theirs),
        "max_difference": np.nan,
        "n_different": max(len(ours), len(theirs)),
        "within": False,
        "note": "",
    }


def _difference(ours: pd.Series, theirs: pd.Series, tolerance: float) -> dict[str, Any]:
    if _is_number(ours) and _is_number(theirs):
        return _number_difference(ours.to_numpy(float), theirs.to_numpy(float), tolerance)
    pairs = zip(ours, theirs, strict=True)
    count = sum(not (a == b or (pd.isna(a) and pd.isna(b))) for a, b in pairs)
    return {"n_different": count, "within": count == 0}


def _number_difference(a: np.ndarray, b: np.ndarray, tolerance: float) -> dict[str, Any]:
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.zeros_like(a)
    np.subtract(a, b, out=gap, where=~same)  # inf - inf is no difference
    gap = np.abs(gap)
    far = ~(gap <= tolerance)  # NaN against a number is far
    largest = np.nan if np.isnan(gap).any() else float(gap.max(initial=0.0))
    return {"max_difference": largest, "n_different": int(far.sum()), "within": not far.any()}


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
