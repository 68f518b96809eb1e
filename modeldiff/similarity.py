"""How alike the two sides' activations are: token by token, as kernels, and as subspaces.

Norms and cosines of single tokens, linear CKA, and principal angles. A few tokens, mostly the first
of a text, have activations many times as long as all others; every figure that they could carry
alone is given with and without them.

All of these are sizes, not findings. Noise of 2 % on the weights, which teaches nothing, moves
every token and turns the spans of principal components by up to 13 degrees. Whether a size means
something is told by that of null pairs (`modeldiff.organisms.nulls`), or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress
from modeldiff._shapes import Float
from modeldiff.activations import Part, stream
from modeldiff.divergence import check_finite
from modeldiff.errors import MismatchError
from modeldiff.forward import as_texts
from modeldiff.loading import Sides
from modeldiff.masks import Mask
from modeldiff.sites import Site, parse_sites
from modeldiff.stats import bootstrap_mean
from modeldiff.tokens import Text, token_names

MASSIVE = 5.0
"""A token is massive where its norm is more than this many times the median token's."""


@dataclass(eq=False)
class CrossSums:
    """Sums over paired rows from which linear CKA is exact, biased or not; they add up.

    Rows are seen block by block; memory is ``d_x * d_y`` float64 values. CKA does not change when a
    constant is taken off all rows: take one near the mean off, or rounding grows.

    Args:
        n: Rows seen.
        product: Sum of the outer products x yᵀ.
        sums: Sums of x and of y.
        squares: Sums of ‖x‖² and of ‖y‖².
        weighted: Sums of x ‖y‖² and of y ‖x‖².
        both: Sum of ‖x‖² ‖y‖².
    """

    n: int
    product: Float[Tensor, "d_x d_y"]
    sums: tuple[Float[Tensor, " d_x"], Float[Tensor, " d_y"]]
    squares: tuple[float, float]
    weighted: tuple[Float[Tensor, " d_x"], Float[Tensor, " d_y"]]
    both: float

    @classmethod
    def of(cls, x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> "CrossSums":
        """Sum paired rows; no rows give the neutral element.

        Raises:
            MismatchError: If these are not two matrices with as many rows.
        """
        if x.dim() != 2 or y.dim() != 2 or len(x) != len(y):
            raise MismatchError(
                f"paired rows need two matrices of as many rows, got {tuple(x.shape)} and "
                f"{tuple(y.shape)}: capture both on the same tokens."
            )
        a, b = x.detach().cpu().double(), y.detach().cpu().double()
        a2, b2 = a.square().sum(1), b.square().sum(1)
        squares = float(a2.sum()), float(b2.sum())
        return cls(len(a), a.T @ b, (a.sum(0), b.sum(0)), squares, (b2 @ a, a2 @ b), float(a2 @ b2))

    def __add__(self, other: "CrossSums") -> "CrossSums":
        (s, t), (u, v) = self.sums, other.sums
        (a, b), (c, d) = self.weighted, other.weighted
        squares = self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]
        return CrossSums(self.n + other.n, self.product + other.product, (s + u, t + v), squares,
                         (a + c, b + d), self.both + other.both)  # fmt: skip

    @property
    def centred(self) -> Float[Tensor, "d_x d_y"]:
        """Sum of the outer products of the centred rows."""
        return self.product - torch.outer(*self.sums) / self.n

    def hsic(self, *, unbiased: bool) -> float:
        """Hilbert-Schmidt independence criterion of linear kernels, up to one common factor.

        Raises:
            MismatchError: If there are fewer than 4 rows, or fewer than 2 for the biased one.
        """
        n, least = self.n, 4 if unbiased else 2
        if n < least:
            raise MismatchError(f"CKA needs at least {least} tokens, got {n}: give more text.")
        if not unbiased:
            return float(self.centred.square().sum())
        (x, y), (a, b) = self.sums, self.weighted
        trace = float(self.product.square().sum()) - self.both
        whole = (float(x @ x) - self.squares[0]) * (float(y @ y) - self.squares[1])
        rows = float(x @ self.product @ y - x @ a - y @ b) + self.both
        return (trace + whole / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def cka_of(cross: CrossSums, x: CrossSums, y: CrossSums, *, unbiased: bool = False) -> float:
    """Linear CKA from the sums of (x, y), (x, x) and (y, y); NaN where one side does not vary.

    Raises:
        MismatchError: If there are too few rows.
    """
    found, own, other = (each.hsic(unbiased=unbiased) for each in (cross, x, y))
    return found / (own * other) ** 0.5 if own > 0 and other > 0 else float("nan")


def linear_cka(
    x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"], *, unbiased: bool = False
) -> float:
    """Centred kernel alignment of two sets of rows on the same tokens.

    1 where one is the other rotated, shifted and scaled as a whole. Independent rows give about
    ``d / (n + d)`` with the biased estimate, so few tokens look alike; 0 with the unbiased one.

    Args:
        x: One row a token.
        y: The same tokens; another width is fine.
        unbiased: Use the unbiased estimate of both HSICs; it may fall below 0.

    Raises:
        MismatchError: If the rows do not pair, or are too few.

    Source:
        Kornblith et al. 2019, arXiv 1905.00414; the unbiased estimate of Song et al. 2012 (Feature
        selection via dependence maximization), exact from sums instead of over minibatches.

    Example:
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> round(linear_cka(x, 3 * x.flip(1) + 7), 6)
        1.0
    """
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    several = CrossSums.of(x, y), CrossSums.of(x, x), CrossSums.of(y, y)
    return cka_of(*several, unbiased=unbiased)


def subspace_angles(
    x: Float[Tensor, "d_model k"], y: Float[Tensor, "d_model m"]
) -> Float[Tensor, " angle"]:
    """Principal angles between the spans of two orthonormal bases, in degrees, smallest first.

    Small angles come from their sine, whose rounding is that of the angle itself.

    Args:
        x: Orthonormal columns.
        y: The same, of the same width.

    Raises:
        MismatchError: If the widths differ.

    Source:
        Björck & Golub 1973; the sine for small angles as in Knyazev & Argentati 2002.

    Example:
        >>> e = torch.eye(3)
        >>> subspace_angles(e[:, :1], (e[:, :1] + e[:, 1:2]) / 2**0.5).round(decimals=3)
        tensor([45.], dtype=torch.float64)
    """
    if len(x) != len(y):
        raise MismatchError(
            f"subspaces of widths {len(x)} and {len(y)} have no angle: compare sites of one width."
        )
    a, b = (x, y) if x.shape[1] >= y.shape[1] else (y, x)
    a, b = a.double(), b.double()
    cosines = torch.linalg.svdvals(a.T @ b).clamp(max=1)
    sines = torch.linalg.svdvals(b - a @ (a.T @ b)).flip(0).clamp(max=1)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin()).rad2deg()


