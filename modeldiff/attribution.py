"""Attribution patching: patches estimated from one backward pass, and checked against real ones.

The estimate of a patch is (other - own) · gradient of the metric. It is exact where the model is
linear between the two, blind where a softmax is saturated (the QK fix computes that softmax again),
and wrong where paths cancel at the own activations alone (GradDrop lets no layer hide another).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.attention_watch import Attention, Watch, watching
from modeldiff.editing import Editor, Group
from modeldiff.errors import InterventionError
from modeldiff.forward import as_texts, device_of, inputs_of
from modeldiff.hooks import hooked, stopping
from modeldiff.interventions import Plan, Side
from modeldiff.loading import Sides
from modeldiff.patch_runs import (
    Cell,
    Component,
    Metric,
    Part,
    Trace,
    columns_of,
    copies,
    effects,
    needs_attention,
    places_of,
    read_out,
)
from modeldiff.patching import COARSE, Scorer, both_traces, components_of
from modeldiff.sites import Site
from modeldiff.stats import Interval
from modeldiff.tokens import Text

Gradients = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimated effects of patches, and how well they agree with real ones.

    Args:
        text: The tokens.
        side: The side whose gradient it is.
        metric: Its name.
        components: Rows.
        estimate: Estimated change of the metric by patching a component at a token with the
            other side's activation; with GradDrop a size, never negative.
        grad_drop: Whether it is.
        sample: Real patches of cells drawn at random: component, position, estimate, patched.
        r: Pearson correlation over the sample (GradDrop: with sizes); its interval is Fisher's.
            NaN where the sample does not vary.
    """

    text: Text
    side: Side
    metric: str
    components: tuple[Component, ...]
    estimate: Float[Tensor, "component token"]
    grad_drop: bool
    sample: pd.DataFrame
    r: Interval

    def table(self) -> pd.DataFrame:
        """One row a cell: component, part, layer, head, position, estimate."""
        n = self.text.n_tokens
        rows = [
            (str(each), each.part, each.layer, each.head, position)
            for each in self.components
            for position in range(n)
        ]
        names = ["component", "part", "layer", "head", "position"]
        return pd.DataFrame(rows, columns=names).assign(estimate=self.estimate.flatten().numpy())


