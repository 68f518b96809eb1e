"""Removing a direction for good, and choosing which: weights that cannot write it any more.

Ablating a direction from everything that is written to the residual stream (embeddings, attention,
MLP) leaves a stream that never holds it. The same can be done to the weights once, which needs no
hook afterwards. Which of many candidates is worth it is chosen by what its ablation does.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from modeldiff._progress import Progress, reporter
from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.batch_size import fitted
from modeldiff.directions import Direction, orthonormal_basis
from modeldiff.errors import DirectionError, MaskError, MismatchError, RemoteError, SiteError
from modeldiff.forward import as_texts, run
from modeldiff.interventions import Ablate, Plan, Side, Steer
from modeldiff.loading import Sides
from modeldiff.placement import refuse_quantized
from modeldiff.sites import Site
from modeldiff.tokens import Text

T = TypeVar("T")

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def everywhere(directions: Direction | Sequence[Direction]) -> Plan:
    """Ablate directions from all that is written to the residual stream.

    From the embeddings, and from what attention and MLP of every layer add: no layer ever reads
    a stream that holds them. `orthogonalised` does the same to the weights.

    Args:
        directions: One or several, wherever they were found in the residual stream.

    Source:
        Arditi et al. 2024 (refusal direction), 2406.11717.
    """
    several = [directions] if isinstance(directions, Direction) else list(directions)
    start, *writes = (
        [each.at(f"{kind}.0") for each in several] for kind in ("resid_pre", "attn_out", "mlp_out")
    )
    return Plan((Ablate(start, layers=0), *(Ablate(each, layers="all") for each in writes)))


@torch.no_grad()
def orthogonalised(
    sides: Sides, directions: Direction | Iterable[Direction], side: Side = "finetuned"
) -> "PreTrainedModel":
    """Copy a side's model, with weights that cannot write some directions.

    Embeddings (of positions too), the output projections of attention and MLP, and their biases
    lose their part in the directions' span, in float64. A tied unembedding is untied first and
    stays as it was; an adapter is merged. The pair is not changed.

    Args:
        sides: The pair.
        directions: One or several.
        side: Whose model.

    Raises:
        SiteError: If a norm stands between a projection and the residual stream, as in Gemma 2:
            no weight there is equal to the ablation.
        MismatchError: If a direction has another width.
        RemoteError: If the weights are not here.

    Source:
        Arditi et al. 2024 (refusal direction), 2406.11717.
    """
    basis = orthonormal_basis(directions).double()
    _check(sides, basis)
    model = _own_copy(sides, side)
    for module in _embeddings(model, sides):
        _without(module.weight, basis, last=True)
    for layer in range(sides.shape(side).n_layers):
        for path in (sides.site_map.o_proj, sides.site_map.down_proj):
            module: Any = module_at(model, f"{sides.site_map.layer(layer)}.{path}")
            _without(module.weight, basis, last=type(module).__name__ == "Conv1D")
            if module.bias is not None:
                _without(module.bias, basis, last=True)
    return model.eval().requires_grad_(False)


def _check(sides: Sides, basis: Tensor) -> None:
    if sides.kind == "remote":
        raise RemoteError(
            "weights on a server cannot be changed. Ablate the direction in every run instead, "
            "do=Ablate(direction), which does the same to the residual stream; or load the pair."
        )
    for root in sides.roots:
        refuse_quantized(root, "orthogonalising")
    width, where = sides.shape("base").d_model, sides.site_map
    if basis.shape[1] != width:
        raise MismatchError(
            f"directions of width {basis.shape[1]}; the residual stream of this pair has {width}."
        )
    pairs = (where.attn_write, where.o_proj), (where.mlp_write, where.down_proj)
    for write, projection in pairs:
        if not projection.startswith(f"{write}."):
            raise SiteError(
                f"what {projection!r} writes passes {write!r} before the residual stream; a norm "
                "there makes the ablation depend on the activations, so no weight is equal to "
                "it. Use the hooks: everywhere(direction)."
            )


def _own_copy(sides: Sides, side: Side) -> Any:
    """A copy without an adapter's wrapper, and with an unembedding of its own."""
    if sides.peft is None:
        model: Any = copy.deepcopy(sides.root(side))
    else:
        wrapped: Any = copy.deepcopy(sides.peft)
        merged = side == "finetuned"
        model = wrapped.merge_and_unload(adapter_names=[sides.adapter]) if merged else None
        model = model if merged else wrapped.unload()
    head = module_at(model, sides.site_map.unembed)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # pyright: ignore
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False
    return model


