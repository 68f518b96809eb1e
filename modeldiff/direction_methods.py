"""Finding directions as differences of means, and how far to trust them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.moments import Moments, nonzero_mean
from modeldiff.sites import Site
from modeldiff.split_halves import Groups, half_masks

Side = Float[Tensor, "_n _d_model"] | Moments
Pair = tuple[Moments, Moments]
Contrast = Literal["data", "model", "both"]


@dataclass(frozen=True, eq=False)
class Quadrants:
    """Activations of two models on two sets of text, at one site.

    Each is a tensor of rows or `Moments`; the rows of one text set are the same tokens in both
    models.
    """

    finetuned_positive: Side
    """Fine-tuned model, texts with the behaviour (e.g. its misaligned answers)."""
    finetuned_negative: Side
    """Fine-tuned model, texts without it (e.g. its aligned answers)."""
    base_positive: Side
    """Base model, reading the texts with the behaviour."""
    base_negative: Side
    """Base model, reading the texts without it."""


def mean_difference(
    positive: Side,
    negative: Side,
    site: Site | str,
    name: str,
    *,
    groups: Groups | None = None,
    halves: tuple[Pair, Pair] | None = None,
    base_contrast: tuple[Side, Side] | None = None,
    sources: tuple[str, ...] = (),
    models: Mapping[str, str] | None = None,
    sign: str = "",
    resid_norm: float | None = None,
    seed: int = 0,
    min_tokens: int = 8,
) -> Direction:
    """Mean of ``positive`` minus mean of ``negative``, in float64.

    Args:
        positive: Activations with the behaviour, one row per token, or their `Moments`.
        negative: Activations without it. The two counts need not agree.
        site: Where both were captured.
        name: Name of the result.
        groups: The text id of every row, per side. The two halves then split texts; without
            ids they split tokens, which flatters the split-half cosine, and a note says so. An
            id found on both sides goes to the same half.
        halves: For `Moments`: those of two halves of each side, ``((pos_a, neg_a), (pos_b,
            neg_b))``, to compute the split-half cosine from.
        base_contrast: The same two sets of text read by the base model, positive first. Gives
            `Direction.text_null`.
        sources: Names of the sets of text.
        models: Content hashes of the models.
        sign: Where it points, in words; by default from the negative to the positive source.
        resid_norm: Mean residual norm at the site; by default that of the rows themselves,
            where the site is the residual stream.
        seed: Of the split into halves.
        min_tokens: Fewest rows accepted on a side.

    Raises:
        DirectionError: If a side has too few rows, a row is not finite, or there is no
            difference between the means, as in a null pair.
        MismatchError: If widths differ, or there is not one text id per row.

    Source:
        Difference in means: Arditi et al. 2024 (refusal); used for the misalignment direction
        by Soligo et al. 2025 (Convergent Linear Representations of Emergent Misalignment).

    Example:
        >>> import torch
        >>> rows = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> shift = torch.tensor([5.0, 0.0, 0.0, 0.0])
        >>> mean_difference(rows + shift, rows, "mlp_out.3", "shift", seed=1)
        Direction 'shift' @ mlp_out.3 · |v|=5 · n=64 tokens · split-half 1.00
    """
    seen = _evidence(positive, negative, groups, halves, seed, name)
    _require(seen, name, min_tokens)
    size = seen.positive.mean_norm + seen.negative.mean_norm
    raw = nonzero_mean(_difference(seen.positive, seen.negative, name), size, name)
    direction = Direction.of(raw, site, name, "mean difference")
    if resid_norm is None and direction.site.kind.startswith("resid"):
        resid_norm = seen.positive.merged(seen.negative).mean_norm
    return replace(
        direction,
        sources=sources,
        n_tokens=min(seen.positive.n, seen.negative.n),
        seed=seen.seed,
        models=dict(models or {}),
        sign=sign or (f"from {sources[1]} to {sources[0]}" if len(sources) == 2 else ""),
        resid_norm=resid_norm,
        split_half=_split_half(seen.halves),
        text_null=None if base_contrast is None else _text_null(raw, base_contrast, name),
        notes=seen.notes,
    )


def contrast_direction(
    quadrants: Quadrants,
    contrast: Contrast,
    site: Site | str,
    name: str,
    *,
    groups: Groups | None = None,
    sources: tuple[str, str] = ("positive", "negative"),
    models: Mapping[str, str] | None = None,
    resid_norm: float | None = None,
    seed: int = 0,
    min_tokens: int = 8,
) -> Direction:
    """One of the three contrasts of emergent misalignment, with the base model's text null.

    - ``data``: fine-tuned model on positive minus on negative texts. The direction that can be
      ablated without breaking the model; much of it may be there in the base model already.
    - ``model``: fine-tuned minus base model, both on the positive texts. Ablating it at every
      layer destroyed the models it was tried on.
    - ``both``: fine-tuned model on positive minus base model on negative texts.

    Args:
        quadrants: Activations of both models on both sets of text.
        contrast: Which of the three.
        site: Where all were captured.
        name: Name of the result.
        groups: Text ids of the positive and of the negative rows, see `mean_difference`.
        sources: Names of the positive and the negative set of text.
        models: Content hashes of the models.
        resid_norm: See `mean_difference`.
        seed: Of the split into halves.
        min_tokens: Fewest rows accepted on a side.

    Raises:
        DirectionError: As for `mean_difference`; for ``model`` also at a site before the first
            changed layer, where the two models agree, or if there is no such contrast.
        MismatchError: As for `mean_difference`.

    Source:
        Soligo et al. 2025, and the null by the base model reading the same texts.
    """
    if contrast not in get_args(Contrast):
        raise DirectionError(
            f"unknown contrast {contrast!r}. Known: {', '.join(get_args(Contrast))}."
        )
    positive, negative = sources
    first, second, sign, used, ids = {
        "data": (quadrants.finetuned_positive, quadrants.finetuned_negative,
                 f"from {negative} to {positive}", sources, groups),
        "model": (quadrants.finetuned_positive, quadrants.base_positive,
                  "from base to finetuned", (positive,), groups and (groups[0], groups[0])),
        "both": (quadrants.finetuned_positive, quadrants.base_negative,
                 f"from base on {negative} to finetuned on {positive}", sources, groups),
    }[contrast]  # fmt: skip
    found = mean_difference(
        first,
        second,
        site,
        name,
        groups=ids,
        base_contrast=(quadrants.base_positive, quadrants.base_negative),
        sources=used,
        models=models,
        sign=sign,
        resid_norm=resid_norm,
        seed=seed,
        min_tokens=min_tokens,
    )
    return replace(found, method=f"{contrast} mean difference")


class _Evidence(NamedTuple):
    """Both sides of a contrast, and its halves where they can be had."""

    positive: Moments
    negative: Moments
    halves: tuple[Pair, Pair] | None
    seed: int | None
    notes: tuple[str, ...]


def _evidence(
    positive: Side,
    negative: Side,
    groups: Groups | None,
    halves: tuple[Pair, Pair] | None,
    seed: int,
    name: str,
) -> _Evidence:
    notes, split = [], None
    if isinstance(positive, Tensor) and isinstance(negative, Tensor) and halves is None:
        halves, split = _halves_of_rows(positive, negative, groups, seed), seed
        sides = halves[0][0].merged(halves[1][0]), halves[0][1].merged(halves[1][1])
        if groups is None:
            notes.append("split-half over tokens, not texts: optimistic")
    elif groups is not None:
        raise MismatchError(
            f"{name!r}: text ids split rows, and moments have none left. Give rows on both "
            "sides, or the moments of two halves as halves=."
        )
    else:
        sides = _moments(positive), _moments(negative)
    counts = f"{sides[0].n:,} positive and {sides[1].n:,} negative tokens"
    return _Evidence(*sides, halves, split, (counts, *notes))


def _moments(side: Side) -> Moments:
    return side if isinstance(side, Moments) else Moments.of(side)


def _halves_of_rows(
    positive: Float[Tensor, "n _d_model"],
    negative: Float[Tensor, "m _d_model"],
    groups: Groups | None,
    seed: int,
) -> tuple[Pair, Pair]:
    chosen = half_masks(len(positive), len(negative), groups, seed)
    of_positive, of_negative = chosen[0].to(positive.device), chosen[1].to(negative.device)
    return (
        (Moments.of(positive[of_positive]), Moments.of(negative[of_negative])),
        (Moments.of(positive[~of_positive]), Moments.of(negative[~of_negative])),
    )


def _require(seen: _Evidence, name: str, min_tokens: int) -> None:
    needed = max(1, min_tokens)
    if min(seen.positive.n, seen.negative.n) < needed:
        raise DirectionError(
            f"{name!r} needs at least {needed} tokens per side, got {seen.positive.n} positive "
            f"and {seen.negative.n} negative. Did the judge keep no answer? Generate more, or "
            "lower min_tokens."
        )


def _difference(positive: Moments, negative: Moments, name: str) -> Float[Tensor, " d_model"]:
    if len(positive.mean) != len(negative.mean):
        raise MismatchError(
            f"{name!r}: the positive side has d_model={len(positive.mean)}, the negative "
            f"{len(negative.mean)}: they come from different models or sites."
        )
    return positive.mean.cpu() - negative.mean.cpu()


def _text_null(
    raw: Float[Tensor, " _d_model"], base_contrast: tuple[Side, Side], name: str
) -> float:
    positive, negative = (_moments(side) for side in base_contrast)
    if positive.n == 0 or negative.n == 0:
        raise DirectionError(
            f"the base contrast of {name!r} has {positive.n} positive and {negative.n} "
            "negative rows: have the base model read the same two sets of text."
        )
    base = _difference(positive, negative, f"{name} in the base model")
    if len(base) != len(raw):
        raise MismatchError(
            f"{name!r} has d_model={len(raw)}, its base contrast {len(base)}: they come from "
            "different models or sites."
        )
    return _cosine(raw, base)


def _split_half(halves: tuple[Pair, Pair] | None) -> float | None:
    if halves is None or any(side.n == 0 for half in halves for side in half):
        return None
    a, b = (_difference(*half, "half") for half in halves)
    return _cosine(a, b)


def _cosine(a: Float[Tensor, " d_model"], b: Float[Tensor, " d_model"]) -> float:
    """Cosine in [-1, 1]; 0 where one of them is zero, and so shares nothing."""
    size = float(a.norm() * b.norm())
    return max(-1.0, min(1.0, float(a @ b) / size)) if size else 0.0
