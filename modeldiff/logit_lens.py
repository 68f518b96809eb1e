"""What a direction says in words: tokens that it promotes and suppresses, beside random ones."""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError, RemoteError
from modeldiff.forward import device_of
from modeldiff.interventions import Side
from modeldiff.loading import Sides
from modeldiff.tokens import token_names

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
        RemoteError: If the weights are not here.

    Source:
        nostalgebraist 2020 (the logit lens), for directions as in Geva et al. 2022, 2203.14680.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> v = Direction.of(torch.ones(pair.d_model), "resid_post.3", "ones")
        >>> len(logit_lens(pair.sides, v, k=5).of("promoted"))
        5
    """
    _check(sides, direction, k, n_random)
    several = [direction, *random_like(direction, n_random, seed=seed)]
    logits = lens_logits(sides, torch.stack([each.unit for each in several]), side)
    reach = logits.abs().amax(-1).tolist()
    rows = []
    for number, (one, scores) in enumerate(zip(several, logits, strict=True)):
        kind = "random" if number else "direction"
        for end, ordered in (("promoted", scores), ("suppressed", -scores)):
            ids = ordered.topk(min(k, len(scores))).indices.tolist()
            names = token_names(sides.tokenizer, ids)
            for rank, (token, name) in enumerate(zip(ids, names, strict=True)):
                rows.append((kind, one.name, end, rank, token, name, float(scores[token])))
    columns = ["kind", "name", "end", "rank", "token_id", "token", "logit"]
    own, controls = reach[0], tuple(reach[1:])
    p = (1 + sum(each >= own for each in controls)) / (1 + len(controls))
    return LogitLens(pd.DataFrame(rows, columns=columns), controls, p)


@torch.no_grad()
def lens_logits(
    sides: Sides, units: Float[Tensor, "n d_model"], side: Side
) -> Float[Tensor, "n vocab"]:
    """Logits of every token under the logit lens, centred over the vocabulary, float32.

    Args:
        sides: The pair.
        units: Unit vectors; they are read at a root mean square of 1.
        side: Whose final norm and unembedding.
    """
    with sides.on(side) as root:
        norm = module_at(root, sides.site_map.norm)
        head = module_at(root, sides.site_map.unembed)
        dtype = next(norm.parameters()).dtype
        rows = (units * units.shape[-1] ** 0.5).to(device_of(root), dtype)
        raw = (head(norm(rows)).float() - head(norm(-rows)).float()) / 2
    known = raw[:, : len(sides.tokenizer)].cpu()
    return known - known.mean(-1, keepdim=True)


def _check(sides: Sides, direction: Direction, k: int, n_random: int) -> None:
    if sides.kind == "remote":
        raise RemoteError("the logit lens reads weights, and this pair's are not here: load it.")
    if k < 1 or n_random < 1:
        raise DirectionError(f"k={k}, n_random={n_random}: both must be at least 1.")
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
