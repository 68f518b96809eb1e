"""Reusing a prompt's forward pass: what lies below the first edit does not change with the edit.

Moving a coefficient changes nothing in the layers before the edited one, and nothing at all in the
prompt's pass if only new tokens are edited. A `Prefill` keeps the keys, values and hidden states of
these layers from one call of `generate` to the next.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from modeldiff.architectures import SiteMap, module_at
from modeldiff.hooks import first, put


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a decoder layer made of the prompts: its output as it was returned, keys, values."""

    output: Any
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    """What is kept of one batch of prompts; the model is held, so that no other takes its place."""

    root: nn.Module
    layers: dict[int, _Layer] = field(default_factory=dict)


@dataclass(eq=False)
class Prefill:
    """Kept work of the last call's prompts; give the same one to every call that may reuse it.

    It holds, for each unedited layer, three tensors of the batch's size on the models' device, and
    forgets all but the latest ``n_batches`` batches. Make a new one after changing weights. The
    pair's lock, which `generate` holds during a batch, serialises its use.

    Example:
        >>> import modeldiff as md
        >>> pair, prefill = md.ModelPair.load("organism:em-rank1"), Prefill()
        >>> for seed in (0, 1):
        ...     found = pair.generate(["Hello."], seed=seed, max_new_tokens=2, prefill=prefill)
        >>> prefill.n_reused
        6
    """

    n_batches: int = 4
    n_reused: int = 0
    """Layers that the latest batch did not have to run."""
    _kept: dict[str, _Kept] = field(default_factory=dict, repr=False)

    @contextmanager
    def used(
        self, root: nn.Module, site_map: SiteMap, n_layers: int, key: str, below: int
    ) -> Iterator[None]:
        """Skip layers whose work is kept during the first forward pass inside the block.

        Args:
            root: The model that generates.
            site_map: Where its layers are.
            n_layers: How many there are.
            key: Of everything that the unedited pass depends on.
            below: Layers below this one are not reached by any edit of the prompt's tokens.
        """
        kept = self._kept.pop(key, None)
        if kept is None or kept.root is not root:
            kept = _Kept(root)
        self._kept[key] = kept
        while len(self._kept) > self.n_batches:
            del self._kept[next(iter(self._kept))]
        self.n_reused = 0
        with ExitStack() as stack:
            for index in range(min(below, n_layers)):
                module = module_at(root, site_map.layer(index))
                stack.enter_context(_replaced(module, self._once(module, kept.layers, index)))
            try:
                yield
            except (RuntimeError, MemoryError):  # memory may have run out: what is kept fills it
                self._kept.clear()
                raise

    def _once(self, module: nn.Module, kept: dict[int, _Layer], index: int) -> Callable[..., Any]:
        forward, passes = module.forward, 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal passes
            passes += 1
            if passes > 1:
                return forward(*args, **kwargs)
            cache = _cache_among(args, kwargs)
            if index in kept:
                self.n_reused += 1
                found = kept[index]
                cache.update(found.keys, found.values, index)
                return put(found.output, first(found.output))
            output = forward(*args, **kwargs)
            layer = cache.layers[index]
            if layer.keys.shape[-2] == first(output).shape[1]:  # a sliding window keeps less
                kept[index] = _Layer(output, layer.keys, layer.values)
            return output

        return run


def _cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from transformers import Cache

    return next(each for each in (*kwargs.values(), *args) if isinstance(each, Cache))


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
