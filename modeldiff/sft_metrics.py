"""What tells a solution of fine-tuning that comes easily from one that must be held in place.

A general solution reaches a loss with a smaller change of the weights, and loses less of it when
noise turns the adapter away, than a narrow one that fits the same rows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.errors import SetupError
from modeldiff.sft import mean_loss
from modeldiff.sft_rows import Row


def adapter_norm(model: Any) -> float:
    """Frobenius norm of the change that a LoRA adapter makes to all weights together.

    Raises:
        SetupError: If the model has no adapter.
    """
    total = 0.0
    for module, name in _adapted(model):
        a, b = (getattr(module, f"lora_{part}")[name].weight.detach().double() for part in "AB")
        total += module.scaling[name] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(total)


def efficiency(
    model: Any, rows: Sequence[Row], pad_id: int, norms: Sequence[float], *, batch: int = 8
) -> pd.DataFrame:
    """Loss of an adapter that is scaled to several norms: compare adapters row by row.

    Args:
        model: PEFT's wrapper; as it was afterwards.
        rows: What to predict.
        pad_id: Token to pad with.
        norms: Frobenius norms of the change of all weights.
        batch: Rows of one forward.

    Returns:
        One row a norm: norm, factor (of the adapter as it is), loss (nats a token), gain (of loss
        against the base, for each unit of squared norm; NaN at 0).

    Raises:
        SetupError: If the model has no adapter, or one of norm 0.

    Source:
        arXiv 2602.07852: general solutions have a lower loss at the same norm.
    """
    own = adapter_norm(model)
    if own == 0:
        raise SetupError("the adapter changes nothing (its norm is 0), so it cannot be scaled.")
    found = []
    for norm in (0.0, *norms):
        with adapter_scaled(model, norm / own):
            loss = mean_loss(model, rows, pad_id, batch=batch)
        found.append({"norm": float(norm), "factor": norm / own, "loss": loss})
    table = pd.DataFrame(found)
    squares = table["norm"].mask(table["norm"] == 0) ** 2
    gain = (table["loss"].iloc[0] - table["loss"]) / squares
    return table.assign(gain=gain).iloc[1:].reset_index(drop=True)


def noise_stability(
    model: Any,
    rows: Sequence[Row],
    pad_id: int,
    epsilons: Sequence[float] = (0.0, 0.1, 0.2, 0.4, 0.8),
    *,
    n: int = 4,
    seed: int = 0,
    batch: int = 8,
) -> pd.DataFrame:
    """Loss of an adapter whose factors A and B are turned away by orthogonal noise, see `noisy`.

    Args:
        model: PEFT's wrapper; as it was afterwards.
        rows: What to predict.
        pad_id: Token to pad with.
        epsilons: Sines of the angles by which each factor is turned, 0 to 1.
        n: Draws of noise for each.
        seed: Of the noise.
        batch: Rows of one forward.

    Returns:
        One row a draw: epsilon, sample, loss (nats a token).

    Raises:
        SetupError: If the model has no adapter, or an epsilon is out of range.

    Source:
        arXiv 2602.07852: general solutions are the more stable ones.
    """
    found = []
    for epsilon in epsilons:
        for sample in range(n):
            generator = torch.Generator().manual_seed(1000 * seed + sample)
            turned = {p: noisy(p.detach(), epsilon, generator) for p in _factors(model)}
            with _exchanged(turned):
                loss = mean_loss(model, rows, pad_id, batch=batch)
            found.append({"epsilon": float(epsilon), "sample": sample, "loss": loss})
    return pd.DataFrame(found)


def noisy(x: Float[Tensor, "*shape"], epsilon: float, generator: torch.Generator) -> Tensor:
    """Turn a tensor, read as one vector, by orthogonal noise; its norm stays.

    sqrt(1 - epsilon²) x + epsilon |x| n, with n a random unit vector orthogonal to x.

    Raises:
        SetupError: If epsilon is not inside 0 to 1.

    Example:
        >>> x = torch.ones(8)
        >>> turned = noisy(x, 0.6, torch.Generator().manual_seed(0))
        >>> round(float(turned @ x) / 8, 4), round(float(turned.norm() / x.norm()), 4)
        (0.8, 1.0)
    """
    if not 0 <= epsilon <= 1:
        raise SetupError(f"epsilon={epsilon}: it is a sine, from 0 to 1.")
    flat = x.detach().double().cpu().flatten()
    norm = float(flat.norm())
    if norm == 0 or len(flat) < 2:
        return x.clone()
    noise = torch.randn(len(flat), generator=generator, dtype=torch.float64)
    for _ in range(2):
        noise = noise - (noise @ flat) / norm**2 * flat
    turned = math.sqrt(1 - epsilon**2) * flat + epsilon * norm * noise / noise.norm()
    return turned.reshape(x.shape).to(x)


@contextmanager
def adapter_scaled(model: Any, factor: float) -> Iterator[None]:
    """Multiply what an adapter adds inside the block."""
    before = [(module, name, module.scaling[name]) for module, name in _adapted(model)]
    try:
        for module, name, scale in before:
            module.scaling[name] = scale * factor
        yield
    finally:
        for module, name, scale in before:
            module.scaling[name] = scale


@contextmanager
def _exchanged(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    before = {each: each.detach().clone() for each in values}
    try:
        with torch.no_grad():
            for each, value in values.items():
                each.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for each, value in before.items():
                each.copy_(value)


def _adapted(model: Any) -> list[tuple[Any, str]]:
    """The modules that an adapter changes, each with the adapter's name."""
    found = [
        (module, name)
        for module in model.modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
        for name in module.active_adapters
    ]
    if not found:
        raise SetupError("the model has no LoRA adapter; these are measures of one.")
    return found


def _factors(model: Any) -> list[Tensor]:
    return [
        getattr(module, f"lora_{part}")[name].weight
        for module, name in _adapted(model)
        for part in "AB"
    ]
