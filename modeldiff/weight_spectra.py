"""Singular value decompositions of weight changes: factored, randomised, and beside rounding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.errors import MismatchError

FLOORS = {torch.bfloat16: 3e-3, torch.float16: 3e-3 / 2**3, torch.float32: 3e-3 / 2**16}
"""Relative change below which rounding to a dtype swallows much of a rank-1 change.

At 3e-3 in bfloat16 the first singular vector of the change is off by half a degree to five degrees
and holds most of its energy; at a tenth of it 95 % of the entries have not changed at all.
"""
_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ diag(singular) @ right.T``: what a matrix writes, how much, and what it reads.

    Of the two signs that a pair of vectors can have, the one is taken that makes the entry of
    ``left`` of largest size positive.

    Args:
        left: Orthonormal columns of the output's width.
        singular: Singular values, largest first.
        right: Orthonormal columns of the input's width.
    """

    left: Float[Tensor, "d_out rank"]
    singular: Float[Tensor, " rank"]
    right: Float[Tensor, "d_in rank"]

    @property
    def rank(self) -> int:
        """Number of singular values, zeros included."""
        return len(self.singular)

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.singular.double().norm())

    def first(self, rank: int) -> "LowRank":
        """Keep the largest singular values."""
        return LowRank(self.left[:, :rank], self.singular[:rank], self.right[:, :rank])

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """Multiply it out."""
        return (self.left * self.singular) @ self.right.T


def oriented(left: Tensor, singular: Tensor, right: Tensor) -> LowRank:
    """Fix the signs of singular vectors as `LowRank` says."""
    largest = left.abs().argmax(0, keepdim=True)
    signs = torch.where(left.gather(0, largest)[0] < 0, -1.0, 1.0).to(left)
    return LowRank(left * signs, singular, right * signs)


@torch.no_grad()
def factored_svd(
    a: Float[Tensor, "rank d_in"], b: Float[Tensor, "d_out rank"], scale: float = 1.0
) -> LowRank:
    """Decompose ``scale * b @ a`` from thin QR, in float64, without forming the product.

    Costs O((d_in + d_out) rank^2).

    Raises:
        MismatchError: If the ranks differ.

    Example:
        >>> found = factored_svd(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0], [-1.0]]), 2.0)
        >>> found.singular.tolist(), found.left[:, 0].tolist()
        ([10.0], [0.0, 1.0])
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise MismatchError(
            f"A of shape {tuple(a.shape)} and B of {tuple(b.shape)} are no factors: A has as many "
            "rows as B has columns."
        )
    q_b, r_b = torch.linalg.qr(b.detach().double())
    q_a, r_a = torch.linalg.qr(a.detach().double().T)
    u, s, vh = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    return oriented(q_b @ u, s, q_a @ vh.T)


@torch.no_grad()
def randomized_svd(
    matrix: Float[Tensor, "d_out d_in"],
    rank: int,
    *,
    oversample: int = 8,
    n_iter: int = 4,
    seed: int = 0,
) -> LowRank:
    """Find the largest singular values and vectors of a matrix by subspace iteration.

    Args:
        matrix: Anything float; worked on in its own dtype, on its device.
        rank: How many are wanted; all of them if the matrix has fewer.
        oversample: Further columns of the random start, thrown away at the end.
        n_iter: Power iterations, with an orthonormalisation after each product.
        seed: Of the random start.

    Raises:
        MismatchError: If it is not a matrix, or ``rank`` is below 1.

    Source:
        Halko, Martinsson and Tropp 2011, SIAM Review 53:217.
    """
    if matrix.dim() != 2 or rank < 1:
        raise MismatchError(
            f"randomized_svd of a tensor of shape {tuple(matrix.shape)} and rank {rank}: it takes "
            "a matrix and a rank of 1 or more."
        )
    q = min(rank + oversample, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], q, generator=generator).to(matrix)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(n_iter):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return oriented(basis @ u, s, vh.T).first(rank)


def stable_rank(singular: Float[Tensor, " rank"]) -> float:
    """Sum of squares over the largest square: 1 for rank 1; NaN of a zero matrix."""
    squares = singular.double() ** 2
    return float(squares.sum() / squares.max()) if len(squares) and squares.max() > 0 else math.nan


def effective_rank(
    singular: Float[Tensor, " rank"], energy: float | None = None, n: int | None = None
) -> float:
    """Exponential of the entropy of the squared singular values; NaN of a zero matrix.

    Args:
        singular: The largest singular values, or all.
        energy: Squared Frobenius norm, if not all are given; what is missing is spread evenly
            over the others, which makes the result an upper bound.
        n: Number of all singular values, if not all are given.

    Source:
        Roy and Vetterli 2007, "The effective rank" (of squares here, which are energies).
    """
    squares = singular.double() ** 2
    total = float(squares.sum()) if energy is None else max(energy, float(squares.sum()))
    if total <= 0:
        return math.nan
    shares = squares[squares > 0] / total
    entropy = -float((shares * shares.log()).sum())
    rest, others = 1 - float(shares.sum()), (n or len(squares)) - len(squares)
    if others > 0 and rest > 1e-12:
        entropy -= rest * math.log(rest / others)
    return math.exp(entropy)


def precision_of(tensor: Tensor) -> torch.dtype:
    """Coarsest dtype that holds every value of a tensor, however it is stored.

    A merge in bfloat16 that was saved in float32 is still rounded to bfloat16.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if tensor.dtype == dtype or bool((tensor.to(dtype) == tensor).all()):
            return dtype
    return torch.float32


