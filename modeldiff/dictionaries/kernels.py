"""The sparse arithmetic of dictionaries: which latents fire, decoding, gradients.

With 64 of 16384 latents a row, a dense decoder spends 99.6 % of its work on zeros. These functions
touch what fires alone. On the CPU they are torch and numpy, on CUDA the kernels of
`modeldiff.dictionaries.triton_kernels` where Triton is installed, else plain torch. None of them
is differentiable: `modeldiff.dictionaries.fast` writes the gradients out.
"""

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from modeldiff._shapes import Bool, Float, Int
from modeldiff.dictionaries.codes import Codes
from modeldiff.errors import MismatchError

_SCORES = 1 << 20  # compared at once: the mask stays in the cache
_ROWS = 512  # summed at once: larger results come on fresh pages, which cost more than the sums
_SAMPLE = 1 << 17  # scores from which a floor is guessed


@dataclass(frozen=True, eq=False)
class ByLatent:
    """The entries of codes, latent after latent (compressed sparse columns).

    Args:
        offsets: Where each latent starts in the lists, and where the last one ends.
        row: Row of each entry, rising within a latent.
        order: Place of each entry in the codes it was taken from.
    """

    offsets: Int[Tensor, " latents_plus_one"]
    row: Int[Tensor, " nonzero"]
    order: Int[Tensor, " nonzero"]

    @classmethod
    def of(cls, codes: Codes) -> "ByLatent":
        """Sort the entries of ``codes`` by latent."""
        order = codes.latent.argsort(stable=True)
        ends = torch.bincount(codes.latent, minlength=codes.n_latents).cumsum(0)
        return cls(torch.cat((ends.new_zeros(1), ends)), codes.row[order], order)


def select(
    pre: Float[Tensor, "row latent"],
    weight: Float[Tensor, " latent"],
    n_keep: int,
    hint: float | None = None,
) -> tuple[Codes, float]:
    """Keep the ``n_keep`` largest of all rows together, without sorting them: BatchTopK.

    Exact: what is kept is what a sort of ``relu(pre) * weight`` would keep, and of equal scores
    the earlier ones (row by row). Zeros never fire, so fewer are kept where fewer are positive.

    Args:
        pre: Pre-activations.
        weight: Positive factor of every latent's score; the values kept do not have it.
        n_keep: Number of entries kept.
        hint: About the smallest score that will be kept, e.g. that of the last batch. Right or
            wrong, it changes the time taken and nothing else.

    Returns:
        The codes, with values ``relu(pre)``, and the smallest score kept; 0 if none is.

    Raises:
        MismatchError: If shapes differ, a score is NaN, or ``n_keep`` is not positive.

    Source:
        Bussmann, Leask & Nanda 2024, "BatchTopK Sparse Autoencoders", arXiv:2412.06410.

    Example:
        >>> codes, least = select(torch.tensor([[3.0, 1.0], [-1.0, 2.0]]), torch.ones(2), 2)
        >>> codes.dense(), least
        (tensor([[3., 0.],
                [0., 2.]]), 2.0)
    """
    if pre.dim() != 2 or weight.shape != pre.shape[1:] or n_keep < 1:
        raise MismatchError(
            f"pre-activations {tuple(pre.shape)}, weights {tuple(weight.shape)} and "
            f"n_keep={n_keep}; give (row, latent), (latent,) and 1 or more."
        )
    pre = pre.contiguous()
    found = pre.new_empty(0, dtype=torch.long)
    for floor in _floors(pre, weight, n_keep, hint):
        found = candidates(pre, floor, weight)
        if len(found) >= n_keep:
            break
    value = pre.view(-1)[found]
    kept, least = largest(value * weight[found % pre.shape[1]], n_keep)
    return codes_at(found[kept], value[kept], pre.shape), least


def _floors(scores: Tensor, weight: Tensor | None, n_keep: int, hint: float | None):
    """Guesses of a score below the smallest kept, the surest last."""
    if hint is not None and 0 < hint < math.inf:
        yield 0.98 * hint
    yield sampled_floor(scores, weight, n_keep)
    yield 0.0


