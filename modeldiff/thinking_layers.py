"""At which layer a behaviour's direction matters: by gradients, checked against real steps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from modeldiff.attribution import gradient_graph
from modeldiff.directions import Direction
from modeldiff.errors import InterventionError, MaskError
from modeldiff.interventions import Side
from modeldiff.layer_attribution import layer_attribution
from modeldiff.loading import Sides
from modeldiff.models import ModelPair
from modeldiff.patch_runs import Metric, trace
from modeldiff.patching import Scorer, onset_loss
from modeldiff.thinking_spans import Sentence
from modeldiff.tokens import Text

SMALLEST = 1e-5
"""Nats: a metric that no small step could move by as much has no gradient but rounding."""


def onsets(
    texts: Sequence[Text], sentences: Sequence[Sentence], label: str, *, n: int = 3
) -> tuple[Text, ...]:
    """Cut texts off inside the sentences of a label: the sentence's first tokens are the response.

    Args:
        texts: Chains.
        sentences: Of them.
        label: Which.
        n: Tokens of the sentence that are kept; fewer where it is shorter.

    Returns:
        One text a sentence, for `modeldiff.patching.onset_loss` and the like.

    Raises:
        MaskError: If no sentence has the label and a token before it.
    """
    mine = [each for each in sentences if each.label == label and each.first > 0]
    if not mine:
        known = ", ".join(sorted({each.label for each in sentences}))
        raise MaskError(f"no sentence labelled {label!r} after a first token; there are {known}.")
    return tuple(_cut(texts[each.text], each.first, min(each.stop, each.first + n))
                 for each in mine)  # fmt: skip


def _cut(text: Text, n_prompt: int, n: int) -> Text:
    return replace(
        text, ids=text.ids[:n], offsets=text.offsets[:n], roles=text.roles[:n],
        special=text.special[:n], labels=text.labels[:n], n_prompt=n_prompt,
    )  # fmt: skip


def cue_logit(token_ids: Collection[int]) -> Scorer:
    """Make a metric: the largest logit of a cue's tokens less the mean logit, before the onset."""
    chosen = sorted(token_ids)

    def metric(text: Text) -> Metric:
        return Metric(
            "logit of the cue - mean logit",
            lambda logits: logits[:, 0, chosen].amax(-1) - logits[:, 0].mean(-1),
            (text.n_prompt - 1,),
        )

    return metric


def choose_layer(
    pair: ModelPair,
    texts: Sequence[Text],
    sentences: Sequence[Sentence],
    label: str,
    directions: Direction | Mapping[int, Direction],
    metric: Scorer = onset_loss,
    *,
    side: Side = "finetuned",
    n: int = 3,
    step: float = 0.1,
    n_check: int = 10,
    n_random: int = 99,
    skip: Collection[int] = (),
    least_r: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Find the layer at which a behaviour's direction moves what comes next most.

    Gradient of the metric times the direction at the token before each sentence of the label, in
    units of ``step`` of the activation's length, with the same step made for real on some.

    Args:
        pair: The pair.
        texts: Chains.
        sentences: Of them, with labels.
        label: Of the behaviour.
        directions: One for all layers, or one for each, as `LabelDirections.of` gives.
        metric: Makes the metric of each text of `onsets`: a loss or a logit difference. A KL of a
            model with itself has no gradient, and is refused.
        side: Whose gradient.
        n: Tokens of a sentence that are looked at.
        step: Share of the residual norm.
        n_check: Sentences on which the step is made for real.
        n_random: Random directions.
        skip: Layers that are not chosen; the first ones often stand out for what the embedding
            does.
        least_r: Smallest correlation of estimates and real steps that is accepted.
        seed: Of random directions and the bootstrap.

    Returns:
        The table of `modeldiff.layer_attribution.layer_attribution`; ``attrs["layer"]`` is the
        chosen layer, ``attrs["r"]`` the correlation, ``attrs["n"]`` the sentences.

    Raises:
        MaskError: If no sentence has the label.
        InterventionError: If the metric is not finite, has no gradient but rounding, every layer is
            skipped, or the estimates do not agree with real steps.

    Source:
        Venhoff et al. 2025, 2506.18167, with a metric whose value is defined.
    """
    cut = onsets(texts, sentences, label, n=n)
    _require_gradient(pair.sides, cut[:n_check], metric, side, step)
    table = layer_attribution(
        pair.sides, cut, directions, metric, side=side, step=step, n_check=n_check,
        n_random=n_random, seed=seed,
    )  # fmt: skip
    left = table[~table["layer"].isin(list(skip))]
    r = table.attrs["r"]
    if left.empty or not r.estimate >= least_r:
        raise InterventionError(
            f"estimates and real steps correlate at {r} over {n_check} sentences, {least_r} is "
            f"needed; {len(left)} layers to choose from. Take a smaller step, or skip fewer layers."
        )
    chosen = left["layer"].iloc[int(left["attribution"].abs().argmax())]
    table.attrs |= {"layer": int(chosen), "n": len(cut)}
    return table


def _require_gradient(
    sides: Sides, texts: Sequence[Text], metric: Scorer, side: Side, step: float
) -> None:
    """Refuse a metric that no step of this size could move, to first order, anywhere.

    Raises:
        InterventionError: If it is so on all of the texts, or the metric is not finite.
    """
    places, reach, name = [f"resid_post.{i}" for i in range(sides.shape(side).n_layers)], [], ""
    for text in texts:
        score = metric(text)
        own = trace(sides, text, side, places, attention=False)
        gradients = gradient_graph(sides, own, places, score, False).gradients(places)
        reach.append(max(_reach(gradients[p][0], own.values[p], score.at, step) for p in places))
        name = score.name
    if max(reach) < SMALLEST:
        raise InterventionError(
            f"the metric {name!r} has no gradient: no step of {step:g} of the activations moves it "
            f"by more than {max(reach):.1g}. A KL of a model with itself is such a metric; take a "
            "loss or a logit difference."
        )


def _reach(gradient: Any, value: Any, at: tuple[int, ...], step: float) -> float:
    slope = torch.as_tensor(gradient)[at[0]].double().norm()
    return float(step * slope * torch.as_tensor(value)[at[0]].double().norm())
