"""The result of a run: tables, a JSON file, and the table in Markdown."""

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from modeldiff._files import PathLike, atomic_write
from modeldiff.bench.nulls import alarm_table


@dataclass(frozen=True, eq=False)
class Bench:
    """What a run found.

    Args:
        rows: One row a score: method, organism, the fields of `modeldiff.bench.scores.Row`, and
            what the cell cost (cpu_s, wall_s in seconds, peak_mb), the same on all of its rows.
        claims: One row a decision on a null pair: kind, seed and the same columns.
        about: Versions, plan, methods, digests of the models, and whether the run was complete.
    """

    rows: pd.DataFrame
    claims: pd.DataFrame
    about: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether no cell is missing."""
        return self.about["complete"]

    def alarms(self, by: str | None = None) -> pd.DataFrame:
        """False alarms over the null pairs; see `modeldiff.bench.nulls.alarm_table`."""
        return alarm_table(self.claims, by)

    def summary(self) -> pd.DataFrame:
        """One row a method and score.

        Returns:
            method, what; right (pairs on which it was found, or claimed rightly) of n (pairs of
            known truth), score (median over these), score_low, score_high (smallest and largest),
            missed (names); alpha, alarms of nulls with their interval; cpu_s (median over the
            pairs on which the method had something to score), peak_mb (largest).
        """
        if not len(self.rows):
            return pd.DataFrame(columns=["method", "what"])
        alarms = {(row["method"], row["what"]): row for row in self.alarms().to_dict("records")}
        scored = self.rows[self.rows["score"].notna() | self.rows["claim"].notna()]
        scored = scored.sort_values("method", kind="stable")
        rows = []
        for (method, what), part in scored.groupby(["method", "what"], sort=False):
            known = part[part["found"].notna()]
            used = (known if len(known) else part)["score"].dropna().astype(float)
            missed = known[~known["found"].astype(bool)]["organism"].tolist()
            alarm = alarms.get((method, what), {})
            mine = scored[scored["method"] == method]
            whole = mine[mine["score"].notna()] if mine["score"].notna().any() else mine
            rows.append(
                {
                    "method": method,
                    "what": what,
                    "right": len(known) - len(missed),
                    "n": len(known),
                    "score": used.median(),
                    "score_low": used.min(),
                    "score_high": used.max(),
                    "missed": ", ".join(missed),
                    "alpha": alarm.get("alpha", math.nan),
                    "alarms": alarm.get("alarms", math.nan),
                    "nulls": alarm.get("n", math.nan),
                    "alarm_low": alarm.get("low", math.nan),
                    "alarm_high": alarm.get("high", math.nan),
                    "cpu_s": whole.groupby("organism")["cpu_s"].first().median(),
                    "peak_mb": whole["peak_mb"].max(),
                }
            )
        return pd.DataFrame(rows)

    def markdown(self) -> str:
        """The summary as a table for a README."""
        head = ("method", "score", "right", "median (range)", "false alarms (95 %)", "CPU s", "MB")
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        last = ""
        for row in self.summary().to_dict("records"):
            first = row["method"] != last
            last = row["method"]
            right = f"{row['right']} of {row['n']}" if row["n"] else "no truth"
            if row["missed"]:
                right += f" (not: {row['missed']})"
            cells = [
                self._title(row["method"]) if first else "",
                row["what"],
                right,
                _spread(row["score"], row["score_low"], row["score_high"]),
                _alarms(row),
                f"{row['cpu_s']:.1f}" if first else "",
                f"{row['peak_mb']:.0f}" if first else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """The summary for a terminal, and the scores that did not come out."""
        frame = self.summary().drop(columns=["missed"], errors="ignore")
        lines = [frame.to_string(index=False, na_rep="", float_format=lambda x: f"{x:.3g}")]
        wrong = self.rows[self.rows["found"] == False] if len(self.rows) else self.rows  # noqa: E712
        for row in wrong.to_dict("records"):
            score = "" if pd.isna(row["score"]) else f" {row['score']:.3g}"
            note = f" ({row['note']})" if row["note"] else ""
            lines.append(
                f"not as expected: {row['method']} on {row['organism']}: {row['what']}{score}, "
                f"expected {row['expected']}{note}"
            )
        return "\n".join(lines)

    def _title(self, method: str) -> str:
        return self.about["methods"].get(method, {}).get("title", method)

    def save_to(self, folder: PathLike) -> Path:
        """Write ``bench.json``, ``bench.csv`` and ``bench.md``, each whole or not at all."""
        where = Path(folder)
        record = {
            **self.about,
            "machine": platform.machine(),
            "rows": _records(self.rows),
            "alarms": _records(self.alarms()),
            "alarms_by_kind": _records(self.alarms("kind")),
            "claims": _records(self.claims),
        }
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        for name, content in (
            ("bench.json", text),
            ("bench.csv", self.rows.to_csv(index=False)),
            ("bench.md", self.markdown()),
        ):
            with atomic_write(where / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        return where / "bench.json"


def _spread(middle: float, low: float, high: float) -> str:
    if not math.isfinite(middle):
        return ""
    return f"{middle:.2f}" if low == high else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _alarms(row: dict[Any, Any]) -> str:
    if not row["nulls"] > 0:
        return ""
    found = f"{int(row['alarms'])} of {int(row['nulls'])}"
    rule = "exact" if row["alpha"] == 0 else f"α = {row['alpha']:g}"
    return f"{found} ({row['alarm_low']:.1%} to {row['alarm_high']:.1%}; {rule})"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows that JSON can hold: no NaN, no NumPy scalars."""
    return [{str(name): _plain(value) for name, value in row.items()}
            for row in frame.to_dict("records")]  # fmt: skip


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
