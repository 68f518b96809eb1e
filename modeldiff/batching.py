"""Texts padded into batches, and masks aligned to the padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modeldiff._shapes import Bool, Int
from modeldiff.errors import MaskError
from modeldiff.masks import Mask, parse_mask
from modeldiff.tokens import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers takes a second to import

Side = Literal["left", "right"]


def padding_id(tokenizer: Tokenizer) -> int:
    """Id to pad with: pad, else eos, else 0. Padding is masked and never read, so any will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in known if isinstance(each, int)), 0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts padded to one length.

    Args:
        ids: Token ids, int64.
        attention_mask: 1 for tokens, 0 for padding.
        position_ids: Position of each token in its own text, from 0, whatever the padding.
        texts: The texts, one per row.
        order: Where each row stood in the list that was batched.
        pad_side: Where the padding is.
    """

    ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    position_ids: Int[Tensor, "batch seq"]
    texts: tuple[Text, ...]
    order: tuple[int, ...]
    pad_side: Side


def make_batch(
    texts: Sequence[Text], pad_id: int, side: Side = "left", order: Sequence[int] | None = None
) -> Batch:
    """Pad texts to the longest of them.

    Args:
        texts: At least one, none of them empty.
        pad_id: See `padding_id`.
        side: "left" to generate, so that all texts end together; "right" to capture.
        order: Original indices of the texts; 0, 1, 2 ... by default.

    Raises:
        MaskError: If there are no texts, or one has no tokens.
    """
    empty = [i for i, text in enumerate(texts) if text.n_tokens == 0]
    if empty or not texts:
        raise MaskError(
            f"got {len(texts)} texts to batch, of which {len(empty)} are empty {empty[:5]}; "
            "give at least one, and leave empty ones out."
        )
    width = max(text.n_tokens for text in texts)
    ids = [_padded(list(text.ids), width, pad_id, side) for text in texts]
    real = torch.tensor([_padded([1] * text.n_tokens, width, 0, side) for text in texts])
    return Batch(
        ids=torch.tensor(ids),
        attention_mask=real,
        position_ids=(real.cumsum(1) - 1).clamp(min=0),
        texts=tuple(texts),
        order=tuple(range(len(texts)) if order is None else order),
        pad_side=side,
    )


def padding_worth(device: torch.device) -> int:
    """Padding tokens that cost about as much as starting another batch on a device."""
    return 64 if device.type == "cpu" else 8192


def batches(
    texts: Sequence[Text],
    *,
    max_tokens: int = 4096,
    max_rows: int = 256,
    max_padding: int = 64,
    pad_id: int = 0,
) -> Iterator[Batch]:
    """Batch texts of similar length, padded on the right; every text comes exactly once.

    The longest come first, so that memory runs out at once if it does.

    Args:
        texts: None of them empty.
        max_tokens: Tokens in a batch at most, padding included. A longer text is a batch alone.
        max_rows: Texts in a batch at most.
        max_padding: Padding tokens in a batch at most; see `padding_worth`.
        pad_id: See `padding_id`.

    Raises:
        MaskError: If a text has no tokens.
    """
    waiting = sorted(range(len(texts)), key=lambda i: (-texts[i].n_tokens, i))
    while waiting:
        widths = [texts[i].n_tokens for i in waiting[: max(1, max_rows)]]
        n_rows = n_together(widths, max_tokens, max_rows, max_padding)
        rows, waiting = waiting[:n_rows], waiting[n_rows:]
        yield make_batch([texts[i] for i in rows], pad_id, "right", order=rows)


def n_together(widths: Sequence[int], max_tokens: int, max_rows: int, max_padding: int) -> int:
    """How many rows of these widths, from the first on, make one batch; at least one.

    Args:
        widths: Tokens of each row; at least one row.
        max_tokens: Tokens in a batch at most, padding included.
        max_rows: Rows in a batch at most.
        max_padding: Padding tokens in a batch at most.

    Example:
        >>> n_together([5, 5, 4, 1], max_tokens=20, max_rows=9, max_padding=3)
        3
    """
    widest, own = widths[0], widths[0]
    for n, width in enumerate(widths[1:max_rows], start=2):
        widest, own = max(widest, width), own + width
        if n * widest > max_tokens or n * widest - own > max_padding:
            return n - 1
    return max(1, min(len(widths), max_rows))


def mask_tensor(batch: Batch, mask: Mask | str) -> Bool[Tensor, "batch seq"]:
    """Select tokens in every row of a batch; padding is never selected.

    Raises:
        MaskError: If the mask is unknown, or cannot be applied to one of the texts.
    """
    where, width = parse_mask(mask), batch.ids.shape[1]
    rows = [_padded(where.select(text), width, False, batch.pad_side) for text in batch.texts]
    return torch.tensor(rows, dtype=torch.bool)


def _padded(row: list[Any], width: int, filler: Any, side: Side) -> list[Any]:
    padding = [filler] * (width - len(row))
    return padding + row if side == "left" else row + padding
