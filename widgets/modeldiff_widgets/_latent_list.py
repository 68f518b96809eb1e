"""The table of latents: which rows pass the filters, in which order, and how they are written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from modeldiff.report_text import number
from modeldiff_widgets._latent_map import COLOURS
from modeldiff_widgets._latent_measure import number_of
from modeldiff_widgets._row_table import RowTable

ANY = "any class"
MOST = 200
"""Rows that are shown."""
COLUMNS = {
    "latent": "latent", "class": "class", "relative_decoder_norm": "rel. norm",
    "nu_activation": "ν act.", "firing_rate": "fires on", "nu_error": "ν error",
    "nu_reconstruction": "ν rec.", "max_activation": "largest", "label": "label",
}  # fmt: skip
_TEXTS = ("class", "label")


@dataclass(frozen=True)
class Order:
    """By which column the table is sorted."""

    column: str = ""
    falling: bool = True

    def turned(self, heading: str) -> "Order":
        """The order after a click on a heading."""
        name = next(name for name, text in COLUMNS.items() if text == heading)
        again = not self.falling if name == self.column else name not in ("latent", "label")
        return Order(name, again)


@dataclass(frozen=True)
class Filters:
    """What a latent must have to be shown.

    Args:
        kind: Its class, or `ANY`.
        rates: Between which shares of the rows it fires.
        words: Text in its label, or its number.
    """

    kind: str = ANY
    rates: tuple[float, float] = (0.0, 1.0)
    words: str = ""

    def passing(self, table: pd.DataFrame, labels: Mapping[int, str], order: Order) -> pd.DataFrame:
        """Rows that pass, in order, with their labels."""
        table = table.assign(label=[labels.get(latent, "") for latent in table["latent"]])
        keep = table["latent"] >= 0
        if self.kind != ANY:
            keep &= table["class"] == self.kind
        if "firing_rate" in table and self.rates != (0.0, 1.0):
            keep &= table["firing_rate"].between(*self.rates)
        words = self.words.strip().lower()
        if words:
            named = table["label"].str.lower().str.contains(words, regex=False)
            keep &= named | (table["latent"].astype(str) == words)
        shown = table[keep]
        if order.column not in shown:
            return shown
        return shown.sort_values(order.column, ascending=not order.falling, kind="stable")


def fill(view: RowTable, shown: pd.DataFrame, order: Order, selected: int, note: str) -> None:
    """Show rows of the table of latents; from any thread."""
    columns = [name for name in COLUMNS if name in shown]
    first = shown.head(MOST)
    more = f", the first {MOST} listed" if len(shown) > MOST else ""
    with view.hold_sync():
        view.headings = [COLUMNS[name] for name in columns]
        view.numeric = [i for i, name in enumerate(columns) if name not in _TEXTS]
        at = columns.index(order.column) if order.column in columns else -1
        view.sorted = [at, order.falling]
        rows = [[_cell(name, row[name]) for name in columns] for row in first.to_dict("records")]
        ids = [int(latent) for latent in first["latent"]]
        view.show(ids, rows, selected=selected, note=f"{len(shown):,} {note}{more}.")


def _cell(name: str, value: Any) -> Any:
    if name == "class":
        return [str(value), COLOURS.get(str(value), "#777777")]
    if name in ("latent", "label"):
        return str(value)
    known = number_of(getattr(value, "item", lambda: value)())
    if known is None:
        return "–"
    if name == "firing_rate":
        return f"{100 * known:.2g} %"
    return number(known) if name == "max_activation" else f"{known:.3f}"
