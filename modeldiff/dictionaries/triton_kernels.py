"""The kernels of `modeldiff.dictionaries.kernels` in Triton, for CUDA.

Every result is written by one program, in a fixed order and summed in float32: no atomics, so
the same inputs give the same bits. The module can be imported without Triton, and with
``TRITON_INTERPRET=1`` its functions run on the CPU, which is how they are tested without a GPU.
"""
# Triton tells constants by their annotation.
# pyright: reportInvalidTypeForm=false

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modeldiff._shapes import Float, Int
from modeldiff.errors import SetupError

if TYPE_CHECKING:
    triton: Any
    tl: Any
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton, tl = None, SimpleNamespace(constexpr=int)


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


_SCORES, _ENTRIES, _WIDTH = 2048, 16, 128  # scores, entries and coordinates of one program


@_jit
def _above(scores, weight, floor, row, block, width, SIZE: tl.constexpr, WEIGHTED: tl.constexpr):
    place = block * SIZE + tl.arange(0, SIZE)
    inside = place < width
    score = tl.load(scores + row.to(tl.int64) * width + place, mask=inside, other=0.0)
    score = score.to(tl.float32)
    if WEIGHTED:
        score = score * tl.load(weight + place, mask=inside, other=0.0)
    return place, inside & (score > floor)


@_jit
def _count(scores, weight, floor, counts, width, SIZE: tl.constexpr, WEIGHTED: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    _, above = _above(scores, weight, floor, row, block, width, SIZE, WEIGHTED)
    tl.store(counts + row * tl.num_programs(1) + block, tl.sum(above.to(tl.int64), 0))


@_jit
def _write(scores, weight, floor, ends, found, width, SIZE: tl.constexpr, WEIGHTED: tl.constexpr):
    row, block = tl.program_id(0), tl.program_id(1)
    place, above = _above(scores, weight, floor, row, block, width, SIZE, WEIGHTED)
    rank = tl.cumsum(above.to(tl.int64), 0)
    end = tl.load(ends + row * tl.num_programs(1) + block)
    target = found + end - tl.sum(above.to(tl.int64), 0) + rank - 1
    tl.store(target, row.to(tl.int64) * width + place, mask=above)


@_jit
def _dots(left, right, row, column, out, n, width, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < n
    here = tl.load(row + entry, mask=inside, other=0)[:, None] * width
    there = tl.load(column + entry, mask=inside, other=0)[:, None] * width
    total = tl.zeros((ENTRIES, WIDTH), tl.float32)
    for start in range(0, width, WIDTH):
        place = (start + tl.arange(0, WIDTH))[None, :]
        real = inside[:, None] & (place < width)
        total += tl.load(left + here + place, mask=real, other=0.0).to(tl.float32) * tl.load(
            right + there + place, mask=real, other=0.0
        ).to(tl.float32)
    tl.store(out + entry, tl.sum(total, 1), mask=inside)


@_jit
def _sum_rows(
    source, offsets, column, value, out, width, ENTRIES: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first, last = tl.load(offsets + row), tl.load(offsets + row + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < last
        there = tl.load(column + entry, mask=inside, other=0)[:, None] * width
        real = inside[:, None] & (place < width)[None, :]
        rows = tl.load(source + there + place[None, :], mask=real, other=0.0).to(tl.float32)
        total += tl.sum(rows * tl.load(value + entry, mask=inside, other=0.0)[:, None], 0)
    tl.store(out + row * width + place, total, mask=place < width)


def candidates(
    scores: Float[Tensor, "row latent"],
    floor: float,
    weight: Float[Tensor, " latent"] | None = None,
) -> Int[Tensor, " found"]:
    """Flat indices, rising, of the scores above ``floor``; see `kernels.candidates`."""
    _require()
    rows, width = scores.shape
    grid = (rows, triton.cdiv(width, _SCORES))
    counts = torch.empty(grid, dtype=torch.long, device=scores.device)
    options = {"SIZE": _SCORES, "WEIGHTED": weight is not None}
    factor = scores if weight is None else weight
    with _on(scores):
        _count[grid](scores, factor, floor, counts, width, **options)
        ends = counts.view(-1).cumsum(0)
        found = torch.empty(int(ends[-1]), dtype=torch.long, device=scores.device)
        _write[grid](scores, factor, floor, ends, found, width, **options)
    return found


def sampled(
    left: Float[Tensor, "row width"],
    right: Float[Tensor, "column width"],
    offsets: Int[Tensor, " rows_plus_one"],
    column: Int[Tensor, " nonzero"],
) -> Float[Tensor, " nonzero"]:
    """Products ``left @ right.T`` at the places of a sparse matrix; see `kernels.sampled`."""
    _require()
    n, out = len(column), torch.empty(len(column), device=left.device)
    rows = torch.arange(len(left), device=left.device)
    row = rows.repeat_interleave(offsets.diff(), output_size=n)
    if n:
        with _on(left):
            _dots[(triton.cdiv(n, _ENTRIES),)](
                left, right, row, column, out, n, left.shape[1], ENTRIES=_ENTRIES, WIDTH=_WIDTH
            )
    return out


def weighted_sum(
    source: Float[Tensor, "column width"],
    offsets: Int[Tensor, " rows_plus_one"],
    column: Int[Tensor, " nonzero"],
    value: Float[Tensor, " nonzero"],
    out: Float[Tensor, "row width"],
) -> Float[Tensor, "row width"]:
    """A sparse matrix times a dense one, into ``out``; see `kernels.weighted_sum`.

    One program owns a stretch of one row of the result: decoding reads its latents' decoders,
    the decoder's gradient the rows on which its latent fires.
    """
    _require()
    width = source.shape[1]
    with _on(source):
        _sum_rows[(len(out), triton.cdiv(width, _WIDTH))](
            source, offsets, column, value, out, width, ENTRIES=_ENTRIES, WIDTH=_WIDTH
        )
    return out


def _require() -> None:
    if triton is None:
        raise SetupError("these kernels need Triton: pip install triton (Linux, CUDA).")


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's device, whichever is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
