"""Layer by layer, token by token: where the sides differ, and where edits change what is said.

Differences are read off one run of both sides. Effects are measured: the activation of one token
after one layer is exchanged (patched, ablated, steered), the layers above run on, and the change of
one prediction is what the cell of the map holds. Cells whose activation the edit leaves as it is,
bit for bit, are exactly 0 and are not run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.batch_size import fitted
from modeldiff.batching import make_batch, padding_id
from modeldiff.directions import Direction
from modeldiff.divergence import kl_and_loss, unembedding
from modeldiff.errors import Cancelled, MaskError, MismatchError
from modeldiff.forward import as_texts, final_states, run_pair
from modeldiff.interventions import Ablate, Plan, Replace, Side, Steer
from modeldiff.loading import Sides
from modeldiff.sites import Site
from modeldiff.tokens import Text

DIFFERENCES = {
    "relative_norm": "‖finetuned − base‖ / ‖base‖ of the residual stream after the layer",
    "cosine": "cosine between finetuned and base after the layer",
    "projection_ft": "projection of finetuned on the direction, residual-stream units",
    "projection_base": "the same of base",
    "projection_difference": "the same of finetuned − base",
}
"""Maps of `layer_differences` and what they mean."""

Edited = Callable[[int, Tensor], Float[Tensor, "column token d_model"]]
"""From a layer and indices of columns: the residual stream after the layer, one row a column."""
OnRow = Callable[[int, "LayerEffects"], None]


@dataclass(frozen=True, eq=False)
class LayerEffects:
    """What edits at single places do to one prediction.

    Args:
        text: The tokens before the predicted one.
        what: "patch", "ablate" or "steer".
        side: The side that is edited.
        layers: Rows: the residual stream after these layers is edited.
        columns: Token positions, or coefficients for "steer".
        kl: Change of KL(edited || base) over the predicted token, nats, ``[layer, column]``; NaN
            where it is not measured yet.
        logprob: Change of the log probability of ``token_id``, nats, the same shape.
        token_id: The fine-tune's most likely token at the place.
        start_kl: KL(side || base) without an edit, nats.
        start_logprob: Log probability of ``token_id`` without an edit, nats.
    """

    text: Text
    what: str
    side: Side
    layers: tuple[int, ...]
    columns: tuple[float, ...]
    kl: Float[Tensor, "layer column"]
    logprob: Float[Tensor, "layer column"]
    token_id: int
    start_kl: float
    start_logprob: float

    def table(self) -> pd.DataFrame:
        """One row a layer and column: layer, column, kl, logprob."""
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in self.columns],
                "column": [column for _ in self.layers for column in self.columns],
                "kl": self.kl.flatten().numpy(),
                "logprob": self.logprob.flatten().numpy(),
            }
        )


def before(text: Text, position: int) -> Text:
    """The tokens before a position: what its token is predicted from.

    Raises:
        MaskError: If there are none, or the text has no such position.
    """
    if not 0 < position <= text.n_tokens:
        raise MaskError(
            f"token {position} of {text.n_tokens}: only tokens 1 to {text.n_tokens} are predicted."
        )
    end = text.offsets[position - 1][1]
    return replace(
        text,
        ids=text.ids[:position],
        text=text.text[:end],
        offsets=text.offsets[:position],
        roles=text.roles[:position],
        special=text.special[:position],
        n_prompt=min(text.n_prompt, position),
        labels=text.labels[:position],
    )


def layer_differences(
    sides: Sides, item: Any, direction: Direction | None = None
) -> dict[str, Float[Tensor, "layer token"]]:
    """Compare both sides' residual streams after every layer, at every token of one text.

    Args:
        sides: The pair.
        item: A text, chat or completion.
        direction: On which to project too; its own site does not matter.

    Returns:
        Maps of `DIFFERENCES`, float64 on the CPU. Where the sides agree bit for bit the relative
        norm is exactly 0 and the cosine exactly 1.

    Raises:
        MismatchError: If the direction has another width than the residual stream.
    """
    (text,) = as_texts(sides, [item])
    base, tuned = (h.double() for h in _residuals(sides, text))
    inner = (base * tuned).sum(-1)
    norms = (base * base).sum(-1), (tuned * tuned).sum(-1)
    found = {
        "relative_norm": (tuned - base).norm(dim=-1) / norms[0].sqrt(),
        "cosine": (inner / (norms[0] * norms[1]).sqrt()).clamp(-1, 1),
    }
    if direction is not None:
        unit = _unit(sides, direction).double()
        found["projection_ft"], found["projection_base"] = tuned @ unit, base @ unit
        found["projection_difference"] = (tuned - base) @ unit
    return found


def patch_effects(
    sides: Sides, item: Any, *, side: Side = "finetuned", **options: Any
) -> LayerEffects:
    """Copy the other side's activation of one token after one layer into a side.

    At the last layer and token of the fine-tune nothing of it is left: the change of the KL is
    then all of it, negative.

    Args:
        sides: The pair.
        item: A text; the prediction after its last token is measured, see `before`.
        side: The side that is edited.
        **options: As for `ablate_effects`.

    Raises:
        Cancelled: If the event is set; ``partial`` holds the finished rows.

    Source:
        Interchange interventions, Geiger et al. 2021, 2106.02997.
    """
    (text,) = as_texts(sides, [item])
    base, tuned = _residuals(sides, text)
    own, other = (tuned, base) if side == "finetuned" else (base, tuned)
    return _swept(sides, text, side, "patch", own, _at_single_tokens(own, other), **options)


def ablate_effects(
    sides: Sides, item: Any, direction: Direction, *, side: Side = "finetuned", **options: Any
) -> LayerEffects:
    """Project a direction out of the activation of one token after one layer.

    Args:
        sides: The pair.
        item: A text; the prediction after its last token is measured, see `before`.
        direction: What to remove, whatever its own site.
        side: The side that is edited.
        **options: ``layers`` (default all), ``max_tokens`` of a batch, ``on_row`` (called with
            the layer and everything so far), ``progress``, ``cancel``.

    Raises:
        MismatchError: If the direction has another width than the residual stream.
        Cancelled: If the event is set; ``partial`` holds the finished rows.

    Source:
        Arditi et al. 2024 (refusal direction), 2406.11717, at one place at a time.
    """
    (text,) = as_texts(sides, [item])
    own = _residuals(sides, text)[side == "finetuned"]
    unit = _unit(sides, direction)[None].to(own.device)
    without = Ablate(direction).apply(own.float(), unit, None).to(own.dtype)
    return _swept(sides, text, side, "ablate", own, _at_single_tokens(own, without), **options)


def steer_effects(
    sides: Sides,
    item: Any,
    direction: Direction,
    coefficients: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    *,
    side: Side = "finetuned",
    **options: Any,
) -> LayerEffects:
    """Add a direction after one layer, at every token, with several coefficients.

    Args:
        sides: The pair.
        item: A text; the prediction after its last token is measured, see `before`.
        direction: What to add, whatever its own site.
        coefficients: Multiples of its raw length; the columns of the result.
        side: The side that is edited.
        **options: As for `ablate_effects`.

    Raises:
        MismatchError: If the direction has another width than the residual stream.
        Cancelled: If the event is set; ``partial`` holds the finished rows.

    Source:
        Turner et al. 2023 (activation addition), 2308.10248.
    """
    (text,) = as_texts(sides, [item])
    own = _residuals(sides, text)[side == "finetuned"]
    unit = _unit(sides, direction)[None].to(own.device)

    def edited(layer: int, columns: Tensor) -> Tensor:
        added = [Steer(direction, coefficients[int(i)]) for i in columns]
        h = own[layer].float()[None]
        return torch.cat([each.apply(h, unit, None) for each in added]).to(own.dtype)

    return _swept(sides, text, side, "steer", own, edited, tuple(map(float, coefficients)),
                  **options)  # fmt: skip


def _unit(sides: Sides, direction: Direction) -> Float[Tensor, " d_model"]:
    width = sides.shape("base").d_model
    if direction.d_model != width:
        raise MismatchError(
            f"direction {direction.name!r} has width {direction.d_model}, the residual stream of "
            f"this pair has {width}: it comes from another model or another kind of site."
        )
    return direction.unit


def _residuals(sides: Sides, text: Text) -> tuple[Tensor, Tensor]:
    """Residual stream of base and finetuned, ``[layer, token, d_model]`` in the model's dtype."""
    sites = tuple(Site("resid_post", i) for i in range(sides.shape("base").n_layers))
    batch = make_batch([text], padding_id(sides.tokenizer), "right")
    found = run_pair(sides, batch, sites)
    device = found.base[sites[0]].device
    base, tuned = (
        torch.stack([acts[site][0].to(device) for site in sites])
        for acts in (found.base, found.finetuned)
    )
    return base, tuned


