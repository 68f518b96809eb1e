"""What can be told from the tokens alone: the baselines that a probe of activations must beat."""

import torch
from torch import Tensor

from modeldiff._shapes import Float, Int


def bag_of_tokens(
    token_ids: Int[Tensor, " token"], text_index: Int[Tensor, " token"], max_tokens: int = 2000
) -> Float[Tensor, "text feature"]:
    """log(1 + count) of the tokens that occur in most texts.

    Args:
        token_ids: Tokens, one after the other.
        text_index: Which text each belongs to, 0 to n - 1.
        max_tokens: Features at most: the tokens in the largest number of texts.

    Example:
        >>> bag_of_tokens(torch.tensor([7, 7, 9]), torch.tensor([0, 0, 1])).expm1().round().tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    known, column = torch.unique(token_ids, return_inverse=True)
    counts = torch.zeros(int(text_index.max()) + 1, len(known), dtype=torch.float64)
    counts.index_put_((text_index, column), torch.ones(()).double(), accumulate=True)
    if len(known) > max_tokens:
        common = (counts > 0).sum(0).argsort(descending=True, stable=True)[:max_tokens]
        counts = counts[:, common.sort().values]
    return counts.log1p()


def lengths(text_index: Int[Tensor, " token"]) -> Float[Tensor, "text 1"]:
    """Number of tokens of each text, as one feature.

    Example:
        >>> lengths(torch.tensor([0, 0, 1])).tolist()
        [[2.0], [1.0]]
    """
    return torch.bincount(text_index).double()[:, None]
