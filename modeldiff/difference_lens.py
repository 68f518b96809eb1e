"""What a fine-tune leaves in the first tokens of texts that have nothing to do with it.

The mean difference of activations at each of the first positions, over unrelated texts, is read
through the unembedding, forwards and backwards, beside directions that mean nothing: random ones,
and differences between the means of random halves of the texts in the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from modeldiff._progress import Progress
from modeldiff._shapes import Bool, Float
from modeldiff.activations import stream
from modeldiff.directions import Direction
from modeldiff.divergence import check_finite
from modeldiff.errors import DirectionError, MaskError
from modeldiff.forward import as_texts
from modeldiff.interventions import Side
from modeldiff.layer_maps import before
from modeldiff.loading import Sides
from modeldiff.logit_lens import LogitLens, logit_lens, plain_lenses
from modeldiff.similarity import MASSIVE
from modeldiff.sites import Site
from modeldiff.stats import empirical_p
from modeldiff.tokens import Text

_ROUNDING = 1e-7  # a difference below this share of the activations is float32 rounding
_ALIKE = 1e-6  # random halves that differ by less than this share differ by rounding
KINDS = ("difference", "random", "random difference")
"""What is read: the trace, and its two controls."""


@dataclass(frozen=True, eq=False)
class DifferenceTrace:
    """Mean difference of activations at the first positions of texts.

    Args:
        site: Where.
        difference: Mean of fine-tuned minus base, one row a position from 0 on, float32.
        controls: Differences between the means of two random halves of the texts, in the base,
            ``[control, position, d_model]``.
        norm_base: Mean norm of the base's activations at each position.
        split_half: Cosine between the differences of two halves of the texts; 0 where there is
            none.
        n_texts: Texts that were long enough.
        seed: Of the halves.
        models: Content hashes of the models.
    """

    site: Site
    difference: Float[Tensor, "position d_model"]
    controls: Float[Tensor, "control position d_model"]
    norm_base: Float[Tensor, " position"]
    split_half: tuple[float, ...]
    n_texts: int
    seed: int
    models: dict[str, str]

    @property
    def massive(self) -> Bool[Tensor, " position"]:
        """Positions whose norm is `modeldiff.similarity.MASSIVE` times the median position's."""
        return self.norm_base > MASSIVE * self.norm_base.median()

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions at which the sides differ by more than rounding."""
        norms = self.difference.norm(dim=-1)
        return tuple((norms > _ROUNDING * self.norm_base).nonzero()[:, 0].tolist())

    @property
    def alike(self) -> tuple[int, ...]:
        """Positions at which the base's activations do not vary: where every text begins alike.

        Random halves differ by rounding alone there, so that no control stands beside the
        difference, and `difference_lens` leaves them out.
        """
        smallest = self.controls.norm(dim=-1).amin(0)
        return tuple((smallest <= _ALIKE * self.norm_base).nonzero()[:, 0].tolist())

    @property
    def readable(self) -> tuple[int, ...]:
        """Positions at which the sides differ and controls stand beside."""
        return tuple(each for each in self.positions if each not in self.alike)

    def table(self) -> pd.DataFrame:
        """One row a position: position, norm, norm_base, relative, split_half, flagged.

        Flagged are position 0 and massive positions, whose differences can be artefacts.
        """
        norms = self.difference.norm(dim=-1)
        flagged = self.massive | (torch.arange(len(norms)) == 0)
        return pd.DataFrame({
            "position": range(len(norms)), "norm": norms.numpy(),
            "norm_base": self.norm_base.numpy(), "relative": (norms / self.norm_base).numpy(),
            "split_half": self.split_half, "flagged": flagged.numpy(),
        })  # fmt: skip

    def direction(self, position: int) -> Direction:
        """The difference at one position, with its provenance.

        Raises:
            DirectionError: If the sides do not differ there.
        """
        if position not in self.positions:
            raise DirectionError(
                f"the sides do not differ at position {position} of {self.site}: there is no "
                f"direction. They differ at {', '.join(map(str, self.positions)) or 'none'}."
            )
        flagged = bool(self.table()["flagged"][position])
        notes = ("the first token or a massive one: may be an artefact",) if flagged else ()
        return replace(
            Direction.of(self.difference[position], self.site, f"difference at {position}",
                         "activation difference at one position"),
            n_tokens=self.n_texts, seed=self.seed, models=self.models, notes=notes,
            sign="from base to finetuned", resid_norm=float(self.norm_base[position]),
            split_half=self.split_half[position],
        )  # fmt: skip

    def random_differences(self, position: int) -> list[Direction]:
        """The controls at one position, with the length of the difference there."""
        like, rows = self.direction(position), self.controls[:, position]
        return [_like(row, i, like, self.seed) for i, row in enumerate(rows)]


def random_differences(
    means: Float[Tensor, "text d_model"], like: Direction, n: int, *, seed: int
) -> list[Direction]:
    """Differences between the means of random halves of texts, with the length of a direction.

    They point where activations differ from text to text, so they are harder to beat than random
    directions.

    Args:
        means: One activation a text, e.g. its mean over tokens in the base.
        like: What they stand in for.
        n: How many.
        seed: Of the halves.

    Raises:
        MaskError: If there are fewer than 4 texts.
        DirectionError: If the halves do not differ.
    """
    rows = _halves(len(means), n, seed) @ means.detach().cpu().double()
    return [_like(row, i, like, seed) for i, row in enumerate(rows)]


def _like(row: Tensor, number: int, like: Direction, seed: int) -> Direction:
    name = f"random difference {number} like {like.name}"
    made = Direction.of(row, like.site, name, "difference of the means of random halves of texts")
    return replace(made, scale=like.scale, seed=seed, models=like.models,
                   resid_norm=like.resid_norm)  # fmt: skip


def _halves(n_texts: int, n: int, seed: int) -> Float[Tensor, "n text"]:
    """Weights that take the mean of one random half minus that of the other."""
    if n_texts < 4:
        raise MaskError(f"{n_texts} texts cannot be halved at random; give 4 or more.")
    rng, half = np.random.default_rng(seed), n_texts // 2
    weights = np.full((n, n_texts), -1 / (n_texts - half))
    weights[:, :half] = 1 / half
    return torch.from_numpy(rng.permuted(weights, axis=1))


def difference_trace(
    sides: Sides,
    items: Sequence[Any],
    *,
    layer: int | None = None,
    n_positions: int = 5,
    n_random: int = 19,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> DifferenceTrace:
    """Average fine-tuned minus base at the first positions of texts.

    Args:
        sides: The pair.
        items: Texts that have nothing to do with the fine-tune; more of them, less noise.
        layer: After which layer; half of the layers by default.
        n_positions: Positions from 0 on; shorter texts are left out.
        n_random: Random halves.
        seed: Of the halves.
        max_tokens: Budget of a batch.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If fewer than 4 texts are long enough.
        MismatchError: If an activation is not finite.
        SiteError: If there is no such layer.
        Cancelled: If the event is set.

    Source:
        Minder et al. 2025 (narrow fine-tuning leaves traces), arXiv 2510.13900; the controls are
        ours.
    """
    shape = sides.shape("base")
    site = Site("resid_post", shape.n_layers // 2 if layer is None else layer)
    texts = _beginnings(as_texts(sides, items), n_positions)
    weights = torch.cat([_halves(len(texts), n_random, seed), _halves(len(texts), 1, seed + 1)])
    controls = torch.zeros(n_random, n_positions, shape.d_model, dtype=torch.float64)
    halves = torch.zeros(2, n_positions, shape.d_model, dtype=torch.float64)
    norms = torch.zeros(n_positions, dtype=torch.float64)
    for part in stream(
        sides, texts, (site,), skip_first=0, max_tokens=max_tokens, progress=progress, cancel=cancel
    ):
        base, tuned = (
            part.rows(acts, site).double().cpu().unflatten(0, (-1, n_positions))
            for acts in (part.run.base, part.run.finetuned)
        )
        chosen = weights[:, part.text_index[::n_positions]]
        controls += torch.einsum("ct,tpd->cpd", chosen[:-1], base)
        for half, own in enumerate((chosen[-1].clamp(min=0), -chosen[-1].clamp(max=0))):
            halves[half] += torch.einsum("t,tpd->pd", own, tuned - base)
        norms += base.norm(dim=-1).sum(0) / len(texts)
    check_finite(halves, f"numbers of the mean difference at {site}")
    share = (len(texts) // 2) / len(texts)
    return DifferenceTrace(
        site=site,
        difference=(share * halves[0] + (1 - share) * halves[1]).float(),
        controls=controls.float(),
        norm_base=norms.float(),
        split_half=tuple(cosine_similarity(*halves, dim=-1).tolist()),
        n_texts=len(texts),
        seed=seed,
        models=sides.digests,
    )


def _beginnings(texts: Sequence[Text], n: int) -> tuple[Text, ...]:
    long = [text for text in texts if text.n_tokens >= n]
    if len(long) < 4:
        raise MaskError(
            f"{len(long)} of {len(texts)} texts have {n} tokens; the lens needs 4 or more. Give "
            "longer texts, or fewer positions."
        )
    return tuple(before(text, n) for text in long)


@dataclass(frozen=True, eq=False)
class DifferenceLens:
    """Tokens at both ends of the differences and of their controls.

    Args:
        tokens: One row a token: position, kind (one of `KINDS`), control (its number; 0 for the
            difference), end ("promoted" by it, or "suppressed": promoted by its opposite), rank,
            token_id, token, logit, flagged.
        reach: One row a position: position, reach (largest absolute logit of the difference), p of
            that among random directions and among random differences (never 0), flagged.
    """

    tokens: pd.DataFrame
    reach: pd.DataFrame

    def words(self, n: int = 10) -> pd.DataFrame:
        """First tokens of every difference beside those of one control of each kind."""
        first = self.tokens[(self.tokens["rank"] < n) & (self.tokens["control"] == 0)]
        keys = ["position", "end", "kind"]
        joined = first.groupby(keys)["token"].agg(lambda each: " ".join(map(str.strip, each)))
        return joined.unstack("kind")[[k for k in KINDS if k in set(first["kind"])]].reset_index()


def difference_lens(
    sides: Sides, trace: DifferenceTrace, *, k: int = 20, side: Side = "finetuned"
) -> DifferenceLens:
    """Read a trace as tokens, beside as many random directions as it has random differences.

    Positions at which the sides do not differ are left out; of a pair of equal models the result
    is empty.

    Args:
        sides: The pair.
        trace: From `difference_trace`.
        k: Tokens at each end.
        side: Whose norm and unembedding.

    Source:
        Minder et al. 2025, arXiv 2510.13900; see `modeldiff.logit_lens.logit_lens`.
    """
    flags = trace.table()["flagged"].tolist()
    parts, reach = [], []
    for position in trace.readable:
        controls = trace.random_differences(position)
        own = logit_lens(sides, trace.direction(position), k=k, n_random=len(controls),
                         seed=trace.seed + position, side=side)  # fmt: skip
        others = plain_lenses(sides, controls, k=k, side=side)
        found = [own.tokens[own.tokens["kind"] == "direction"].assign(kind=KINDS[0], control=0)]
        drawn = own.tokens[own.tokens["kind"] == "random"]
        found.append(drawn.assign(control=pd.factorize(drawn["name"])[0]))
        for number, each in enumerate(others):
            rows = each.tokens[each.tokens["kind"] == "direction"]
            found.append(rows.assign(kind=KINDS[2], control=number))
        place = {"position": position, "flagged": flags[position]}
        parts.append(pd.concat(found).assign(**place))
        reach.append({**place, **_reached(own, others)})
    columns = [
        "position",
        "kind",
        "control",
        "end",
        "rank",
        "token_id",
        "token",
        "logit",
        "flagged",
    ]
    tokens = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
    names = ["position", "reach", "p_random", "p_random_difference", "flagged"]
    return DifferenceLens(tokens[columns], pd.DataFrame(reach, columns=names))


def _reached(own: LogitLens, others: Sequence[LogitLens]) -> dict[str, float]:
    reaches = [_largest(each) for each in (own, *others)]
    return {
        "reach": reaches[0],
        "p_random": own.p,
        "p_random_difference": empirical_p(reaches[0], reaches[1:], tail="upper"),
    }


def _largest(lens: LogitLens) -> float:
    rows = lens.tokens[lens.tokens["kind"] == "direction"]
    return float(rows["logit"].abs().max())
