"""What a dictionary is trained to make small: plain and dense, one function per architecture.

All of it is in normalised space, where a row of a model has norm ``sqrt(d_model)``. The fused
steps are checked against this.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeldiff._shapes import Bool, Float
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.models import Dictionary
from modeldiff.errors import TrainingError

_TINY = 1e-12  # of a variance that is divided by
FLAT = 1e-2
"""Share of the errors' size below which their variance is no measure: rows that are all alike."""
ALIKE = 1e-3
"""Share of the rows' size that the two models' difference has at least: nothing is no measure."""


class StepResult(NamedTuple):
    """What one optimizer step saw; tensors, so that nobody waits for them.

    ``mse`` is the mean squared error of a coordinate for each model, ``lowest`` the smallest
    score (strength times `Dictionary.code_weight`) that was kept, 0 if none was.
    """

    loss: Float[Tensor, ""]
    mse: Float[Tensor, " model"]
    l0: Float[Tensor, ""]
    lowest: Float[Tensor, ""]
    fired: Bool[Tensor, " latent"]


class Loss(NamedTuple):
    """A loss with its graph, and what it is made of without one."""

    total: Float[Tensor, ""]
    mse: Float[Tensor, " model"]
    latents: Float[Tensor, "row latent"]
    lowest: Float[Tensor, ""]

    def result(self) -> StepResult:
        """Sum up for the log."""
        fires = self.latents > 0
        l0 = fires.sum(1).float().mean()
        return StepResult(self.total.detach(), self.mse, l0, self.lowest, fires.any(0))


def loss(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    *,
    k: float | None = None,
    ramp: float = 1.0,
    dead: Bool[Tensor, " latent"] | None = None,
) -> Loss:
    """Loss of a batch by the dictionary's architecture.

    Args:
        dictionary: What is trained.
        x: Normalised rows, as `Dictionary.normalised` gives them.
        config: Weights of the terms.
        k: Mean latents a row, if not the dictionary's.
        ramp: Factor of the penalties, from 0 to 1.
        dead: Latents that have not fired for long.
    """
    kind = dictionary.config.activation
    k = dictionary.config.k if k is None else k
    if kind == "batch_topk":
        return batch_topk_loss(dictionary, x, config, k, dead)
    if kind == "topk":
        return topk_loss(dictionary, x, config, round(k), dead)
    if kind == "jumprelu":
        return jumprelu_loss(dictionary, x, config, k, ramp, dead)
    if kind == "gated":
        return gated_loss(dictionary, x, config, ramp)
    return relu_loss(dictionary, x, config, ramp)


def batch_topk_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    k: float,
    dead: Bool[Tensor, " latent"] | None = None,
) -> Loss:
    """Error with the ``k * rows`` highest scores of the batch, and what dead latents could add.

    Source:
        Bussmann et al. 2024 (arXiv 2412.06410); for crosscoders Minder et al. 2025
        (arXiv 2504.02922).
    """
    pre = dictionary.pre(x)
    values = pre.relu()
    scores = (values * dictionary.code_weight).detach()
    best = scores.flatten().topk(round(k * len(x)), sorted=False)
    kept = torch.zeros_like(scores).flatten().scatter(0, best.indices, 1.0).view_as(scores)
    return _with_aux(dictionary, x, config, pre, values * kept, _lowest(best.values), dead)


def topk_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    k: int,
    dead: Bool[Tensor, " latent"] | None = None,
) -> Loss:
    """Error with the ``k`` highest scores of every row, and what dead latents could add.

    Source:
        Gao et al. 2024 (arXiv 2406.04093).
    """
    pre = dictionary.pre(x)
    values = pre.relu()
    best = (values * dictionary.code_weight).detach().topk(k, dim=1, sorted=False)
    latents = values * torch.zeros_like(values).scatter(1, best.indices, 1.0)
    return _with_aux(dictionary, x, config, pre, latents, _lowest(best.values), dead)


