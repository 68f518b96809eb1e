"""Random controls: what any direction of this length would do at this site."""

from dataclasses import replace

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.moments import Moments


def random_like(
    direction: Direction,
    n: int,
    *,
    seed: int,
    covariance: Moments | Float[Tensor, "d_model d_model"] | None = None,
) -> list[Direction]:
    """Random controls with the scale and site of a direction.

    Isotropic directions are an easy control: most of them point where activations hardly vary.
    With the covariance of activations the controls point where the activations do.

    Args:
        direction: What they stand in for.
        n: How many. The first ``k`` of ``n`` are the same for every ``n``.
        seed: Of the draw.
        covariance: Of activations at the site; None draws isotropically.

    Returns:
        Directions named ``"random 0 like <name>"`` and so on.

    Raises:
        MismatchError: If the covariance has another width.
        DirectionError: If the covariance is not positive semidefinite, or zero.

    Example:
        >>> toy = Direction.of(torch.tensor([3.0, 4.0]), "resid_post.1", "toy")
        >>> [(control.name, control.scale) for control in random_like(toy, 1, seed=0)]
        [('random 0 like toy', 5.0)]
    """
    kind = "isotropic" if covariance is None else "from the activation covariance"
    root = None if covariance is None else _root(covariance, direction)
    generator = torch.Generator().manual_seed(seed)
    controls = []
    for i in range(n):
        draw = torch.randn(direction.d_model, generator=generator, dtype=torch.float64)
        control = Direction.of(
            draw if root is None else root @ draw,
            direction.site,
            f"random {i} like {direction.name}",
            f"random, {kind}",
        )
        controls.append(
            replace(
                control,
                scale=direction.scale,
                seed=seed,
                models=direction.models,
                resid_norm=direction.resid_norm,
            )
        )
    return controls


def _root(
    covariance: Moments | Float[Tensor, "d_model d_model"], direction: Direction
) -> Float[Tensor, "d_model d_model"]:
    """A matrix R with R @ R.T equal to the covariance."""
    matrix = covariance.covariance if isinstance(covariance, Moments) else covariance
    width = direction.d_model
    if matrix.shape != (width, width):
        raise MismatchError(
            f"a covariance of shape {tuple(matrix.shape)} cannot shape controls for "
            f"{direction.name!r} (d_model={width}). Capture it at the same site."
        )
    variances, vectors = torch.linalg.eigh(matrix.detach().cpu().double())
    if not float(variances[-1]) > 0 or float(variances[0]) < -1e-6 * float(variances[-1]):
        raise DirectionError(
            f"not a covariance: its eigenvalues run from {float(variances[0]):.3g} to "
            f"{float(variances[-1]):.3g}; none may be negative, and not all zero."
        )
    return vectors * variances.clamp(min=0).sqrt()
