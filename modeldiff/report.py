"""The report of an audit: findings, the tables behind them, and how to get them again."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from modeldiff._files import PathLike, digest
from modeldiff.directions import Direction
from modeldiff.errors import FileFormatError, MismatchError, ModelDiffError
from modeldiff.report_compare import compare_frames
from modeldiff.report_files import Content, read_folder, storable, write_folder

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_MAIN = ("behaviour", "effects", "outputs")


class TableError(ModelDiffError, KeyError):
    """A report holds no table of that name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr of the sentence


@dataclass(frozen=True)
class Finding:
    """One claim about the fine-tune and what speaks for or against it.

    Args:
        claim: A sentence, e.g. ``"The fine-tune is misaligned off-domain"``.
        holds: True if it was shown with its controls, False if it was shown not to hold, None
            if it could not be decided.
        evidence: One sentence with the numbers, intervals, ``n`` and the control.
    """

    claim: str
    holds: bool | None
    evidence: str


@dataclass(frozen=True, eq=False)
class Table:
    """A data frame and what a reader needs to understand it.

    Args:
        frame: Columns of numbers, truth values or text. It is copied, rows are renumbered, and
            numbers among None become floats among NaN.
        title: Heading.
        caption: Units, the direction of divergences, and what the controls are.

    Raises:
        MismatchError: If the index holds data, or a column has no text as its name, occurs
            twice, or holds something else.
    """

    frame: pd.DataFrame
    title: str
    caption: str

    def __post_init__(self) -> None:
        index, columns = self.frame.index, self.frame.columns
        if len(index) and not (index.nlevels == 1 and pd.api.types.is_integer_dtype(index.dtype)):
            raise MismatchError(
                f"the table {self.title!r} has an index of {index.dtype}: what it says would be "
                "lost. frame.reset_index() makes it a column."
            )
        names = list(columns)
        if len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
            raise MismatchError(
                f"the table {self.title!r} has the columns {names}; their names must be text, "
                "each one once."
            )
        if bad := [name for name, column in self.frame.items() if not storable(column)]:
            kinds = ", ".join(f"{name!r} ({self.frame[name].dtype})" for name in bad)
            raise MismatchError(
                f"the table {self.title!r} has columns that a report cannot hold: {kinds}. Use "
                "numbers, truth values or text; missing is NaN or None."
            )
        frame = self.frame.reset_index(drop=True)
        for name, column in frame.items():
            if column.dtype == np.dtype(object) and all(map(_is_number_or_none, column)):
                frame[name] = column.astype(float)
        object.__setattr__(self, "frame", frame)


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What an audit found out.

    Args:
        title: Heading.
        pair: Facts about the two models: ``base``, ``finetuned``, ``kind``, ``digests``, ....
        settings: Every argument of the audit, with its seed and how to load the pair again. If
            there is a text under ``"python"`` or ``"command"``, the page shows it as the lines
            that repeat the audit.
        versions: Of the packages that the numbers depend on.
        findings: Most important first.
        tables: In the order to be read. Names are lower-case words with ``_`` or ``-``.
        directions: The directions that the tables speak of.
        caveats: What a reader could take the findings for and should not; one sentence each.
        seconds: Wall time of each stage.
        complete: False if the audit was stopped; the tables then hold what was finished.

    Raises:
        MismatchError: If a table's name is not of that form, or something in ``pair`` or
            ``settings`` cannot be written as JSON. Tuples become lists, paths become text.

    Example:
        >>> frame = pd.DataFrame({"cell": ["base", "finetuned"], "rate": [0.0, 0.61]})
        >>> report = Report("Demo", {}, {"seed": 0}, {}, (Finding("It differs", True, "61 %"),),
        ...                 {"behaviour": Table(frame, "Rates", "Fractions.")}, (), (), {})
        >>> report
        Report 'Demo' · findings: 1 shown, 0 refuted, 0 open · tables: behaviour
        >>> float(report.table()["rate"].max())
        0.61
        >>> bool(report.compare(report)["within"].all())
        True
    """

    title: str
    pair: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    findings: tuple[Finding, ...]
    tables: Mapping[str, Table]
    directions: tuple[Direction, ...]
    caveats: tuple[str, ...]
    seconds: Mapping[str, float]
    complete: bool = True

    def __post_init__(self) -> None:
        for name in self.tables:
            if not _NAME.fullmatch(name):
                raise MismatchError(
                    f"{name!r} cannot name a table: it also names a file. Use lower-case letters, "
                    "digits, '_' and '-', e.g. 'behaviour'."
                )
        plain = {
            "pair": _plain(self.pair, "pair"),
            "settings": _plain(self.settings, "settings"),
            "versions": dict(self.versions),
            "tables": dict(self.tables),
            "seconds": {stage: float(wall) for stage, wall in self.seconds.items()},
            **{part: tuple(getattr(self, part)) for part in ("findings", "directions", "caveats")},
        }
        for part, value in plain.items():
            object.__setattr__(self, part, value)

    def table(self, name: str = "behaviour") -> pd.DataFrame:
        """A copy of one table.

        Raises:
            TableError: If there is no such table; the message names those there are.
        """
        if name not in self.tables:
            known = ", ".join(self.tables) or "none"
            raise TableError(f"this report has no table {name!r}. Its tables: {known}.")
        return self.tables[name].frame.copy()

    @property
    def main_table(self) -> str | None:
        """Name of the table that says most; None if there is none."""
        return next((name for name in (*_MAIN, *self.tables) if name in self.tables), None)

    def compare(self, other: "Report", tolerance: float = 1e-6) -> pd.DataFrame:
        """Hold every column of every table against another report's, e.g. that of a rerun.

        Args:
            other: The other report.
            tolerance: Largest absolute difference of numbers that counts as equal; NaN equals
                NaN alone. Text and truth values must be the same.

        Returns:
            One row a column: table, column, rows, rows_other, max_difference (NaN unless both
            sides have numbers in the same places), n_different, within, and a note that says
            what cannot be compared.
        """
        ours = {name: table.frame for name, table in self.tables.items()}
        theirs = {name: table.frame for name, table in other.tables.items()}
        return compare_frames(ours, theirs, tolerance)

    def to_html(self) -> str:
        """One self-contained page: works offline, in light and dark, and on paper.

        About 1.3 MB of it is the plotting library. All text that came from models is shown as
        text, with control characters made visible.
        """
        from modeldiff.report_html import page

        return page(self)

    def save_to(self, folder: PathLike) -> None:
        """Write the report to a folder: the page, the tables, the directions and a manifest.

        Everything is written under temporary names first and the manifest, which holds the hash
        of every other file, is put in place last. A report that was there stays readable if
        writing is interrupted; otherwise it is replaced. Other files are left alone.
        """
        frames = {name: table.frame for name, table in self.tables.items()}
        write_folder(folder, self._content(), frames, self.directions, self.to_html())

    @classmethod
    def load_from(cls, folder: PathLike) -> "Report":
        """Read what `save_to` wrote, exactly.

        Raises:
            FileFormatError: If a file is missing, cut short, or not the one that was written
                with the report; the message names it. The hashes find damage and careless
                edits, they are no signature.
        """
        content, frames, directions = read_folder(folder)
        try:
            return cls(
                title=content["title"],
                pair=content["pair"],
                settings=content["settings"],
                versions=content["versions"],
                findings=tuple(Finding(**entry) for entry in content["findings"]),
                tables={
                    name: Table(frames[name], entry["title"], entry["caption"])
                    for name, entry in content["tables"].items()
                },
                directions=tuple(directions),
                caveats=tuple(content["caveats"]),
                seconds=content["seconds"],
                complete=content["complete"],
            )
        except (KeyError, TypeError, AttributeError, MismatchError) as error:
            raise FileFormatError(
                f"manifest.json in {str(folder)!r} does not describe a report ({error!r}). "
                "It may be damaged or of another version; nothing was read."
            ) from error

    @property
    def content_key(self) -> str:
        """Hash of everything but wall times: equal for two reports that say the same."""
        frames = {name: table.frame.to_dict("list") for name, table in self.tables.items()}
        vectors = [(each.name, each.content_key) for each in self.directions]
        return digest(self._content() | {"seconds": {}}, frames, vectors)

    def _content(self) -> Content:
        return {
            "title": self.title,
            "pair": self.pair,
            "settings": self.settings,
            "versions": self.versions,
            "findings": [asdict(finding) for finding in self.findings],
            "tables": {
                name: {"title": table.title, "caption": table.caption}
                for name, table in self.tables.items()
            },
            "caveats": list(self.caveats),
            "seconds": self.seconds,
            "complete": self.complete,
        }

    def __repr__(self) -> str:
        held = [finding.holds for finding in self.findings]
        parts = [
            f"Report {self.title!r}",
            f"findings: {held.count(True)} shown, {held.count(False)} refuted, "
            f"{held.count(None)} open",
            f"tables: {', '.join(self.tables) or 'none'}",
        ]
        return " · ".join(parts if self.complete else [*parts, "interrupted"])

    def _repr_html_(self) -> str:
        from modeldiff.report_html import summary

        return summary(self)


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, float | int) and not isinstance(value, bool))


def _plain(value: Any, where: str) -> Any:
    """The value as JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise MismatchError(
        f"{where} is a {type(value).__name__}, which JSON has no word for. A report keeps "
        "numbers, text, truth values, lists and mappings."
    )
