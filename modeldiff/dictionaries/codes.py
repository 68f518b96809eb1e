"""Sparse latents of some rows: which fire, and how strongly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeldiff._shapes import Float, Int
from modeldiff.errors import MismatchError


@dataclass(frozen=True, eq=False)
class Codes:
    """The latents that fire on some rows, row after row (compressed sparse rows).

    Args:
        offsets: Where each row starts in the two lists, and where the last one ends.
        latent: Index of each latent that fires, rising within a row.
        value: Its strength.
        n_latents: Latents of the dictionary, firing or not.

    Raises:
        MismatchError: If the lists have different lengths, or do not end where the rows do.

    Example:
        >>> codes = Codes.of(torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 3.0]]))
        >>> len(codes), codes.row, codes.latent, codes.value
        (3, tensor([0, 2, 2]), tensor([1, 0, 1]), tensor([2., 1., 3.]))
    """

    offsets: Int[Tensor, " rows_plus_one"]
    latent: Int[Tensor, " nonzero"]
    value: Float[Tensor, " nonzero"]
    n_latents: int

    def __post_init__(self) -> None:
        if (
            self.offsets.dim() != 1
            or len(self.offsets) < 1
            or self.latent.shape != self.value.shape
        ):
            raise MismatchError(
                f"codes with {tuple(self.offsets.shape)} offsets, {tuple(self.latent.shape)} "
                f"latents and {tuple(self.value.shape)} values; latents and values go together."
            )

    @classmethod
    def of(cls, dense: Float[Tensor, "row latent"]) -> "Codes":
        """Keep what is not zero."""
        row, latent = dense.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(dense))
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return cls(offsets, latent, dense[row, latent], dense.shape[1])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def row(self) -> Int[Tensor, " nonzero"]:
        """The row of each entry."""
        rows = torch.arange(len(self), device=self.offsets.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=len(self.latent))

    def dense(self) -> Float[Tensor, "row latent"]:
        """The same as a matrix, zeros included."""
        made = self.value.new_zeros(len(self), self.n_latents)
        return made.index_put((self.row, self.latent), self.value)
