"""What a dictionary is, how it is trained, and the normaliser its weights live behind."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.errors import MismatchError

Inputs = Literal["pair", "base", "finetuned", "difference"]
"""What of the paired rows a dictionary sees."""
Activation = Literal["batch_topk", "topk", "relu", "jumprelu", "gated"]
CodeNorm = Literal["sum", "concat", "none"]


@dataclass(frozen=True)
class DictionaryConfig:
    """Sizes and rules of a crosscoder or of a sparse autoencoder.

    Args:
        d_model: Width of the activations.
        n_latents: Latents.
        n_models: Models that are encoded together; 1 for a sparse autoencoder.
        activation: Rule by which latents fire. ``batch_topk`` keeps ``k`` a row on average in
            training and those above a threshold afterwards.
        k: Mean number of latents a row: kept by ``batch_topk`` and ``topk``, aimed at by
            ``jumprelu``; ``relu`` and ``gated`` do not use it.
        inputs: What of the rows it sees: all models, one of them, or fine-tuned minus base.
        site: Where the activations are from, e.g. ``"resid_post.3"``.
        code_norm: Latents are ranked by strength times this size of their decoder: the sum of
            the models' norms, the norm of the models' decoders side by side, or 1.
        n_tied: The first so many latents have one decoder for all models.
        n_exclusive: For each model, how many latents it has alone: encoder and decoder of the
            other models are zero. They are the last latents, in the order of the models.
        groups: Ends of nested prefixes of the latents, each of which must reconstruct by
            itself; the last is ``n_latents``.

    Raises:
        MismatchError: If the numbers do not go together.

    Example:
        >>> config = DictionaryConfig(d_model=8, n_latents=32, k=4, n_exclusive=(3, 5))
        >>> config.exclusive(0), config.exclusive(1), config.is_crosscoder
        (range(24, 27), range(27, 32), True)
    """

    d_model: int
    n_latents: int
    n_models: int = 2
    activation: Activation = "batch_topk"
    k: int = 32
    inputs: Inputs = "pair"
    site: str = ""
    code_norm: CodeNorm = "sum"
    n_tied: int = 0
    n_exclusive: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if wrong := next(_faults(self), ""):
            raise MismatchError(f"no such dictionary: {wrong}.")

    @property
    def is_crosscoder(self) -> bool:
        """Whether several models are encoded together."""
        return self.n_models > 1

    def exclusive(self, model: int) -> range:
        """The latents that belong to one model by construction."""
        if not self.n_exclusive:
            return range(0)
        start = self.n_latents - sum(self.n_exclusive[model:])
        return range(start, start + self.n_exclusive[model])


def _faults(config: DictionaryConfig) -> Iterator[str]:
    c = config
    for name, value, allowed in (
        ("activation", c.activation, get_args(Activation)),
        ("inputs", c.inputs, get_args(Inputs)),
        ("code_norm", c.code_norm, get_args(CodeNorm)),
    ):
        if value not in allowed:
            yield f"{name}={value!r}; known are {', '.join(allowed)}"
    if min(c.d_model, c.n_latents, c.n_models) < 1:
        yield f"d_model={c.d_model}, n_latents={c.n_latents}, n_models={c.n_models}; give 1 or more"
    if not 1 <= c.k <= c.n_latents:
        yield f"k={c.k} of {c.n_latents} latents; give 1 to {c.n_latents}"
    if (c.n_models > 1) != (c.inputs == "pair"):
        yield (
            f"inputs={c.inputs!r} with {c.n_models} models; 'pair' is for crosscoders of two "
            "models or more, the others for sparse autoencoders (n_models=1)"
        )
    if c.n_exclusive and (len(c.n_exclusive) != c.n_models or min(c.n_exclusive) < 0):
        yield f"n_exclusive={c.n_exclusive} for {c.n_models} models; give one number each"
    if c.n_tied < 0 or c.n_tied + sum(c.n_exclusive) > c.n_latents:
        yield f"{c.n_tied} tied and {c.n_exclusive} exclusive of {c.n_latents} latents"
    ends = c.groups
    if ends and (list(ends) != sorted(set(ends)) or ends[0] < 1 or ends[-1] != c.n_latents):
        yield f"groups={ends}; give rising ends, the last of them {c.n_latents}"


@dataclass(frozen=True)
class TrainConfig:
    """How a dictionary is trained.

    Losses are of normalised rows, so that no weight depends on the models' own sizes: the mean
    squared error of a coordinate is 1 minus the share of variance that is explained.

    Args:
        steps: Optimizer steps.
        batch_size: Rows a step.
        lr: Peak learning rate of Adam; None is ``2e-4 / sqrt(n_latents / 2 ** 14)``.
        warmup: Share of the steps in which the rate, and the weights of the penalties, rise.
        decay: Share of the steps, the last ones, in which the rate falls to 0.
        clip: Greatest norm of the gradient.
        l1: Weight of ``sum of strength * decoder norms``, for unit-norm rows (``relu``,
            ``gated``).
        l1_tied: Factor on it for the tied latents.
        l0: Weight of ``(L0 / k - 1) ** 2`` (``jumprelu``).
        bandwidth: Width of the kernel that gives thresholds a gradient (``jumprelu``).
        aux: Weight of the loss that lets dead latents explain what the others leave over.
        k_aux: Dead latents a row in it; None is half of ``d_model``.
        delta: Weight of the share of variance of ``fine-tuned - base`` that is not explained; a
            variance below a thousandth of the rows' counts as that.
        k_start: Mean latents a row at the first step, falling to ``k``; None is ``k``.
        anneal: Share of the steps in which it falls.
        dead_after: Rows without firing after which a latent is dead; None is 10 million, or a
            tenth of the run if that is less.
        threshold_beta: Of the moving average of the smallest score that is kept; None is 0.999,
            or less, so that it looks back over a twentieth of the run.
        threshold_start: Step at which the average begins; None is 1000, or half of the steps.
        normaliser_rows: Rows that a normaliser is fitted on where the dictionary has none.
        seed: Of the order of the rows.
        bf16: Multiply matrices in bfloat16 (autocast).
        fast: Use the fused step: where there is one (``auto``), always, or never.
        log_every: Steps from one log to the next.
        checkpoint_every: Steps from one checkpoint to the next; 0 is none but at the end.
        betas: Of Adam.
        eps: Of Adam; gradients are means over the batch and the width, hence small.

    Raises:
        MismatchError: If a number is out of range.

    Example:
        >>> config = TrainConfig(steps=1000)
        >>> [round(config.rate(step, 2**14) * 1e4, 3) for step in (0, 49, 500, 900, 999)]
        [0.04, 2.0, 2.0, 1.0, 0.01]
    """

    steps: int
    batch_size: int = 2048
    lr: float | None = None
    warmup: float = 0.05
    decay: float = 0.2
    clip: float = 1.0
    l1: float = 0.1
    l1_tied: float = 1.0
    l0: float = 1.0
    bandwidth: float = 0.1
    aux: float = 1 / 32
    k_aux: int | None = None
    delta: float = 0.0
    k_start: int | None = None
    anneal: float = 0.2
    dead_after: int | None = None
    threshold_beta: float | None = None
    threshold_start: int | None = None
    normaliser_rows: int = 1 << 16
    seed: int = 0
    bf16: bool = False
    fast: Literal["auto", "on", "off"] = "auto"
    log_every: int = 50
    checkpoint_every: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.log_every) < 1 or self.checkpoint_every < 0:
            raise MismatchError(
                f"steps={self.steps}, batch_size={self.batch_size}, log_every={self.log_every}, "
                f"checkpoint_every={self.checkpoint_every}; give 1 or more, the last 0 or more."
            )
        shares = (self.warmup, self.decay, self.anneal, self.threshold_keeps)
        if not all(0 <= share <= 1 for share in shares):
            raise MismatchError(f"warmup, decay, anneal, threshold_beta = {shares}; give 0 to 1.")
        weights = (self.clip, self.l1, self.l0, self.bandwidth, self.aux, self.delta)
        if min(weights) < 0 or not (self.clip and self.bandwidth):
            raise MismatchError(f"clip, l1, l0, bandwidth, aux, delta = {weights}: out of range.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise MismatchError(f"lr={self.lr}; give a number above 0, or None.")
        if self.fast not in ("auto", "on", "off"):
            raise MismatchError(f"fast={self.fast!r}; give 'auto', 'on' or 'off'.")

    def ramp(self, step: int) -> float:
        """Factor of the warm-up at a step, counted from 0."""
        return min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))

    def rate(self, step: int, n_latents: int) -> float:
        """Learning rate at a step, counted from 0."""
        peak = 2e-4 / math.sqrt(n_latents / 2**14) if self.lr is None else self.lr
        return peak * min(self.ramp(step), (self.steps - step) / max(1.0, self.decay * self.steps))

    def k_at(self, step: int, k: int) -> float:
        """Mean latents a row at a step, counted from 0, of a dictionary's ``k``."""
        done = min(1.0, step / max(1.0, self.anneal * self.steps))
        return k if self.k_start is None else self.k_start + (k - self.k_start) * done

    @property
    def rows_to_die(self) -> int:
        """Rows without firing after which a latent is dead."""
        tenth = max(1, self.steps * self.batch_size // 10)
        return min(10_000_000, tenth) if self.dead_after is None else self.dead_after

    @property
    def threshold_keeps(self) -> float:
        """Share of the average of the smallest kept score that outlives a step."""
        if self.threshold_beta is not None:
            return self.threshold_beta
        return max(0.0, min(0.999, 1 - 20 / self.steps))

    @property
    def threshold_from(self) -> int:
        """Step at which the average of the smallest kept score begins."""
        return min(1000, self.steps // 2) if self.threshold_start is None else self.threshold_start


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Brings the activations of every model to mean 0 and the same size.

    ``normalised = (x - mean) * scale``; with the scale that `fit` takes, the mean square of a
    coordinate is 1, so rows have norm ``sqrt(d_model)`` whatever the model's own size is.

    Args:
        mean: Mean row of each model, float32.
        scale: One positive factor for each model.

    Raises:
        MismatchError: If the shapes differ, or a value is not finite, or a scale not positive.

    Example:
        >>> rows = torch.tensor([[[1.0, 1.0]], [[3.0, 1.0]]])
        >>> Normaliser.fit(rows).apply(rows).squeeze(1)
        tensor([[-1.4142,  0.0000],
                [ 1.4142,  0.0000]])
    """

    mean: Float[Tensor, "model d_model"]
    scale: Float[Tensor, " model"]

    def __post_init__(self) -> None:
        if self.mean.dim() != 2 or self.scale.shape != self.mean.shape[:1]:
            raise MismatchError(
                f"a normaliser has means (model, d_model) and a scale for each model, got "
                f"{tuple(self.mean.shape)} and {tuple(self.scale.shape)}."
            )
        if not (self.mean.isfinite().all() and self.scale.isfinite().all()):
            raise MismatchError("a normaliser is not finite: were the rows? Use float32.")
        if not (self.scale > 0).all():
            raise MismatchError(f"a normaliser's scales are {self.scale.tolist()}: not positive.")

    @classmethod
    def identity(cls, n_models: int, d_model: int) -> "Normaliser":
        """The normaliser that changes nothing."""
        return cls(torch.zeros(n_models, d_model), torch.ones(n_models))

    @classmethod
    def fit(
        cls,
        rows: Float[Tensor, "row model d_model"] | Iterable[Float[Tensor, "_row model d_model"]],
    ) -> "Normaliser":
        """Take mean and size of rows, or of batches of rows that are read once, in float64.

        Raises:
            MismatchError: If there are fewer than two rows, or the rows of a model are all the
                same or not finite.
        """
        n, total, squares = 0, torch.zeros(()), torch.zeros(())
        shift: Tensor | None = None
        for batch in [rows] if isinstance(rows, Tensor) else rows:
            shift = batch[:1].double() if shift is None else shift
            centred = batch.double() - shift  # near the mean, where squares do not cancel
            n, total = n + len(batch), total + centred.sum(0)
            squares = squares + centred.square().sum((0, 2))
        if shift is None or n < 2:
            raise MismatchError(f"a normaliser needs 2 rows or more, got {n}.")
        mean, d_model = total / n, shift.shape[-1]
        square = squares / n - mean.square().sum(1)
        if not (square > 0).all():
            raise MismatchError(
                f"mean square deviations of the models' rows: {square.tolist()}. A normaliser "
                "needs finite rows that are not all the same."
            )
        return cls((mean + shift[0]).float(), (math.sqrt(d_model) / square.sqrt()).float())

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return not self.mean.any() and bool((self.scale == 1).all())

    def apply(self, x: Float[Tensor, "row model d_model"]) -> Float[Tensor, "row model d_model"]:
        """Normalise raw rows; a new tensor."""
        return (x - self.mean) * self.scale[:, None]

    def undo(self, x: Float[Tensor, "row model d_model"]) -> Float[Tensor, "row model d_model"]:
        """Bring normalised rows back to the models' own size; a new tensor."""
        return x / self.scale[:, None] + self.mean
