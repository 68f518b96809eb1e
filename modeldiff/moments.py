"""Means and covariances of activations that need not be in memory at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.errors import DirectionError, MismatchError

_CELLS = 1 << 22  # values cast to float64 at once: 32 MiB
_NOTHING = 1e-10  # a mean below this share of the row norm is float64 rounding


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and, if wanted, scatter of rows of activations, in float64.

    Take one per batch with `of`, and merge them in any order: the result is the dense one up to
    float64 rounding, also in bfloat16 where a running sum would lose small differences.

    Args:
        n: Number of rows.
        mean: Mean row, float64, on the device of the rows.
        mean_norm: Mean of the rows' L2 norms.
        scatter: Sum of the outer products of the centred rows, float64; None if not asked for.

    Example:
        >>> rows = torch.arange(8.0).reshape(4, 2)
        >>> Moments.of(rows[:1]).merged(Moments.of(rows[1:])).mean
        tensor([3., 4.], dtype=torch.float64)
    """

    n: int
    mean: Float[Tensor, " d_model"]
    mean_norm: float
    scatter: Float[Tensor, "d_model d_model"] | None = None

    @classmethod
    def of(
        cls,
        rows: Float[Tensor, "*_rows d_model"],
        *,
        minus: Float[Tensor, "*_others _d_model"] | None = None,
        covariance: bool = False,
    ) -> "Moments":
        """Count rows, block by block, in float64.

        Args:
            rows: One activation each; not modified. No rows give the neutral element of
                `merged`.
            minus: Subtracted row by row first, e.g. the base model's rows on the same tokens.
            covariance: Also accumulate the scatter matrix: ``d_model ** 2`` float64 values.

        Raises:
            MismatchError: If ``rows`` are not a matrix, or ``minus`` has another shape.
            DirectionError: If a row is not finite.
        """
        if rows.dim() != 2 or (minus is not None and minus.shape != rows.shape):
            raise MismatchError(
                f"moments need rows of shape (n, d_model), got {tuple(rows.shape)}"
                + ("." if minus is None else f" and, to subtract, {tuple(minus.shape)}.")
            )
        total = cls._of_block(_double(rows[:0]), covariance)
        for block in _blocks(rows, minus):
            total = total.merged(cls._of_block(block, covariance))
        return total

    @classmethod
    def _of_block(cls, block: Float[Tensor, "n d_model"], covariance: bool) -> "Moments":
        if bad := int((~block.isfinite().all(1)).sum()):
            raise DirectionError(
                f"{bad} of {len(block)} rows are not finite. Was the model run in float16? "
                "Use bfloat16 or float32."
            )
        n = len(block)
        mean = block.mean(0) if n else block.new_zeros(block.shape[1])
        centred = block - mean
        norm = float(block.norm(dim=1).mean()) if n else 0.0
        return cls(n, mean, norm, centred.T @ centred if covariance else None)

    def merged(self, other: "Moments") -> "Moments":
        """Moments of the rows of both.

        Raises:
            MismatchError: If the widths differ, or only one has a scatter matrix.

        Source:
            Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm".
        """
        if len(self.mean) != len(other.mean):
            raise MismatchError(
                f"cannot merge moments of width {len(self.mean)} and {len(other.mean)}."
            )
        if (self.scatter is None) != (other.scatter is None):
            raise MismatchError(
                "cannot merge moments with and without covariance: take both with "
                "covariance=True, or both without."
            )
        n = self.n + other.n
        share = other.n / n if n else 0.0
        gap = other.mean.to(self.mean.device) - self.mean
        scatter = None
        if self.scatter is not None and other.scatter is not None:
            between = torch.outer(gap, gap) * (self.n * share)
            scatter = self.scatter + other.scatter.to(self.mean.device) + between
        norm = self.mean_norm + (other.mean_norm - self.mean_norm) * share
        return Moments(n, self.mean + gap * share, norm, scatter)

    def require(self, min_tokens: int, name: str) -> None:
        """Check that there are enough rows to find ``name`` in.

        Raises:
            DirectionError: If there are fewer than ``min_tokens`` rows, or none.
        """
        needed = max(1, min_tokens)
        if self.n < needed:
            raise DirectionError(
                f"{name!r} needs at least {needed} tokens, got {self.n}. Did the judge or the "
                "mask keep anything? Generate more, or lower min_tokens."
            )

    @property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        """Unbiased covariance of the rows, float64.

        Raises:
            DirectionError: If it was not accumulated, or there are fewer than two rows.
        """
        if self.scatter is None:
            raise DirectionError("these moments hold no covariance: take covariance=True.")
        if self.n < 2:
            raise DirectionError(f"a covariance needs at least 2 rows, got {self.n}.")
        return self.scatter / (self.n - 1)


def mean_and_norm(rows: Float[Tensor, "n d_model"]) -> tuple[Tensor, float]:
    """Mean and mean norm of rows that fit in memory as float64; not finite if a row is not."""
    double = rows.detach()
    double = (double.cpu() if double.device.type == "mps" else double).double()  # no float64 there
    return double.mean(0), float(double.norm(dim=1).mean())


def nonzero_mean(
    mean: Float[Tensor, " d_model"], row_norm: float, name: str
) -> Float[Tensor, " d_model"]:
    """The mean difference on the CPU, unless it is nothing but rounding.

    Args:
        mean: The difference, float64.
        row_norm: Size of the rows it was taken from.
        name: Of the direction, for the message.

    Raises:
        DirectionError: If it is zero beside the rows.
    """
    length = float(mean.norm())
    if length <= _NOTHING * row_norm:
        raise DirectionError(
            f"{name!r}: no difference between the means (length {length:.2g}, rows of norm "
            f"{row_norm:.4g}). The two sides are the same activations: is the adapter active, "
            "and does the site come after the first changed layer?"
        )
    return mean.cpu()


def _double(rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    on_mps = rows.device.type == "mps"  # which has no float64
    return (rows.detach().cpu() if on_mps else rows.detach()).double()


def _blocks(
    rows: Float[Tensor, "n d_model"], minus: Float[Tensor, "n d_model"] | None
) -> Iterator[Float[Tensor, "block d_model"]]:
    step = max(1, _CELLS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        block = _double(rows[start : start + step])
        if minus is not None:
            block = block - _double(minus[start : start + step]).to(block.device)
        yield block
