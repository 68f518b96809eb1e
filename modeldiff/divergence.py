"""Comparing two distributions over the vocabulary, token by token, in float32.

Everything here works on a block of tokens at a time, so that the largest thing in memory is a few
``[block, vocab]`` tensors whatever the number of texts; `block_size` keeps them within a budget.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from modeldiff._shapes import Float, Int
from modeldiff.architectures import SiteMap, module_at
from modeldiff.errors import MismatchError, RemoteError
from modeldiff.placement import is_offloaded

Unembed = Callable[[Float[Tensor, "*token d_model"]], Float[Tensor, "*token vocab"]]
_TEMPORARIES = 8  # [block, vocab] tensors alive at once in `compare`


def unembedding(root: nn.Module, site_map: SiteMap) -> Unembed:
    """Return the function from the final norm's output to float32 logits.

    Raises:
        RemoteError: If the weights are not here.
    """
    head, cap = module_at(root, site_map.unembed), softcap(root)
    if next(head.parameters()).is_meta and not is_offloaded(head):
        raise RemoteError(
            "this reads the unembedding, and it is on a server. Lenses (logit_lens, patchscope), "
            "token_scores, output_diff and patch_map read it there; for the rest load the pair."
        )
    return lambda h: logits_of(head, h, cap)


def softcap(root: nn.Module) -> float | None:
    """The bound that a family (Gemma 2) puts on its logits, or None."""
    config = root.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return getattr(config, "final_logit_softcapping", None)


def logits_of(
    head: Unembed, h: Float[Tensor, "*token d_model"], cap: float | None
) -> Float[Tensor, "*token vocab"]:
    """Float32 logits of the final norm's output.

    A matrix product of 16-bit numbers is summed in float32; where the device can write that, it
    is not rounded to 16 bits in between, which alone would put 0.5 % on a small divergence.
    """
    logits = _unrounded(head, h) if _is_bare(head, h) else head(h).float()
    return torch.tanh(logits / cap) * cap if cap else logits


def _is_bare(head: Any, h: Tensor) -> bool:
    """Whether the unembedding is nothing but a matrix of 16-bit numbers, beside the states."""
    if type(head) is not nn.Linear or torch.is_grad_enabled() or h.dim() < 2:
        return False
    weight, hooks = head.weight, (head._forward_hooks, head._forward_pre_hooks)
    alike = weight.dtype == h.dtype in (torch.bfloat16, torch.float16) and weight.device == h.device
    plain = head.bias is None and not any(hooks) and "forward" not in vars(head)
    return alike and plain and _writes_float32(h.device.type, h.dtype)


def _unrounded(head: Any, h: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token vocab"]:
    flat = torch.mm(h.flatten(0, -2), head.weight.t(), out_dtype=torch.float32)
    return flat.unflatten(0, h.shape[:-1])


@lru_cache(maxsize=8)
def _writes_float32(kind: str, dtype: torch.dtype) -> bool:
    """Whether this torch and device write products of such numbers in float32; tried once."""
    made = torch.full((16, 16), 1 / 3, device=kind, dtype=dtype)
    try:
        found = torch.mm(made, made, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    exact = 16 * made[0, 0].double() ** 2
    return bool((found.double() - exact).abs().max() < 1e-5)


def block_size(vocab: int, budget: int) -> int:
    """Tokens in a block so that its temporaries fit ``budget`` bytes; at least one."""
    return max(1, budget // (4 * vocab * _TEMPORARIES))


def blocks(n: int, size: int) -> Iterator[slice]:
    """Cut ``range(n)`` into slices."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@dataclass(frozen=True, eq=False)
class Block:
    """Divergences of one block of tokens; ``f`` is the fine-tune, ``b`` the base. Nats.

    Args:
        kl_fb: KL(finetuned || base).
        kl_bf: KL(base || finetuned).
        js: Jensen-Shannon divergence, at most ln 2.
        entropy: Of both, (base, finetuned) in the last axis.
        logprob: Of the token that came, the same.
        rank: Of the token that came, 0 the most likely, the same.
        top_ids: Most likely tokens of both, ``[token, 2, k]``.
        top_logprobs: Their log probabilities.
        log_ratio: log p_f - log p_b of every token of the vocabulary.
        moved: p_f - p_b of every token of the vocabulary.
    """

    kl_fb: Float[Tensor, " token"]
    kl_bf: Float[Tensor, " token"]
    js: Float[Tensor, " token"]
    entropy: Float[Tensor, "token 2"]
    logprob: Float[Tensor, "token 2"]
    rank: Int[Tensor, "token 2"]
    top_ids: Int[Tensor, "token 2 k"]
    top_logprobs: Float[Tensor, "token 2 k"]
    log_ratio: Float[Tensor, "token vocab"]
    moved: Float[Tensor, "token vocab"]


def check_finite(values: Tensor, what: str) -> None:
    """Verify that what was computed are numbers: NaN compares as equal, and sorts first.

    Raises:
        MismatchError: If some are not finite.
    """
    if broken := int((~values.isfinite()).sum()):
        raise MismatchError(
            f"{broken} of {values.numel()} {what} are not finite: a side's weights are damaged, or "
            "its activations are too large for the dtype. Load the pair in float32 or bfloat16."
        )


def check_k(k: int, vocab: int) -> None:
    """Verify that there are so many tokens to be the most likely ones.

    Raises:
        MismatchError: If there are not.
    """
    if not 1 <= k <= vocab:
        raise MismatchError(f"k={k}: give 1 to {vocab}, which is the size of the vocabulary.")


