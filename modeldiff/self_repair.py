"""What breaks when a component is taken out, three ways, and what later layers put back.

Zero-ablation asks about an input that the model never meets; resampling asks what the component's
information is worth. Where the two disagree, or where the total effect is far smaller than what the
component itself writes to the logits, one number misleads, and the table says so.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.errors import InterventionError, MaskError
from modeldiff.forward import as_texts
from modeldiff.interventions import Side
from modeldiff.loading import Sides
from modeldiff.patch_runs import (
    Component,
    Metric,
    Trace,
    columns_of,
    logits,
    places_of,
    read_out,
    trace,
)
from modeldiff.patching import Scorer
from modeldiff.sites import Site
from modeldiff.stats import bootstrap_mean


def ablation_table(
    sides: Sides,
    items: Sequence[Any],
    components: Sequence[Component],
    metric: Scorer,
    *,
    side: Side = "finetuned",
    n_donors: int = 4,
    seed: int = 0,
    progress: Progress = False,
    cancel: Any = None,
) -> pd.DataFrame:
    """Ablate components at every token: zero, mean and resample, total and direct effect.

    Resampling gives each token the component's activation at a random token of the other texts.
    The direct effect is that of the component's own write alone, every later layer as it was.

    Args:
        sides: The pair.
        items: Texts; at least two, since donors are other texts.
        components: Parts ``attn_out``, ``mlp_out`` and ``head``.
        metric: Makes the metric of each text.
        side: The side that is ablated.
        n_donors: Resamples for each text.
        seed: Of the donors and the bootstrap.
        progress: Where to report.
        cancel: Event that stops between texts.

    Returns:
        One row a component: component, layer, zeroed, averaged, resampled (mean changes of the
        metric over texts), low, high (of resampled, 95 % over texts), direct (of the resample),
        repaired (1 - total / direct: 0 none, 1 all), warning (text, or nothing). The share and
        its warning are given only where the interval of the direct effect excludes 0.

    Raises:
        InterventionError: If a component is of another part.
        MaskError: If there are fewer than two texts.
        Cancelled: If the event is set.

    Source:
        McGrath et al. 2023 (the Hydra effect), 2307.15771; Zhang and Nanda 2023, 2309.16042.
    """
    texts, chosen = as_texts(sides, items), tuple(components)
    strange = [str(c) for c in chosen if c.part not in ("attn_out", "mlp_out", "head")]
    if strange or not chosen:
        raise InterventionError(
            f"ablation_table: {strange or 'no components'}; it takes attn_out, mlp_out and head, "
            "whose own write to the residual stream is known."
        )
    if len(texts) < 2:
        raise MaskError("ablation_table resamples from other texts: give two or more.")
    last = Site("resid_post", sides.shape(side).n_layers - 1)
    places = places_of(chosen)
    wanted = tuple(dict.fromkeys([*places, *(str(_write(c)) for c in chosen), str(last)]))
    traces = [trace(sides, text, side, wanted, attention=False) for text in texts]
    draw = torch.Generator().manual_seed(seed)
    report, found = reporter(progress, "ablate"), []
    for number, own in enumerate(traces):
        check(cancel)
        others = [each for each in traces if each is not own]
        score = metric(own.text)
        rows = [_of(sides, own, others, traces, c, score, n_donors, draw, last) for c in chosen]
        found.append(torch.stack(rows))
        report(number + 1, len(texts), f"{number + 1}/{len(texts)} texts")
    return _table(chosen, torch.stack(found), seed)


def _write(component: Component) -> Site:
    """What the component reaches the residual stream with."""
    return Site("mlp_out" if component.part == "mlp_out" else "attn_out", component.layer)


@torch.no_grad()
def _of(
    sides: Sides,
    own: Trace,
    others: Sequence[Trace],
    every: Sequence[Trace],
    component: Component,
    metric: Metric,
    n_donors: int,
    draw: torch.Generator,
    last: Site,
) -> Float[Tensor, " 4"]:
    """Changes by zero, mean and resample (mean of donors), and the resample's direct one."""
    value, place = own.values[component.place], component.place
    width = columns_of(sides, component, value.shape[1])
    pool = torch.cat([each.values[place][:, width] for each in others])
    mean = torch.cat([each.values[place][:, width] for each in every]).mean(0)
    rows = value.repeat(3 + n_donors, 1, 1)
    rows[1, :, width], rows[2, :, width] = 0, mean
    picks = torch.randint(len(pool), (n_donors, len(value)), generator=draw)
    rows[3:, :, width] = pool[picks.to(pool.device)]
    write, acts = _write(component), {}
    total = (
        metric(logits(sides, own, component, rows, metric.at, reads=(write,), acts=acts))
        .double()
        .cpu()
    )
    moved = acts[write] - acts[write][:1]
    with sides.on(own.on) as root:
        h = own.values[str(last)] + moved
        direct = metric(read_out(sides, root, h, metric.at)).double().cpu()
    total, direct = total - total[0], direct - direct[0]
    return torch.stack([total[1], total[2], total[3:].mean(), direct[3:].mean()])


def _table(
    chosen: tuple[Component, ...], found: Float[Tensor, "text component 4"], seed: int
) -> pd.DataFrame:
    rows = []
    for number, component in enumerate(chosen):
        zero, mean, resample, direct = found[:, number].T
        inside, own = bootstrap_mean(resample, seed=seed), bootstrap_mean(direct, seed=seed)
        clear = own.low > 0 or own.high < 0
        repaired = 1 - inside.estimate / own.estimate if clear else float("nan")
        rows.append(
            {
                "component": str(component),
                "layer": component.layer,
                "zeroed": float(zero.mean()),
                "averaged": float(mean.mean()),
                "resampled": inside.estimate,
                "low": inside.low,
                "high": inside.high,
                "direct": own.estimate,
                "repaired": repaired,
                "warning": _warning(float(zero.mean()), inside.low, inside.high, repaired),
            }
        )
    return pd.DataFrame(rows)


def _warning(zero: float, low: float, high: float, repaired: float) -> str:
    said = []
    if repaired > 0.5:
        said.append(f"later layers put {min(1.0, repaired):.0%} of its own write back")
    middle = (low + high) / 2
    if not low <= zero <= high and (zero * middle < 0 or abs(zero) > 2 * abs(middle)):
        said.append("zero-ablation says something else than resampling: trust the latter")
    return "; ".join(said)
