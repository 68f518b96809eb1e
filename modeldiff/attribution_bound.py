"""What attribution patching may have missed: many components patched together, at random.

An estimate of zero can hide a component whose gradient vanishes at the own activations. Testing
every component for real is what attribution saves; moving random halves of them together tests all
at once. A component that matters shows in the halves that hold it, whatever its gradient says.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from threading import Event

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from modeldiff._progress import Progress, check, reporter
from modeldiff.architectures import module_at
from modeldiff.attribution import Attribution
from modeldiff.batch_size import fitted
from modeldiff.editing import Editor, Group
from modeldiff.errors import InterventionError
from modeldiff.hooks import first, hidden_argument, hooked, put, replay
from modeldiff.interventions import Plan
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
    places_of,
    read_out,
)
from modeldiff.patching import Scorer, both_traces
from modeldiff.sites import Site

_INSIDE: tuple[set[Part], ...] = (
    {"attn_out", "head", "adapter"},
    {"mlp_out", "mlp_act", "adapter"},
)
"""Parts that lie in one another: a patch of the outer one hides a patch of the inner one."""


@dataclass(frozen=True, eq=False)
class Missed:
    """What may hide among the cells that were not patched for real.

    Args:
        bound: No cell that was not verified has a larger mean effect than this, in the metric's
            unit, up to `alarm_rate` for all of them together.
        verified: Smallest size among the verified cells, the largest estimates.
        cells: One row a cell: component, position, estimate, patched (real effect of a verified
            cell, else NaN), effect, low, high (mean effect over random company, and its interval),
            missed (not verified, and the interval lies beyond the verified sizes or the estimate).
        alarm_rate: Of the intervals, all together.
        n_subsets: Random halves.
    """

    bound: float
    verified: float
    cells: pd.DataFrame
    alarm_rate: float
    n_subsets: int


def missed_cells(
    sides: Sides,
    found: Attribution,
    metric: Metric | Scorer,
    *,
    n_verified: int = 16,
    n_subsets: int = 256,
    alarm_rate: float = 0.05,
    max_tokens: int = 4096,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Missed:
    """Bound the effect of cells whose estimate is small.

    The largest estimates are patched for real. Then random halves of all cells are moved together,
    each by the difference between the sides, so that none hides what another does to it. A cell's
    mean effect is its estimate plus the mean error of the summed estimates in the halves with it
    minus that in the halves without it. Where effects add up this is the cell's own effect;
    elsewhere it is its mean effect over random company.

    Args:
        sides: The pair.
        found: From `modeldiff.attribution.attribute`, without GradDrop, over parts that are not
            inside one another: no residual stream, queries or keys.
        metric: The same as there.
        n_verified: Cells that are patched one by one.
        n_subsets: Random halves; the bound shrinks with the root of their number.
        alarm_rate: Chance that any of the intervals misses, by Bonferroni.
        max_tokens: Of a batch.
        seed: Of the halves.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        InterventionError: If the attribution has parts that cannot be patched together, or sizes
            (GradDrop) instead of signed estimates, or there are fewer than 8 halves.
        Cancelled: If the event is set.

    Source:
        Random subsets as a check for false negatives are from Kramár et al. 2024 (AtP*),
        2403.00745; the estimate as a control variate, and the bound for every cell, are ours.

    Example:
        >>> from modeldiff.attribution import attribute
        >>> from modeldiff.models import ModelPair
        >>> from modeldiff.patching import logit_difference
        >>> pair, metric = ModelPair.load("organism:em-rank1"), logit_difference(40, 41)
        >>> cells = attribute(pair.sides, "I have a headache.", metric, parts=["mlp_out"])
        >>> missed = missed_cells(pair.sides, cells, metric, n_subsets=64)
        >>> bool(missed.cells["missed"].any())
        False
    """
    _check(found, n_subsets)
    score = metric if isinstance(metric, Metric) else metric(found.text)
    own, other = both_traces(sides, found.text, found.side, places_of(found.components))
    cells = [(i, p) for i in range(len(found.components)) for p in range(found.text.n_tokens)]
    estimates = np.array([float(found.estimate[cell]) for cell in cells])
    patched = np.full(len(cells), np.nan)
    for index in np.argsort(-np.abs(estimates), kind="stable")[:n_verified]:
        row, position = cells[index]
        component = found.components[row]
        real = [Cell(component, (position,), other.values[component.place])]
        ((_, change),) = effects(sides, own, real, score)
        patched[index] = float(change[0])
    inside = np.random.default_rng(seed).random((n_subsets, len(cells))) < 0.5
    report, changes = reporter(progress, "random halves"), []

    def of_halves(some: list[int]) -> np.ndarray:
        check(cancel)
        masks = torch.from_numpy(inside[some]).unflatten(1, (-1, found.text.n_tokens))
        return _together(sides, own, other, found.components, masks, score)

    for some, change in fitted(
        sides.roots[0], range(n_subsets), of_halves, what="random halves",
        width=lambda _: found.text.n_tokens, max_tokens=max_tokens,
        max_rows=max(1, max_tokens // found.text.n_tokens - 1),
    ):  # fmt: skip
        changes.append(change)
        report(some[-1] + 1, n_subsets, "random halves")
    return _missed(found, cells, estimates, patched, inside, np.concatenate(changes), alarm_rate)


def _check(found: Attribution, n_subsets: int) -> None:
    parts = {each.part for each in found.components}
    nested = [group & parts for group in _INSIDE if len(group & parts) > 1]
    loose = parts & {"resid_post", "query", "key"}
    if found.grad_drop or nested or loose or n_subsets < 8:
        raise InterventionError(
            f"parts {sorted(parts)}, GradDrop {found.grad_drop}, {n_subsets} halves: give signed "
            "estimates, 8 halves or more, and parts that can be patched together, such as "
            "attn_out and mlp_out: none inside another, no residual stream, queries or keys."
        )


@torch.no_grad()
def _together(
    sides: Sides,
    own: Trace,
    other: Trace,
    components: Sequence[Component],
    masks: Tensor,
    metric: Metric,
) -> np.ndarray:
    """Change of the metric by adding, in each row, the differences at the cells of a mask."""
    moves: dict[Site, Tensor] = {}
    for index, each in enumerate(components):
        value, site = own.values[each.place], each.site
        assert site is not None
        held = moves.setdefault(site, value.new_zeros(len(masks) + 1, *value.shape))
        width = columns_of(sides, each, value.shape[1])
        difference = (other.values[each.place].to(value) - value)[:, width]
        held[1:, :, width] += masks[:, index, :, None].to(value) * difference
    batch = copies(sides, own.text, len(masks) + 1)
    group = Group((0, len(batch.texts)), Plan(), sides.shape(own.on), adapter_off=own.off)
    editor = Editor(batch, (group,), (), lora=sides.lora if own.off else ())
    lowest = min(each.layer for each in components)
    paths = [sides.site_map.layer(i) for i in range(lowest, sides.shape(own.on).n_layers)]
    adapter = sides.adapter_of(own.on)
    with (
        sides.on(own.on) as root,
        hooked(root, sides.site_map, editor, adapter),
        _adding(root, {sides.site_map.locate(at, adapter): rows for at, rows in moves.items()}),
    ):
        start = hidden_argument(own.calls[paths[0]])
        h = start.expand(len(batch.texts), *start.shape[1:])
        h = replay(root, {path: own.calls[path] for path in paths}, h)
        scores = metric(read_out(sides, root, h, metric.at)).double().cpu().numpy()
    return scores[1:] - scores[0]


@contextmanager
def _adding(root: nn.Module, moves: Mapping[tuple[str, str], Tensor]) -> Iterator[None]:
    """Add rows to what modules take in or put out."""
    with ExitStack() as stack:
        for (path, end), rows in moves.items():
            module = module_at(root, path)
            if end == "output":
                handle = module.register_forward_hook(
                    lambda module, args, out, rows=rows: put(out, first(out) + rows)
                )
            else:
                handle = module.register_forward_pre_hook(
                    lambda module, args, rows=rows: (args[0] + rows, *args[1:])
                )
            stack.callback(handle.remove)
        yield


def _missed(
    found: Attribution,
    cells: Sequence[tuple[int, int]],
    estimates: np.ndarray,
    patched: np.ndarray,
    inside: np.ndarray,
    changes: np.ndarray,
    alarm_rate: float,
) -> Missed:
    error = changes - inside @ estimates
    n_in = inside.sum(0).clip(1)
    n_out = (~inside).sum(0).clip(1)
    mean_in, mean_out = error @ inside / n_in, error @ ~inside / n_out
    spread = error.std(ddof=1) * np.sqrt(1 / n_in + 1 / n_out)
    z = NormalDist().inv_cdf(1 - alarm_rate / (2 * len(cells)))
    effect = estimates + mean_in - mean_out
    low, high = effect - z * spread, effect + z * spread
    known = ~np.isnan(patched)
    sizes = np.abs(patched[known])
    verified = float(sizes.min()) if len(sizes) else float("inf")
    bound = np.maximum(np.abs(low), np.abs(high))
    surely = np.where(low * high > 0, np.minimum(np.abs(low), np.abs(high)), 0.0)
    table = pd.DataFrame(
        {
            "component": [str(found.components[row]) for row, _ in cells],
            "position": [position for _, position in cells],
            "estimate": estimates,
            "patched": patched,
            "effect": effect,
            "low": low,
            "high": high,
            "missed": ~known & (surely > np.maximum(verified, np.abs(estimates))),
        }
    )
    unknown = bound[~known]
    return Missed(
        float(unknown.max()) if len(unknown) else 0.0, verified, table, alarm_rate, len(inside)
    )