def relu_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    ramp: float = 1.0,
) -> Loss:
    """Error with all positive latents, and an L1 penalty on strength times decoder norms."""
    latents = dictionary.pre(x).relu()
    total, mse = _reconstruction(dictionary, x, config, latents)
    total = total + ramp * _l1(dictionary, config, latents, dictionary.W_dec.norm(dim=-1))
    return _loss(dictionary, total, mse, latents)


def jumprelu_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    k: float,
    ramp: float = 1.0,
    dead: Bool[Tensor, " latent"] | None = None,
) -> Loss:
    """Error with the latents above their thresholds, and how far their number is from ``k``.

    Source:
        Rajamanoharan et al. 2024 (arXiv 2407.14435).
    """
    pre, threshold = dictionary.pre(x), dictionary.threshold
    latents: Tensor = _Jump.apply(pre, threshold, config.bandwidth)  # pyright: ignore
    fires: Tensor = _Step.apply(pre, threshold, config.bandwidth)  # pyright: ignore
    made = _with_aux(dictionary, x, config, pre, latents, None, dead)
    penalty = (fires.sum(1).mean() / k - 1).square()
    return made._replace(total=made.total + ramp * config.l0 * penalty)


def gated_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    ramp: float = 1.0,
) -> Loss:
    """Error of the gated latents, an L1 penalty on the gates, and the error of the gates alone.

    Source:
        Rajamanoharan et al. 2024 (arXiv 2404.16014).
    """
    pre = dictionary.pre(x)
    gates = (pre + dictionary.b_gate).relu()
    latents = dictionary.activate(pre)
    total, mse = _reconstruction(dictionary, x, config, latents)
    frozen = gates @ dictionary.W_dec.detach().flatten(1)
    left = x - frozen.unflatten(1, x.shape[1:]) - dictionary.b_dec.detach()
    frozen_norms = dictionary.decoder_norms  # a gate costs what it says, not what it can shrink
    total = total + left.square().mean() + ramp * _l1(dictionary, config, gates, frozen_norms)
    return _loss(dictionary, total, mse, latents)


def constrain_gradients(dictionary: Dictionary) -> None:
    """Keep what the configuration fixes: tied decoders equal, other models' blocks at zero."""
    encoder, decoder = dictionary.W_enc.grad, dictionary.W_dec.grad
    if encoder is None or decoder is None:
        return
    if dictionary.config.n_exclusive:
        lacks = ~dictionary.owned
        encoder.masked_fill_(lacks.T[:, None, :], 0.0)
        decoder.masked_fill_(lacks[:, :, None], 0.0)
    if tied := dictionary.config.n_tied:
        decoder[:tied] = decoder[:tied].sum(1, keepdim=True)


def require_finite(norm: Float[Tensor, ""]) -> None:
    """Check the norm of the gradients before a step is taken.

    Raises:
        TrainingError: If it is not finite.
    """
    if not norm.isfinite():
        raise TrainingError(
            f"the gradient's norm is {float(norm)}: are the rows finite, and normalised? "
            "Nothing was changed; give a smaller lr if it was well before."
        )


