"""Activation patching between the sides: which component, at which token, carries a change.

One component's activation at some tokens is exchanged for the other side's on the same tokens, the
rest of the model runs on, and a metric is read off the logits. `modeldiff.layer_maps` does this for
the residual stream alone, with the panel's numbers; here are heads, sublayers, queries, keys and
adapter modules, any metric, and sets of texts with intervals.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.batching import make_batch, padding_id
from modeldiff.divergence import unembedding
from modeldiff.errors import Cancelled, InterventionError, MaskError, RemoteError, SiteError
from modeldiff.forward import as_texts, final_states
from modeldiff.interventions import Plan, Side
from modeldiff.loading import Sides
from modeldiff.patch_runs import (
    Cell,
    Component,
    Metric,
    Part,
    Trace,
    columns_of,
    effects,
    n_heads,
    needs_attention,
    places_of,
    places_together,
    trace,
)
from modeldiff.stats import bootstrap_mean, null_band
from modeldiff.tokens import Text

Scorer = Callable[[Text], Metric]
OnPlace = Callable[[str, "PatchMap"], None]
COARSE: tuple[Part, ...] = ("resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True, eq=False)
class PatchMap:
    """What patches do to a metric, component by component and column by column.

    Args:
        text: The tokens.
        side: The side that is patched, with the other's activations.
        metric: Its name.
        components: Rows.
        columns: Positions that are patched together, one tuple a column.
        effect: Change of the metric; NaN where it is not measured yet.
        start: The metric of the side.
        target: The metric of the other side, which copying everything would reach.
    """

    text: Text
    side: Side
    metric: str
    components: tuple[Component, ...]
    columns: tuple[tuple[int, ...], ...]
    effect: Float[Tensor, "component column"]
    start: float
    target: float

    @property
    def recovered(self) -> Float[Tensor, "component column"]:
        """Effects as shares of the way to the other side; NaN where the two agree."""
        way = self.target - self.start
        return self.effect / way if way else torch.full_like(self.effect, torch.nan)

    def table(self) -> pd.DataFrame:
        """One row a cell: component, part, layer, head, module, positions, effect, recovered."""
        rows = [
            {**_names(component), "positions": column}
            for component in self.components
            for column in self.columns
        ]
        effect, recovered = (each.flatten().numpy() for each in (self.effect, self.recovered))
        return pd.DataFrame(rows).assign(effect=effect, recovered=recovered)


def _names(component: Component) -> dict[str, Any]:
    return {
        "component": str(component),
        "part": component.part,
        "layer": component.layer,
        "head": component.head,
        "module": component.module,
    }


def components_of(sides: Sides, parts: Iterable[Part] = COARSE) -> tuple[Component, ...]:
    """List every component of some parts, layer by layer.

    Args:
        sides: The pair.
        parts: See `Component`; ``adapter`` exists on adapter pairs alone.

    Raises:
        InterventionError: If a part does not exist in this pair.
    """
    wanted = tuple(parts)
    if "adapter" in wanted and not sides.lora:
        raise InterventionError("the part 'adapter' needs a pair with a LoRA adapter on its base.")
    found = []
    for layer in range(sides.shape("base").n_layers):
        for part in wanted:
            if part == "adapter":
                several = [site.module for site in sides.lora if site.layer == layer]
                found += [Component(part, layer, module=module) for module in several]
            elif part in ("head", "query", "key"):
                found += [Component(part, layer, head) for head in range(n_heads(sides, part))]
            else:
                found.append(Component(part, layer))
    return tuple(found)


def logit_difference(token_id: int, other: int, at: int = -1) -> Metric:
    """Logit of one token less that of another, at one position.

    Example:
        >>> logit_difference(1, 0)(torch.tensor([[[2.0, 5.0]]]))
        tensor([3.])
    """
    return Metric(
        f"logit {token_id} - logit {other}",
        lambda logits: logits[:, 0, token_id] - logits[:, 0, other],
        (at,),
        {"kind": "difference", "of": token_id, "less": other},
    )


def onset_loss(text: Text, n: int = 3) -> Metric:
    """Mean loss of the first tokens of a response, nats: how far a behaviour is from starting.

    Args:
        text: A prompt and a response that begins with the behaviour.
        n: How many tokens; fewer where the response is shorter.

    Raises:
        MaskError: If the text has no response, or no prompt.
    """
    first = text.n_prompt
    came = torch.tensor(text.ids[first : first + n])
    if not len(came) or first < 1:
        raise MaskError(
            f"a text with {first} tokens of prompt and {text.n_tokens - first} of response has no "
            "onset: give a chat or a Completion with both."
        )

    def score(logits: Tensor) -> Tensor:
        chosen = came.to(logits.device).expand(len(logits), -1)[..., None]
        return -logits.log_softmax(-1).gather(-1, chosen)[..., 0].mean(-1)

    at = tuple(range(first - 1, first - 1 + len(came)))
    name = f"loss of the first {len(came)} response tokens (nats)"
    return Metric(name, score, at, {"kind": "loss", "came": came})


def kl_to(sides: Sides, text: Text, side: Side, at: tuple[int, ...] = (-1,)) -> Metric:
    """KL(patched || a side), nats, mean over positions.

    Its gradient is exactly zero where the two agree: at the side itself.

    Args:
        sides: The pair.
        text: What is run.
        side: The reference.
        at: Positions.
    """
    batch = make_batch([text], padding_id(sides.tokenizer), "right")
    known = final_states(sides, batch, side, Plan())[0, list(at)]
    name, there = f"KL(patched || {side}) (nats)", {"kind": "kl", "states": known, "side": side}
    if sides.kind == "remote":
        return Metric(name, _only_there, at, there)
    with torch.no_grad():
        reference = unembedding(sides.root(side), sides.site_map)(known).log_softmax(-1)

    def score(logits: Tensor) -> Tensor:
        own = logits.log_softmax(-1)
        return (own.exp() * (own - reference.to(own.device))).sum(-1).mean(-1)

    return Metric(name, score, at, there)


def _only_there(logits: Tensor) -> Tensor:
    raise RemoteError("the KL to a side of a remote pair is computed on the server alone.")


def patch_map(
    sides: Sides,
    item: Any,
    metric: Metric | Scorer | None = None,
    *,
    side: Side = "finetuned",
    parts: Iterable[Part] = COARSE,
    components: Sequence[Component] | None = None,
    columns: Sequence[tuple[int, ...]] | None = None,
    max_tokens: int = 4096,
    on_place: OnPlace | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
) -> PatchMap:
    """Copy the other side's activations into a side, one component and column at a time.

    Args:
        sides: The pair.
        item: A text, chat or completion.
        metric: What is measured, or a function that makes it from the text, such as
            `onset_loss`. None is the KL to the other side after the last token.
        side: The side that is patched: "finetuned" asks what takes the change away, "base" what
            brings it.
        parts: Every component of these, see `components_of`.
        components: Or these alone.
        columns: Positions that are patched together; each token by itself if None.
        max_tokens: Of a batch.
        on_place: Called with a place's name and everything so far, after each place; of a remote
            pair after each job's last.
        progress: Where to report.
        cancel: Event that stops between places.

    Raises:
        InterventionError: If the metric is not finite, or a part does not exist.
        SiteError: If a component does not exist.
        MaskError: If a column has no position, or one outside the text.
        Cancelled: If the event is set; ``partial`` is the map so far.

    Source:
        Interchange interventions, Geiger et al. 2021, 2106.02997; practice as in Zhang and Nanda
        2023, 2309.16042: both ways, with a logit difference or a loss.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> found = patch_map(pair.sides, "I have a headache.", parts=["mlp_out"])
        >>> float(found.effect[:3].abs().sum()), bool(found.effect[3:].abs().sum() > 0)
        (0.0, True)
    """
    (text,) = as_texts(sides, [item])
    chosen = components_of(sides, parts) if components is None else tuple(components)
    cut = _columns(text, columns)
    score = _metric(sides, text, side, metric)
    own, other = both_traces(sides, text, side, places_of(chosen))
    empty = torch.full((len(chosen), len(cut)), torch.nan, dtype=torch.float64)
    found = PatchMap(text, side, score.name, chosen, cut, empty, *_ends(sides, text, side, score))
    report, n_done = reporter(progress, "patch"), 0
    for places in places_together(sides, chosen, len(cut), text.n_tokens, max_tokens):
        check(cancel, found)
        rows = [row for row, each in enumerate(chosen) if each.place in places]
        cells = [
            Cell(chosen[row], column, other.values[chosen[row].place])
            for row in rows
            for column in cut
        ]
        done = [part for _, part in effects(sides, own, cells, score, max_tokens=max_tokens)]
        found.effect[rows] = torch.cat(done).reshape(len(rows), len(cut))
        if on_place is not None:
            on_place(places[-1], found)
        n_done += len(places)
        report(n_done, len(places_of(chosen)), places[-1])
    return found


def both_traces(sides: Sides, text: Text, side: Side, places: Sequence[str]) -> tuple[Trace, Trace]:
    """Unedited passes of the side that is patched and of the other."""
    watched = needs_attention(places)
    other: Side = "base" if side == "finetuned" else "finetuned"
    own = trace(sides, text, side, places, attention=watched)
    found = trace(sides, text, other, places, attention=watched)
    differ = [p for p in places if own.values[p].shape != found.values[p].shape]
    if differ:
        widths = [each.values[differ[0]].shape[1] for each in (own, found)]
        raise SiteError(
            f"{', '.join(differ[:3])}: the sides have other widths there ({widths[0]} and "
            f"{widths[1]}), so nothing can be copied. Take parts that write to the residual stream."
        )
    return own, found


def _columns(text: Text, columns: Sequence[tuple[int, ...]] | None) -> tuple[tuple[int, ...], ...]:
    n = text.n_tokens
    cut = tuple((i,) for i in range(n)) if columns is None else tuple(map(tuple, columns))
    if not cut or not all(cut) or any(not -n <= p < n for column in cut for p in column):
        raise MaskError(
            f"columns {list(cut)[:4]} of a text of {n} tokens: give one or more positions a "
            "column, inside the text."
        )
    return cut


def _metric(sides: Sides, text: Text, side: Side, metric: Metric | Scorer | None) -> Metric:
    if metric is None:
        return kl_to(sides, text, "base" if side == "finetuned" else "finetuned")
    found = metric if isinstance(metric, Metric) else metric(text)
    if not isinstance(found, Metric):
        raise InterventionError(
            f"metric: got {type(found).__name__}; give a Metric(name, score, at), or a function "
            "that makes one from a text, such as onset_loss."
        )
    return found


@torch.no_grad()
def _ends(sides: Sides, text: Text, side: Side, metric: Metric) -> tuple[float, float]:
    """The metric of the side and of the other."""
    other: Side = "base" if side == "finetuned" else "finetuned"
    if sides.kind == "remote":
        from modeldiff import remote_patching

        ends = remote_patching.ends(sides, text, metric)
        return ends[side], ends[other]
    batch = make_batch([text], padding_id(sides.tokenizer), "right")
    found: dict[Side, float] = {}
    for each in ("base", "finetuned"):
        states = final_states(sides, batch, each, Plan())[:, list(metric.at)]
        scores = unembedding(sides.root(each), sides.site_map)(states)
        found[each] = float(metric(scores)[0])
    return found[side], found[other]


def patch_texts(
    sides: Sides,
    items: Sequence[Any],
    metric: Scorer | None = None,
    *,
    side: Side = "finetuned",
    parts: Iterable[Part] = COARSE,
    components: Sequence[Component] | None = None,
    last: int | None = None,
    n_random: int = 19,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Patch whole components over a set of texts; effects with intervals, beside random ones.

    A random control moves the component at each token as far as the patch does, always in one
    direction that is random: what a change of this size, which means nothing, does over all texts.
    A component *carries* the change if the interval of its effect excludes 0 and its effect lies
    further from its controls than any component's control does from the others, in their standard
    deviations, at 5 % for all components together.

    Args:
        sides: The pair.
        items: Texts, chats, completions; at least two.
        metric: Makes the metric of each text; None is the KL to the other side after the last
            token.
        side: The side that is patched.
        parts: Every component of these.
        components: Or these alone.
        last: Patch the last so many tokens; all of them if None.
        n_random: Random controls; with fewer than 19 nothing can carry.
        seed: Of controls and bootstrap.
        max_tokens: Of a batch.
        progress: Where to report.
        cancel: Event that stops between texts.

    Returns:
        One row a component: component, part, layer, head, module, effect, low, high (95 % over
        texts), random_low, random_high (the band of the controls), recovered (ratio of means), p
        (for all components together, never below 1 / (1 + n_random)), carries, n_texts.
        ``attrs`` hold metric, start and target (means).

    Raises:
        MaskError: If there are fewer than two texts, or three controls.
        Cancelled: If the event is set.

    Source:
        The largest statistic of all components as the null: Westfall and Young 1993.
    """
    texts = as_texts(sides, items)
    if len(texts) < 2 or n_random < 3:
        raise MaskError(f"{len(texts)} texts, n_random={n_random}: give two or more, and three.")
    chosen = components_of(sides, parts) if components is None else tuple(components)
    units = _random_units(sides, texts[0], side, chosen, n_random, seed)
    report, seen = reporter(progress, "patch"), []
    for number, text in enumerate(texts):
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"cancelled after {number} of {len(texts)} texts.")
        score = _metric(sides, text, side, metric)
        changes = _of_text(sides, text, side, score, chosen, last, units, max_tokens)
        seen.append((changes, _ends(sides, text, side, score), score.name))
        report(number + 1, len(texts), f"{number + 1}/{len(texts)} texts")
    ends = torch.tensor([each[1] for each in seen], dtype=torch.float64).mean(0)
    table = _summary(chosen, torch.stack([each[0] for each in seen]), ends, seed)
    table.attrs = {"metric": seen[0][2], "start": float(ends[0]), "target": float(ends[1])}
    return table


