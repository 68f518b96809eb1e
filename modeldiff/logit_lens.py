"""What a direction says in words: tokens that it promotes and suppresses, beside random ones."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.forward import device_of
from modeldiff.interventions import Side
from modeldiff.loading import Sides
from modeldiff.tokens import n_ids, token_names

_WRITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True, eq=False)
class LogitLens:
    """Tokens at both ends of a direction and of random controls.

    Args:
        tokens: One row a token: kind ("direction" or "random"), name, end ("promoted" or
            "suppressed"), rank (0 the most extreme), token_id, token, logit.
        random_reach: Largest absolute logit of any token in each control.
        p: How often controls reach the direction's largest absolute logit, which counts as one
            of them: never 0.
    """

    tokens: pd.DataFrame
    random_reach: tuple[float, ...]
    p: float

    def of(self, end: str, kind: str = "direction", index: int = 0) -> pd.DataFrame:
        """Rows of one end, most extreme first; of the direction, or of one control."""
        rows = self.tokens[(self.tokens["kind"] == kind) & (self.tokens["end"] == end)]
        name = rows["name"].unique()[index]
        return rows[rows["name"] == name].reset_index(drop=True)


def logit_lens(
    sides: Sides,
    direction: Direction,
    *,
    k: int = 10,
    n_random: int = 19,
    seed: int = 0,
    side: Side = "finetuned",
) -> LogitLens:
    """Read a direction through the final norm and the unembedding.

    The logits are those of the vector set to a root mean square of 1, less the unembedding's
    answer to nothing: the linear part, half of f(v) - f(-v), so that biases fall out. They are
    centred over the vocabulary, since a constant changes no probability. Soft-capping is left out.

    Args:
        sides: The pair's sides.
        direction: In the residual stream, or written to it.
        k: Tokens at each end.
        n_random: Random directions of the same length beside it.
        seed: Of the controls.
        side: Whose norm and unembedding.

    Raises:
        DirectionError: If the direction's site does not write to the residual stream, or ``k`` or
            ``n_random`` is below 1.
        MismatchError: If its width is not the model's.

    Source:
        nostalgebraist 2020 (the logit lens), for directions as in Geva et al. 2022, 2203.14680.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> v = Direction.of(torch.ones(pair.d_model), "resid_post.3", "ones")
        >>> len(logit_lens(pair.sides, v, k=5).of("promoted"))
        5
    """
    if k < 1 or n_random < 1:
        raise DirectionError(f"k={k}, n_random={n_random}: both must be at least 1.")
    _check(sides, direction)
    several = [direction, *random_like(direction, n_random, seed=seed)]
    (own, *controls), rows = _read(sides, several, k, side)
    p = (1 + sum(each >= own for each in controls)) / (1 + len(controls))
    kinds = ["random" if row[0] else "direction" for row in rows]
    return LogitLens(_table(kinds, rows), tuple(controls), p)


def plain_lenses(
    sides: Sides, directions: Sequence[Direction], *, k: int = 10, side: Side = "finetuned"
) -> list[LogitLens]:
    """Read several directions at once, without random ones beside them.

    Args:
        sides: The pair's sides.
        directions: As for `logit_lens`.
        k: Tokens at each end.
        side: Whose norm and unembedding.

    Returns:
        One for each; ``random_reach`` is empty and ``p`` NaN.

    Raises:
        DirectionError: As `logit_lens`.
        MismatchError: As `logit_lens`.
    """
    for each in directions:
        _check(sides, each)
    if not directions:
        return []
    _, rows = _read(sides, directions, k, side)
    own = [[row for row in rows if row[0] == number] for number in range(len(directions))]
    return [LogitLens(_table(["direction"] * len(each), each), (), math.nan) for each in own]


_Row = tuple[int, str, str, int, int, str, float]


def _read(
    sides: Sides, several: Sequence[Direction], k: int, side: Side
) -> tuple[list[float], list[_Row]]:
    """How far each reaches; rows of number, name, end, rank, token_id, token, logit."""
    found = _ends(sides, torch.stack([each.unit for each in several]), side, k)
    rows: list[_Row] = []
    for number, one in enumerate(several):
        for which, end in enumerate(("promoted", "suppressed")):
            ids, logits = (found[each][number, which].tolist() for each in ("ids", "logits"))
            names = token_names(sides.tokenizer, ids)
            for rank, (token, name, logit) in enumerate(zip(ids, names, logits, strict=True)):
                rows.append((number, one.name, end, rank, token, name, logit))
    return found["reach"].tolist(), rows


def _table(kinds: Sequence[str], rows: Sequence[_Row]) -> pd.DataFrame:
    columns = ["kind", "name", "end", "rank", "token_id", "token", "logit"]
    return pd.DataFrame([(kind, *row[1:]) for kind, row in zip(kinds, rows, strict=True)],
                        columns=columns)  # fmt: skip


@torch.no_grad()
def lens_logits(
    sides: Sides, units: Float[Tensor, "n d_model"], side: Side
) -> Float[Tensor, "n vocab"]:
    """Logits of every token under the logit lens, centred over the vocabulary, float32.

    Args:
        sides: The pair.
        units: Unit vectors; they are read at a root mean square of 1.
        side: Whose final norm and unembedding.

    Raises:
        RemoteError: If they lie on a server, and the logits are more than may travel.
    """
    if sides.kind == "remote":
        from modeldiff import remote_lenses

        return remote_lenses.lens_logits(sides, units, side)
    with sides.on(side) as root:
        norm = module_at(root, sides.site_map.norm)
        head = module_at(root, sides.site_map.unembed)
        dtype = next(norm.parameters()).dtype
        rows = (units * units.shape[-1] ** 0.5).to(device_of(root), dtype)
        return centred(norm, head, rows, n_ids(sides.tokenizer))


def centred(
    norm: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    rows: Float[Tensor, "n d_model"],
    known: int,
) -> Float[Tensor, "n vocab"]:
    """The linear part of what norm and unembedding make of rows, less its mean over the tokens.

    Args:
        norm: The final norm.
        head: The unembedding.
        rows: At a root mean square of 1, where the modules are.
        known: Tokens of the vocabulary; the unembedding may have more.
    """
    raw = (head(norm(rows)).float() - head(norm(-rows)).float()) / 2
    named = raw[:, :known].cpu()
    return named - named.mean(-1, keepdim=True)


def _ends(sides: Sides, units: Float[Tensor, "n d_model"], side: Side, k: int) -> dict[str, Tensor]:
    if sides.kind == "remote":
        from modeldiff import remote_lenses

        return remote_lenses.lens_ends(sides, units, side, k)
    return ends_of(lens_logits(sides, units, side), k)


def ends_of(logits: Float[Tensor, "n vocab"], k: int) -> dict[str, Tensor]:
    """The k tokens at both ends of each row.

    Args:
        logits: From `lens_logits`.
        k: How many; fewer where there are fewer.

    Returns:
        ``reach`` ``[n]``, the largest absolute logit; ``ids`` and ``logits`` ``[n, 2, k]``, the
        promoted first, each end's most extreme first.
    """
    k = min(k, logits.shape[-1])
    ids = torch.stack([(sign * logits).topk(k).indices for sign in (1, -1)], 1)
    chosen = logits[:, None].expand(-1, 2, -1).gather(-1, ids)
    return {"reach": logits.abs().amax(-1), "ids": ids, "logits": chosen}


def _check(sides: Sides, direction: Direction) -> None:
    if direction.site.kind not in _WRITES:
        raise DirectionError(
            f"{direction.name!r} is at {direction.site}, which is not in the residual stream; the "
            f"unembedding reads directions at {', '.join(_WRITES)}."
        )
    width = sides.shape("base").d_model
    if direction.d_model != width:
        raise MismatchError(
            f"{direction.name!r} has width {direction.d_model}, the model {width}: it comes from "
            "another model."
        )
