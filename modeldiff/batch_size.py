"""Batches as large as memory allows: where it runs out, they are halved and the rest goes on.

What memory a batch takes is not known before it ran: it depends on the model, the sites that are
read, the vocabulary, and on what else is on the device. So it is tried. A batch that does not fit
has changed nothing; it is cut in half and so are all after it, and what was finished is kept.
Results are those of the smaller batches, to the bit, as if these had been asked for.
"""

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn

from modeldiff.batching import Batch, make_batch, n_together, padding_id, padding_worth
from modeldiff.errors import ModelDiffError, SetupError
from modeldiff.forward import device_of
from modeldiff.loading import Sides
from modeldiff.tokens import Text

T = TypeVar("T")
R = TypeVar("R")
P = TypeVar("P")

_SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)  # fmt: skip
_GIB = 1 << 30
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[str, int]]" = weakref.WeakKeyDictionary()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or here.

    Example:
        >>> out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        True
        >>> out_of_memory(RuntimeError("shapes do not fit"))
        False
    """
    if isinstance(error, ModelDiffError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in _SIGNS)


def known_limit(root: nn.Module, what: str) -> int | None:
    """Tokens of a batch that fitted after memory had run out in this work; None if it never did."""
    return _KNOWN.get(root, {}).get(what)


def fitted(
    root: nn.Module,
    waiting: Sequence[T],
    work: Callable[[list[T]], R],
    *,
    what: str,
    width: Callable[[T], int],
    max_tokens: int = sys.maxsize,
    max_rows: int = 256,
    max_padding: int = sys.maxsize,
    remember: bool = True,
) -> Iterator[tuple[list[T], R]]:
    """Work through items in batches that fit, in order; every item comes exactly once.

    Args:
        root: The model, for which the size that fits is remembered.
        waiting: What is to be worked on; neighbours share a batch.
        work: Done with a batch. Called again with a part of it after memory ran out, so it must
            have changed nothing then.
        what: Name of the work, such as "capture".
        width: Tokens of an item.
        max_tokens: Tokens in a batch at most, padding included.
        max_rows: Items in a batch at most.
        max_padding: Padding tokens in a batch at most.
        remember: Begin the next time with the size that fitted this time. False where results
            must not depend on what ran before.

    Yields:
        The items of a batch, and what ``work`` made of them.

    Raises:
        SetupError: If memory runs out on a single item.
    """
    left = list(waiting)
    limit = min(max_tokens, (remember and known_limit(root, what)) or max_tokens)
    while left:
        widths = [max(1, width(item)) for item in left[:max_rows]]
        n = n_together(widths, limit, max_rows, max_padding)
        found, said = _attempt(work, left[:n])
        if found:
            yield left[:n], found.pop()
            left = left[n:]
            continue
        _release()
        if n == 1:
            raise SetupError(_too_large(what, widths[0], said))
        limit = n * max(widths[:n]) // 2
        if remember:
            _KNOWN.setdefault(root, {})[what] = limit


def each_batch(
    sides: Sides,
    texts: Sequence[Text],
    max_tokens: int,
    work: Callable[[Batch], R],
    *,
    what: str,
    remember: bool = True,
) -> Iterator[tuple[Batch, R]]:
    """Batch texts by length, padded on the right, and work on each batch, smaller where it must be.

    Args:
        sides: The pair.
        texts: None of them empty.
        max_tokens: Tokens in a batch at most, padding included. A longer text is a batch alone.
        work: See `fitted`.
        what: See `fitted`.
        remember: See `fitted`.

    Raises:
        MaskError: If a text has no tokens.
        SetupError: If memory runs out on a single text.
    """
    root = sides.roots[0]
    pad_id = padding_id(sides.tokenizer)
    order = sorted(range(len(texts)), key=lambda i: (-texts[i].n_tokens, i))

    def of_rows(rows: list[int]) -> tuple[Batch, R]:
        batch = make_batch([texts[i] for i in rows], pad_id, "right", order=rows)
        return batch, work(batch)

    for _, found in fitted(
        root, order, of_rows, what=what, width=lambda i: texts[i].n_tokens,
        max_tokens=max_tokens, max_padding=padding_worth(device_of(root)), remember=remember,
    ):  # fmt: skip
        yield found


def at_once(root: nn.Module, n: int, work: Callable[[int], R], *, what: str, width: int) -> R:
    """Do a whole work with n of its parts at a time, or half as many, until it fits.

    For parts that share what was computed for all of them, such as edits of one batch of texts.
    Used inside the work of `each_batch` or `fitted`, which goes on with fewer texts if not even
    one part fits.

    Args:
        root: The model, for which the size that fits is remembered.
        n: Parts at a time at most.
        work: Given how many at a time; done again from its beginning after memory ran out.
        what: Name of the work.
        width: Tokens of a part.

    Raises:
        torch.OutOfMemoryError: If memory runs out on one part.

    Example:
        >>> at_once(nn.Linear(1, 1), 8, lambda n: n, what="edits", width=10)
        8
    """
    n = max(1, min(n, (known_limit(root, what) or sys.maxsize) // width))
    while True:
        found, said = _attempt(work, n)
        if found:
            return found.pop()
        _release()
        if n == 1:
            raise torch.OutOfMemoryError(said)
        n //= 2
        _KNOWN.setdefault(root, {})[what] = n * width


def _attempt(work: Callable[[P], R], part: P) -> tuple[list[R], str]:
    """The result in a list, to be taken out of it; or nothing, and what the system said.

    The error is gone when this returns, and with it the frames that hold tensors of the batch.
    """
    try:
        return [work(part)], ""
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return [], str(error).strip().split("\n")[0]


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _too_large(what: str, n_tokens: int, said: str) -> str:
    return (
        f"memory ran out ({what}) on one text of {n_tokens} tokens, new ones included, alone in "
        f"its batch: smaller batches cannot help. It said: {said[:300] or 'nothing'} Now there "
        f"are {memory_now()}. Give shorter texts (or fewer max_new_tokens, or fewer sites); free "
        "what else is on the device; or load the pair with device_map='auto' over several GPUs "
        "or the CPU's memory, with dtype=torch.bfloat16, or, if it has an adapter, with "
        "quantization='8bit'."
    )


def memory_now() -> str:
    """Free and used memory of every GPU, or of this machine if there is none."""
    if torch.cuda.is_available():
        parts = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            used = (total - free) / _GIB
            parts.append(f"{free / _GIB:.1f} GiB free and {used:.1f} GiB used on cuda:{index}")
        return ", ".join(parts)
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return "an unknown number of bytes free"
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    return f"{free / _GIB:.1f} GiB free and {(total - free) / _GIB:.1f} GiB used on the CPU"