def aux_loss(
    dictionary: Dictionary,
    pre: Float[Tensor, "row latent"],
    error: Float[Tensor, "row model d_model"],
    dead: Bool[Tensor, " latent"],
    k_aux: int | None = None,
) -> Float[Tensor, ""]:
    """Share of the error's variance that dead latents leave unexplained, at most ``k_aux`` a row.

    A dead latent counts with its strength, which is often 0 on every row; its gradient passes
    through all the same, so that its encoder turns towards rows whose error it could explain.

    Args:
        dictionary: What is trained.
        pre: Pre-activations.
        error: What the living latents leave over; no gradient flows into it.
        dead: Which latents are dead; at least one.
        k_aux: Dead latents a row; None is half of ``d_model``.

    Source:
        After Gao et al. 2024 (arXiv 2406.04093), with the gradient straight through the
        rectifier.
    """
    which = dead.nonzero().squeeze(1)
    wanted = max(1, dictionary.config.d_model // 2) if k_aux is None else k_aux
    best = pre[:, which].topk(min(wanted, len(which)), dim=1)
    values = best.values + (best.values.relu() - best.values).detach()
    latents = torch.zeros_like(pre[:, which]).scatter(1, best.indices, values)
    explained = latents @ dictionary.W_dec[which].flatten(1)
    target = error.detach().flatten(1)
    return (target - explained).square().sum() / _variation(target, FLAT * target.square().sum())


def _with_aux(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    pre: Float[Tensor, "row latent"],
    latents: Float[Tensor, "row latent"],
    lowest: Float[Tensor, ""] | None,
    dead: Bool[Tensor, " latent"] | None,
) -> Loss:
    total, mse = _reconstruction(dictionary, x, config, latents)
    if config.aux and dead is not None and bool(dead.any()):
        error = x - dictionary.decode_normalised(latents.detach())
        total = total + config.aux * aux_loss(dictionary, pre, error, dead, config.k_aux)
    return _loss(dictionary, total, mse, latents, lowest)


def _reconstruction(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    latents: Float[Tensor, "row latent"],
) -> tuple[Float[Tensor, ""], Float[Tensor, " model"]]:
    """Mean squared error, over the nested prefixes where there are, and that of all latents."""
    start, total, error = 0, torch.zeros((), device=x.device), x - dictionary.b_dec
    ends = dictionary.config.groups or (dictionary.config.n_latents,)
    for end in ends:
        flat = latents[:, start:end] @ dictionary.W_dec[start:end].flatten(1)
        error = error - flat.unflatten(1, x.shape[1:])
        total, start = total + error.square().mean() / len(ends), end
    if config.delta:
        total = total + config.delta * _delta(dictionary, x, error)
    return total, error.detach().square().mean((0, 2))


def _delta(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    error: Float[Tensor, "row model d_model"],
) -> Float[Tensor, ""]:
    """Unexplained share of the raw difference of the two models (arXiv 2603.04426).

    Of two models that hardly differ it would be rounding, enlarged: see `ALIKE`.
    """
    raw_error, raw = (each / dictionary.scale[:, None] for each in (error, x))
    left = raw_error[:, 1] - raw_error[:, 0]
    return left.square().sum() / _variation(raw[:, 1] - raw[:, 0], ALIKE * raw.square().sum())


def _l1(
    dictionary: Dictionary,
    config: TrainConfig,
    latents: Float[Tensor, "row latent"],
    norms: Float[Tensor, "latent model"],
) -> Float[Tensor, ""]:
    c = dictionary.config
    factor = torch.ones_like(norms[:, 0])
    factor[: c.n_tied] = config.l1_tied
    size = norms.sum(1) / (c.n_models * math.sqrt(c.d_model))
    return config.l1 * (latents.mean(0) * size * factor).sum()


def _loss(
    dictionary: Dictionary,
    total: Float[Tensor, ""],
    mse: Float[Tensor, " model"],
    latents: Float[Tensor, "row latent"],
    lowest: Float[Tensor, ""] | None = None,
) -> Loss:
    latents = latents.detach()
    if lowest is None:
        lowest = _lowest(latents * dictionary.code_weight)
    return Loss(total, mse, latents, lowest)


def _lowest(scores: Float[Tensor, "*some"]) -> Float[Tensor, ""]:
    low = torch.where(scores > 0, scores, math.inf).amin().float()
    return torch.where(low.isinf(), 0.0, low)


def _variation(rows: Float[Tensor, "row width"], least: Float[Tensor, ""]) -> Float[Tensor, ""]:
    return (rows - rows.mean(0)).square().sum().maximum(least).clamp_min(_TINY)


class _Jump(torch.autograd.Function):
    """``pre`` where it is above the threshold; the threshold's gradient by a box kernel."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre.relu() * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(gradient * near).sum(0) * threshold / ctx.bandwidth
        return gradient * (pre > threshold), to_threshold, None


class _Step(torch.autograd.Function):
    """1 where ``pre`` is above the threshold; the threshold's gradient by a box kernel."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return None, -(gradient * near).sum(0) / ctx.bandwidth, None
