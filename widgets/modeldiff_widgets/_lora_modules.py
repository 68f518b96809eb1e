"""The adapted modules as a table: how they are read, in which order, and how they are written."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from modeldiff.loading import Sides
from modeldiff.lora import AdapterModule, adapter_modules, adapter_table
from modeldiff.lora_scalars import Scalars
from modeldiff.report_text import number
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._row_table import RowTable

COLUMNS = {
    "module": "module", "rank": "rank", "top": "singular values", "relative": "rel. norm",
    "stable_rank": "stable rank", "effective_rank": "effective rank",
    "first_energy": "share of 1st", "bias_fraction": "bias fraction", "writes_to": "writes to",
}  # fmt: skip
_TEXTS = ("module", "top", "writes_to")
_MOST = 3  # singular values that are written out
LEGEND = (
    "Rel. norm: of the change beside its weight's (Frobenius). Share of 1st: of the squared norm "
    "in the first component. Bias fraction: mean²/mean square of the first component's scalar on "
    "the text below; 1 is a constant push, near 0 it depends on the token."
)


@dataclass(frozen=True, eq=False)
class Opened:
    """An adapter that was read.

    Args:
        modules: In forward order.
        table: From `adapter_table`, a row a module.
    """

    modules: tuple[AdapterModule, ...]
    table: pd.DataFrame

    def layers(self) -> pd.DataFrame:
        """One row a layer: layer, modules, norm and relative, of its changes together."""
        squares = self.table.assign(
            norm2=self.table["norm"] ** 2, base2=[m.base_norm**2 for m in self.modules]
        )
        found = squares.groupby("layer", as_index=False).agg(
            modules=("module", "size"), norm2=("norm2", "sum"), base2=("base2", "sum")
        )
        return found.assign(
            norm=found["norm2"] ** 0.5, relative=(found["norm2"] / found["base2"]) ** 0.5
        )


def open_adapter(sides: Sides, job: Job) -> Opened:
    """Read every module of the adapter; in a job."""
    modules = adapter_modules(sides)
    rows = []
    for done, module in enumerate(modules):
        job.report(done / len(modules), module.name)
        rows.append(adapter_table([module]))
    return Opened(modules, pd.concat(rows, ignore_index=True))


def fill(
    view: RowTable, opened: Opened, order: tuple[str, bool], selected: int,
    scalars: Scalars | None,
) -> None:  # fmt: skip
    """Show the modules; from any thread."""
    table = opened.table.assign(bias_fraction=math.nan)
    if scalars is not None:
        summary = scalars.summary(n_resamples=1)
        first = summary[summary["component"] == 0].set_index("module")["bias_fraction"]
        table["bias_fraction"] = table["module"].map(first)
    column, falling = order
    if column != "module":  # else in forward order, as they are
        table = table.sort_values(column, ascending=not falling, kind="stable")
    elif falling:
        table = table[::-1]
    ids = [int(str(each)) for each in table.index]
    with view.hold_sync():
        view.headings = list(COLUMNS.values())
        view.numeric = [i for i, name in enumerate(COLUMNS) if name not in _TEXTS]
        view.sorted = [list(COLUMNS).index(column), falling]
        view.show(
            ids, [_row(opened.modules[i], table.loc[i]) for i in ids], selected=selected,
            note=f"{len(ids)} adapted module{'s' * (len(ids) > 1)}. {LEGEND}",
        )  # fmt: skip


def turned(order: tuple[str, bool], column: int) -> tuple[str, bool]:
    """The order after a click on a heading: numbers fall first."""
    name = list(COLUMNS)[column]
    return (name, not order[1] if name == order[0] else name not in ("module", "writes_to"))


def _row(module: AdapterModule, row: Any) -> list[str]:
    return [_cell(name, row[name], module) for name in COLUMNS]


def _cell(name: str, value: Any, module: AdapterModule) -> str:
    if name == "top":
        values = module.svd.singular.tolist()
        return ", ".join(map(number, values[:_MOST])) + (" …" if len(values) > _MOST else "")
    if name == "writes_to":
        return value or "not the stream"
    if name == "module":
        return str(value)
    if name == "rank":
        return str(int(value))
    known = float(value)
    return "–" if math.isnan(known) else number(known if known else 0)
