"""At which layer a direction matters for what comes next, by attribution and by real steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.attribution import correlation, gradient_graph
from modeldiff.directions import Direction
from modeldiff.errors import MaskError, MismatchError
from modeldiff.forward import as_texts
from modeldiff.interventions import Side
from modeldiff.loading import Sides
from modeldiff.patch_runs import Component, Metric, Trace, logits, trace
from modeldiff.patching import Scorer
from modeldiff.stats import bootstrap_mean, empirical_p


def layer_attribution(
    sides: Sides,
    items: Sequence[Any],
    direction: Direction | Mapping[int, Direction],
    metric: Scorer,
    *,
    side: Side = "finetuned",
    step: float = 0.1,
    n_check: int = 10,
    n_random: int = 99,
    seed: int = 0,
) -> pd.DataFrame:
    """Where a direction matters for what comes next: gradient · direction, layer by layer.

    Read at the position from which the metric's first token is predicted, and said as the change
    of the metric when the residual stream there moves by ``step`` of its own length along the
    direction. The same change is measured for real, both ways, on the first ``n_check`` texts.

    Args:
        sides: The pair.
        items: Texts, chats, completions.
        direction: One for all layers, or one for each of some layers.
        metric: Makes the metric of each text, such as `modeldiff.patching.onset_loss`.
        side: Whose gradient.
        step: Share of the residual norm.
        n_check: Texts on which it is measured for real.
        n_random: Random directions, the same at every layer.
        seed: Of the random directions and the bootstrap.

    Returns:
        One row a layer: layer, attribution (mean over texts), low, high (95 %), measured (mean
        over the checked texts), random (95 % of random directions' absolute means lie below),
        p (of the absolute mean among them). ``attrs["r"]`` is the correlation of estimates and
        measurements over texts and layers, ``attrs["layer"]`` the layer of the largest absolute
        mean, ``attrs["metric"]`` the metric.

    Raises:
        InterventionError: If the metric is not finite, or has no gradient.
        MismatchError: If a direction has another width, or is of no layer.

    Source:
        Venhoff et al. 2025 (arXiv 2506.18167), with a metric whose value is defined.
    """
    texts, units = as_texts(sides, items), _units(sides, direction)
    if not texts or n_random < 19:
        raise MaskError(f"{len(texts)} texts, n_random={n_random}: give one or more, and 19.")
    draw = torch.randn(n_random, sides.shape(side).d_model, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))  # fmt: skip
    draw = draw / draw.norm(dim=-1, keepdim=True)
    found, controls, measured, name = [], [], [], ""
    for number, text in enumerate(texts):
        score = metric(text)
        own = trace(sides, text, side, [f"resid_post.{layer}" for layer in units], attention=False)
        slopes = _slopes(sides, own, tuple(units), score, step)
        found.append(torch.stack([g @ u for g, u in zip(slopes, units.values(), strict=True)]))
        controls.append(slopes @ draw.T)
        name = score.name
        if number < n_check:
            measured.append(_moved(sides, own, units, score, step))
    return _layer_table(
        tuple(units), torch.stack(found), torch.stack(controls), torch.stack(measured), name, seed
    )


def _units(
    sides: Sides, direction: Direction | Mapping[int, Direction]
) -> dict[int, Float[Tensor, " d_model"]]:
    shape = sides.shape("base")
    several = (
        dict.fromkeys(range(shape.n_layers), direction)
        if isinstance(direction, Direction)
        else dict(sorted(direction.items()))
    )
    wrong = [
        layer
        for layer, each in several.items()
        if each.d_model != shape.d_model or not 0 <= layer < shape.n_layers
    ]
    if wrong or not several:
        raise MismatchError(
            f"layers {wrong or 'none'}: this pair has layers 0 to {shape.n_layers - 1} of width "
            f"{shape.d_model}; give directions of that width."
        )
    return {layer: each.unit.double() for layer, each in several.items()}


def _slopes(
    sides: Sides, own: Trace, layers: Sequence[int], metric: Metric, step: float
) -> Float[Tensor, "layer d_model"]:
    """Gradient at the metric's first place, times ``step`` of the residual norm there."""
    places = [f"resid_post.{layer}" for layer in layers]
    gradients = gradient_graph(sides, own, places, metric, False).gradients(places)
    rows = []
    for place in places:
        norm = own.values[place][metric.at[0]].double().norm()
        rows.append(gradients[place][0, metric.at[0]].double() * step * norm)
    return torch.stack(rows).cpu()


@torch.no_grad()
def _moved(
    sides: Sides, own: Trace, units: Mapping[int, Tensor], metric: Metric, step: float
) -> Float[Tensor, " layer"]:
    """Half the difference of the metric between a step along a direction and one against it."""
    found = []
    for layer, unit in units.items():
        value = own.values[f"resid_post.{layer}"]
        here = value[metric.at[0]].double()
        rows = value.repeat(2, 1, 1)
        for row, sign in enumerate((1.0, -1.0)):
            rows[row, metric.at[0]] = (here + sign * step * here.norm() * unit.to(here)).to(value)
        both = metric(logits(sides, own, Component("resid_post", layer), rows, metric.at)).double()
        found.append((both[0] - both[1]) / 2)
    return torch.stack(found).cpu()


def _layer_table(
    layers: tuple[int, ...],
    found: Float[Tensor, "text layer"],
    controls: Float[Tensor, "text layer random"],
    measured: Float[Tensor, "checked layer"],
    metric: str,
    seed: int,
) -> pd.DataFrame:
    rows, chance = [], controls.mean(0).abs()
    for number, layer in enumerate(layers):
        mean = bootstrap_mean(found[:, number], seed=seed)
        rows.append(
            {
                "layer": layer,
                "attribution": mean.estimate,
                "low": mean.low,
                "high": mean.high,
                "measured": float(measured[:, number].mean()),
                "random": float(chance[number].quantile(0.95)),
                "p": empirical_p(abs(mean.estimate), chance[number], "upper"),
            }
        )
    table = pd.DataFrame(rows)
    estimates = found[: len(measured)].flatten().numpy()
    table.attrs = {
        "r": correlation(estimates, measured.flatten().numpy()),
        "layer": layers[int(table["attribution"].abs().argmax())],
        "metric": metric,
    }
    return table
