"""What random walks do: the null of every turn in a series of checkpoints.

The walks have steps as long as the path's and directions without memory. In a wide space they turn
by a right angle at every point; a transition is a turn that stands out of an otherwise straight
path, by more than the turns of walks stand out of one another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from modeldiff._shapes import Float, Int

_CELLS = 1 << 22  # values of walks held at once: 32 MiB
_NONE = -2.0  # below every cosine


def local_cosine(path: Float[Tensor, "*batch step d"], k: int) -> Float[Tensor, "*batch inner"]:
    """Tell how a path turns: the cosine of the ways from a point ``k`` back and ``k`` on.

    -1 is straight on, 0 a right angle, +1 the way back. Points are raw, not normalised.

    Args:
        path: Points at equal distances in training steps.
        k: Points back and on.

    Returns:
        One value for every point with ``k`` others on both sides, so ``2 k`` fewer than points;
        NaN where the path stood still on one of the sides.

    Source:
        Turner et al. 2025, arXiv 2506.11613, section 4; other code has +1 for straight.

    Example:
        >>> local_cosine(torch.tensor([[0.0, 0], [1, 0], [2, 0], [2, 1]]), 1).tolist()
        [-1.0, 0.0]
    """
    n = path.shape[-2]
    here = path[..., k : n - k, :]
    back, on = path[..., : n - 2 * k, :] - here, path[..., 2 * k :, :] - here
    sizes = back.norm(dim=-1) * on.norm(dim=-1)
    found = ((back * on).sum(-1) / sizes).clamp(-1, 1)
    return found.masked_fill(sizes == 0, torch.nan)


def walks(
    lengths: Float[Tensor, " way"], d: int, n: int, seed: int
) -> Iterator[Float[Tensor, "some point coordinate"]]:
    """Draw random walks in ``d`` dimensions, in coordinates of the space that each spans.

    The directions of T steps are the rows of a T x d Gaussian matrix, whose angles depend on its
    triangular factor alone; that is drawn at once (chi on the diagonal, normal below), so that the
    cost does not depend on ``d``.

    Args:
        lengths: Of every step.
        d: Dimension of the space.
        n: How many.
        seed: Of the draw.

    Source:
        Bartlett 1933, On the theory of statistical regression.
    """
    rng, steps = np.random.default_rng(seed), len(lengths)
    width = min(d, steps)
    free = np.maximum(d - np.arange(width), 1)
    chunk = max(1, _CELLS // max(1, steps * width))
    for start in range(0, n, chunk):
        some = min(chunk, n - start)
        ways = np.tril(rng.standard_normal((some, steps, width)), -1)
        ways[:, np.arange(width), np.arange(width)] = np.sqrt(rng.chisquare(free, (some, width)))
        unit = normalize(torch.from_numpy(ways), dim=-1)
        path = (unit * lengths.double()[:, None]).cumsum(1)
        yield torch.cat([torch.zeros_like(path[:, :1]), path], 1)


def walk_cosines(
    path: Float[Tensor, "step d"], ks: Sequence[int], *, n: int = 1000, seed: int = 0
) -> dict[int, Float[Tensor, "walk inner"]]:
    """Local cosines of random walks with the steps of a path.

    Args:
        path: Whose step lengths and width the walks have.
        ks: Points back and on.
        n: Walks.
        seed: Of the walks; all ``ks`` see the same ones.

    Returns:
        One row a walk for every ``k``, float64.
    """
    lengths = path.double().diff(dim=0).norm(dim=-1)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for some in walks(lengths, path.shape[1], n, seed):
        for k in ks:
            found[k].append(local_cosine(some, k))
    return {k: torch.cat(parts) for k, parts in found.items()}


@dataclass(frozen=True, eq=False)
class Peaks:
    """The sharpest turn of each path of a batch.

    Args:
        height: Largest local cosine; -2 where no point could be judged.
        at: Index of its point among the local cosines.
        prominence: Height above the path's median; 0 where no point could be judged.
    """

    height: Float[Tensor, " path"]
    at: Int[Tensor, " path"]
    prominence: Float[Tensor, " path"]


def peaks(cosines: Float[Tensor, "path inner"]) -> Peaks:
    """Find the sharpest turn of each path; NaN is left out."""
    height, at = cosines.nan_to_num(_NONE).max(-1)
    median = cosines.nanquantile(0.5, dim=-1)  # the mean of the middle two, if there are two
    return Peaks(height, at, (height - median).nan_to_num(0.0))