def _at_single_tokens(own: Tensor, other: Tensor) -> Edited:
    """Rows that hold the other activation at one token each."""

    def edited(layer: int, columns: Tensor) -> Tensor:
        rows = own[layer].repeat(len(columns), 1, 1)
        rows[torch.arange(len(columns)), columns] = other[layer][columns.to(own.device)]
        return rows

    return edited


@dataclass(frozen=True, eq=False)
class _Prediction:
    """What is measured: the distribution after the last token of a text."""

    sides: Sides
    text: Text
    side: Side
    known: Tensor
    token_id: int

    @classmethod
    def of(cls, sides: Sides, text: Text, side: Side) -> "_Prediction":
        batch = make_batch([text], padding_id(sides.tokenizer), "right")
        known = final_states(sides, batch, "base", Plan())[:, -1]
        tuned = final_states(sides, batch, "finetuned", Plan())[:, -1]
        if sides.kind == "remote":
            from modeldiff.remote_lenses import likeliest

            return cls(sides, text, side, known, int(likeliest(sides, tuned, "finetuned")))
        with torch.no_grad():
            likely = unembedding(sides.root("finetuned"), sides.site_map)(tuned)
        return cls(sides, text, side, known, int(likely.argmax()))

    @torch.no_grad()
    def measure(self, n: int, plan: Plan) -> tuple[Tensor, Tensor]:
        """KL(edited || base) and log probability of the token for n copies of the text."""
        batch = make_batch([self.text] * n, padding_id(self.sides.tokenizer), "right")
        if self.sides.kind == "remote":
            from modeldiff.remote_lenses import effect_at_the_end

            came = torch.full((n,), self.token_id)
            known = self.known.expand(n, -1)
            kl, loss = effect_at_the_end(self.sides, batch, self.side, plan, known, came, 256 << 20)
            return kl.double(), -loss.double()
        states = final_states(self.sides, batch, self.side, plan)[:, -1]
        own = unembedding(self.sides.root(self.side), self.sides.site_map)
        base = unembedding(self.sides.root("base"), self.sides.site_map)
        known = self.known.expand(n, -1)
        came = torch.full((n,), self.token_id, device=states.device)
        kl, loss = kl_and_loss(states, known, own, base, came, 256 << 20)
        return kl.double().cpu(), -loss.double().cpu()