@dataclass(frozen=True, eq=False)
class Similarity:
    """How alike both sides' activations are.

    Args:
        tokens: One row a token and site: text, position, token_id, token, site, layer, norm_base,
            norm_finetuned, norm_difference, relative (norm_difference / norm_base), cosine,
            massive.
        cka: One row a pair of sites: base_site, finetuned_site, cka, unbiased, and both
            ``_without`` massive tokens; n_tokens, n_massive.
        angles: One row a pair of sites and component: base_site, finetuned_site, component, degrees
            between the spans of the first principal components, degrees_without massive tokens.
    """

    tokens: pd.DataFrame
    cka: pd.DataFrame
    angles: pd.DataFrame

    def guard(self) -> pd.DataFrame:
        """Say how much massive tokens carry; see `massive_guard`."""
        return massive_guard(self.tokens)


def similarity(
    sides: Sides,
    items: Sequence[Any],
    at: "str | Site | Sequence[str | Site] | None" = None,
    *,
    on: "str | Mask" = "all",
    n_components: int = 8,
    across_layers: bool = False,
    massive: float = MASSIVE,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Similarity:
    """Compare both sides' activations in two passes; memory does not grow with activations.

    The first pass finds the massive tokens, the second sums. Position 0 is not skipped: that is
    what the columns without massive tokens are for.

    Args:
        sides: The pair.
        items: Texts, chats, completions.
        at: Sites; the residual stream after every layer by default.
        on: Tokens that count.
        n_components: Principal components whose spans are compared.
        across_layers: Compare every site of the base with every site of the fine-tune, which must
            then be of one width; costs its square of float64 values for each pair of sites.
        massive: See `massive_tokens`.
        max_tokens: Budget of a batch, padding included.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If no token is kept.
        MismatchError: If fewer than 4 tokens are kept, or an activation is not finite.
        Cancelled: If the event is set.

    Source:
        Kornblith et al. 2019, arXiv 1905.00414; massive activations: Sun et al. 2024, arXiv
        2402.17762.
    """
    layers = range(sides.shape("base").n_layers)
    sites = parse_sites([f"resid_post.{i}" for i in layers] if at is None else at)
    options: dict[str, Any] = {"on": on, "skip_first": 0, "max_tokens": max_tokens,
                               "progress": progress, "cancel": cancel}  # fmt: skip
    texts = as_texts(sides, items)
    parts = stream(sides, texts, sites, **options)
    tokens = _token_table(sides, texts, [_rows_of(part, site) for part in parts for site in sites])
    tokens["massive"] = massive_tokens(tokens, massive)
    sums = _Sums(sites, across_layers, _places(tokens))
    for part in stream(sides, texts, sites, **options):
        sums.add(part)
    return Similarity(tokens, sums.cka(), sums.angles(n_components))


def by_position(tokens: pd.DataFrame, *, last: int = 16, seed: int = 0) -> pd.DataFrame:
    """Mean relative difference at every position of the texts, with intervals over texts.

    Args:
        tokens: `Similarity.tokens`.
        last: Last position.
        seed: Of the bootstrap.

    Returns:
        One row a site and position: site, position, n, relative, low, high (95 %), norm_base,
        massive (share of these tokens). A length is never negative: wherever the sides are not
        equal to the bit the interval lies above 0, and that says no more than this.
    """
    rows = []
    near = tokens[tokens["position"] <= last]
    for (site, position), part in near.groupby(["site", "position"], sort=False):
        found = bootstrap_mean(part["relative"].to_numpy(float), seed=seed)
        rows.append({
            "site": site, "position": position, "n": found.n, "relative": found.estimate,
            "low": found.low, "high": found.high, "norm_base": float(part["norm_base"].mean()),
            "massive": float(part["massive"].mean()),
        })  # fmt: skip
    found = pd.DataFrame(rows).sort_values("position", kind="stable")
    order = list(dict.fromkeys(tokens["site"]))
    return found.sort_values("site", key=lambda s: s.map(order.index), kind="stable",
                             ignore_index=True)  # fmt: skip


def massive_tokens(tokens: pd.DataFrame, factor: float = MASSIVE) -> pd.Series:
    """Flag tokens whose norm dominates: more than ``factor`` times a side's median at the site.

    Source:
        Sun et al. 2024 (massive activations), arXiv 2402.17762; they flag single channels.
    """
    flags = pd.Series(False, index=tokens.index)
    for side in ("norm_base", "norm_finetuned"):
        flags |= tokens[side] > factor * tokens.groupby("site")[side].transform("median")
    return flags


def massive_guard(tokens: pd.DataFrame) -> pd.DataFrame:
    """Say of every site what the flagged tokens carry, and the results without them.

    Returns:
        One row a site: site, n_tokens, n_massive, positions (those of massive tokens),
        energy_share and difference_share (their part of Σ‖h_base‖² and of Σ‖h_ft - h_base‖²),
        relative, cosine (means over tokens), pooled_relative (√(Σ‖h_ft - h_base‖² / Σ‖h_base‖²)),
        the same three ``_without`` them, and dominated: whether a share exceeds a half. It warns
        of figures that few tokens carry, whether or not anything was taught: ``energy_share`` is
        measured on the base's activations.
    """
    return pd.DataFrame([
        _guard_row(str(site), part) for site, part in tokens.groupby("site", sort=False)
    ])  # fmt: skip


def _guard_row(site: str, part: pd.DataFrame) -> dict[str, Any]:
    flagged, rest = part[part["massive"]], part[~part["massive"]]
    shares = {
        name: _energy(flagged, column) / max(_energy(part, column), 1e-300)
        for name, column in (("energy_share", "norm_base"), ("difference_share", "norm_difference"))
    }
    places = sorted(set(flagged["position"]))
    means = {name: _means(each) for name, each in (("", part), ("_without", rest))}
    return {
        "site": site, "n_tokens": len(part), "n_massive": len(flagged),
        "positions": ", ".join(map(str, places[:8])) + (", ..." if len(places) > 8 else ""),
        **shares,
        **{key + end: value for end, found in means.items() for key, value in found.items()},
        "dominated": max(shares.values()) > 0.5,
    }  # fmt: skip


def _energy(part: pd.DataFrame, column: str) -> float:
    return float(np.square(part[column].to_numpy(float)).sum())


def _means(part: pd.DataFrame) -> dict[str, float]:
    size = _energy(part, "norm_base")
    return {
        "relative": float(part["relative"].mean()),
        "cosine": float(part["cosine"].mean()),
        "pooled_relative": (_energy(part, "norm_difference") / size) ** 0.5 if size else np.nan,
    }


def _rows_of(part: Part, site: Site) -> pd.DataFrame:
    base = part.rows(part.run.base, site).double().cpu()
    tuned = part.rows(part.run.finetuned, site).double().cpu()
    norms = base.norm(dim=-1), tuned.norm(dim=-1), (tuned - base).norm(dim=-1)
    check_finite(torch.cat(norms), f"norms at {site}")
    cosine = torch.nn.functional.cosine_similarity(tuned, base, dim=-1).clamp(-1, 1)
    columns = (*norms, norms[2] / norms[0], cosine.masked_fill(norms[2] == 0, 1.0))
    names = ("norm_base", "norm_finetuned", "norm_difference", "relative", "cosine")
    values = dict(zip(names, (each.numpy() for each in columns), strict=True))
    return pd.DataFrame({"text": part.text_index.numpy(), "position": part.position.numpy(),
                         "site": str(site), "layer": site.layer, **values})  # fmt: skip


def _token_table(
    sides: Sides, texts: Sequence[Text], parts: Sequence[pd.DataFrame]
) -> pd.DataFrame:
    found = pd.concat(parts).sort_values(["layer", "site", "text", "position"], ignore_index=True)
    places = zip(found["text"].tolist(), found["position"].tolist(), strict=True)
    ids = [texts[text].ids[position] for text, position in places]
    known = sorted(set(ids))
    names = dict(zip(known, token_names(sides.tokenizer, known), strict=True))
    found.insert(2, "token_id", ids)
    found.insert(3, "token", [names[each] for each in ids])
    return found


def _places(tokens: pd.DataFrame) -> set[tuple[int, int]]:
    """Tokens that are massive at any of the sites."""
    flagged = tokens[tokens["massive"]]
    return set(zip(flagged["text"].tolist(), flagged["position"].tolist(), strict=True))


@dataclass(eq=False)
class _Sums:
    """Sums of massive tokens (True) and of all others (False)."""

    sites: tuple[Site, ...]
    across: bool
    massive: set[tuple[int, int]]
    found: dict[tuple[str, Site, str, Site, bool], CrossSums] = field(default_factory=dict)
    origin: dict[tuple[str, Site], Tensor] = field(default_factory=dict)

    def pairs(self) -> list[tuple[Site, Site]]:
        return [(a, b) for a in self.sites for b in self.sites if self.across or a == b]

    def add(self, part: Part) -> None:
        places = zip(part.text_index.tolist(), part.position.tolist(), strict=True)
        flags = torch.tensor([each in self.massive for each in places])
        rows = {}
        for side, acts in (("base", part.run.base), ("finetuned", part.run.finetuned)):
            for site in self.sites:
                h = part.rows(acts, site).double().cpu()
                # one origin for both sides: equal activations stay equal
                rows[side, site] = h - self.origin.setdefault(("", site), h.mean(0))
        own = [(side, site, side, site) for side, site in rows]
        for a, x, b, y in own + [("base", x, "finetuned", y) for x, y in self.pairs()]:
            for kind in (False, True):
                chosen = flags == kind
                new = CrossSums.of(rows[a, x][chosen], rows[b, y][chosen])
                known = self.found.get((a, x, b, y, kind))
                self.found[a, x, b, y, kind] = new if known is None else known + new

    def get(self, a: str, x: Site, b: str, y: Site, *, without: bool) -> CrossSums:
        rest = self.found[a, x, b, y, False]
        return rest if without else rest + self.found[a, x, b, y, True]

    def cka(self) -> pd.DataFrame:
        rows = []
        for x, y in self.pairs():
            row: dict[str, Any] = {"base_site": str(x), "finetuned_site": str(y)}
            for end, without in (("", False), ("_without", True)):
                three = (self.get("base", x, "finetuned", y, without=without),
                         self.get("base", x, "base", x, without=without),
                         self.get("finetuned", y, "finetuned", y, without=without))  # fmt: skip
                row["cka" + end] = cka_of(*three)
                row["unbiased" + end] = cka_of(*three, unbiased=True)
            massive = self.found["base", x, "base", x, True].n
            row["n_tokens"], row["n_massive"] = three[1].n + massive, massive
            rows.append(row)
        return pd.DataFrame(rows)

    def angles(self, k: int) -> pd.DataFrame:
        rows = []
        bases = {(side, site, without): self._principal(side, site, k, without=without)
                 for side in ("base", "finetuned") for site in self.sites
                 for without in (False, True)}  # fmt: skip
        for x, y in self.pairs():
            both = [subspace_angles(bases["base", x, without], bases["finetuned", y, without])
                    for without in (False, True)]  # fmt: skip
            for number, (every, rest) in enumerate(zip(*map(Tensor.tolist, both), strict=True)):
                rows.append({"base_site": str(x), "finetuned_site": str(y), "component": number,
                             "degrees": every, "degrees_without": rest})  # fmt: skip
        return pd.DataFrame(rows)

    def _principal(
        self, side: str, site: Site, k: int, *, without: bool
    ) -> Float[Tensor, "d_model k"]:
        scatter = self.get(side, site, side, site, without=without).centred
        return torch.linalg.eigh(scatter)[1][:, -k:]
