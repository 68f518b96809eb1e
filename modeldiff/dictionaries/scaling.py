"""Latent scaling: how strongly each model carries the direction of each latent, for all at once.

Decoder norms say what a dictionary was trained to write, not what is in the activations: a sparsity
penalty can shrink a decoder to zero although the model has the feature. Latent scaling asks the
activations. With f_j the latent's value and d_j one model's decoder, beta is the multiple of
f_j d_j that fits a target best, and nu is the ratio of two models' betas along the *same* d_j.

All of it follows from sums over the pairs of a row and a latent that fires on it, so one pass over
the rows serves every latent, both directions and every target, and each row is encoded once.
"""

from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float, Int
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Source, checked
from modeldiff.errors import MismatchError

Target = Literal["activation", "reconstruction", "error"]
TARGETS: tuple[Target, ...] = ("activation", "reconstruction", "error")
_BLOCK = 4096  # latents whose decoders are held in float64 at once


@dataclass(frozen=True, eq=False)
class Scaling:
    """Betas of all latents, and how often they fired. Float64; NaN for latents that never fired.

    The last two axes of a beta are (model whose decoder is the direction, model whose activations
    are fitted), base 0 and fine-tuned 1. A dictionary on one model or on differences has one
    direction, and only ``beta_activation`` has both models.

    Args:
        beta_activation: Fit to x, in the dictionary's normalised space.
        beta_reconstruction: Fit to the whole reconstruction of x.
        beta_error: Fit to x less the reconstruction by all *other* latents.
        n_active: Rows on which the latent fired.
        mean: Mean value where it fired.
        peak: Largest value.
        n_rows: Rows seen.
        names: Names of the models.
    """

    beta_activation: Float[Tensor, "latent direction model"]
    beta_reconstruction: Float[Tensor, "latent direction own"]
    beta_error: Float[Tensor, "latent direction own"]
    n_active: Int[Tensor, " latent"]
    mean: Float[Tensor, " latent"]
    peak: Float[Tensor, " latent"]
    n_rows: int
    names: tuple[str, ...]

    @property
    def n_never(self) -> int:
        """Latents that never fired."""
        return int((self.n_active == 0).sum())

    def beta(self, target: Target) -> Float[Tensor, "latent direction model"]:
        """Betas of one target."""
        return getattr(self, f"beta_{target}")

    def nu(self, target: Target, *, direction: int = 1, other: int = 0) -> Float[Tensor, " latent"]:
        """How much of the latent the other model carries: beta of other / beta of direction's own.

        Near 0 the other model lacks it, near 1 it has it as strongly. With the defaults the
        direction is the fine-tune's decoder and the other model the base; ``direction=0,
        other=1`` asks the same of base-heavy latents. For a dictionary on one model, along its
        one decoder, the two are the models compared.

        Raises:
            MismatchError: If the target does not exist for both models.
        """
        beta = self.beta(target)
        if max(direction, other) >= beta.shape[2]:
            raise MismatchError(
                f"nu({target!r}) compares models {other} and {direction}, and this dictionary has "
                f"{beta.shape[2]} for that target; one-model dictionaries have nu('activation')."
            )
        along = min(direction, beta.shape[1] - 1)
        return beta[:, along, other] / beta[:, along, direction]

    def table(self, *, direction: int = 1) -> pd.DataFrame:
        """One row a latent: latent, n_active, firing_rate, mean, max, every beta, and the nus.

        Args:
            direction: Whose decoder is the direction; nu compares the other model with it.
        """
        columns: dict[str, Tensor] = {
            "latent": torch.arange(len(self.n_active)),
            "n_active": self.n_active,
            "firing_rate": self.n_active.double() / max(1, self.n_rows),
            "mean_activation": self.mean,
            "max_activation": self.peak,
        }
        for target in TARGETS:
            beta = self.beta(target)
            along = beta[:, min(direction, beta.shape[1] - 1)]
            names = self.names if beta.shape[2] == len(self.names) else ("own",)
            columns |= {f"beta_{target}_{name}": along[:, m] for m, name in enumerate(names)}
            if beta.shape[2] == 2:
                columns[f"nu_{target}"] = self.nu(target, direction=direction, other=1 - direction)
        return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


