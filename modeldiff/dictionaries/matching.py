"""Which latents of one dictionary another one has too: decoders matched by cosine."""

from dataclasses import dataclass
from threading import Event
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, tracked
from modeldiff._shapes import Float
from modeldiff.dictionaries.models import Dictionary
from modeldiff.errors import MismatchError

Which = Literal["base", "finetuned", "both"]
_BLOCK = 1024  # latents compared with all others at once


@dataclass(frozen=True, eq=False)
class Matching:
    """Best matches of the latents of dictionary a in dictionary b.

    Args:
        table: One row a latent of a: latent, match (the latent of b with the highest cosine),
            cosine, second (the next highest cosine), mutual (whether it is also the best match
            of its match), novel (cosine below the threshold). Latents of a whose decoder is zero
            have no match and a NaN.
        chance: The cosine that 95 % of random directions stay below with their best match in b.
        threshold: Below it a latent is novel.
    """

    table: pd.DataFrame
    chance: float
    threshold: float

    @property
    def novel_share(self) -> float:
        """Share of a's latents, zero decoders left out, that b lacks."""
        known = self.table["cosine"].notna()
        return float(self.table.loc[known, "novel"].mean())


@torch.no_grad()
def match(
    a: "Dictionary | Float[Tensor, 'latent d_model']",
    b: "Dictionary | Float[Tensor, 'other d_model']",
    *,
    side: Which = "finetuned",
    other_side: Which | None = None,
    threshold: float = 0.7,
    n_random: int = 1000,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Matching:
    """Match every latent of a with the latent of b whose decoder has the highest cosine.

    Args:
        a: A dictionary, or decoders as rows.
        b: Another, at a site of the same width.
        side: Which decoder of a: the raw one of a model, or "both": those of all models, in
            normalised space, side by side.
        other_side: The same of b; as for a by default.
        threshold: A latent whose best cosine is below this is novel.
        n_random: Random directions for the cosine to expect by chance.
        seed: Of these.
        progress: Where to report.
        cancel: Event that stops between blocks.

    Raises:
        MismatchError: If the widths differ, or a dictionary has no decoder for the side.
        Cancelled: If the event is set.

    Source:
        Leask et al. 2025, 2502.04878 (stitching: a latent is novel below a cosine of 0.7).

    Example:
        >>> found = match(torch.eye(3), torch.eye(3)[[2, 0]])
        >>> found.table["match"].tolist(), found.table["novel"].tolist()
        ([1, 0, 0], [False, True, False])
    """
    rows, others = _units(a, side), _units(b, other_side or side)
    if rows.shape[1] != others.shape[1]:
        raise MismatchError(
            f"decoders of width {rows.shape[1]} and {others.shape[1]}: the dictionaries are of "
            "different models or sites."
        )
    cosine, best = [], []
    reached = others.new_full((len(others),), -2.0)
    back = torch.zeros(len(others), dtype=torch.int64)
    blocks = rows.split(_BLOCK)
    for number, block in enumerate(tracked(blocks, progress, cancel, "matching")):
        cosines = block @ others.T
        top = cosines.topk(min(2, len(others)), 1)
        cosine.append(
            torch.nn.functional.pad(top.values, (0, 2 - top.values.shape[1]), value=torch.nan)
        )
        best.append(top.indices[:, 0])
        cosines[~block.any(1)] = -2.0
        here, at = cosines.max(0)
        better = here > reached
        reached = torch.where(better, here, reached)
        back = torch.where(better, at + number * _BLOCK, back)
    table = _table(rows, torch.cat(best), torch.cat(cosine), back, threshold)
    return Matching(table, _chance(others, n_random, seed), threshold)


def _units(a: "Dictionary | Tensor", side: Which) -> Float[Tensor, "latent d_model"]:
    if isinstance(a, Tensor):
        rows = a.detach()
    else:
        rows = a.W_dec.detach().flatten(1) if side == "both" else a.decoder(side)
    if rows.dim() != 2 or not len(rows):
        raise MismatchError(f"decoders of shape {tuple(rows.shape)}; give rows (latent, d_model).")
    return torch.nn.functional.normalize(rows.float().cpu(), dim=1)


def _table(
    rows: Tensor, best: Tensor, cosine: Tensor, back: Tensor, threshold: float
) -> pd.DataFrame:
    known = rows.any(1)
    first, second = cosine.T.where(known, torch.nan)
    mutual = known & (back[best] == torch.arange(len(rows)))
    columns = {
        "latent": torch.arange(len(rows)),
        "match": best.where(known, -1),
        "cosine": first,
        "second": second,
        "mutual": mutual,
        "novel": known & (first < threshold),
    }
    return pd.DataFrame({name: each.numpy() for name, each in columns.items()})


def _chance(others: Tensor, n: int, seed: int) -> float:
    """95th percentile of the best cosine of random directions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, others.shape[1], generator=generator)
    units = torch.nn.functional.normalize(drawn, dim=1)
    best = torch.cat([(block @ others.T).amax(1) for block in units.split(_BLOCK)])
    return float(best.quantile(0.95))