def compare(
    base: Float[Tensor, "token vocab"],
    finetuned: Float[Tensor, "token vocab"],
    came: Int[Tensor, " token"],
    k: int,
) -> Block:
    """Compare float32 logits of both sides.

    JS uses log p - log m = ln 2 - softplus(log q - log p), which stays accurate where p and q
    nearly agree.

    Args:
        base: Logits of the base.
        finetuned: Logits of the fine-tune.
        came: The token that came next.
        k: How many of the most likely tokens to keep.
    """
    return Block(**divergences(base, finetuned, came, k))


def divergences(
    base: Float[Tensor, "token vocab"],
    finetuned: Float[Tensor, "token vocab"],
    came: Int[Tensor, " token"],
    k: int,
) -> dict[str, Tensor]:
    """What `compare` compares, by the names of `Block`; servers without this package run it too."""
    logprobs = [base.log_softmax(-1), finetuned.log_softmax(-1)]
    b, f = logprobs
    pb, pf = b.exp(), f.exp()
    ratio = f - b
    towards_m = math.log(2) - nn.functional.softplus(-ratio)
    js = (pf * towards_m).sum(-1)
    towards_m = math.log(2) - nn.functional.softplus(ratio)
    js = (js + (pb * towards_m).sum(-1)) / 2
    observed = [one.gather(-1, came[:, None]) for one in logprobs]
    tops = [one.topk(k, -1) for one in logprobs]
    return {
        "kl_fb": (pf * ratio).sum(-1),
        "kl_bf": -(pb * ratio).sum(-1),
        "js": js,
        "entropy": torch.stack([-(pb * b).sum(-1), -(pf * f).sum(-1)], -1),
        "logprob": torch.cat(observed, -1),
        "rank": torch.stack(
            [(one > o).sum(-1) for one, o in zip(logprobs, observed, strict=True)], -1
        ),
        "top_ids": torch.stack([top.indices for top in tops], 1),
        "top_logprobs": torch.stack([top.values for top in tops], 1),
        "log_ratio": ratio,
        "moved": pf - pb,
    }


def compared(
    h_base: Float[Tensor, "token d_model"],
    h_finetuned: Float[Tensor, "token d_model"],
    unembed_base: Unembed,
    unembed_finetuned: Unembed,
    came: Int[Tensor, " token"],
    k: int,
    budget: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compare both sides' predictions of many tokens, a block at a time.

    Args:
        h_base: Final norm's output of the base.
        h_finetuned: The same of the fine-tune.
        unembed_base: The base's unembedding.
        unembed_finetuned: The fine-tune's.
        came: The token that came next.
        k: Size of the top lists.
        budget: Bytes for the temporaries of a block.

    Returns:
        A row a token by the names of `Block`, without the two ``[token, vocab]`` tensors; and
        instead of these their sums and counts over the tokens, ``[vocab]``: ``promoted`` and
        ``demoted`` (among the k), ``positive`` (log ratio), ``log_ratio``, ``moved``.
    """
    vocab = unembed_base(h_base[:1]).shape[-1]
    parts = []
    sums: dict[str, Tensor] = {}
    for rows in blocks(len(came), block_size(vocab, budget)):
        base, tuned = unembed_base(h_base[rows]), unembed_finetuned(h_finetuned[rows])
        block = divergences(base, tuned.to(base.device), came[rows].to(base.device), k)
        for name, one in _moved_tokens(block.pop("log_ratio"), block.pop("moved"), k).items():
            sums[name] = sums[name] + one if name in sums else one
        parts.append(block)
    columns = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    return columns, sums


def _moved_tokens(
    ratio: Float[Tensor, "token vocab"], moved: Float[Tensor, "token vocab"], k: int
) -> dict[str, Tensor]:
    top, bottom = ratio.topk(k, -1), ratio.topk(k, -1, largest=False)
    up, down = top.indices[top.values > 0], bottom.indices[bottom.values < 0]
    return {
        "promoted": torch.bincount(up.cpu(), minlength=ratio.shape[1]),
        "demoted": torch.bincount(down.cpu(), minlength=ratio.shape[1]),
        "positive": (ratio > 0).sum(0).cpu(),
        "log_ratio": ratio.sum(0, dtype=torch.float64).cpu(),
        "moved": moved.sum(0, dtype=torch.float64).cpu(),
    }


def kl_and_loss(
    h: Float[Tensor, "token d_model"],
    reference: Float[Tensor, "token d_model"],
    unembed: Unembed,
    unembed_reference: Unembed,
    came: Int[Tensor, " token"],
    budget: int,
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """KL(model || reference) and the model's loss on the token that came, in nats.

    Args:
        h: Final norm's output of the model.
        reference: The same of the reference, on the device where that runs.
        unembed: The model's unembedding.
        unembed_reference: The reference's.
        came: The token that came next.
        budget: Bytes for temporaries.
    """
    vocab = unembed(h[:1]).shape[-1]
    kls, losses = [], []
    for block in blocks(len(h), block_size(vocab, budget)):
        p = unembed(h[block]).log_softmax(-1)
        q = unembed_reference(reference[block]).log_softmax(-1).to(p.device)
        losses.append(-p.gather(-1, came[block, None])[:, 0])
        kls.append(torch.sub(p, q, out=q).mul_(p.exp_()).sum(-1))
    return torch.cat(kls), torch.cat(losses)
