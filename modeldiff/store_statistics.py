"""Mean and spread of paired activations that need not be in memory at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.errors import MismatchError
from modeldiff.moments import Moments

_CELLS = 1 << 20  # values squared in float64 at once: 8 MiB


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Count, mean and mean square of every coordinate, in float64.

    Take one per batch with `of`, and merge them: in bfloat16 a running sum would lose most of the
    spread after some hundred batches, here nothing is lost.

    Args:
        n: Rows.
        mean: Mean of each coordinate of each model.
        square: Mean of its square.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]], dtype=torch.bfloat16)
        >>> found = RowStatistics.of(rows)
        >>> found.mean.tolist(), found.std.tolist(), found.rms.tolist()
        ([[2.0, 0.0]], [[1.0, 0.0]], [1.0])
    """

    n: int
    mean: Float[Tensor, "model d_model"]
    square: Float[Tensor, "model d_model"]

    @classmethod
    def of(cls, rows: Float[Tensor, "row model d_model"]) -> "RowStatistics":
        """Count some rows, a block at a time.

        Raises:
            DirectionError: If a row is not finite.
        """
        shape = rows.shape[1:]
        flat = rows.reshape(len(rows), shape.numel())
        mean, square = Moments.of(flat[:0]), Moments.of(flat[:0])
        for block in flat.split(max(1, _CELLS // max(1, flat.shape[1]))):
            wide = block.double()
            mean, square = mean.merged(Moments.of(wide)), square.merged(Moments.of(wide.square()))
        return cls(len(rows), mean.mean.view(shape), square.mean.view(shape))

    def merged(self, other: "RowStatistics") -> "RowStatistics":
        """Statistics of the rows of both.

        Raises:
            MismatchError: If the shapes differ.
        """
        if self.mean.shape != other.mean.shape:
            raise MismatchError(
                f"cannot merge statistics of rows {tuple(self.mean.shape)} and "
                f"{tuple(other.mean.shape)}."
            )
        n = self.n + other.n
        share = other.n / n if n else 0.0
        mean = self.mean + (other.mean.to(self.mean.device) - self.mean) * share
        square = self.square + (other.square.to(self.mean.device) - self.square) * share
        return RowStatistics(n, mean, square)

    @classmethod
    def joined(cls, parts: "Iterable[RowStatistics]") -> "RowStatistics":
        """Statistics of the rows of all parts, at least one."""
        return reduce(RowStatistics.merged, parts)

    @property
    def std(self) -> Float[Tensor, "model d_model"]:
        """Standard deviation of each coordinate (of the rows, not of a sample), float64."""
        return (self.square - self.mean.square()).clamp(min=0).sqrt()

    @property
    def rms(self) -> Float[Tensor, " model"]:
        """Root mean square length of each model's rows about their mean, float64."""
        return self.std.square().sum(1).sqrt()
