"""Matching pursuit: rows as sums of a few unit vectors, found one at a time."""

from typing import Literal

import torch
from torch import Tensor

from modeldiff._shapes import Float, Int
from modeldiff.dictionaries.codes import Codes

Measure = Literal["cosine", "square"]
_NOTHING = 1e-6  # a coefficient below this share of the row is float32 rounding


def pursue(
    scores: Float[Tensor, "row latent"], gram: Float[Tensor, "latent _latent"], k: int
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """Matching pursuit on inner products alone.

    Args:
        scores: Inner products of rows and unit atoms; not modified.
        gram: Inner products of the atoms.
        k: Steps.

    Returns:
        Which atom each step took, and how much of it.

    Source:
        Mallat & Zhang 1993, "Matching pursuits with time-frequency dictionaries".
    """
    left = scores.clone()
    latents, values = [], []
    for _ in range(k):
        latent = left.abs().argmax(1, keepdim=True)
        value = left.gather(1, latent)
        left -= value * gram[latent[:, 0]]
        latents.append(latent)
        values.append(value)
    return torch.cat(latents, 1), torch.cat(values, 1)


def missing(
    scores: Float[Tensor, "row latent"],
    gram: Float[Tensor, "latent _latent"],
    k: int,
    measure: Measure,
) -> Float[Tensor, " row"]:
    """What matching pursuit leaves of rows of unit length; see `ItdaConfig.measure`."""
    if not scores.shape[1]:
        return scores.new_ones(len(scores))
    latent, value = pursue(scores, gram, k)
    square = (1 - value.square().sum(1)).clamp(min=0)  # what is left is orthogonal to what is taken
    if measure == "square":
        return square
    inner = (value * scores.gather(1, latent)).sum(1)
    length = (square - 1 + 2 * inner).clamp(min=1e-12).sqrt()
    return 1 - inner / length


def pursued_codes(
    latents: Int[Tensor, "row k"], values: Float[Tensor, "row k"], x: Tensor, n_latents: int
) -> Codes:
    """Add up the steps that took the same atom, and drop what is only rounding."""
    row = torch.arange(len(x), device=x.device)[:, None].expand_as(latents)
    cell, inverse = (row * n_latents + latents).flatten().unique(return_inverse=True)
    value = values.new_zeros(len(cell)).index_add(0, inverse, values.flatten())
    kept = value.abs() > _NOTHING * x.norm(dim=1)[cell // n_latents]
    cell, value = cell[kept], value[kept]
    counts = torch.bincount(cell // n_latents, minlength=len(x))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return Codes(offsets, cell % n_latents, value, n_latents)
