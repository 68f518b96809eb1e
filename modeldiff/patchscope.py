"""A vector read by the model itself: put in place of a token in a prompt that repeats tokens.

The prompts say "man -> man, hello -> hello, ?"; the residual stream at the question mark is
overwritten by the vector, and what the model expects next is what it takes the vector for. How long
the vector must be is chosen by how sharply and how alike several prompts answer, against random
directions at the same length; no language model judges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, log, nan
from threading import Event

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, tracked
from modeldiff._shapes import Float
from modeldiff.batch_size import fitted
from modeldiff.batching import make_batch, padding_id
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.divergence import unembedding
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.forward import as_texts, final_states, run
from modeldiff.interventions import Plan, Replace, Side
from modeldiff.loading import Sides
from modeldiff.tokens import Text, n_ids, token_names

PROMPTS = (
    "man -> man\n1135 -> 1135\nhello -> hello\n?",
    "bear -> bear\n42 -> 42\nblue -> blue\n?",
    "yes -> yes\n821 -> 821\nriver -> river\n?",
)
"""Prompts that repeat a token; what is overwritten is the last one."""
SCALES = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
"""Lengths that are tried, in mean norms of the residual stream."""


@dataclass(frozen=True, eq=False)
class Patchscope:
    """What a model takes a direction for, beside random directions.

    Args:
        scales: One row a scale: scale, agreement (of the prompts' distributions: sum over tokens
            of their geometric mean, 1 if all are the same), entropy (of their mean, nats), score
            (agreement times 1 - entropy / ln of the vocabulary), random_score and random_high (mean
            and largest of random directions), control_score and control_high (the same of the
            given controls; NaN without), excess (score minus the larger of the two means).
        tokens: One row a token at the chosen scale: kind ("direction", "random", "control"), name,
            rank, token_id, token, probability (mean over prompts), among those that are likely
            after every prompt.
        scale: Chosen: where the excess is largest, the smallest such scale.
        p_random: How often a random direction exceeds all others by as much at the scale that is
            best for it; never 0.
        p_control: The same among the given controls; NaN without.
        norm: Mean norm of the residual stream: a scale of 1.
        side: Which model read it.
    """

    scales: pd.DataFrame
    tokens: pd.DataFrame
    scale: float
    p_random: float
    p_control: float
    norm: float
    side: Side

    @property
    def p(self) -> float:
        """The larger of both p."""
        return self.p_random if isnan(self.p_control) else max(self.p_random, self.p_control)


def patchscope(
    sides: Sides,
    direction: Direction,
    *,
    prompts: Sequence[str] = PROMPTS,
    scales: Sequence[float] = SCALES,
    k: int = 20,
    n_random: int = 9,
    controls: Sequence[Direction] = (),
    pool: int | None = None,
    norm: float | None = None,
    seed: int = 0,
    side: Side = "finetuned",
    max_rows: int = 256,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Patchscope:
    """Read a direction by overwriting the last token of identity prompts after its layer.

    Args:
        sides: The pair.
        direction: In the residual stream, at a ``resid_pre`` or ``resid_post`` site; its length
            does not matter.
        prompts: Two or more, whose last token is overwritten.
        scales: Lengths to try, in units of ``norm``.
        k: Tokens to return.
        n_random: Random directions, at every scale. They are easy to beat: any vector that lies
            where activations vary is read more sharply.
        controls: Harder ones, such as `modeldiff.difference_lens.random_differences`; at the same
            lengths.
        pool: A token counts if it is among so many likeliest after every prompt; by default a
            tenth of the vocabulary, at most 16384.
        norm: Length of a scale of 1; by default the mean norm of the residual stream that the
            direction knows, or that of the prompts, the first token left out.
        seed: Of the random directions.
        side: Which model reads it.
        max_rows: Rows of a batch.
        progress: Where to report, prompt by prompt.
        cancel: Event that stops between prompts.

    Raises:
        Cancelled: If the event is set; there is nothing to read before the last prompt.
        DirectionError: If the site is not in the residual stream, or prompts, scales or random
            directions are too few.
        MismatchError: If the direction has another width.
        RemoteError: If they lie on a server, and ``max_rows`` distributions may not travel.

    Source:
        Ghandeharioun et al. 2024 (Patchscopes), arXiv 2401.06102; scales and intersection as in
        Minder et al. 2025, arXiv 2510.13900; choosing the scale by agreement is ours.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> v = Direction.of(torch.ones(pair.d_model), "resid_post.3", "ones")
        >>> len(patchscope(pair.sides, v, scales=(1.0, 4.0), n_random=2, k=3).tokens)
        9
    """
    _check(sides, [direction, *controls], prompts, scales, n_random)
    texts = as_texts(sides, prompts)
    norm = norm or direction.resid_norm or _mean_norm(sides, direction, texts, side)
    drawn = random_like(direction, n_random, seed=seed)
    several = [direction, *drawn, *controls]
    kinds = ["direction"] + ["random"] * n_random + ["control"] * len(controls)
    units = torch.stack([each.unit for each in several])
    ordered = sorted(set(map(float, scales)))
    vectors = torch.cat([units * scale * norm for scale in ordered])
    asked = tracked(texts, progress, cancel, "patchscope")
    found = torch.stack([_read(sides, text, direction, vectors, side, max_rows) for text in asked])
    logprobs = found.unflatten(1, (len(ordered), len(several)))  # prompt, scale, vector, token
    table, p_random, p_control = _scores(logprobs, ordered, n_random)
    best = int(table["excess"].round(4).to_numpy().argmax())
    size = pool or min(16384, max(k, logprobs.shape[-1] // 10))
    tokens = _tokens(sides, logprobs[:, best], several, kinds, k, size)
    return Patchscope(table, tokens, ordered[best], p_random, p_control, float(norm), side)


def _check(
    sides: Sides,
    several: Sequence[Direction],
    prompts: Sequence[str],
    scales: Sequence[float],
    n_random: int,
) -> None:
    direction, width = several[0], sides.shape("base").d_model
    if not direction.site.kind.startswith("resid"):
        raise DirectionError(
            f"{direction.name!r} is at {direction.site}; a patchscope overwrites the whole "
            "residual stream: move it with direction.at('resid_post.<layer>')."
        )
    if len(prompts) < 2 or n_random < 1 or not scales or min(scales) <= 0:
        raise DirectionError(
            f"{len(prompts)} prompts, {n_random} random directions, scales {tuple(scales)}: give "
            "two prompts or more, one random direction or more, and positive scales."
        )
    for each in several:
        if each.d_model != width:
            raise MismatchError(
                f"{each.name!r} has width {each.d_model}, the model {width}: it comes from another "
                "model."
            )


def _mean_norm(sides: Sides, direction: Direction, texts: Sequence[Text], side: Side) -> float:
    found = run(sides, texts, side=side, reads=(direction.site,), logits=False)
    keep = found.batch.attention_mask.bool() & (found.batch.position_ids > 0)
    return float(found.acts[direction.site].float().cpu()[keep].norm(dim=-1).mean())


@torch.no_grad()
def _read(
    sides: Sides,
    text: Text,
    direction: Direction,
    vectors: Float[Tensor, "n d_model"],
    side: Side,
    max_rows: int,
) -> Float[Tensor, "n vocab"]:
    """Log probabilities after the last token of a prompt, overwritten by each vector."""

    def logprobs(some: list[int]) -> Float[Tensor, "n vocab"]:
        batch = make_batch([text] * len(some), padding_id(sides.tokenizer), "right")
        source = torch.zeros(*batch.ids.shape, vectors.shape[1])
        source[:, -1] = vectors[some]
        plan = Plan((Replace(direction.site, source, where="last"),))
        if sides.kind == "remote":
            from modeldiff.remote_lenses import last_logprobs

            return last_logprobs(sides, batch, side, plan)
        unembed = unembedding(sides.root(side), sides.site_map)
        logits = unembed(final_states(sides, batch, side, plan)[:, -1])
        return logits[:, : n_ids(sides.tokenizer)].log_softmax(-1).cpu()

    parts = fitted(
        sides.roots[0], range(len(vectors)), logprobs, what="patchscope",
        width=lambda _: text.n_tokens, max_rows=max_rows,
    )  # fmt: skip
    return torch.cat([found for _, found in parts])


def _scores(
    logprobs: Float[Tensor, "prompt scale vector token"], scales: Sequence[float], n_random: int
) -> tuple[pd.DataFrame, float, float]:
    """The table of the first vector, and its p among random directions and among controls."""
    agreement = logprobs.mean(0).exp().sum(-1).double()
    mean = logprobs.exp().mean(0)
    entropy = -(mean * mean.clamp(min=1e-45).log()).sum(-1).double()
    score = agreement * (1 - entropy / log(logprobs.shape[-1]))
    own, drawn, given = score.split([1, n_random, score.shape[1] - 1 - n_random], dim=1)
    table = {"scale": scales, "agreement": agreement[:, 0].tolist(),
             "entropy": entropy[:, 0].tolist(), "score": own[:, 0].tolist()}  # fmt: skip
    means, ps = [], []
    for name, others in (("random", drawn), ("control", given)):
        some = others.shape[1] > 0
        table[f"{name}_score"] = others.mean(1).tolist()  # NaN of nothing
        table[f"{name}_high"] = others.amax(1).tolist() if some else [nan] * len(scales)
        means += [others.mean(1)] if some else []
        ps.append(_p(torch.cat([own, others], 1)) if some else nan)
    table["excess"] = (own[:, 0] - torch.stack(means).amax(0)).tolist()
    return pd.DataFrame(table), *ps


def _p(score: Float[Tensor, "scale vector"]) -> float:
    """Share of vectors, the first among them, that exceed the mean of the others as far."""
    others = (score.sum(1, keepdim=True) - score) / (score.shape[1] - 1)
    reached = (score - others).amax(0)
    return float((reached >= reached[0]).double().mean())


def _tokens(
    sides: Sides,
    logprobs: Float[Tensor, "prompt vector token"],
    several: Sequence[Direction],
    kinds: Sequence[str],
    k: int,
    pool: int,
) -> pd.DataFrame:
    rows = []
    for number, one in enumerate(several):
        each = logprobs[:, number]
        likely = torch.zeros_like(each, dtype=torch.bool)
        likely.scatter_(1, each.topk(min(pool, each.shape[-1])).indices, True)
        mean = each.exp().mean(0).masked_fill(~likely.all(0), -1.0)
        ids = [i for i in mean.topk(k).indices.tolist() if mean[i] >= 0]
        names = token_names(sides.tokenizer, ids) if ids else []
        for rank, (token, name) in enumerate(zip(ids, names, strict=True)):
            rows.append((kinds[number], one.name, rank, token, name, float(mean[token])))
    return pd.DataFrame(rows, columns=["kind", "name", "rank", "token_id", "token", "probability"])
