"""Queries, keys and attention patterns of one forward pass, seen and exchanged.

They have no module of their own, so a hook cannot reach them. Inside `watching` the model attends
with the plain formula below, which is told which layer calls it; everything is as it was after.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from modeldiff._shapes import Float
from modeldiff.architectures import SiteMap, module_at
from modeldiff.errors import SiteError

_NAME = "modeldiff_watched"


@dataclass(frozen=True, eq=False)
class Attention:
    """What one layer attended with, after rotary embeddings and norms.

    Args:
        query: ``[row, head, token, d_head]``.
        key: ``[row, kv_head, token, d_head]``; a kv head serves several heads in a row.
        weights: The pattern ``[row, head, token, token]``; rows sum to 1.
        mask: What is added to the scores, or None.
        scaling: What scores are multiplied by.
        softcap: Gemma 2's cap on scores, or None.
    """

    query: Float[Tensor, "row head token d_head"]
    key: Float[Tensor, "row kv_head token d_head"]
    weights: Float[Tensor, "row head token token"]
    mask: Tensor | None
    scaling: float
    softcap: float | None

    def pattern(self, query: Tensor, key: Tensor) -> Float[Tensor, "row head token token"]:
        """The pattern that other queries and keys give in this layer."""
        return pattern(query, key, self.mask, self.scaling, self.softcap)


@dataclass(eq=False)
class Watch:
    """Of one pass: what to put in, and what was seen.

    Args:
        put: Rows ``[row, token, heads * d_head]`` to put in, by ``"query.<layer>"`` and
            ``"key.<layer>"``.
        seen: By layer.
    """

    put: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[int, Attention] = field(default_factory=dict)

    def value(self, name: str) -> Float[Tensor, "row token width"]:
        """Queries or keys of a layer, heads side by side, by the names of ``put``."""
        kind, layer = name.split(".")
        found = self.seen[int(layer)]
        heads = found.query if kind == "query" else found.key
        return heads.transpose(1, 2).flatten(2)


_WATCHES: "WeakKeyDictionary[nn.Module, Watch]" = WeakKeyDictionary()


def pattern(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
) -> Float[Tensor, "row head token token"]:
    """Softmax of the masked, scaled and capped scores, in float32.

    Args:
        query: ``[row, head, token, d_head]``.
        key: ``[row, kv_head, token, d_head]``.
        mask: Added to the scores.
        scaling: Of the scores.
        softcap: Scores are bent to stay within it; None leaves them.
    """
    shared = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, 1).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    watch, layer = _WATCHES[module], int(module.layer_idx)  # pyright: ignore
    query = _exchanged(watch, f"query.{layer}", query)
    key = _exchanged(watch, f"key.{layer}", key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = pattern(query, key, attention_mask, scale, softcap)
    watch.seen[layer] = Attention(query, key, weights, attention_mask, scale, softcap)
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    out = weights.to(values.dtype) @ values
    return out.transpose(1, 2).contiguous(), weights


def _exchanged(watch: Watch, name: str, heads: Tensor) -> Tensor:
    rows = watch.put.get(name)
    if rows is None:
        return heads
    return rows.unflatten(-1, (heads.shape[1], -1)).transpose(1, 2).to(heads)


@contextmanager
def watching(
    root: nn.Module, site_map: SiteMap, watch: Watch | None = None, *, on: bool = True
) -> Iterator[Watch]:
    """Attend with the plain formula inside the block, and see what with.

    Args:
        root: The causal language model; hold its lock.
        site_map: Where its layers are.
        watch: What to put in; a new one that puts in nothing if None.
        on: False changes nothing, for callers that may not need it.

    Raises:
        SiteError: If the attention of this family cannot be watched.
    """
    watch = Watch() if watch is None else watch
    if not on:
        yield watch
        return
    _register()
    modules = _attentions(root, site_map)
    config: Any = root.config.get_text_config()  # pyright: ignore
    before = config._attn_implementation
    try:
        config._attn_implementation = _NAME
        _WATCHES.update(dict.fromkeys(modules, watch))
        yield watch
    finally:
        config._attn_implementation = before
        for module in modules:
            _WATCHES.pop(module, None)


def _attentions(root: nn.Module, site_map: SiteMap) -> list[nn.Module]:
    layers = module_at(root, site_map.layers)
    found = [module for module in layers.modules() if hasattr(module, "layer_idx")]
    if not found:
        raise SiteError(
            f"{type(root).__name__}: no attention module says its layer (layer_idx), so queries "
            "and keys cannot be told apart. Use the part 'head' instead."
        )
    return found


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, eager_mask)
