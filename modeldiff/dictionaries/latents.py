"""A latent as a direction to steer with and to ablate, and what its decoders say in words."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import pandas as pd
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.dictionaries.models import Dictionary, Side
from modeldiff.dictionaries.scaling import Scaling
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.loading import SIDES, Sides
from modeldiff.logit_lens import LogitLens, logit_lens
from modeldiff.sites import Site

Which = Side | Literal["difference"]


def latent_direction(
    dictionary: Dictionary,
    latent: int,
    *,
    side: Which = "finetuned",
    strength: float | Scaling = 1.0,
    site: "Site | str | None" = None,
    sides: Sides | None = None,
) -> Direction:
    """Take one model's decoder of a latent as a direction, in raw activation space.

    Steering with coefficient c adds what the latent adds to that model's activations when its
    value is ``c * strength``. With a `Scaling` as strength that is a multiple of the largest
    value seen, which is how steering with latents is usually stated (0.5, 0.8, 1, 1.5).

    Args:
        dictionary: Whose latent.
        latent: Which.
        side: Whose decoder; or "difference": the fine-tune's less the base's, what the latent
            adds in the fine-tune over the base. A dictionary of differences has that one alone.
        strength: Value of the latent at coefficient 1; a `Scaling` takes its ``peak``.
        site: Where the activations were from; by default what the dictionary knows.
        sides: The pair, to note its digests.

    Returns:
        ``unit`` is the decoder, ``scale`` its raw length times the strength; the notes say which.

    Raises:
        DirectionError: If the decoder is zero, the latent never fired in the `Scaling`, or no
            site is known.
        MismatchError: If there is no such latent, or the dictionary has not seen that model.

    Source:
        Templeton et al. 2024, Scaling Monosemanticity (steering in multiples of the maximum).

    Example:
        >>> from modeldiff.dictionaries.models import crosscoder
        >>> made = crosscoder(8, 32, k=4, site="resid_post.3")
        >>> latent_direction(made, 5, strength=2.0)
        Direction 'latent 5 (finetuned decoder)' @ resid_post.3 · |v|=2
    """
    where = site or dictionary.config.site
    if not where:
        raise DirectionError(
            "this dictionary does not know where its activations are from: give site=, such as "
            '"resid_post.12".'
        )
    check_latents(dictionary.config.n_latents, (latent,))
    value, meaning = _strength(latent, strength)
    whose = "difference" if dictionary.config.inputs == "difference" else side
    decoder = _decoder(dictionary, latent, whose)
    made = Direction.of(
        decoder * value, where, f"latent {latent} ({whose} decoder)", "dictionary latent"
    )
    length = float(decoder.norm())
    note = f"decoder of latent {latent}, raw length {length:.4g}, times {value:.4g} ({meaning})"
    return replace(
        made,
        models=dict(sides.digests) if sides is not None else {},
        sign=f"towards latent {latent}",
        notes=(note,),
    )


def check_latents(n: int, latents: Iterable[int]) -> None:
    """Check numbers of latents.

    Raises:
        MismatchError: If one is not from 0 to ``n - 1``.
    """
    if wrong := [each for each in latents if not 0 <= each < n]:
        raise MismatchError(
            f"latent {', '.join(map(str, wrong[:5]))} of a dictionary that has 0 to {n - 1}."
        )


def _decoder(dictionary: Dictionary, latent: int, side: Which) -> Float[Tensor, " d_model"]:
    if side != "difference" or not dictionary.config.is_crosscoder:
        return dictionary.decoder("finetuned" if side == "difference" else side)[latent].double()
    both = (dictionary.decoder(each)[latent].double() for each in SIDES[::-1])
    return next(both) - next(both)


def bias_direction(dictionary: Dictionary, *, site: "Site | str | None" = None) -> Direction:
    """What a dictionary adds to every token of the fine-tune and not of the base, as a direction.

    A change that is the same on all tokens is in no latent: the normaliser's means and the
    decoder's biases hold it. It is the difference of what the two sides decode where no latent
    fires; for a dictionary of differences what that decodes to.

    Args:
        dictionary: A crosscoder of two models, or a dictionary of differences.
        site: Where the activations were from; by default what the dictionary knows.

    Raises:
        DirectionError: If there is no such difference, or no site is known.
        MismatchError: If the dictionary sees one side alone, or more than two models.

    Example:
        >>> import torch
        >>> from modeldiff.dictionaries.models import crosscoder
        >>> made = crosscoder(2, 8, k=1, site="resid_post.3")
        >>> made.b_dec.data[1] = torch.tensor([3.0, 4.0])
        >>> bias_direction(made)
        Direction 'bias difference' @ resid_post.3 · |v|=5
    """
    c = dictionary.config
    where = site or c.site
    if not where:
        raise DirectionError(
            "this dictionary does not know where its activations are from: give site=, such as "
            '"resid_post.12".'
        )
    if c.inputs != "difference" and c.n_models != 2:
        raise MismatchError(
            f"a dictionary with inputs={c.inputs!r} of {c.n_models} models has no difference of "
            "base and fine-tune."
        )
    decoded = dictionary.normaliser.undo(dictionary.b_dec.detach()[None])[0].double()
    change = decoded[0] if c.inputs == "difference" else decoded[1] - decoded[0]
    return replace(
        Direction.of(change, where, "bias difference", "bias of a dictionary"),
        sign="from base to finetuned",
        notes=("the part of the change that is the same on every token",),
    )


def _strength(latent: int, strength: float | Scaling) -> tuple[float, str]:
    if not isinstance(strength, Scaling):
        return float(strength), "the value asked for"
    if not int(strength.n_active[latent]):
        raise DirectionError(
            f"latent {latent} never fired in {strength.n_rows:,} rows, so it has no largest "
            "value; give a number as strength."
        )
    return float(strength.peak[latent]), f"its largest value in {strength.n_rows:,} rows"


def latent_lens(
    sides: Sides,
    dictionary: Dictionary,
    latent: int,
    *,
    k: int = 10,
    n_random: int = 19,
    seed: int = 0,
    site: "Site | str | None" = None,
) -> dict[Side, LogitLens]:
    """Read each model's decoder of a latent through that model's own unembedding.

    Args:
        sides: The pair.
        dictionary: Whose latent.
        latent: Which.
        k: Tokens at each end.
        n_random: Random directions beside each decoder; `LogitLens.p` compares with them.
        seed: Of the random ones.
        site: Where the activations were from; by default what the dictionary knows.

    Returns:
        A lens by side; sides that the dictionary has not seen, or whose decoder is zero, are
        left out. Both sides for a dictionary of differences.

    Raises:
        DirectionError: If no decoder can be read.
        MismatchError: If there is no such latent.
    """
    found: dict[Side, LogitLens] = {}
    for side in SIDES:
        if not _written(dictionary, latent, side):
            continue
        direction = latent_direction(dictionary, latent, side=side, site=site)
        found[side] = logit_lens(sides, direction, k=k, n_random=n_random, seed=seed, side=side)
    if not found:
        raise DirectionError(f"both decoders of latent {latent} are zero: nothing can be read.")
    return found


def _written(dictionary: Dictionary, latent: int, side: Side) -> bool:
    check_latents(dictionary.config.n_latents, (latent,))
    if dictionary.config.inputs not in ("pair", "difference", side):
        return False
    return bool(dictionary.decoder(side)[latent].any())


def top_tokens(
    sides: Sides,
    dictionary: Dictionary,
    latents: Sequence[int],
    *,
    side: Side = "finetuned",
    k: int = 10,
    site: "Site | str | None" = None,
) -> pd.DataFrame:
    """The tokens that each of several latents promotes most, one row a latent and token.

    Args:
        sides: The pair.
        dictionary: Whose latents.
        latents: Which; one whose decoder is zero has no rows.
        side: Whose decoder, norm and unembedding.
        k: Tokens of each.
        site: Where the activations were from; by default what the dictionary knows.

    Returns:
        latent, rank, token_id, token, logit (see `modeldiff.logit_lens`), p (chance of a random
        direction to reach as far as this latent's most extreme token).
    """
    parts = []
    for latent in latents:
        if _written(dictionary, latent, side):
            direction = latent_direction(dictionary, latent, side=side, site=site)
            lens = logit_lens(sides, direction, k=k, side=side)
            rows = lens.of("promoted")[["rank", "token_id", "token", "logit"]].assign(p=lens.p)
            rows.insert(0, "latent", latent)
            parts.append(rows)
    columns = ["latent", "rank", "token_id", "token", "logit", "p"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