def sampled_floor(
    scores: Float[Tensor, "row latent"], weight: Float[Tensor, " latent"] | None, n_keep: int
) -> float:
    """A score that somewhat more than ``n_keep`` exceed, judged from a sample; at least 0.

    Raises:
        MismatchError: If a sampled score is NaN.
    """
    found = sample(scores, weight)
    if found.isnan().any():
        raise MismatchError("a score is NaN: are the activations and the weights finite?")
    rank = safe_rank(n_keep * len(found) / scores.numel())
    if rank >= len(found):
        return 0.0
    return max(0.0, float(found.topk(rank, sorted=False).values.min()))


def sample(
    scores: Float[Tensor, "row latent"], weight: Float[Tensor, " latent"] | None
) -> Float[Tensor, " sampled"]:
    """Some of the scores, of every latent, in float32."""
    width, step = scores.shape[1], max(1, scores.numel() // _SAMPLE)
    while math.gcd(step, width) > 1 and step > 1:
        step += 1  # so that the sample visits every latent
    found = scores.view(-1)[::step].float()
    if weight is None:
        return found
    places = torch.arange(0, scores.numel(), step, device=scores.device)
    return found * weight[places % width]


def safe_rank(share: float) -> int:
    """How many of a sample to take for ``share`` expected: five standard deviations more."""
    return math.ceil(share + 5 * math.sqrt(share) + 5)


def candidates(
    scores: Float[Tensor, "row latent"],
    floor: float,
    weight: Float[Tensor, " latent"] | None = None,
) -> Int[Tensor, " found"]:
    """Flat indices, rising, of the scores above ``floor``.

    Args:
        scores: float32 or bfloat16, contiguous.
        floor: 0 or more.
        weight: Factor of every latent's score; for float32 alone.
    """
    if scores.is_cuda:
        if triton := _triton():
            return triton.candidates(scores, floor, weight)
        weighted = scores if weight is None else scores * weight
        return (weighted > floor).view(-1).nonzero().squeeze(1)
    width, step = scores.shape[1], max(1, _SCORES // scores.shape[1])
    found = []
    for start in range(0, len(scores), step):
        block = scores[start : start + step]
        above = _above(block if weight is None else block * weight, floor)
        found.append(np.flatnonzero(above) + start * width)
    return torch.from_numpy(np.concatenate(found)) if found else torch.zeros(0, dtype=torch.long)


def _above(block: Tensor, floor: float) -> np.ndarray:
    if block.dtype != torch.bfloat16:
        return block.numpy() > floor
    # Positive numbers have the order of their bits; numpy compares 16-bit integers fastest.
    bits = np.float32(floor).view(np.uint32) >> 16  # rounded down
    return block.view(torch.int16).numpy() > np.int16(bits)


def largest(
    scores: Float[Tensor, " candidate"], n_keep: int
) -> tuple[Bool[Tensor, " candidate"], float]:
    """Mark the ``n_keep`` largest positive scores, of equal ones the first; also the smallest."""
    positive = scores > 0
    if (n_positive := int(positive.sum())) <= n_keep:
        return positive, float(scores[positive].min()) if n_positive else 0.0
    least = scores.topk(n_keep, sorted=False).values.min()
    kept = scores > least
    ties = (scores == least).nonzero().squeeze(1)
    kept[ties[: n_keep - int(kept.sum())]] = True
    return kept, float(least)


def row_floor(values: Float[Tensor, "row column"], k: int) -> Float[Tensor, " row"]:
    """The ``k``-th largest value of every row."""
    if values.is_cuda:
        return values.topk(k, sorted=False).values.amin(1)
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place].copy())


def codes_at(
    index: Int[Tensor, " kept"], value: Float[Tensor, " kept"], shape: tuple[int, ...]
) -> Codes:
    """Codes with these values at these flat indices, which rise, of a (row, latent) matrix."""
    rows, width = shape
    starts = torch.arange(0, (rows + 1) * width, width, device=index.device)
    return Codes(torch.searchsorted(index, starts), index % width, value, width)


