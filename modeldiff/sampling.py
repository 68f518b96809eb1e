"""Sampling with common random numbers: the same noise for a prompt's sample in every cell.

The uniform number behind a token depends on the seed, the prompt's ids, the sample and the step,
and on nothing else. So a row is the same whatever else is in its batch, and two models or two edits
that agree on a distribution draw the same token.
"""

from collections.abc import Callable, Sequence
from threading import Event

import numpy as np
import torch
from torch import Tensor

from modeldiff._files import digest
from modeldiff._shapes import Bool, Float, Int
from modeldiff.errors import InterventionError


def noise(seed: int, prompt: Sequence[int], sample: int, n: int) -> Float[Tensor, " n"]:
    """Uniform numbers in [0, 1) of one row, float64.

    Example:
        >>> torch.equal(noise(0, [1, 2], 0, 3), noise(0, [1, 2], 0, 5)[:3])
        True
    """
    key = int(digest(seed, list(prompt), sample), 16)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(n))


class Sampler:
    """A logits processor that leaves one token of each row: the sampled one.

    Used with greedy decoding, so that every engine draws the same tokens.

    Args:
        uniform: ``[row, step]`` from `noise`.
        temperature: 0 takes the most likely token.
        on_step: Called with the step and the chosen ids ``[row]``.
    """

    def __init__(
        self,
        uniform: Float[Tensor, "row step"],
        temperature: float,
        on_step: Callable[[int, Int[Tensor, " row"]], None] | None = None,
    ) -> None:
        self._uniform, self._temperature, self._on_step = uniform, temperature, on_step
        self._step = 0

    def __call__(
        self, input_ids: Int[Tensor, "row seq"], scores: Float[Tensor, "row vocab"]
    ) -> Float[Tensor, "row vocab"]:
        """Return scores that are 0 at the chosen token and -inf elsewhere.

        Raises:
            InterventionError: If a logit is NaN; no token could be drawn from it.
        """
        refuse_nan(int(torch.isnan(scores).any(-1).sum()), len(scores), self._step)
        chosen = choose(scores, self._uniform[:, self._step], self._temperature)
        if self._on_step is not None:
            self._on_step(self._step, chosen)
        self._step += 1
        out = torch.full_like(scores, -torch.inf)
        return out.scatter_(1, chosen[:, None], 0.0)


def refuse_nan(broken: int, n_rows: int, step: int) -> None:
    """Verify that a token can be drawn in every row.

    Args:
        broken: Rows with a logit that is NaN.
        n_rows: Of all.
        step: Number of the token.

    Raises:
        InterventionError: If there is any such row.
    """
    if broken:
        raise InterventionError(
            f"the logits of {broken} of {n_rows} rows are NaN at generated token {step}: an edit "
            "is too strong for the model's dtype, or the weights are damaged. Use a smaller "
            "coefficient, or load the pair in float32."
        )


def choose(
    scores: Float[Tensor, "row vocab"], uniform: Float[Tensor, " row"], temperature: float
) -> Int[Tensor, " row"]:
    """Draw a token per row by inverting the distribution function, in float64.

    Args:
        scores: Logits.
        uniform: One number in [0, 1) per row.
        temperature: 0 takes the most likely token.
    """
    return scores.argmax(-1) if temperature == 0 else draw(scores, uniform, temperature)


def draw(
    scores: Float[Tensor, "row vocab"], uniform: Float[Tensor, " row"], temperature: float | Tensor
) -> Int[Tensor, " row"]:
    """Draw as `choose` does at a temperature above 0, which may be a tensor on the device."""
    weights = torch.softmax(scores.double() / temperature, -1)
    cumulative = weights.cumsum(-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[1] - 1)[:, 0]


class Stopper:
    """A stopping criterion that ends every row once an event is set."""

    def __init__(self, cancel: Event) -> None:
        self._cancel = cancel

    def __call__(
        self, input_ids: Int[Tensor, "row seq"], scores: object, **options: object
    ) -> Bool[Tensor, " row"]:
        """Say for each row whether it ends."""
        return torch.full((len(input_ids),), self._cancel.is_set(), device=input_ids.device)