def _swept(
    sides: Sides,
    text: Text,
    side: Side,
    what: str,
    own: Tensor,
    edited: Edited,
    columns: tuple[float, ...] = (),
    *,
    layers: Sequence[int] | None = None,
    max_tokens: int = 4096,
    on_row: OnRow | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
) -> LayerEffects:
    columns = columns or tuple(map(float, range(text.n_tokens)))
    layers = tuple(range(len(own))) if layers is None else tuple(layers)
    target = _Prediction.of(sides, text, side)
    (kl,), (logprob,) = (each.tolist() for each in target.measure(1, Plan()))
    empty = torch.full((len(layers), len(columns)), torch.nan, dtype=torch.float64)
    found = LayerEffects(text, what, side, layers, columns, empty, empty.clone(), target.token_id,
                         kl, logprob)  # fmt: skip
    report, size = reporter(progress, what), max(1, max_tokens // text.n_tokens)
    for row, layer in enumerate(layers):

        def of_columns(some: list[int], row: int = row, layer: int = layer) -> None:
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"{what}: cancelled after {row} of {len(layers)} layers.", found)
            _measured(found, target, own[layer], edited, row, torch.tensor(some))

        list(fitted(sides.roots[0], range(len(columns)), of_columns, what=what, max_rows=size,
                    width=lambda _: text.n_tokens, max_tokens=max_tokens))  # fmt: skip
        if on_row is not None:
            on_row(layer, found)
        report(row + 1, len(layers), f"layer {layer}")
    check(cancel, found)
    return found


def _measured(
    found: LayerEffects, target: _Prediction, own: Tensor, edited: Edited, row: int, some: Tensor
) -> None:
    """Fill in some columns of one row; those where nothing changes are 0."""
    layer = found.layers[row]
    h = edited(layer, some)
    changed = (h != own).flatten(1).any(1).cpu()
    found.kl[row, some] = found.logprob[row, some] = 0.0
    if changed.any():
        source = torch.cat([own[None], h[changed.to(h.device)]])  # the same batch, so that
        plan = Plan((Replace(Site("resid_post", layer), source),))  # rounding is the same too
        kl, logprob = target.measure(len(source), plan)
        found.kl[row, some[changed]] = kl[1:] - kl[0]
        found.logprob[row, some[changed]] = logprob[1:] - logprob[0]