def decode(
    codes: Codes, W_dec: Float[Tensor, "latent model d_model"]
) -> Float[Tensor, "row model d_model"]:
    """Reconstruct rows from what fires: ``codes.dense() @ W_dec``, without bias."""
    _check(codes, W_dec, "W_dec", codes.n_latents)
    flat = weighted_sum(W_dec.flatten(1), codes.offsets, codes.latent, codes.value)
    return flat.unflatten(1, W_dec.shape[1:])


def decoder_gradient(
    codes: Codes, grad: Float[Tensor, "row model d_model"]
) -> Float[Tensor, "latent model d_model"]:
    """Gradient of the decoder from that of the reconstruction: ``codes.dense().T @ grad``."""
    _check(codes, grad, "the gradient", len(codes))
    by = ByLatent.of(codes)
    flat = weighted_sum(grad.flatten(1), by.offsets, by.row, codes.value[by.order])
    return flat.unflatten(1, grad.shape[1:])


def code_gradient(
    codes: Codes,
    grad: Float[Tensor, "row model d_model"],
    W_dec: Float[Tensor, "latent model d_model"],
) -> Float[Tensor, " nonzero"]:
    """Gradient of the values that fire: ``grad @ W_dec.T`` at their places alone."""
    _check(codes, grad, "the gradient", len(codes))
    _check(codes, W_dec, "W_dec", codes.n_latents)
    by = ByLatent.of(codes)
    dots = sampled(W_dec.flatten(1), grad.flatten(1), by.offsets, by.row)
    return torch.empty_like(dots).index_copy_(0, by.order, dots)


def _check(codes: Codes, matrix: Tensor, name: str, length: int) -> None:
    if matrix.dim() != 3 or len(matrix) != length:
        raise MismatchError(
            f"{name} is {tuple(matrix.shape)}, for codes of {len(codes)} rows and "
            f"{codes.n_latents} latents; give ({length}, model, d_model)."
        )


def weighted_sum(
    source: Float[Tensor, "column width"],
    offsets: Int[Tensor, " rows_plus_one"],
    column: Int[Tensor, " nonzero"],
    value: Float[Tensor, " nonzero"],
    out: Float[Tensor, "row width"] | None = None,
) -> Float[Tensor, "row width"]:
    """A sparse matrix, given row by row, times a dense one; into ``out`` if there is one."""
    if out is None:
        out = source.new_empty(len(offsets) - 1, source.shape[1])
    if source.is_cuda and (triton := _triton()):
        return triton.weighted_sum(source, offsets, column, value, out)
    starts = [*range(0, len(out), _ROWS), len(out)]
    ends = offsets[starts].tolist()
    for i, start in enumerate(starts[:-1]):
        inside, stop = slice(ends[i], ends[i + 1]), starts[i + 1]
        out[start:stop] = embedding_bag(
            column[inside],
            source,
            offsets[start : stop + 1] - ends[i],
            mode="sum",
            per_sample_weights=value[inside],
            include_last_offset=True,
        )
    return out


def sampled(
    left: Float[Tensor, "row width"],
    right: Float[Tensor, "column width"],
    offsets: Int[Tensor, " rows_plus_one"],
    column: Int[Tensor, " nonzero"],
) -> Float[Tensor, " nonzero"]:
    """Products ``left @ right.T`` at the places of a sparse matrix, given row by row.

    Fastest where ``left`` is the longer: its rows are read once each, those of ``right`` often.
    """
    if left.is_cuda and (triton := _triton()):
        return triton.sampled(left, right, offsets, column)
    _quiet()
    zeros = left.new_zeros(len(column))
    size = (len(left), len(right))
    places = torch.sparse_csr_tensor(offsets, column, zeros, size, check_invariants=False)
    return torch.sparse.sampled_addmm(places, left, right.t(), beta=0.0).values()


@lru_cache(maxsize=1)
def _triton() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from modeldiff.dictionaries import triton_kernels

    return triton_kernels


@lru_cache(maxsize=1)
def _quiet() -> None:
    """Let torch say once, unheard, that its sparse rows are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
