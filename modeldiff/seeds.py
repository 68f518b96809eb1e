"""Randomness that is the caller's: seeded inside a block, untouched outside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's default generators inside the block and put them back afterwards.

    For code that draws from the global generator and takes no generator of its own (weight
    initialisation, ``generate``). Every visible CUDA device is seeded and restored too.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(2)
        >>> with seeded(3):
        ...     second = torch.rand(2)
        >>> torch.equal(first, second)
        True
    """
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield
