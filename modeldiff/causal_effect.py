"""What a direction does for a fine-tune: the loss on texts when it is taken back along it.

At one layer the fine-tune's component along the direction is set to the base's, or to zero, at
every token. How much the loss rises on texts of the fine-tune's domain, on others and on chats is
held against random directions, and against differences between random halves of the texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Bool, Float, Int
from modeldiff.activations import stream
from modeldiff.architectures import module_at
from modeldiff.batch_size import at_once, each_batch
from modeldiff.batching import Batch
from modeldiff.difference_lens import random_differences
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.divergence import block_size, blocks, unembedding
from modeldiff.errors import DirectionError, MaskError, RemoteError
from modeldiff.forward import as_texts, device_of, inputs_of, run_pair
from modeldiff.hooks import hidden_argument, recorded, replay, stopping
from modeldiff.loading import Sides
from modeldiff.sites import Site
from modeldiff.stats import bootstrap_mean, empirical_p, wilson
from modeldiff.tokens import Text

Target = Literal["base", "zero"]
KINDS = ("random", "random difference")
_BUDGET = 256 << 20


@dataclass(frozen=True, eq=False)
class CausalEffect:
    """Change of the loss on texts when a fine-tune is set back along a direction.

    Args:
        direction: What was taken back.
        to: "base" or "zero".
        table: One row a set of texts: texts, n_texts, n_tokens, loss_base, loss_finetuned (nats a
            token, mean over texts), effect (change of the fine-tune's loss) with its 95 % interval
            over texts (low, high); for both kinds of control their mean effect (random,
            random_difference), the percentile of the effect among them (percentile_*, share of
            controls below it) with its 95 % Wilson interval (percentile_*_low, _high), and p_*
            (share of controls that reach it, never 0).
        controls: One row a set of texts and control: texts, kind, number, effect.
        per_text: One row a text: texts, text, n_tokens, effect.
    """

    direction: Direction
    to: Target
    table: pd.DataFrame
    controls: pd.DataFrame
    per_text: pd.DataFrame

    def carries(self, texts: str, alarm_rate: float = 0.05) -> bool:
        """Whether the loss on these texts rises by more than with controls of both kinds.

        The interval over texts must lie above 0 too.
        """
        row = self.table.set_index("texts").loc[texts]
        beyond = all(row[f"p_{kind.replace(' ', '_')}"] <= alarm_rate for kind in KINDS)
        return bool(row["low"] > 0) and beyond


def causal_effect(
    sides: Sides,
    direction: Direction,
    texts: Mapping[str, Sequence[Any]],
    *,
    to: Target = "base",
    n_random: int = 64,
    after: int = 1,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> CausalEffect:
    """Set the fine-tune back along a direction, and measure its loss beside controls.

    Layers up to the direction's own run once for each batch; only the layers above run again, for
    the direction and for each control, several of them side by side. Replacing a component does not
    depend on the direction's length, so controls need none.

    Args:
        sides: The pair.
        direction: At a ``resid_pre`` or ``resid_post`` site.
        texts: Sets of texts by name, such as "in_domain", "general" and "chat"; teacher-forced.
        to: Set the component to the base's on the same tokens, or to zero.
        n_random: Random directions, and as many differences between random halves of all texts.
        after: First position whose token counts; 20 leaves out what depends on the first tokens.
        seed: Of controls and intervals.
        max_tokens: Budget of a batch, padding included.
        progress: Where to report.
        cancel: Event that stops between directions.

    Raises:
        DirectionError: If the site is not in the residual stream, or there are no controls.
        MaskError: If a set has no token after ``after``, or all have fewer than 4 texts.
        RemoteError: If the weights are not here.
        SiteError: If the site does not exist.
        Cancelled: If the event is set.

    Source:
        Minder et al. 2025 (narrow fine-tuning leaves traces), arXiv 2510.13900.
    """
    _check(sides, direction, texts, to, n_random)
    rendered = {name: as_texts(sides, items) for name, items in texts.items()}
    every = [text for several in rendered.values() for text in several]
    controls = [*random_like(direction, n_random, seed=seed),
                *random_differences(_means(sides, every, direction.site, max_tokens), direction,
                                    n_random, seed=seed)]  # fmt: skip
    units = torch.stack([each.unit for each in (direction, *controls)])
    report = reporter(progress, "causal effect")
    rows, drawn, singles = [], [], []
    for number, (name, several) in enumerate(rendered.items()):
        losses, counts = _losses(
            sides, several, direction.site, units, to, after, max_tokens, cancel
        )
        if not len(counts):
            raise MaskError(f"{name!r}: no token of {len(several)} texts is at {after} or later.")
        row, table, single = _summary(name, losses, counts, n_random, seed)
        rows.append(row)
        drawn.append(table)
        singles.append(single)
        report(number + 1, len(rendered), name)
    return CausalEffect(direction, to, pd.DataFrame(rows), pd.concat(drawn, ignore_index=True),
                        pd.concat(singles, ignore_index=True))  # fmt: skip


def _check(
    sides: Sides, direction: Direction, texts: Mapping[str, Any], to: str, n_random: int
) -> None:
    if sides.kind == "remote":
        raise RemoteError(
            "causal effects run layers again, and they are on a server. What ablating or steering "
            "does to predictions is measured there: edit_effects.effects, and layer by layer "
            "layer_maps.ablate_effects. Or load the pair here."
        )
    if not direction.site.kind.startswith("resid"):
        raise DirectionError(
            f"{direction.name!r} is at {direction.site}; effects are measured in the residual "
            "stream: move it with direction.at('resid_post.<layer>')."
        )
    if n_random < 1 or not texts or to not in ("base", "zero"):
        raise DirectionError(
            f"n_random={n_random}, {len(texts)} sets of texts, to={to!r}: give one or more of "
            "either, and 'base' or 'zero'."
        )


def _means(
    sides: Sides, texts: Sequence[Text], site: Site, max_tokens: int
) -> Float[Tensor, "text d_model"]:
    """Mean activation of every text in the base, the first token left out."""
    sums = torch.zeros(len(texts), sides.shape("base").d_model, dtype=torch.float64)
    counts = torch.zeros(len(texts), dtype=torch.float64)
    for part in stream(sides, tuple(texts), (site,), max_tokens=max_tokens):
        sums.index_add_(0, part.text_index, part.rows(part.run.base, site).double().cpu())
        counts += torch.bincount(part.text_index, minlength=len(texts))
    seen = counts > 0
    return sums[seen] / counts[seen, None]


def _losses(
    sides: Sides,
    texts: Sequence[Text],
    site: Site,
    units: Float[Tensor, "direction d_model"],
    to: Target,
    after: int,
    max_tokens: int,
    cancel: Event | None,
) -> tuple[Float[Tensor, "text case"], Int[Tensor, " text"]]:
    """Mean loss of each text: base, fine-tune, and the fine-tune set back along each unit."""

    def of_batch(batch: Batch) -> list[tuple[int, Tensor, int]]:
        keep = batch.attention_mask.bool() & (batch.position_ids >= max(1, after))
        if not keep.any():
            return []

        def cases(copies: int) -> Tensor:
            found = []
            for losses in _cases(sides, batch, keep, site, units, to, copies):
                check(cancel)
                found.append(losses)
            return torch.cat(found).T

        n = batch.ids.numel()
        copies = min(len(units), max(1, max_tokens // n))
        every = at_once(sides.roots[0], copies, cases, what="causal effect", width=n)
        owner = keep.nonzero()[:, 0]
        several = [(row, owner == row) for row in owner.unique().tolist()]
        return [(batch.order[row], every[mine].mean(0), int(mine.sum())) for row, mine in several]

    found = each_batch(sides, texts, max_tokens, of_batch, what="texts of causal effects")
    parts = sorted((part for _, some in found for part in some), key=lambda each: each[0])
    if not parts:
        return torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)
    return torch.stack([each[1] for each in parts]), torch.tensor([each[2] for each in parts])


@torch.no_grad()
def _cases(
    sides: Sides,
    batch: Batch,
    keep: Bool[Tensor, "row seq"],
    site: Site,
    units: Float[Tensor, "direction d_model"],
    to: Target,
    copies: int,
) -> Iterator[Float[Tensor, "case token"]]:
    """Losses of the kept tokens of a batch, some cases at a time: as many as ``copies``."""
    found = run_pair(sides, batch, (site,), final=True)
    assert found.final is not None
    for side, states in zip(("base", "finetuned"), found.final, strict=True):
        yield _loss(sides, states, batch, keep, side)[None]
    base, tuned = found.base[site], found.finetuned[site]
    above = range(site.layer + (site.kind == "resid_post"), sides.shape("base").n_layers)
    paths = [sides.site_map.layer(i) for i in above]
    several, keeps = _repeated(batch, copies), keep.repeat(copies, 1)
    with sides.on("finetuned") as root:
        norm = sides.site_map.norm
        with recorded(root, paths) as calls, stopping(root, norm):
            root(**inputs_of(several, device_of(root)), use_cache=False)
        if calls:  # the site as the layers above see it
            device = hidden_argument(next(iter(calls.values()))).device
            base, tuned = base.to(device), tuned.to(device)
        for some in blocks(len(units), copies):
            moved = _moved(base, tuned, units[some].to(tuned.device), to)
            n, spare = len(moved), copies - len(moved)
            h = torch.cat([moved, moved[:1].expand(spare, -1, -1, -1)]).flatten(0, 1)
            states = module_at(root, norm)(replay(root, calls, h))
            losses = _loss(sides, states, several, keeps, "finetuned")
            yield losses.unflatten(0, (copies, -1))[:n]


def _repeated(batch: Batch, copies: int) -> Batch:
    return replace(
        batch,
        ids=batch.ids.repeat(copies, 1),
        attention_mask=batch.attention_mask.repeat(copies, 1),
        position_ids=batch.position_ids.repeat(copies, 1),
        texts=batch.texts * copies,
        order=batch.order * copies,
    )


def _moved(
    base: Float[Tensor, "row seq d_model"],
    tuned: Float[Tensor, "row seq d_model"],
    units: Float[Tensor, "direction d_model"],
    to: Target,
) -> Float[Tensor, "direction row seq d_model"]:
    """The fine-tune's activations, set back along each direction; arithmetic in float32."""
    own, along = tuned.float(), units.float()
    gap = base.float() - own if to == "base" else -own
    sizes = (gap @ along.T).movedim(-1, 0)[..., None]
    return (own + sizes * along[:, None, None]).to(tuned.dtype)


def _loss(
    sides: Sides, states: Tensor, batch: Batch, keep: Bool[Tensor, "row seq"], side: Any
) -> Float[Tensor, " token"]:
    unembed = unembedding(sides.root(side), sides.site_map)
    row, column = (each.to(states.device) for each in keep.nonzero(as_tuple=True))
    h, came = states[row, column - 1], batch.ids[keep].to(states.device)
    vocab = unembed(h[:1]).shape[-1]
    parts = [
        -unembed(h[some]).log_softmax(-1).gather(-1, came[some, None])[:, 0]
        for some in blocks(len(h), block_size(vocab, _BUDGET))
    ]
    return torch.cat(parts).double().cpu()


def _summary(
    name: str,
    losses: Float[Tensor, "text case"],
    counts: Int[Tensor, " text"],
    n_random: int,
    seed: int,
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    effects = losses[:, 2:] - losses[:, 1:2]
    own, drawn = effects[:, 0].numpy(), effects[:, 1:].mean(0).numpy()
    interval = bootstrap_mean(own, seed=seed)
    row: dict[str, Any] = {
        "texts": name, "n_texts": len(counts), "n_tokens": int(counts.sum()),
        "loss_base": float(losses[:, 0].mean()), "loss_finetuned": float(losses[:, 1].mean()),
        "effect": interval.estimate, "low": interval.low, "high": interval.high,
    }  # fmt: skip
    groups = dict(zip(KINDS, np.split(drawn, [n_random]), strict=True))
    for kind, values in groups.items():
        key, place = (
            kind.replace(" ", "_"),
            wilson(int((values < row["effect"]).sum()), len(values)),
        )
        row |= {
            key: float(values.mean()), f"percentile_{key}": place.estimate,
            f"percentile_{key}_low": place.low, f"percentile_{key}_high": place.high,
            f"p_{key}": empirical_p(row["effect"], values, tail="upper"),
        }  # fmt: skip
    table = pd.concat([
        pd.DataFrame({"texts": name, "kind": kind, "number": range(len(values)), "effect": values})
        for kind, values in groups.items()
    ])  # fmt: skip
    single = pd.DataFrame({"texts": name, "text": range(len(own)), "n_tokens": counts.tolist(),
                           "effect": own})  # fmt: skip
    return row, table, single
