"""Controls for ablating chosen directions: others, as many, that carry as much."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modeldiff._progress import Progress
from modeldiff._shapes import Float
from modeldiff.activations import stream
from modeldiff.caft_candidates import Candidate
from modeldiff.directions import Direction, orthonormal_basis
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.interventions import Side
from modeldiff.masks import Mask
from modeldiff.models import ModelPair
from modeldiff.moments import Moments
from modeldiff.sites import Site

Directions = Mapping[int, Sequence[Direction]]
"""Directions by layer, as `modeldiff.caft.caft` takes them."""


def random_choice(
    candidates: Sequence[Candidate], *, seed: int, keep: float = 0.5
) -> tuple[Candidate, ...]:
    """Keep each candidate with a probability; at least one is kept.

    Args:
        candidates: All of them.
        seed: Of the draw.
        keep: The probability.

    Raises:
        DirectionError: If there are none, or the probability is not above 0 and at most 1.
    """
    if not candidates or not 0 < keep <= 1:
        raise DirectionError(f"{len(candidates)} candidates, each kept with probability {keep}.")
    rng = random.Random(f"choice {seed}")
    kept = tuple(each for each in candidates if rng.random() < keep)
    return kept or (rng.choice(candidates),)


def top_k(candidates: Sequence[Candidate], k: int | None = None) -> tuple[Candidate, ...]:
    """All candidates, unselected; or the ``k`` of each layer with most of the difference."""
    if k is None:
        return tuple(candidates)
    kept: set[str] = set()
    for layer in {each.layer for each in candidates}:
        mine = [each for each in candidates if each.layer == layer]
        kept |= {each.name for each in sorted(mine, key=lambda one: -one.share)[:k]}
    return tuple(each for each in candidates if each.name in kept)


def isotropic(chosen: Directions, *, seed: int) -> dict[int, tuple[Direction, ...]]:
    """A random orthonormal subspace of the same size at each layer, any as likely as any other.

    Most directions hold little of the activations' variance, so this control is an easy one.
    """
    found = {}
    for layer, several in chosen.items():
        if several:
            basis = orthonormal_basis(several)
            draw = torch.randn(basis.shape, generator=_generator(seed, layer), dtype=torch.float64)
            found[layer] = _named(orthonormal_basis(draw), several, layer, seed, "isotropic")
    return found


def same_variance(
    chosen: Directions,
    covariances: Mapping[int, Moments | Float[Tensor, "d_model d_model"]],
    *,
    seed: int,
    draws: int = 128,
    apart: bool = False,
) -> dict[int, tuple[Direction, ...]]:
    """A random orthonormal subspace that holds as much of the activations' variance.

    At each layer subspaces of the same size are drawn, from distributions that run from one that
    avoids the activations' variance, over the isotropic one and that of the activations themselves,
    to one that follows the largest components; the one is taken whose variance is nearest to that
    of the chosen directions' span. The notes say both shares, and how much the subspaces overlap.

    Args:
        chosen: What the control is for, by layer.
        covariances: Of activations by layer, see `covariances_of`.
        seed: Of the draws.
        draws: Subspaces drawn at each layer.
        apart: Draw orthogonally to the chosen directions, so that the control removes none of them.

    Raises:
        DirectionError: If a layer has no covariance, or there is no room apart.
        MismatchError: If a width differs.
    """
    missing = [layer for layer, several in chosen.items() if several and layer not in covariances]
    if missing:
        raise DirectionError(f"no covariance of activations at layers {missing}.")
    found = {}
    for layer, several in chosen.items():
        if several:
            given = covariances[layer]
            matrix = given.covariance if isinstance(given, Moments) else given
            basis = orthonormal_basis(several).double()
            _check(basis, matrix, layer, apart)
            made = _matched(basis, matrix.cpu().double(), _generator(seed, layer), draws, apart)
            note = _note(made, basis, matrix.cpu().double())
            kind = "of the same variance"
            found[layer] = _named(made.float(), several, layer, seed, kind, note)
    return found


def covariances_of(
    pair: ModelPair,
    items: Sequence[object],
    layers: Sequence[int],
    *,
    side: Side = "base",
    on: "str | Mask" = "all",
    skip_first: int = 1,
    progress: Progress = False,
) -> dict[int, Moments]:
    """Moments of one side's activations after decoder layers, with covariance.

    Args:
        pair: Base and fine-tune.
        items: Texts that are like those trained on.
        layers: After which layers.
        side: Whose activations.
        on: Tokens that count.
        skip_first: Positions left out at the start of each text.
        progress: Where to report.

    Raises:
        MaskError: If no token counts.
        SiteError: If there is no such layer.
    """
    sites = {layer: Site("resid_post", layer) for layer in layers}
    found: dict[int, Moments] = {}
    for part in stream(
        pair.sides, pair.texts(items), tuple(sorted(sites.values())), on=on,
        skip_first=skip_first, progress=progress,
    ):  # fmt: skip
        acts = part.run.base if side == "base" else part.run.finetuned
        for layer, site in sites.items():
            new = Moments.of(part.rows(acts, site), covariance=True)
            found[layer] = found[layer].merged(new) if layer in found else new
    return found


def variance_share(
    several: Sequence[Direction], covariance: Float[Tensor, "d_model d_model"]
) -> float:
    """Share of a variance that the span of directions holds."""
    return _held(orthonormal_basis(several).double(), covariance.cpu().double())


def _held(basis: Tensor, covariance: Tensor) -> float:
    return float((basis @ covariance @ basis.T).trace() / covariance.trace())


def _matched(
    basis: Tensor, covariance: Tensor, generator: torch.Generator, draws: int, apart: bool
) -> Float[Tensor, "k d_model"]:
    """Draw with the covariance to powers from -4 to 4; keep the nearest in variance."""
    variances, vectors = torch.linalg.eigh(covariance)
    sizes = (variances / variances[-1]).clamp(min=1e-6)
    wanted, found, nearest = _held(basis, covariance), basis, float("inf")
    for power in torch.linspace(-4, 4, draws).tolist():
        draw = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
        rows = (draw * sizes ** (power / 2)) @ vectors.T
        if apart:
            rows = rows - (rows @ basis.T) @ basis
        made = orthonormal_basis(rows).double()
        gap = abs(_held(made, covariance) - wanted)
        if len(made) == len(basis) and gap < nearest:
            found, nearest = made, gap
    return found


def _check(basis: Tensor, covariance: Tensor, layer: int, apart: bool) -> None:
    k, width = basis.shape
    if covariance.shape != (width, width):
        raise MismatchError(
            f"layer {layer}: a covariance of shape {tuple(covariance.shape)} for directions of "
            f"width {width}."
        )
    if apart and 2 * k > width:
        raise DirectionError(
            f"layer {layer}: {k} of {width} dimensions are chosen, so that there is no room for as "
            "many apart from them."
        )


def _note(made: Tensor, basis: Tensor, covariance: Tensor) -> str:
    shares = _held(made, covariance), _held(basis, covariance)
    overlap = float((made @ basis.T).square().sum() / len(basis))
    return (
        f"holds {shares[0]:.2%} of the variance, the chosen directions {shares[1]:.2%}; "
        f"overlap {overlap:.3f}"
    )


def _named(
    rows: Float[Tensor, "k d_model"],
    like: Sequence[Direction],
    layer: int,
    seed: int,
    kind: str,
    *notes: str,
) -> tuple[Direction, ...]:
    """Directions of the rows, with the lengths of those that they stand in for."""
    made = []
    for i, (row, each) in enumerate(zip(rows, like, strict=False)):
        name = f"random {i}, {kind}, layer {layer}"
        plain = Direction.of(row, Site("resid_post", layer), name, f"random subspace, {kind}")
        made.append(replace(plain, scale=each.scale, seed=seed, models=each.models, notes=notes))
    return tuple(made)


def _generator(seed: int, layer: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + layer)
