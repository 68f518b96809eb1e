"""The training step of BatchTopK dictionaries, several times as fast as the plain one.

The same mathematics as `modeldiff.dictionaries.losses` with autograd and Adam, written out: dense
work is left in one place, the scores of all latents, which select and need not be exact; they are
computed in bfloat16 where that pays, and what may be kept is scored again in float32. Decoding and
the gradients touch only what fires, and Adam reads each gradient once, clipped on the way.
"""

import math
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modeldiff._shapes import Bool, Float, Int
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.configs import DictionaryConfig, TrainConfig
from modeldiff.dictionaries.kernels import (
    ByLatent,
    candidates,
    codes_at,
    largest,
    row_floor,
    sampled,
    sampled_floor,
    select,
    weighted_sum,
)
from modeldiff.dictionaries.losses import FLAT, StepResult, require_finite
from modeldiff.dictionaries.models import Dictionary
from modeldiff.errors import MismatchError, TrainingError

_DENSE = 0.05  # share of latents that fire beyond which dense matrices are as fast
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def available(
    dictionary: Dictionary, config: TrainConfig, whole: DictionaryConfig | None = None
) -> bool:
    """Whether `FastStep` can train this dictionary, of which at most 5 % of the latents fire.

    Args:
        dictionary: What is trained.
        config: How.
        whole: Of the dictionary of which this is a share.
    """
    c = whole or dictionary.config
    return c.k <= _DENSE * c.n_latents and _obstacle(dictionary, config) is None


def _obstacle(dictionary: Dictionary, config: TrainConfig) -> str | None:
    """What about the dictionary or its training the fast step does not know."""
    c = dictionary.config
    if c.activation != "batch_topk":
        return f"activation={c.activation!r}"
    if c.groups:
        return f"groups={c.groups}"
    if config.delta:
        return f"delta={config.delta}"
    if dictionary.device.type not in ("cpu", "cuda"):
        return f"a dictionary on {dictionary.device}"
    return None


class Undivided:
    """How a step's sums and ranks go over processes: there is one. See `distributed_training`."""

    n_rows_of = 1
    """How many processes have rows of their own."""

    def over_rows(self, each: Tensor) -> Tensor:
        """A sum over this process's rows, as one over all."""
        return each

    def over_latents(self, each: Tensor) -> Tensor:
        """A sum over this process's latents, as one over all."""
        return each

    def row_floor(self, values: Float[Tensor, "row some"], k: int) -> Float[Tensor, "row one"]:
        """The k-th largest value of each row among all latents."""
        return row_floor(values, k)[:, None]


