"""How well a dictionary reconstructs, and how sparsely."""

from dataclasses import dataclass
from threading import Event

import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float, Int
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Source, checked
from modeldiff.errors import MismatchError


@dataclass(frozen=True, eq=False)
class Metrics:
    """Figures of a dictionary on rows, by the rule of inference.

    Args:
        fve: For each model, ``1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2`` over all rows.
        l0: Mean latents that fire on a row.
        dead: Share of the latents that fire on no row.
        n_rows: Rows.
        fired: Rows on which each latent fires.
    """

    fve: tuple[float, ...]
    l0: float
    dead: float
    n_rows: int
    fired: Int[Tensor, " latent"]

    def __str__(self) -> str:
        fve = ", ".join(f"{each:.4f}" for each in self.fve)
        return f"FVE {fve} · L0 {self.l0:.2f} · dead {self.dead:.1%} · {self.n_rows} rows"


def evaluate(
    dictionary: Dictionary,
    source: Source,
    batch_size: int = 4096,
    *,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Metrics:
    """Measure a dictionary on every row of a source, in one pass, sums in float64.

    Args:
        dictionary: A dictionary; its thresholds decide what fires.
        source: Rows.
        batch_size: Rows at once; the figures do not depend on it.
        progress: See `modeldiff._progress.Progress`.
        cancel: Stops between batches when set.

    Raises:
        MismatchError: If there are no rows, or they do not fit the dictionary.
        Cancelled: If the event is set.
    """
    error, variation = _Variation(), _Variation()
    fired = torch.zeros(dictionary.config.n_latents, dtype=torch.long, device=dictionary.device)
    report, n = reporter(progress, "evaluating"), 0
    for rows in checked(source).in_order(batch_size):
        check(cancel)
        x, codes = dictionary.view(rows.acts), dictionary.encode(rows.acts)
        error.add(x.double() - dictionary.decode(codes).double())
        variation.add(x)
        fired += torch.bincount(codes.latent, minlength=len(fired))
        n += len(x)
        report(n, source.n_rows, "")
    if not n:
        raise MismatchError("no rows to measure a dictionary on.")
    fve = 1 - error.about_zero / variation.about_mean
    l0, dead = float(fired.sum()) / n, float((fired == 0).double().mean())
    return Metrics(tuple(fve.tolist()), l0, dead, n, fired.cpu())


class _Variation:
    """Sums of squares of batches of rows, for each model."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None
        self.total = self.squares = torch.zeros(())

    def add(self, rows: Float[Tensor, "row model d_model"]) -> None:
        """Count rows."""
        rows = rows.double()
        self.shift = rows.mean(0) if self.shift is None else self.shift
        centred = rows - self.shift  # near the mean, where squares do not cancel
        self.n += len(rows)
        self.total = self.total + centred.sum(0)
        self.squares = self.squares + centred.square().sum((0, 2))

    @property
    def about_mean(self) -> Float[Tensor, " model"]:
        """Sum of squared distances from the mean row."""
        return self.squares - self.total.square().sum(-1) / self.n

    @property
    def about_zero(self) -> Float[Tensor, " model"]:
        """Sum of squares."""
        mean = self.total / self.n + (0.0 if self.shift is None else self.shift)
        return self.about_mean + self.n * mean.square().sum(-1)