def _embeddings(model: Any, sides: Sides) -> list[nn.Embedding]:
    """What starts the residual stream: of tokens, and of positions where they are learned."""
    width = sides.shape("base").d_model
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == width
    ]


def _without(weight: Tensor, basis: Float[Tensor, "k d_model"], *, last: bool) -> None:
    """Take a span out of a weight's output side, which is its last axis or its first."""
    raw, q = weight.double(), basis.to(weight.device)
    part = (raw @ q.T) @ q if last else q.T @ (q @ raw)
    weight.copy_((raw - part).to(weight.dtype))


@dataclass(frozen=True, eq=False)
class Selection:
    """A chosen candidate among all.

    Args:
        layer: Of the chosen one.
        position: Of the chosen one, from the end of the text.
        table: The candidates as they were given, with ``why``: the reason why each was dropped,
            nothing for those that were kept; best first.
    """

    layer: int
    position: int
    table: pd.DataFrame


def select_direction(
    candidates: pd.DataFrame,
    n_layers: int,
    *,
    max_kl: float = 0.1,
    below: float = 0.8,
    min_steering: float = 0.0,
) -> Selection:
    """Choose the candidate whose ablation lowers the behaviour most, among those that do no harm.

    Args:
        candidates: One row each: ``position``, ``layer``, ``ablated`` (the behaviour's score with
            the direction ablated), ``steered`` (the score of other texts with it added), ``kl``
            (that ablation does to other texts, nats).
        n_layers: Of the model.
        max_kl: Candidates above it break the model.
        below: Layers from this share of the depth on are too near to the unembedding.
        min_steering: Candidates below it do not cause the behaviour.

    Raises:
        DirectionError: If no candidate is left; says how many each rule dropped.
        MismatchError: If a column is missing.

    Source:
        Arditi et al. 2024 (refusal direction), 2406.11717.

    Example:
        >>> rows = {"position": [-1, -1], "layer": [1, 2], "ablated": [-3.0, -9.0],
        ...         "steered": [2.0, 2.0], "kl": [0.01, 0.7]}
        >>> select_direction(pd.DataFrame(rows), 10).layer
        1
    """
    wanted = ["position", "layer", "ablated", "steered", "kl"]
    missing = [name for name in wanted if name not in candidates]
    if missing:
        raise MismatchError(f"candidates lack {', '.join(missing)}; they need {', '.join(wanted)}.")
    limits = max_kl, below * n_layers, min_steering
    why = [_reason(row, *limits) for row in candidates[wanted].to_dict("records")]
    table = candidates.assign(why=why)
    table = table.assign(dropped=table["why"] != "").sort_values(
        ["dropped", "ablated", "layer", "position"], ignore_index=True
    )
    kept = table[~table["dropped"]]
    if kept.empty:
        counts = table["why"].value_counts().to_dict()
        raise DirectionError(
            f"none of {len(table)} candidates is left: "
            f"{', '.join(f'{n} {reason}' for reason, n in counts.items()) or 'there were none'}."
        )
    best = kept.iloc[0]
    return Selection(int(best["layer"]), int(best["position"]), table.drop(columns="dropped"))


def _reason(row: dict[Any, Any], max_kl: float, end: float, min_steering: float) -> str:
    if not all(math.isfinite(row[name]) for name in ("ablated", "steered", "kl")):
        return "not finite"
    if row["layer"] >= end:
        return "too late a layer"
    if row["kl"] > max_kl:
        return "KL too large"
    return "steering does not cause it" if row["steered"] < min_steering else ""