class FastStep:
    """Forward, backward, clipping and Adam of one batch in one call, in place.

    Equal to the plain step up to float32 rounding. While it is in use, ``dictionary.W_enc`` is a
    transposed view of weights that lie latent by latent; `close` gives it its own layout again.

    Args:
        dictionary: With ``batch_topk``; tied and exclusive blocks are fine.
        config: Of the training: ``clip``, ``aux``, ``betas`` and ``eps`` are read.
        split: The division among processes.
        half: Whether to choose candidates by a bfloat16 product; None asks this machine.

    Raises:
        MismatchError: If the dictionary has another activation, or groups, or the training a
            delta loss.

    Source:
        BatchTopK: Bussmann et al. 2024 (arXiv:2412.06410); auxiliary loss: Gao et al. 2024
        (arXiv:2406.04093).
    """

    def __init__(
        self,
        dictionary: Dictionary,
        config: TrainConfig,
        split: Any = None,
        half: bool | None = None,
    ) -> None:
        if obstacle := _obstacle(dictionary, config):
            raise MismatchError(
                f"the fast step trains batch_topk dictionaries without groups or delta loss on "
                f"CPU or CUDA, not {obstacle}. Use fast='off'."
            )
        self.dictionary, self.config = dictionary, config
        self.split: Any = split or Undivided()
        W_enc = dictionary.W_enc.detach().permute(2, 0, 1).contiguous()
        dictionary.W_enc.data = W_enc.permute(1, 2, 0)
        others = (getattr(dictionary, name).detach() for name in _NAMES[1:])
        self._weights = dict(zip(_NAMES, (W_enc, *others), strict=True))
        self._grads, self._means, self._squares = (
            {name: torch.zeros_like(each) for name, each in self._weights.items()} for _ in range(3)
        )
        self._steps = torch.zeros((), device=dictionary.device)
        self._hint, self._half = 0.0, half_pays(dictionary.device.type) if half is None else half
        self._scaled = W_enc.flatten(1).to(torch.bfloat16) if self._half else None
        self._scores = torch.empty(0)

    @torch.no_grad()
    def step(
        self,
        x_norm: Float[Tensor, "row model d_model"],
        k: float,
        lr: float,
        dead: Bool[Tensor, " latent"] | None = None,
    ) -> StepResult:
        """Train on one batch.

        Args:
            x_norm: Normalised rows.
            k: Mean latents a row that fire in this step.
            lr: Learning rate of this step.
            dead: Latents that the auxiliary loss shall revive.

        Raises:
            TrainingError: If the gradient is not finite; nothing was changed then. Or if the
                step was closed, or the dictionary moved.
        """
        weights = self._weights
        if any(
            getattr(self.dictionary, name).data_ptr() != weights[name].data_ptr() for name in _NAMES
        ):
            raise TrainingError(
                "the dictionary's weights are no longer those of this step, which was closed, or "
                "the dictionary moved to another device. Make a new FastStep."
            )
        x, decoder = x_norm.flatten(1).contiguous(), weights["W_dec"].flatten(1)
        try:
            codes, lowest = self._select(x, max(1, round(k * len(x) * self.split.n_rows_of)))
        except MismatchError as error:
            raise TrainingError(f"{error} Nothing was changed.") from error
        by = ByLatent.of(codes)
        error = weighted_sum(decoder, codes.offsets, codes.latent, codes.value)
        error = self.split.over_latents(error)
        error.add_(weights["b_dec"].flatten()).sub_(x)
        mse = error.view_as(x_norm).square().mean((0, 2))
        slope = error * (2 / error.numel())
        self._gradients(x, slope, codes.value[by.order], by)
        loss = mse.mean()
        n_dead = 0 if dead is None or not self.config.aux else self.split.over_latents(dead.sum())
        if dead is not None and (n_dead := int(n_dead)):
            which = dead.nonzero().squeeze(1)
            loss = loss + self.config.aux * self._revive(x, error.neg_(), which, n_dead)
        self._share_and_own()
        self._adam(lr)
        l0 = torch.tensor(len(codes.value) / len(x), device=x.device)
        fired = by.offsets.diff() > 0
        return StepResult(loss, mse, l0, torch.tensor(lowest, device=x.device), fired)

    def _select(self, x: Float[Tensor, "row width"], n_keep: int) -> tuple[Codes, float]:
        """Exactly the codes that the largest float32 scores of the batch would give.

        Scores that are only nearly right choose candidates, which are scored exactly. The choice
        holds if what was left out would have to be twice as wrong as the worst candidate.
        """
        weight = self.dictionary.code_weight
        scores = self._nearly(x, weight)
        shape = tuple(scores.shape)
        for floor, most in self._floors(scores, weight, n_keep):
            found = candidates(scores, floor, None if self._half else weight)
            if not n_keep <= len(found) <= most:
                continue
            near = codes_at(found, scores.view(-1)[found].float(), shape)
            size, value = weight[near.latent], self._exactly(near, x)
            kept, self._hint = largest(value * size, n_keep)
            guess = near.value if self._half else near.value * size
            wrong = ((guess - value * size).abs() / (value * size).clamp_min(self._hint)).max()
            if floor <= self._hint * (1 - 2 * float(wrong)):
                return codes_at(found[kept], value[kept], shape), self._hint
        weights = self._weights  # few are positive, or candidates are many: take all
        pre = torch.addmm(weights["b_enc"], x, weights["W_enc"].flatten(1).t())
        codes, self._hint = select(pre, weight, n_keep)
        return codes, self._hint

    def _floors(self, scores: Tensor, weight: Tensor, n_keep: int) -> Iterator[tuple[float, float]]:
        """Guesses below the lowest score kept, the surest last, and how many may exceed them."""
        if self._hint > 0:
            yield 0.98 * self._hint, 2 * n_keep
        for wanted in (n_keep, 2 * n_keep, 4 * n_keep):
            floor = sampled_floor(scores, None if self._half else weight, wanted)
            if floor > 0:
                yield floor, math.inf

    def _nearly(self, x: Float[Tensor, "row width"], weight: Tensor) -> Float[Tensor, "row latent"]:
        """Scores of all latents in bfloat16; or, without `weight`, in float32."""
        rows, bias = self._weights["W_enc"].flatten(1), self._weights["b_enc"]
        if self._scores.shape != (len(x), len(rows)):
            kind = torch.bfloat16 if self._half else torch.float32
            self._scores = torch.empty(len(x), len(rows), dtype=kind, device=x.device)
        if self._scaled is None:
            return torch.addmm(bias, x, rows.t(), out=self._scores)
        step = 1 << (14 if x.is_cuda else 8)  # on a CPU, what fits the cache
        for i in range(0, len(rows), step):
            self._scaled[i : i + step] = rows[i : i + step] * weight[i : i + step, None]
        half = (bias * weight).bfloat16(), x.bfloat16()
        return torch.addmm(half[0], half[1], self._scaled.t(), out=self._scores)

    def _exactly(self, codes: Codes, x: Float[Tensor, "row width"]) -> Float[Tensor, " nonzero"]:
        """Pre-activations of the entries of codes, in float32."""
        by = ByLatent.of(codes)
        dots = sampled(self._weights["W_enc"].flatten(1), x, by.offsets, by.row)
        dots += self._weights["b_enc"][codes.latent[by.order]]
        return torch.empty_like(dots).index_copy_(0, by.order, dots)

    def _gradients(self, x: Tensor, slope: Tensor, value: Tensor, by: ByLatent) -> None:
        """Of the mean square; ``slope`` is its gradient by the reconstruction."""
        grads, decoder = self._grads, self._weights["W_dec"].flatten(1)
        back = sampled(decoder, slope, by.offsets, by.row)
        weighted_sum(slope, by.offsets, by.row, value, grads["W_dec"].flatten(1))
        weighted_sum(x, by.offsets, by.row, back, grads["W_enc"].flatten(1))
        ones = x.new_ones(len(x), 1)
        weighted_sum(ones, by.offsets, by.row, back, grads["b_enc"][:, None])
        torch.sum(slope, 0, out=grads["b_dec"].view(-1))

    def _revive(
        self,
        x: Float[Tensor, "row width"],
        missing: Float[Tensor, "row width"],
        dead: Int[Tensor, " dead"],
        n_dead: int,
    ) -> Float[Tensor, ""]:
        """The auxiliary loss, and its gradients, by dense matrices of the dead latents alone.

        All but the choice of the latents in bfloat16, where that pays. ``n_dead`` is of all
        processes, ``dead`` of this one.
        """
        split = self.split
        kind = torch.bfloat16 if self._half else torch.float32
        weights, grads = self._weights, self._grads
        encoder, decoder = (weights[name].flatten(1)[dead] for name in ("W_enc", "W_dec"))
        value, chosen = torch.addmm(weights["b_enc"][dead], x, encoder.t()), None
        if (k_aux := self.config.k_aux or max(1, self.dictionary.config.d_model // 2)) < n_dead:
            chosen = value >= split.row_floor(value, k_aux)
            value *= chosen
        value, decoder, rows = value.relu_().to(kind), decoder.to(kind), x.to(kind)
        mean, n_rows = split.over_rows(missing.mean(0)) / split.n_rows_of, len(x) * split.n_rows_of
        size = split.over_rows(missing.square().sum())
        squares = (size - n_rows * mean.square().sum()).maximum(FLAT * size).clamp_min(1e-12)
        wrong = split.over_latents(value @ decoder).sub_(missing.to(kind))
        back = wrong @ decoder.t()
        if chosen is not None:
            back *= chosen
        scale = 2 * self.config.aux * split.n_rows_of / squares
        grads["W_dec"].flatten(1)[dead] += scale * (value.t() @ wrong)
        grads["W_enc"].flatten(1)[dead] += scale * (back.t() @ rows)
        grads["b_enc"][dead] += scale * back.sum(0)
        norm = torch.linalg.vector_norm(wrong, dtype=torch.float32)
        return norm.square() * split.n_rows_of / squares

    def _share_and_own(self) -> None:
        """Tied decoders get one gradient, and what a model does not own gets none."""
        tied = self._grads["W_dec"][: self.dictionary.config.n_tied]
        if len(tied):
            tied.copy_(tied.sum(1, keepdim=True).expand_as(tied))
        if any(self.dictionary.config.n_exclusive):
            for name in ("W_enc", "W_dec"):
                self._grads[name][~self.dictionary.owned] = 0

    def _adam(self, lr: float) -> None:
        """Clip by the norm of all gradients, and step, in one pass over the weights."""
        grads = list(self._grads.values())
        norm = self._norm()
        require_finite(norm)
        self._steps += 1
        torch._fused_adam_(
            list(self._weights.values()),
            grads,
            list(self._means.values()),
            list(self._squares.values()),
            [],
            [self._steps] * len(grads),
            lr=lr,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            weight_decay=0.0,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=((norm + 1e-6) / self.config.clip).clamp_min(1.0),
        )

    def _norm(self) -> Float[Tensor, ""]:
        """Of the gradients of all weights."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([*self._grads.values()])))

    def state(self) -> dict[str, Tensor]:
        """What, beside the weights, the next step depends on; contiguous, not copied."""
        moments = (("mean", self._means), ("square", self._squares))
        made = {f"{kind}.{name}": each[name] for kind, each in moments for name in _NAMES}
        made["hint"] = torch.tensor(self._hint, dtype=torch.float64)
        made["half"] = torch.tensor(self._half)
        return made | {"steps": self._steps}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state` was taken, to the bit if the weights are those of then.

        Raises:
            MismatchError: If it is the state of another dictionary.
        """
        own = self.state()
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong or set(state) != set(own):
            raise MismatchError(
                f"the state of a fast step has {sorted(own)} in the shapes of its dictionary; "
                f"given are {sorted(state)}, and unlike in shape or missing are {wrong}."
            )
        for name, each in own.items():
            each.copy_(state[name])
        self._hint, self._half = float(state["hint"]), bool(state["half"])
        rows = self._weights["W_enc"].flatten(1)
        self._scaled = rows.to(torch.bfloat16) if self._half else None
        self._scores = torch.empty(0)

    def close(self) -> None:
        """Give the dictionary's encoder its own layout again; the step is not used afterwards."""
        self.dictionary.W_enc.data = self.dictionary.W_enc.data.contiguous()


@lru_cache(maxsize=2)
def half_pays(device: str) -> bool:
    """Whether this machine multiplies bfloat16 matrices a third faster than float32 ones."""
    if device == "cuda":
        return True
    left, right = torch.ones(256, 512), torch.ones(512, 2048)
    return 1.3 * _seconds(left.bfloat16(), right.bfloat16()) < _seconds(left, right)


def _seconds(left: Tensor, right: Tensor) -> float:
    out, times = left @ right, []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - start)
    return min(times)