def _random_units(
    sides: Sides, text: Text, side: Side, chosen: tuple[Component, ...], n: int, seed: int
) -> list[Float[Tensor, "random width"]]:
    """Random unit vectors for each component, the same for every text and token."""
    own, _ = both_traces(sides, text, side, places_of(chosen))
    draw, units = torch.Generator().manual_seed(seed), []
    for each in chosen:
        whole = own.values[each.place].shape[1]
        channels = columns_of(sides, each, whole)
        noise = torch.randn(n, channels.stop - channels.start, generator=draw)
        units.append(noise / noise.norm(dim=-1, keepdim=True))
    return units


def _of_text(
    sides: Sides,
    text: Text,
    side: Side,
    metric: Metric,
    chosen: tuple[Component, ...],
    last: int | None,
    units: Sequence[Float[Tensor, "random _width"]],
    max_tokens: int,
) -> Float[Tensor, "component cell"]:
    """Effect of patching each component, and of each of its random controls, on one text."""
    own, other = both_traces(sides, text, side, places_of(chosen))
    n = text.n_tokens
    positions = tuple(range(n - min(n, n if last is None else last), n))
    found = torch.zeros(len(chosen), 1 + len(units[0]), dtype=torch.float64)
    for places in places_together(sides, chosen, found.shape[1], n, max_tokens):
        rows = [row for row, each in enumerate(chosen) if each.place in places]
        cells = [
            Cell(chosen[row], positions, *source)
            for row in rows
            for source in _sources(sides, own, other, chosen[row], units[row])
        ]
        done = [part for _, part in effects(sides, own, cells, metric, max_tokens=max_tokens)]
        found[rows] = torch.cat(done).reshape(len(rows), -1)
    return found


