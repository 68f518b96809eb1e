"""Principal components of what a fine-tune changed, with the mean change as the first."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.directions import Direction
from modeldiff.moments import Moments, nonzero_mean
from modeldiff.sites import Site


def pca_difference(
    base: Float[Tensor, "_n _d_model"],
    finetuned: Float[Tensor, "_n _d_model"],
    site: Site | str,
    n_components: int,
    *,
    name: str = "difference",
    sources: tuple[str, ...] = (),
    models: Mapping[str, str] | None = None,
    min_tokens: int = 8,
) -> list[Direction]:
    """Mean and principal components of ``finetuned - base`` on the same tokens.

    See `pca_of_moments` for the result. The residual norm is that of the base model, known
    where the site is the residual stream.

    Raises:
        MismatchError: If the two have different shapes.
        DirectionError: As for `pca_of_moments`.
    """
    moments = Moments.of(finetuned, minus=base, covariance=True)
    moments.require(min_tokens, name)
    where = Site.parse(site)
    norm = Moments.of(base).mean_norm if where.kind.startswith("resid") else None
    found = pca_of_moments(
        moments, where, n_components, name=name, sources=sources, models=models,
        min_tokens=min_tokens,
    )  # fmt: skip
    return [replace(direction, resid_norm=norm) for direction in found]


def pca_of_moments(
    difference: Moments,
    site: Site | str,
    n_components: int,
    *,
    name: str = "difference",
    sources: tuple[str, ...] = (),
    models: Mapping[str, str] | None = None,
    min_tokens: int = 8,
) -> list[Direction]:
    """Mean and principal components of a difference from its streamed moments.

    The first result, PC-0, is the mean difference: centring would hide it, and it is often the
    strongest signal. Then come the components of the centred difference, largest variance
    first, from the full float64 covariance; practical up to ``d_model`` of about 8192.

    Args:
        difference: Moments of ``finetuned - base`` rows, with covariance.
        site: Where the rows were captured.
        n_components: Components after PC-0, at most. Those without variance are left out: the
            output of a rank-1 adapter gives one.
        name: The results are called ``"<name> PC-0"`` and so on.
        sources: Names of the sets of text.
        models: Content hashes of the models.
        min_tokens: Fewest rows accepted.

    Returns:
        PC-0, pointing from base to finetuned, and the components, whose sign makes their
        largest entry positive. The scale of a component is the standard deviation along it,
        and `Direction.explained_variance` its share of the centred variance.

    Raises:
        DirectionError: If there are too few rows, no covariance, or the mean difference is
            zero.
    """
    difference.require(min_tokens, name)
    covariance = difference.covariance
    mean = nonzero_mean(difference.mean, difference.mean_norm, name)
    variances, vectors = torch.linalg.eigh(covariance)
    total = float(covariance.trace())
    energy = float(mean.square().sum())
    share = energy / (energy + total)
    first = replace(
        Direction.of(mean, site, f"{name} PC-0", "PCA of the difference: the mean"),
        sign="from base to finetuned",
        notes=(f"the mean is {share:.1%} of the mean squared difference",),
    )
    found = [first]
    for i in range(1, min(n_components, len(mean)) + 1):
        variance, vector = float(variances[-i]), vectors[:, -i].cpu()
        if variance <= 1e-12 * (total + energy):
            break
        vector = vector * vector[vector.abs().argmax()].sign()
        component = Direction.of(
            vector * variance**0.5, site, f"{name} PC-{i}", "PCA of the centred difference"
        )
        sign = "largest entry positive"
        found.append(replace(component, sign=sign, explained_variance=variance / total))
    return [
        replace(d, n_tokens=difference.n, sources=sources, models=dict(models or {})) for d in found
    ]
