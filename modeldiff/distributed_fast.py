"""The fused BatchTopK step of several processes: each proposes candidates, all choose together.

A process scores its own rows, or its own latents, nearly; what might be kept it scores exactly.
The lowest score that is kept is found by the exact k-th largest over all processes' candidates,
and holds for all of them if nothing that any of them left out could belong. Decoding and gradients
are sparse, and only reconstructions (by latents) or gradients (by rows) travel.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modeldiff._shapes import Bool, Float
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.fast import FastStep, half_pays
from modeldiff.dictionaries.kernels import candidates, codes_at, safe_rank, sample
from modeldiff.dictionaries.losses import StepResult
from modeldiff.dictionaries.models import Dictionary


class DividedFastStep(FastStep):
    """`modeldiff.dictionaries.fast.FastStep` on a share of the rows or of the latents.

    Args:
        dictionary: The whole one, or a share of its latents.
        config: Of the training.
        split: `modeldiff.distributed_training.ByRows` or ``ByLatents``.
    """

    def __init__(self, dictionary: Dictionary, config: TrainConfig, split: Any) -> None:
        self.world = split.world
        half = not self.world.any(not half_pays(dictionary.device.type))  # all of them alike
        super().__init__(dictionary, config, split, half)

    def step(
        self,
        x_norm: Float[Tensor, "row model d_model"],
        k: float,
        lr: float,
        dead: Bool[Tensor, " latent"] | None = None,
    ) -> StepResult:
        """Train on one batch; see `FastStep.step`. Scores equal to the lowest kept are all kept."""
        return self.split.seen(super().step(x_norm, k, lr, dead))

    def _select(self, x: Float[Tensor, "row width"], n_keep: int) -> tuple[Codes, float]:
        weight = self.dictionary.code_weight
        scores = self._nearly(x, weight)
        shape = tuple(scores.shape)
        for floor, most in self._common_floors(scores, weight, n_keep):
            found = candidates(scores, floor, None if self._half else weight)
            if not n_keep <= int(self.world.total(x.new_tensor(len(found)).double())) <= most:
                continue
            near = codes_at(found, scores.view(-1)[found].float(), shape)
            size, value = weight[near.latent], self._exactly(near, x)
            lowest = self.world.kth_largest(value * size, n_keep)
            guess = near.value if self._half else near.value * size
            wrong = (guess - value * size).abs() / (value * size).clamp_min(lowest)
            worst = torch.cat((wrong.nan_to_num(torch.inf), wrong.new_zeros(1))).max()
            self._hint = float(lowest)
            if 0 < floor <= self._hint * (1 - 2 * float(self.world.highest(worst))):
                kept = value * size >= lowest
                return codes_at(found[kept], value[kept], shape), self._hint
        return self._dense(x, weight, n_keep)

    def _common_floors(
        self, scores: Tensor, weight: Tensor, n_keep: int
    ) -> Iterator[tuple[float, float]]:
        """The same guesses in all processes, from all their samples together."""
        if self._hint > 0:
            yield 0.98 * self._hint, 2 * n_keep
        found = sample(scores, None if self._half else weight)
        for wanted in (n_keep, 2 * n_keep, 4 * n_keep):
            rank = safe_rank(wanted * len(found) / scores.numel())
            floor = float(self.world.kth_largest(found, rank))
            if floor > 0:
                yield floor, float("inf")

    def _dense(
        self, x: Float[Tensor, "row width"], weight: Float[Tensor, " latent"], n_keep: int
    ) -> tuple[Codes, float]:
        """Take all positive scores as candidates."""
        weights = self._weights
        pre = torch.addmm(weights["b_enc"], x, weights["W_enc"].flatten(1).t())
        exact = pre.relu() * weight
        lowest = self.world.kth_largest(exact, n_keep)
        self._hint = float(lowest)
        kept = ((exact >= lowest) & (exact > 0)).view(-1).nonzero().squeeze(1)
        return codes_at(kept, pre.view(-1)[kept], tuple(pre.shape)), self._hint

    def _share_and_own(self) -> None:
        self.split.gather_gradients(list(self._grads.values()))
        super()._share_and_own()

    def _norm(self) -> Float[Tensor, ""]:
        return self.split.norm(self._grads)