def _sources(
    sides: Sides, own: Trace, other: Trace, component: Component, units: Tensor
) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
    """The other side's activations, and the own ones moved as far in random directions."""
    start = own.values[component.place]
    end = other.values[component.place].to(start)
    channels = columns_of(sides, component, start.shape[1])
    length = (end - start)[:, channels].float().norm(dim=-1, keepdim=True)
    found: list[tuple[Tensor, tuple[Tensor, Tensor] | None]] = [(end, None)]
    for unit in units.to(start.device):
        row = start.clone()
        row[:, channels] += (length * unit).to(start)
        found.append((row, (length, unit)))
    return found


def _family_p(means: Float[Tensor, "component cell"]) -> Float[Tensor, " component"]:
    """P of each component's first value, by the largest deviation of any component's control.

    A deviation is a value's distance from the mean of the others of its component, in their
    standard deviations; a value that differs from others that are all equal deviates without end.
    """
    n = means.shape[1]
    rest = (means.sum(1, keepdim=True) - means) / (n - 1)
    others = means[:, None, :].expand(-1, n, -1)[:, ~torch.eye(n, dtype=torch.bool)]
    spread = others.reshape(len(means), n, n - 1).std(-1)
    gap = (means - rest).abs()
    deviation = torch.where(gap > 0, gap / spread, torch.zeros_like(gap))
    largest = deviation[:, 1:].amax(0)
    return (1 + (largest >= deviation[:, :1]).sum(1)).double() / n


def _summary(
    chosen: tuple[Component, ...],
    changes: Float[Tensor, "text component cell"],
    ends: Float[Tensor, " 2"],
    seed: int,
) -> pd.DataFrame:
    way, rows = float(ends[1] - ends[0]), []
    means = changes.mean(0)
    for number, (component, p) in enumerate(zip(chosen, _family_p(means).tolist(), strict=True)):
        own = bootstrap_mean(changes[:, number, 0], seed=seed)
        band = null_band(means[number, 1:])
        rows.append(
            {
                **_names(component),
                "effect": own.estimate,
                "low": own.low,
                "high": own.high,
                "random_low": band.low,
                "random_high": band.high,
                "recovered": own.estimate / way if way else float("nan"),
                "p": p,
                "carries": p <= 0.05 and (own.low > 0 or own.high < 0),
                "n_texts": len(changes),
            }
        )
    return pd.DataFrame(rows)