def steps(weight: Tensor, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Distance between neighbouring numbers of a dtype at every entry, in float32."""
    _, exponent = torch.frexp(weight.float().abs().clamp_(min=2.0**-100))
    return torch.ldexp(torch.ones((), device=weight.device), exponent.float().sub_(_BITS[dtype]))


@dataclass(frozen=True, eq=False)
class Rounding:
    """What rounding alone does to a matrix.

    Args:
        dtype: To which was rounded.
        relative: Norm of the rounding error over the norm of the weights.
        singular: Singular values of a random rounding error, largest first: uniform within half a
            step of every entry.
        edge: Singular values of the change above it are not rounding.
    """

    dtype: torch.dtype
    relative: float
    singular: Float[Tensor, " rank"]
    edge: float


@torch.no_grad()
def rounding_noise(
    base: Float[Tensor, "d_out d_in"],
    finetuned: Float[Tensor, "d_out d_in"],
    found: LowRank,
    *,
    seed: int = 0,
) -> Rounding:
    """Simulate the rounding error in the difference of two matrices and decompose it.

    The error of an entry is uniform within half a step. The base's counts if it lies on a grid as
    coarse as the fine-tune's: whether the change was made before it was rounded or after cannot be
    seen, and the larger noise is assumed. Where the whole change is smaller than that, most entries
    do not move and the error is no larger than the change: the noise is then scaled to it.

    Args:
        base: Weights before.
        finetuned: Weights after.
        found: The largest singular values of the change.
        seed: Of the simulated error.

    Source:
        Marchenko and Pastur 1967: noise of standard deviation s in an m x n matrix has singular
        values up to s (sqrt m + sqrt n); Johnstone 2001 for how far the largest strays.
    """
    dtype = precision_of(finetuned)
    squares = steps(finetuned, dtype) ** 2
    if dtype != torch.float32 and precision_of(base) == dtype:
        squares += steps(base, dtype) ** 2
    generator = torch.Generator().manual_seed(seed)
    error = _errors(squares, generator)
    rounding = energy_of(error)
    noise = randomized_svd(error, min(found.rank, 16), seed=seed).singular.double()
    again = range(min(18, (1 << 19) // error.numel()))  # small matrices stray further
    largest = [float(torch.linalg.matrix_norm(_errors(squares, generator), 2)) for _ in again]
    total = energy_of(finetuned.float() - base.float())
    size = min(1.0, math.sqrt(total / rounding)) if rounding else 0.0
    m, n = (math.sqrt(each) for each in base.shape)
    reach = math.sqrt(1 + 4 * (1 / m + 1 / n) ** (1 / 3) / (m + n))
    law = math.sqrt(rounding) * (m + n) / (m * n)
    edge = reach * size * max(law, float(noise[0]), *largest)
    arithmetic = 2.0**-22 * float(found.singular[0])
    norm = math.sqrt(energy_of(base))
    relative = math.sqrt(rounding) / norm if norm else math.nan
    return Rounding(dtype, relative, (noise * size).float(), max(edge, arithmetic))


def _errors(squares: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform errors within half a step of every entry, from the squared steps."""
    draw = torch.rand(squares.shape, generator=generator).to(squares)
    return draw.sub_(0.5).mul_(squares.sqrt())


def energy_of(tensor: Tensor) -> float:
    """Sum of squares in float64, a block at a time."""
    parts = tensor.detach().reshape(-1).split(1 << 22)
    return sum(float(part.double().square_().sum()) for part in parts)


def energy_in(singular: Float[Tensor, " rank"], energy: float, rank: int) -> float:
    """Share of the squared Frobenius norm in the first ``rank`` singular values."""
    return float(singular[:rank].double().pow(2).sum()) / energy if energy > 0 else math.nan


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer.

    Args:
        n_heads: Query heads.
        n_kv_heads: Key and value heads; each serves ``n_heads / n_kv_heads`` query heads.
        head_dim: Width of a head.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int

    def rows(self, weight: Tensor, head: int) -> Tensor:
        """Rows of q_proj (or of k_proj and v_proj) that belong to a query head."""
        shared = weight.shape[0] == self.n_kv_heads * self.head_dim
        index = head * self.n_kv_heads // self.n_heads if shared else head
        return weight[index * self.head_dim : (index + 1) * self.head_dim]


def circuit(
    weights: dict[str, Tensor], heads: Heads, head: int, kind: str
) -> tuple[Float[Tensor, "head_dim d_in"], Float[Tensor, "d_out head_dim"]]:
    """Factors (A, B) of one head's circuit ``B @ A`` in the residual stream.

    ``OV`` is what the head writes of what it attends to, ``QK`` the bilinear form of its scores
    (queries as rows, keys as columns), without rotary embeddings, biases and norms of q and k. The
    gain of the norm before attention is folded into q, k and v; the output's projection reads no
    norm and has none.

    Args:
        weights: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and ``gain``.
        heads: Sizes.
        head: Query head.
        kind: "OV" or "QK".
    """
    gain = weights["gain"].double()
    if kind == "OV":
        columns = slice(head * heads.head_dim, (head + 1) * heads.head_dim)
        read = heads.rows(weights["v_proj"].double(), head) * gain
        return read, weights["o_proj"][:, columns].double()
    queries = heads.rows(weights["q_proj"].double(), head) * gain
    keys = heads.rows(weights["k_proj"].double(), head) * gain
    return keys, queries.T


def circuit_change(
    base: Sequence[Tensor], finetuned: Sequence[Tensor]
) -> tuple[LowRank, float, float]:
    """Decompose the difference of two products; their norms follow.

    Args:
        base: Factors (A, B).
        finetuned: The same of the fine-tune.

    Returns:
        The difference, at most twice a head's rank, and both products' Frobenius norms.
    """
    (a0, b0), (a1, b1) = base, finetuned
    change = factored_svd(torch.cat([a1, a0]), torch.cat([b1, -b0], 1))
    return change, factored_svd(a0, b0).norm, factored_svd(a1, b1).norm