@torch.no_grad()
def candidate_sweep(
    sides: Sides,
    positive: Sequence[Any],
    negative: Sequence[Any],
    token_ids: Sequence[int],
    *,
    positions: Sequence[int] = (-1, -2),
    layers: Sequence[int] | None = None,
    side: Side = "finetuned",
    progress: Progress = False,
) -> tuple[pd.DataFrame, dict[tuple[int, int], Direction]]:
    """Mean differences at every position and layer, with what ablating and adding them does.

    Directions come from the first half of each set of texts, scores from the second. The score
    is log p - log(1 - p), p the probability that one of some tokens comes after the text.

    Args:
        sides: The pair.
        positive: Texts after which the behaviour comes; four or more.
        negative: Texts after which it does not; four or more.
        token_ids: Tokens with which the behaviour begins.
        positions: From the end of the text.
        layers: Whose inputs; all but the first if None.
        side: Whose activations and answers.
        progress: Where to report.

    Returns:
        The candidates for `select_direction`, with ``start`` (the positive texts' score without
        an edit); and the directions by (position, layer), at ``resid_pre``.

    Raises:
        MaskError: If there are too few texts, or one is shorter than a position reaches.
        DirectionError: If the two sets do not differ anywhere; places where they do not are left
            out.

    Source:
        Arditi et al. 2024 (refusal direction), 2406.11717.
    """
    sets = [as_texts(sides, each, reply=True) for each in (positive, negative)]
    _check_texts(sets, positions)
    chosen = range(1, sides.shape(side).n_layers) if layers is None else layers
    found = _means(sides, sets, positions, tuple(chosen), side)
    yes, no = (each[len(each) // 2 :] for each in sets)
    known = _last(sides, no, side, None)
    start, rows = _score(_last(sides, yes, side, None), token_ids), []
    report = reporter(progress, "candidates")
    for number, ((position, layer), direction) in enumerate(found.items()):
        plan = everywhere(direction)
        steered = _last(sides, no, side, Steer(direction, layers=layer))
        ablated = _last(sides, no, side, plan)
        rows.append(
            {
                "position": position,
                "layer": layer,
                "ablated": _score(_last(sides, yes, side, plan), token_ids),
                "steered": _score(steered, token_ids),
                "kl": float((known.exp() * (known - ablated)).sum(-1).mean()),
                "start": start,
            }
        )
        report(number + 1, len(found), f"layer {layer}")
    return pd.DataFrame(rows), found


def _check_texts(sets: Sequence[Sequence[Text]], positions: Sequence[int]) -> None:
    short = sum(text.n_tokens < -min(positions) for texts in sets for text in texts)
    if min(map(len, sets)) < 4 or short or max(positions) >= 0:
        raise MaskError(
            f"{len(sets[0])} and {len(sets[1])} texts, {short} of them too short for positions "
            f"{list(positions)}: give four or more a side, and positions from the end (-1, -2)."
        )


def _means(
    sides: Sides,
    sets: Sequence[Sequence[Text]],
    positions: Sequence[int],
    layers: Sequence[int],
    side: Side,
) -> dict[tuple[int, int], Direction]:
    sites, firsts = tuple(Site("resid_pre", layer) for layer in layers), []

    def reads(some: list[Text]) -> dict[Site, Tensor]:
        acts = run(sides, some, side=side, reads=sites, logits=False).acts
        return {site: acts[site][:, list(positions)].double() for site in sites}

    for texts in sets:
        parts = _fitted(sides, texts[: len(texts) // 2], reads)
        firsts.append({s: torch.cat([part[s] for part in parts]).mean(0).cpu() for s in sites})
    found = {}
    for place, position in enumerate(positions):
        for site in sites:
            gap = firsts[0][site][place] - firsts[1][site][place]
            if not bool(gap.any()):
                continue  # the same tokens so far: no candidate
            direction = Direction.of(gap, site, f"{site} at {position}", "mean difference")
            n = min(map(len, sets)) // 2
            found[position, site.layer] = replace(direction, n_tokens=n)
    if not found:
        raise DirectionError("the two sets of texts are the same at every position asked for.")
    return found


def _last(sides: Sides, texts: Sequence[Text], side: Side, do: Any) -> Float[Tensor, "text vocab"]:
    """Log probabilities after each text, in float64."""

    def logprobs(some: list[Text]) -> Tensor:
        scores = run(sides, some, side=side, do=do).logits
        assert scores is not None
        return scores[:, -1].double().log_softmax(-1).cpu()

    return torch.cat(_fitted(sides, texts, logprobs))


def _fitted(sides: Sides, texts: Sequence[Text], work: Callable[[list[Text]], T]) -> list[T]:
    """Work on all texts at once, or on as many as fit."""
    parts = fitted(
        sides.roots[0], texts, work, what="orthogonalise", width=lambda text: text.n_tokens,
        max_rows=len(texts),
    )  # fmt: skip
    return [part for _, part in parts]


def _score(logprobs: Float[Tensor, "text vocab"], token_ids: Sequence[int]) -> float:
    p = logprobs[:, list(token_ids)].logsumexp(-1)
    return float((p - torch.log1p(-p.exp().clamp(max=1 - 1e-12))).mean())
