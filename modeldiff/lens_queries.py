"""One direction read as tokens beside both kinds of control, and single tokens asked for."""

from collections.abc import Sequence
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.activations import capture
from modeldiff.difference_lens import KINDS, DifferenceLens
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.errors import MaskError, MismatchError
from modeldiff.interventions import Side
from modeldiff.loading import Sides
from modeldiff.logit_lens import LogitLens, lens_logits, logit_lens, plain_lenses
from modeldiff.stats import empirical_p, null_band
from modeldiff.tokens import n_ids, token_names


def read_direction(
    sides: Sides, direction: Direction, controls: Sequence[Direction], *, k: int = 20,
    seed: int = 0, side: Side = "finetuned",
) -> DifferenceLens:  # fmt: skip
    """Read one direction as `modeldiff.difference_lens.difference_lens` reads a trace.

    Args:
        sides: The pair.
        direction: In the residual stream, or written to it.
        controls: Random differences, see `modeldiff.difference_lens.random_differences`; as many
            random directions are drawn.
        k: Tokens at each end.
        seed: Of the random directions.
        side: Whose norm and unembedding.

    Returns:
        Its tokens and reach; the position is 0 and never flagged.

    Raises:
        DirectionError: If the site does not write to the residual stream, or without controls.
        MismatchError: If a width differs.
    """
    own = logit_lens(sides, direction, k=k, n_random=len(controls), seed=seed, side=side)
    others = plain_lenses(sides, controls, k=k, side=side)
    drawn = own.tokens[own.tokens["kind"] == "random"]
    parts = [_own(own).assign(kind=KINDS[0], control=0),
             drawn.assign(control=pd.factorize(drawn["name"])[0])]  # fmt: skip
    parts += [_own(each).assign(kind=KINDS[2], control=i) for i, each in enumerate(others)]
    columns = ["position", "kind", "control", "end", "rank", "token_id", "token", "logit",
               "flagged"]  # fmt: skip
    tokens = pd.concat(parts, ignore_index=True).assign(position=0, flagged=False)[columns]
    reaches = [float(_own(each)["logit"].abs().max()) for each in (own, *others)]
    p = empirical_p(reaches[0], reaches[1:], tail="upper")
    reach = {"position": 0, "reach": reaches[0], "p_random": own.p, "p_random_difference": p,
             "flagged": False}  # fmt: skip
    return DifferenceLens(tokens, pd.DataFrame([reach]))


def _own(lens: LogitLens) -> pd.DataFrame:
    return lens.tokens[lens.tokens["kind"] == "direction"]


def text_means(
    sides: Sides, texts: Sequence[Any], direction: Direction, *, cancel: Event | None = None
) -> Float[Tensor, "text d_model"]:
    """Mean activation of every text at a direction's site, in the base.

    Args:
        sides: The pair.
        texts: Unrelated texts, 4 or more; for `modeldiff.difference_lens.random_differences`.
        direction: Whose site.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If fewer than 4 texts have a token after the first.
        Cancelled: If the event is set.
    """
    acts = capture(sides, texts, direction.site, cancel=cancel)
    kept = acts.text_index.unique()
    if len(kept) < 4:
        raise MaskError(f"{len(kept)} texts have two tokens or more; controls need 4: add some.")
    rows = acts.base[direction.site]
    return torch.stack([rows[acts.text_index == each].mean(0) for each in kept])


def token_query(
    sides: Sides, direction: Direction, controls: Sequence[Direction], token_ids: Sequence[int],
    *, n_random: int = 99, seed: int = 0, side: Side = "finetuned",
) -> pd.DataFrame:  # fmt: skip
    """Logit and rank of tokens under a direction's logit lens, beside both kinds of control.

    Args:
        sides: The pair.
        direction: In the residual stream, or written to it.
        controls: Random differences; may be empty.
        token_ids: Tokens.
        n_random: Random directions.
        seed: Of the random directions.
        side: Whose norm and unembedding.

    Returns:
        One row a token: token_id, token, logit, rank (0 is promoted most), n_tokens; of random
        directions random_low, random_high (95 % of logits), random_p (two-sided), rank_low,
        rank_high; of random differences difference_low, difference_high, difference_p (NaN
        without). P-values are of one token, not corrected for how many are asked.

    Raises:
        DirectionError: If the site does not write to the residual stream.
        MismatchError: If no token is named.
    """
    if not token_ids:
        raise MismatchError("there is no token to ask for: write some text.")
    logit_lens(sides, direction, k=1, n_random=1, side=side)  # says what is wrong with it
    drawn = random_like(direction, n_random, seed=seed)
    logits = lens_logits(sides, _units([direction, *drawn, *controls]), side)[:, list(token_ids)]
    ranks = _ranks(lens_logits(sides, _units([direction, *drawn]), side), token_ids)
    names = token_names(sides.tokenizer, list(token_ids))
    rows = []
    for i, (token, name) in enumerate(zip(token_ids, names, strict=True)):
        own, random = float(logits[0, i]), logits[1 : n_random + 1, i].tolist()
        rows.append(
            {"token_id": token, "token": name, "logit": own, "rank": int(ranks[0, i]),
             "n_tokens": n_ids(sides.tokenizer), **_beside("random", own, random),
             **_rank_band(ranks[1:, i].tolist()),
             **_beside("difference", own, logits[n_random + 1 :, i].tolist())}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _units(directions: Sequence[Direction]) -> Float[Tensor, "n d_model"]:
    return torch.stack([each.unit for each in directions])


def _ranks(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    return torch.stack([(logits > logits[:, [token]]).sum(-1) for token in token_ids], -1)


def _rank_band(ranks: list[int]) -> dict[str, int]:
    band = null_band([float(each) for each in ranks])
    return {"rank_low": int(band.low), "rank_high": int(band.high)}


def _beside(name: str, own: float, others: list[float]) -> dict[str, float]:
    if not others:
        return dict.fromkeys((f"{name}_low", f"{name}_high", f"{name}_p"), float("nan"))
    band = null_band(others)
    return {f"{name}_low": band.low, f"{name}_high": band.high,
            f"{name}_p": empirical_p(own, others)}  # fmt: skip