@dataclass(frozen=True, eq=False)
class Graph:
    """A pass whose graph is kept: the metric, and the activations in it by place."""

    score: Tensor
    acts: Mapping[str, Tensor]
    attention: Mapping[int, Attention]

    def gradients(self, places: Sequence[str]) -> Gradients:
        """Gradient of the metric at places, and at watched queries, keys and patterns."""
        tensors = {place: self.acts[place] for place in places}
        for layer, seen in self.attention.items():
            tensors |= {f"query.{layer}": seen.query, f"key.{layer}": seen.key}
            tensors[f"weights.{layer}"] = seen.weights
        found = torch.autograd.grad(
            self.score, list(tensors.values()), retain_graph=True, allow_unused=True
        )
        filled = zip(tensors.items(), found, strict=True)
        return {
            name: torch.zeros_like(value) if grad is None else grad
            for (name, value), grad in filled
        }

    @contextmanager
    def blocking(self, layer: int) -> Iterator[None]:
        """Let no gradient through what a layer writes; the residual stream passes it by."""
        handles = [
            self.acts[f"{kind}.{layer}"].register_hook(torch.zeros_like)
            for kind in ("attn_out", "mlp_out")
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def attribute(
    sides: Sides,
    item: Any,
    metric: Metric | Scorer,
    *,
    side: Side = "finetuned",
    parts: Iterable[Part] = COARSE,
    components: Sequence[Component] | None = None,
    qk_fix: bool = True,
    grad_drop: bool = False,
    n_sample: int = 32,
    seed: int = 0,
) -> Attribution:
    """Estimate what `modeldiff.patching.patch_map` measures, token by token, and check a sample.

    Args:
        sides: The pair.
        item: A text, chat or completion.
        metric: What is measured, or a function that makes it from the text.
        side: The side that is patched with the other's activations.
        parts: Every component of these.
        components: Or these alone.
        qk_fix: Compute the softmax again for patches of queries and keys, and take the gradient
            after it; False is the plain gradient.
        grad_drop: Mean size over passes that each block one layer, times L / (L - 1).
        n_sample: Cells that are patched for real, drawn from those that differ between the sides.
        seed: Of the draw.

    Raises:
        InterventionError: If the metric is not finite, or its gradient is zero everywhere (a KL
            of a side with itself has none).

    Source:
        Kramár et al. 2024 (AtP*), 2403.00745.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> from modeldiff.patching import logit_difference
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> found = attribute(pair.sides, "I have a headache.", logit_difference(40, 41))
        >>> len(found.sample), found.r.estimate > 0.8
        (32, True)
    """
    (text,) = as_texts(sides, [item])
    chosen = components_of(sides, parts) if components is None else tuple(components)
    places = places_of(chosen)
    score = metric if isinstance(metric, Metric) else metric(text)
    own, other = both_traces(sides, text, side, places)
    moved = {p: (own.values[p] != other.values[p].to(own.values[p])).any(-1) for p in places}
    estimate = torch.zeros(len(chosen), text.n_tokens, dtype=torch.float64)
    if any(bool(each.any()) for each in moved.values()):
        graph = gradient_graph(sides, own, places, score, grad_drop)
        estimate = _estimates(sides, own, other, chosen, graph, qk_fix, grad_drop)
    changed = torch.stack([moved[each.place].cpu() for each in chosen])
    sample = _sample(sides, own, other, chosen, changed, estimate, score, n_sample, seed)
    patched = sample["patched"].abs() if grad_drop else sample["patched"]
    r = correlation(sample["estimate"].to_numpy(), patched.to_numpy())
    return Attribution(text, side, score.name, chosen, estimate, grad_drop, sample, r)


def correlation(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> Interval:
    """Pearson correlation with Fisher's interval; NaN where a side does not vary.

    Example:
        >>> round(correlation(np.arange(9.0), np.arange(9.0) ** 2).estimate, 3)
        0.962
    """
    n = len(a)
    if n < 2 or not np.ptp(a) or not np.ptp(b):
        return Interval(math.nan, -1.0, 1.0, n, level)
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    if n < 4 or abs(r) == 1:
        return Interval(r, -1.0 if n < 4 else r, 1.0 if n < 4 else r, n, level)
    from statistics import NormalDist

    half = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(n - 3)
    centre = math.atanh(r)
    return Interval(r, math.tanh(centre - half), math.tanh(centre + half), n, level)


def gradient_graph(
    sides: Sides, own: Trace, places: Sequence[str], metric: Metric, every_write: bool
) -> Graph:
    """Run a side with its graph, from the first layer's input on.

    Args:
        sides: The pair.
        own: The unedited pass of the side; says how it is run.
        places: Whose activations are kept in the graph.
        metric: Of the logits.
        every_write: Keep what attention and MLP of every layer write, as `Graph.blocking` needs.

    Raises:
        InterventionError: If the metric is not finite, or its gradient is zero everywhere.
    """
    layers = range(sides.shape(own.on).n_layers)
    last, start = Site("resid_post", len(layers) - 1), Site("resid_pre", 0)
    writes = ("attn_out", "mlp_out") if every_write else ()
    reads = {start, last, *(Site(kind, layer) for kind in writes for layer in layers)}
    reads |= {Site.parse(p) for p in places if not needs_attention([p])}
    batch = copies(sides, own.text, 1)
    group = Group((0, 1), Plan(), sides.shape(own.on), adapter_off=own.off)
    silenced = sides.lora if own.off else ()
    editor = Editor(batch, (group,), tuple(sorted(reads)), lora=silenced, leaf=True)
    with (
        torch.enable_grad(),
        sides.on(own.on) as root,
        hooked(root, sides.site_map, editor, sides.adapter_of(own.on)),
        _leaves(sides, root, silenced),
        watching(root, sides.site_map, Watch(), on=needs_attention(places)) as watch,
    ):
        with stopping(root, sides.site_map.layer(len(layers) - 1)):
            root(**inputs_of(batch, device_of(root)), use_cache=False)
        score = metric(read_out(sides, root, editor.acts[last], metric.at)).sum()
    acts = {str(site): h for site, h in editor.acts.items()}
    graph = Graph(score, acts, watch.seen)
    if not score.requires_grad or not bool(graph.gradients([str(start)])[str(start)].any()):
        raise InterventionError(
            f"the metric {metric.name!r} has a gradient of exactly zero at side {own.side!r}: "
            "nothing can be attributed. A KL of a side with itself has none; take a loss, a "
            "logit difference, or the KL to the other side."
        )
    return graph


@contextmanager
def _leaves(sides: Sides, root: nn.Module, silenced: Sequence[Site]) -> Iterator[None]:
    """Give the silenced adapter a gradient; hooks of `hooked` have put zeros there before."""
    paths = [sides.site_map.locate(site, sides.adapter)[0] for site in silenced]
    handles = [
        module_at(root, path).register_forward_hook(lambda m, args, out: out.requires_grad_(True))
        for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _estimates(
    sides: Sides,
    own: Trace,
    other: Trace,
    chosen: tuple[Component, ...],
    graph: Graph,
    qk_fix: bool,
    grad_drop: bool,
) -> Float[Tensor, "component token"]:
    places = [place for place in places_of(chosen) if not needs_attention([place])]
    if not grad_drop:
        return _products(sides, own, other, chosen, graph, graph.gradients(places), qk_fix)
    n_layers = sides.shape(own.on).n_layers
    if n_layers < 2:
        raise InterventionError("GradDrop blocks one layer at a time: it needs two or more.")
    total = torch.zeros(len(chosen), own.text.n_tokens, dtype=torch.float64)
    for layer in range(n_layers):
        with graph.blocking(layer):
            gradients = graph.gradients(places)
        total += _products(sides, own, other, chosen, graph, gradients, qk_fix).abs()
    return total / (n_layers - 1)


@torch.no_grad()
def _products(
    sides: Sides,
    own: Trace,
    other: Trace,
    chosen: tuple[Component, ...],
    graph: Graph,
    gradients: Gradients,
    qk_fix: bool,
) -> Float[Tensor, "component token"]:
    rows, fixed = [], {}
    for each in chosen:
        place, start = each.place, own.values[each.place]
        end = other.values[place].to(start)
        if needs_attention([place]) and qk_fix:
            if place not in fixed:
                weights = gradients[f"weights.{each.layer}"][0]
                fixed[place] = _through_softmax(
                    graph.attention[each.layer], each.part, end, weights
                )
            rows.append(fixed[place][each.head].double().cpu())
            continue
        gradient = gradients[place][0]
        if needs_attention([place]):
            gradient = gradient.transpose(0, 1).flatten(1)
        width = columns_of(sides, each, start.shape[1])
        product = (end - start).double() * gradient.double()
        rows.append(product[:, width].sum(-1).cpu())
    return torch.stack(rows)


def _through_softmax(
    seen: Attention, part: Part, end: Float[Tensor, "token width"], gradient: Tensor
) -> Float[Tensor, "head token"]:
    """Change of the pattern by each patched query or key, times the pattern's gradient."""
    heads = seen.query if part == "query" else seen.key
    put = end.unflatten(-1, (heads.shape[1], -1)).transpose(0, 1)[None].to(heads)
    if part == "query":  # a query changes its own row alone, so all rows at once
        return ((seen.pattern(put, seen.key) - seen.weights)[0] * gradient).sum(-1)
    shared, found = seen.query.shape[1] // seen.key.shape[1], []
    for position in range(put.shape[2]):
        keys = seen.key.clone()
        keys[:, :, position] = put[:, :, position]
        change = (seen.pattern(seen.query, keys) - seen.weights)[0] * gradient
        found.append(change.sum((-1, -2)).unflatten(0, (-1, shared)).sum(-1))
    return torch.stack(found, -1)


def _sample(
    sides: Sides,
    own: Trace,
    other: Trace,
    chosen: tuple[Component, ...],
    changed: Tensor,
    estimate: Tensor,
    metric: Metric,
    n: int,
    seed: int,
) -> pd.DataFrame:
    """Patch some cells for real, those of one place together."""
    cells = changed.nonzero()
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:n]
    drawn = [(chosen[row], position, row) for row, position in cells[order].tolist()]
    rows = []
    for place in dict.fromkeys(each.place for each, _, _ in drawn):
        here = [one for one in drawn if one[0].place == place]
        patches = [Cell(each, (position,), other.values[place]) for each, position, _ in here]
        patched = torch.cat([part for _, part in effects(sides, own, patches, metric)])
        for (each, position, row), value in zip(here, patched.tolist(), strict=True):
            rows.append((str(each), position, float(estimate[row, position]), value))
    return pd.DataFrame(rows, columns=["component", "position", "estimate", "patched"])
