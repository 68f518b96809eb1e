"""What the panel *Latents* measures: one pass for classes and rates, one for examples."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd

from modeldiff.dictionaries.classes import classify
from modeldiff.dictionaries.examples import Example, Examples, max_activating
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.scaling import Scaling, latent_scaling
from modeldiff.dictionaries.sources import Source
from modeldiff.errors import Cancelled
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._latent_map import FIRING, UNKNOWN

K = 12
"""Strongest texts of each latent, and texts sampled for each."""
WINDOW = (16, 8)
_MOST = 1 << 29  # bytes that examples of all latents may take
_BYTES = 12 * (sum(WINDOW) + 3)  # an example: token, activation, and where it is


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of the latents of a dictionary.

    Args:
        dictionary: Whose latents.
        table: One row a latent.
        rows: On which rows; None where nothing was measured.
        scaling: What the table is made of.
        examples: Texts in which latents fire; None where they were not looked for.
        k: Examples of each kind that were asked for.
    """

    dictionary: Dictionary
    table: pd.DataFrame
    rows: Source | None = None
    scaling: Scaling | None = None
    examples: Examples | None = None
    k: int = K

    @property
    def n_rows(self) -> int:
        """How many rows were seen."""
        return 0 if self.scaling is None else self.scaling.n_rows

    def strength(self, latent: int) -> Scaling | float:
        """What steering with coefficient 1 sets the latent to: its largest value, if it fired."""
        fired = self.scaling is not None and bool(self.scaling.n_active[latent])
        return self.scaling if fired and self.scaling is not None else 1.0

    def of(self, latent: int, kind: str, tokenizer: Any) -> list[Example]:
        """Examples of a latent: "max" or "sample"."""
        if self.examples is None:
            return []
        return [each for each in self.examples.of(latent, tokenizer) if each.kind == kind]


def unmeasured(dictionary: Dictionary) -> Measured:
    """What the weights alone say."""
    n, compares = dictionary.config.n_latents, dictionary.config.n_models == 2
    columns: dict[str, Any] = {"latent": range(n), "class": UNKNOWN}
    if compares:
        columns["relative_decoder_norm"] = dictionary.relative_decoder_norm.double().cpu().numpy()
    return Measured(dictionary, pd.DataFrame(columns))


def latent_table(dictionary: Dictionary, scaling: Scaling) -> pd.DataFrame:
    """One row a latent: classes where a dictionary sees two models, else the bare figures."""
    if dictionary.config.is_crosscoder:
        return classify(dictionary, scaling)
    table = scaling.table(direction=own_side(dictionary))
    never = table["n_active"] == 0
    table.insert(1, "class", never.map({True: "dead", False: FIRING}))
    return table


def own_side(dictionary: Dictionary) -> int:
    """Whose activations an autoencoder is of: 0 the base, 1 the fine-tune or the difference."""
    return 0 if dictionary.config.inputs == "base" else 1


def examples_wanted(dictionary: Dictionary) -> int:
    """How many examples of all latents fit into memory, at least one each."""
    return max(1, min(K, _MOST // (2 * _BYTES * dictionary.config.n_latents)))


def measure(
    job: Job, dictionary: Dictionary, rows: Source, show: Callable[[Measured], None]
) -> Measured:
    """Measure and show, piece by piece; a cancelled job has shown what it has.

    Raises:
        Cancelled: If the job was cancelled.
    """
    try:
        scaling = latent_scaling(dictionary, rows, cancel=job.cancel, progress=part(job, 0.0, 0.5))
    except Cancelled as stopped:
        if isinstance(stopped.partial, Scaling):
            show(_measured(dictionary, rows, stopped.partial))
        raise
    found = _measured(dictionary, rows, scaling)
    show(found)
    k = examples_wanted(dictionary)
    try:
        examples = max_activating(
            dictionary, rows, k=k, n_sample=k, window=WINDOW, cancel=job.cancel,
            progress=part(job, 0.5, 0.5),
        )  # fmt: skip
    except Cancelled as stopped:
        if isinstance(stopped.partial, Examples):
            show(_with_examples(found, stopped.partial, k))
        raise
    found = _with_examples(found, examples, k)
    show(found)
    return found


def part(job: Job, start: float, share: float) -> Callable[[int, int, str], None]:
    """A ``progress=`` for a part of a job; it never stops it: ``cancel=`` does, and keeps more."""

    def report(done: int, total: int, message: str) -> None:
        with suppress(Cancelled):
            job.report(start + share * done / max(total, 1), message)

    return report


def _measured(dictionary: Dictionary, rows: Source, scaling: Scaling) -> Measured:
    return Measured(dictionary, latent_table(dictionary, scaling), rows, scaling)


def _with_examples(found: Measured, examples: Examples, k: int) -> Measured:
    return Measured(found.dictionary, found.table, found.rows, found.scaling, examples, k)


def code_of(found: Measured, latent: int, side: str) -> list[str]:
    """Python lines for what is shown; ``dictionary``, ``rows`` and ``pair`` are in scope."""
    lines: list[str] = []
    if found.rows is not None:
        crosscoder = found.dictionary.config.is_crosscoder
        if crosscoder:
            lines.append("from modeldiff.dictionaries.classes import classify")
        lines += [
            "from modeldiff.dictionaries.scaling import latent_scaling",
            "scaling = latent_scaling(dictionary, rows)",
            "table = classify(dictionary, scaling)" if crosscoder
            else f"table = scaling.table(direction={own_side(found.dictionary)})",
        ]  # fmt: skip
        if found.n_rows < found.rows.n_rows:
            lines.append(f"# what is shown was stopped after {found.n_rows} rows")
    if found.examples is not None:
        lines += [
            "from modeldiff.dictionaries.examples import max_activating",
            f"examples = max_activating(dictionary, rows, [{latent}], k={found.k}, "
            f"n_sample={found.k})",
            f"texts = examples.of({latent}, pair.tokenizer)",
        ]
    strength = ", strength=scaling" if isinstance(found.strength(latent), Scaling) else ""
    if found.dictionary.config.site:
        lines += [
            "from modeldiff.dictionaries.latents import latent_direction, latent_lens",
            f"direction = latent_direction(dictionary, {latent}, side={side!r}{strength})",
        ]
    return lines


def number_of(value: Any) -> float | None:
    """A cell of the table as a number; None where it says nothing."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None