@torch.no_grad()
def latent_scaling(
    dictionary: Dictionary,
    source: Source,
    *,
    bias: bool = True,
    batch_size: int = 512,
    budget: int = 2 << 20,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Scaling:
    """Fit every latent's direction to every target in both models, in one pass over the rows.

    Args:
        dictionary: A crosscoder; or a dictionary on one model or on differences, for which both
            models' activations (less their means, in the dictionary's scale) are fitted.
        source: Rows of the pair, raw.
        bias: Whether decoder biases count as part of activations and reconstructions, as in the
            source; the error target does not depend on it. Only for crosscoders.
        batch_size: Rows encoded at once.
        budget: Bytes for the gathered decoders; beside them, memory is the encoder's and a few
            numbers a latent.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        Betas with sums in float64.

    Raises:
        Cancelled: If the event is set; ``partial`` is the `Scaling` of the rows so far.

    Source:
        Minder et al. 2025, 2504.02922 (latent scaling, complete shrinkage and latent decoupling).
    """
    report, sums = reporter(progress, "latent scaling"), None
    for rows in checked(source).in_order(batch_size):
        acts = rows.acts.to(dictionary.W_dec)
        seen = dictionary.normaliser.apply(dictionary.view(acts))
        pair = None if dictionary.config.is_crosscoder else acts * dictionary.normaliser.scale
        sums = sums or _Sums(dictionary, budget, 0 if pair is None else pair.shape[1])
        if cancel is not None and cancel.is_set():
            check(cancel, sums.scaling(bias))
        sums.add(dictionary.encode(acts), seen, pair)
        report(sums.n_rows, source.n_rows, f"{sums.n_rows:,} rows")
    if sums is None:
        raise MismatchError("latent scaling needs rows, and the source has none.")
    return sums.scaling(bias)


class _Sums:
    """Sums over active pairs: n, f, f^2, and f <y, d> for every direction d and target y.

    The targets are what the dictionary sees, its residual, and, for a dictionary on one model,
    the models of the pair.
    """

    def __init__(self, dictionary: Dictionary, budget: int, n_pair: int) -> None:
        self.W_dec, self.b_dec = dictionary.W_dec.detach(), dictionary.b_dec.detach()
        n_latents, n_models, d_model = self.W_dec.shape
        self.n_pair, self.budget, self.n_rows = n_pair, budget, 0
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.W_dec.device)
        self.n = zeros(n_latents).long()
        self.f, self.ff, self.peak = zeros(n_latents), zeros(n_latents), zeros(n_latents)
        self.dots = zeros(n_latents, n_models, 2 * n_models + n_pair)
        self.pair_total = zeros(n_pair, d_model)

    def add(
        self,
        codes: Codes,
        seen: Float[Tensor, "row model d_model"],
        pair: Float[Tensor, "row other d_model"] | None = None,
    ) -> None:
        """Add rows: their latents, what the dictionary sees (normalised), and the pair's rows."""
        latent, value = codes.latent, codes.value.double()
        self.n += latent.bincount(minlength=len(self.n))
        self.f.index_add_(0, latent, value)
        self.ff.index_add_(0, latent, value * value)
        self.peak.scatter_reduce_(0, latent, value, "amax")
        self.n_rows += len(codes)
        if pair is not None:
            self.pair_total += pair.sum(0, dtype=torch.float64)
        lengths = codes.offsets.diff()
        order = lengths.argsort(descending=True)  # rows of like length together: little padding
        start, n = 0, int((lengths > 0).sum())
        while start < n:
            width = int(lengths[order[start]])
            a_row = width * self.W_dec[0].numel() * self.W_dec.element_size()
            rows = order[start : min(n, start + max(1, self.budget // a_row))]
            self._add_rows(codes, rows, width, seen[rows], None if pair is None else pair[rows])
            start += len(rows)

    def _add_rows(
        self, codes: Codes, rows: Tensor, width: int, seen: Tensor, pair: Tensor | None
    ) -> None:
        """Add rows with at most ``width`` latents; their decoders are gathered once."""
        at = codes.offsets[rows, None] + torch.arange(width, device=rows.device)
        real = at < codes.offsets[rows + 1, None]
        at = at.clamp(max=len(codes.latent) - 1)
        latent, value = codes.latent[at], codes.value[at] * real
        gathered = self.W_dec[latent]  # row, code, model, d_model
        found = torch.bmm(value[:, None], gathered.flatten(2)).view_as(seen) + self.b_dec
        targets = torch.cat([seen, seen - found] if pair is None else [seen, seen - found, pair], 1)
        dots = torch.bmm(gathered.flatten(1, 2), targets.mT).double()
        weighted = dots.view(latent.numel(), *self.dots.shape[1:]) * value.reshape(-1, 1, 1)
        self.dots.index_add_(0, latent.flatten(), weighted)

    def scaling(self, bias: bool) -> Scaling:
        """The betas of what was added so far."""
        n_models = self.W_dec.shape[1]
        act, error, pair = self.dots.split([n_models, n_models, self.n_pair], 2)
        gram, offset, off_pair = self._decoders()
        size = (self.ff[:, None] * gram.diagonal(dim1=1, dim2=2))[..., None]
        size = size.where(size > 0, torch.nan)
        rec, f = act - error, self.f[:, None, None]
        if self.n_pair:
            act = pair - f * off_pair
        elif not bias:
            act, rec = act - f * offset, rec - f * offset
        return Scaling(
            beta_activation=act / size,
            beta_reconstruction=rec / size,
            beta_error=(error + self.ff[:, None, None] * gram) / size,
            n_active=self.n,
            mean=self.f / self.n,
            peak=self.peak.where(self.n > 0, torch.nan),
            n_rows=self.n_rows,
            names=model_names(self.n_pair or n_models),
        )

    def _decoders(self) -> tuple[Tensor, Tensor, Tensor]:
        """Products of each direction with the decoders, their biases, and the pair's means."""
        bias, mean = self.b_dec.double(), self.pair_total / max(1, self.n_rows)
        grams, offsets, pairs = [], [], []
        for block in self.W_dec.split(_BLOCK):
            directions = block.double()
            grams.append(directions @ directions.mT)
            offsets.append(directions @ bias.T)
            pairs.append(directions @ mean.T)
        return torch.cat(grams), torch.cat(offsets), torch.cat(pairs)


def model_names(n: int) -> tuple[str, ...]:
    """Names of the models of a dictionary, for columns.

    Example:
        >>> model_names(3)
        ('base', 'finetuned', 'finetuned_2')
    """
    return ("base", "finetuned", *(f"finetuned_{i}" for i in range(2, n)))[:n]
