"""Splitting rows into two random halves: by text where the texts are known."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from modeldiff._shapes import Bool
from modeldiff.errors import MismatchError

Groups = tuple[Sequence[Hashable] | Tensor, Sequence[Hashable] | Tensor]


def half_masks(
    n_positive: int, n_negative: int, groups: Groups | None, seed: int
) -> tuple[Bool[Tensor, " n_positive"], Bool[Tensor, " n_negative"]]:
    """Say which rows of either side are in the first of two random halves.

    Sides of one length are split alike, so that rows of the same tokens stay together.

    Args:
        n_positive: Rows on the positive side.
        n_negative: Rows on the negative side.
        groups: Text id of every row, per side. All rows of a text go to one half, on both
            sides. Without ids the rows are split singly.
        seed: Of the split.

    Raises:
        MismatchError: If there is not one id per row.

    Example:
        >>> half_masks(4, 2, (["a", "a", "b", "b"], ["a", "b"]), seed=0)
        (tensor([ True,  True, False, False]), tensor([ True, False]))
    """
    if groups is None:
        return _random_half(n_positive, seed), _random_half(n_negative, seed)
    positive, negative = (ids.tolist() if isinstance(ids, Tensor) else list(ids) for ids in groups)
    if (len(positive), len(negative)) != (n_positive, n_negative):
        raise MismatchError(
            f"{len(positive)} and {len(negative)} text ids for {n_positive} positive and "
            f"{n_negative} negative rows: one id per row is needed."
        )
    both = set(positive) & set(negative)
    shared = [text for text in dict.fromkeys(positive) if text in both]
    odd = len(shared) % 2 == 1  # the texts of one side alone then even the halves out
    first = _first_half(shared, seed, False)
    for side in (positive, negative):
        own = [text for text in dict.fromkeys(side) if text not in both]
        first |= _first_half(own, seed, odd)
    return (
        torch.tensor([text in first for text in positive], dtype=torch.bool),
        torch.tensor([text in first for text in negative], dtype=torch.bool),
    )


def _random_half(n: int, seed: int) -> Bool[Tensor, " n"]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % 2 == 0


def _first_half(texts: list[Hashable], seed: int, smaller: bool) -> set[Hashable]:
    chosen = _random_half(len(texts), seed).tolist()
    return {text for text, half in zip(texts, chosen, strict=True) if half != smaller}
