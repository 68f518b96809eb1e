"""Linear probes of activations, cross-validated by text, with the baselines that they must beat.

A probe is judged only on texts that took no part in fitting it, in choosing its regularisation or
in standardising its inputs, and whose *group* (question, template, source) took none either. Scores
are compared within a fold alone, because folds have scales of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Bool, Float
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.interventions import Side
from modeldiff.probe_baselines import bag_of_tokens, lengths
from modeldiff.probe_fits import (
    Fitted,
    Pooling,
    Tokens,
    fit_attention,
    fit_logistic,
    fit_mean_difference,
    pooled,
)
from modeldiff.probe_scores import FoldScores, held_out_auroc, threshold_rate
from modeldiff.probe_texts import ProbeTexts, replace_rows, shuffled, splits
from modeldiff.stats import Interval, null_band, outside

Method = Literal["logistic", "mean difference"]
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the data against the prior (scikit-learn's C) that folds choose from."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """How well one probe tells the labels of texts it has not seen.

    Args:
        name: What was read and how.
        train: The side it was fitted on.
        test: The side it was tried on.
        auroc: Over held-out pairs within folds; the interval resamples groups and allows for fits
            that overlap (`held_out_auroc`). Claims need shuffled labels beside it.
        fpr: False alarms at a threshold that finds ``tpr`` of the positives.
        tpr: That share.
        penalties: What each fold chose.
        n: Texts.
        n_groups: Groups.
    """

    name: str
    train: Side
    test: Side
    auroc: Interval
    fpr: float
    tpr: float
    penalties: tuple[float, ...]
    n: int
    n_groups: int


def probe(
    data: ProbeTexts,
    *,
    train: Side = "finetuned",
    test: Side | None = None,
    method: Method = "logistic",
    pooling: Pooling = "mean",
    n_folds: int = 5,
    tpr: float = 0.95,
    seed: int = 0,
) -> ProbeResult:
    """Fit a probe on all groups but a fifth, try it on that fifth, five times.

    Args:
        data: Texts with labels.
        train: The side whose activations it is fitted on.
        test: The side it is tried on; the same if None. The held-out texts are the same ones.
        method: ``"logistic"`` (ridge penalty, chosen inside each fold) or ``"mean difference"``.
        pooling: ``"mean"`` or ``"max"`` of a text's tokens, or ``"attention"``: weights that are
            learned with the probe (logistic alone).
        n_folds: Fewer where there are fewer groups of a label.
        tpr: For the false alarm rate.
        seed: Of the folds and the interval.

    Raises:
        DirectionError: If a label is in fewer than two groups: nothing can be held out.
        MismatchError: If the method or pooling is unknown.

    Source:
        Alain and Bengio 2016, 1610.01644; baselines as in Kantamneni et al. 2025, 2502.16681.
    """
    on: Side = train if test is None else test
    if method not in get_args(Method) or pooling not in get_args(Pooling):
        raise MismatchError(
            f"method {method!r}, pooling {pooling!r}: known are {', '.join(get_args(Method))} and "
            f"{', '.join(get_args(Pooling))}."
        )
    if pooling == "attention" and method != "logistic":
        raise MismatchError("attention pooling is learned with a logistic probe.")
    if pooling == "attention":
        found = _attention_scores(data, train, on, n_folds, seed)
    else:
        sides: tuple[Side, ...] = (train, on)
        features = {each: pooled(data.tokens(each), pooling) for each in sides}
        found = _scores(features[train], features[on], data, method, n_folds, seed)
    return _result(f"{method} probe, {pooling} pooling", train, on, found, data, tpr, seed)


def probe_features(
    data: ProbeTexts,
    features: Float[Tensor, "text feature"],
    name: str,
    *,
    n_folds: int = 5,
    tpr: float = 0.95,
    seed: int = 0,
) -> ProbeResult:
    """Judge a logistic probe of any features of the texts in the same folds.

    Args:
        data: Texts with labels; its activations are not read.
        features: One row a text: latents of a dictionary, scalars of an adapter, a baseline.
        name: What they are.
        n_folds: As in `probe`.
        tpr: For the false alarm rate.
        seed: As in `probe`.

    Raises:
        MismatchError: If there is not one row a text.
    """
    if len(features) != len(data.labels):
        raise MismatchError(f"{len(features)} rows of features for {len(data.labels)} texts.")
    found = _scores(features, features, data, "logistic", n_folds, seed)
    return _result(name, "finetuned", "finetuned", found, data, tpr, seed)


def probe_report(
    data: ProbeTexts,
    *,
    extra: dict[str, Float[Tensor, "text feature"]] | None = None,
    poolings: Sequence[Pooling] = ("mean", "max"),
    n_shuffles: int = 19,
    n_folds: int = 5,
    tpr: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Judge probes of both sides, with transfer, the baselines and shuffled labels beside them.

    Args:
        data: Texts with labels.
        extra: Other features of the texts, by name.
        poolings: To try.
        n_shuffles: Probes of shuffled labels (mean pooling, fine-tune); they span the null band.
        n_folds: As in `probe`.
        tpr: For the false alarm rate.
        seed: Of everything.

    Returns:
        One row a probe: name, train, test, auroc, low, high, fpr, n, n_groups, above_chance (its
        AUROC lies outside the shuffled ones). Base and fine-tune, base to fine-tune and back, for
        each pooling and both methods; then ``extra``, bag of tokens, text length. ``attrs`` hold
        the band of shuffled labels and ``tpr``.

    Raises:
        DirectionError: If a label is in fewer than two groups.
    """
    options = {"n_folds": n_folds, "tpr": tpr, "seed": seed}
    sides: tuple[Side, Side] = ("base", "finetuned")
    found = [
        probe(data, train=train, test=test, method=method, pooling=pooling, **options)
        for pooling in poolings
        for method in (get_args(Method) if pooling != "attention" else ("logistic",))
        for train in sides
        for test in sides
    ]
    several = {**(extra or {}), "bag of tokens": bag_of_tokens(data.token_ids, data.text_index),
               "text length": lengths(data.text_index)}  # fmt: skip
    found += [probe_features(data, each, name, **options) for name, each in several.items()]
    band = null_band(shuffled_aurocs(data, n_shuffles, n_folds=n_folds, seed=seed))
    rows = [
        (r.name, r.train, r.test, r.auroc.estimate, r.auroc.low, r.auroc.high, r.fpr, r.n,
         r.n_groups, outside(band, r.auroc.estimate) and r.auroc.estimate > 0.5)
        for r in found
    ]  # fmt: skip
    names = ["name", "train", "test", "auroc", "low", "high", "fpr", "n", "n_groups"]
    table = pd.DataFrame(rows, columns=[*names, "above_chance"])
    baseline = table["name"].isin([*several])
    table.loc[baseline, ["train", "test"]] = "texts"
    table.attrs = {"shuffled": band, "tpr": tpr}
    return table


def shuffled_aurocs(
    data: ProbeTexts, n: int = 19, *, side: Side = "finetuned", n_folds: int = 5, seed: int = 0
) -> list[float]:
    """Judge probes of labels that were shuffled; around .5 if no text leaks.

    Whole groups change labels where every group has one label, single texts otherwise.

    Args:
        data: Texts with labels.
        n: How many shuffles.
        side: Whose activations.
        n_folds: As in `probe`.
        seed: Of the shuffles.
    """
    features = pooled(data.tokens(side), "mean")
    found = []
    for number in range(n):
        labels = shuffled(data.labels, data.groups, seed * 100_003 + number)
        mixed = replace(data, labels=labels)
        scores = _scores(features, features, mixed, "logistic", n_folds, seed + number)
        found.append(held_out_auroc(scores, data.groups, seed=seed, n_resamples=0).estimate)
    return found


def probe_direction(
    data: ProbeTexts,
    name: str,
    *,
    side: Side = "finetuned",
    method: Method = "logistic",
    seed: int = 0,
) -> Direction:
    """Fit a probe on all texts (mean pooling) and return what it reads as a direction.

    Its scale is the distance of the classes' means along it, so that steering with coefficient 1
    moves one class's mean to the other's.

    Args:
        data: Texts with labels.
        name: Of the direction.
        side: Whose activations.
        method: See `probe`.
        seed: Of the folds that choose the penalty and judge the probe.

    Raises:
        DirectionError: If a label is in fewer than two groups, or the probe reads nothing.
    """
    features, labels = pooled(data.tokens(side), "mean"), data.labels
    judged = probe(data, train=side, method=method, seed=seed)
    penalty = _chosen(features, data, list(range(len(labels))), seed)
    fitted = _fit(features, labels, method, penalty)
    unit = fitted.weight / fitted.weight.norm()
    gap = float((features[labels].mean(0) - features[~labels].mean(0)).double() @ unit)
    if gap <= 0:
        raise DirectionError(f"{name!r}: the probe does not separate the means of the classes.")
    found = Direction.of(unit * gap, data.site, name, f"{method} probe of {side}")
    note = (
        f"held-out AUROC {judged.auroc} over {judged.n_groups} groups; false alarms "
        f"{judged.fpr:.0%} at {judged.tpr:.0%} found"
    )
    n = min(int(labels[data.text_index].sum()), int((~labels)[data.text_index].sum()))
    norm = features.double().norm(dim=-1).mean() if data.site.kind.startswith("resid") else None
    return replace(found, n_tokens=n, seed=seed, sign="towards True", notes=(note,),
                   resid_norm=None if norm is None else float(norm))  # fmt: skip


def _fit(
    features: Float[Tensor, "text feature"],
    labels: Bool[Tensor, " text"],
    method: Method,
    penalty: float,
) -> Fitted:
    if method == "logistic":
        return fit_logistic(features, labels, penalty)
    return fit_mean_difference(features, labels)


def _scores(
    train: Float[Tensor, "text feature"],
    test: Float[Tensor, "text feature"],
    data: ProbeTexts,
    method: Method,
    n_folds: int,
    seed: int,
) -> FoldScores:
    scores, fold_of = torch.zeros(len(data.labels), dtype=torch.float64), [0] * len(data.labels)
    chosen = []
    for number, (rest, fold) in enumerate(splits(data, n_folds, seed)):
        penalty = _chosen(train, data, rest, seed) if method == "logistic" else math.nan
        scores[fold] = _fit(train[rest], data.labels[rest], method, penalty)(test[fold])
        chosen.append(penalty)
        for index in fold:
            fold_of[index] = number
    return FoldScores(scores, data.labels, torch.tensor(fold_of), tuple(chosen))


def _chosen(
    features: Float[Tensor, "text feature"], data: ProbeTexts, rows: list[int], seed: int
) -> float:
    """The penalty with the best AUROC inside these rows, by groups again; .01 if too few."""
    inside = replace_rows(data, rows)
    try:
        inner = list(splits(inside, 3, seed + 1))
    except DirectionError:
        return 1e-2  # one group of a label: nothing inside can be held out
    own, best = features[rows], (-1.0, 1e-2)
    for penalty in PENALTIES:
        scores, fold_of = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows))
        for number, (rest, fold) in enumerate(inner):
            scores[fold] = fit_logistic(own[rest], inside.labels[rest], penalty)(own[fold])
            fold_of[fold] = number
        found = FoldScores(scores, inside.labels, fold_of, ())
        value = held_out_auroc(found, inside.groups, seed=seed, n_resamples=0).estimate
        best = max(best, (value, penalty), key=lambda pair: pair[0])
    return best[1]


def _attention_scores(
    data: ProbeTexts, train: Side, test: Side, n_folds: int, seed: int
) -> FoldScores:
    scores, fold_of = torch.zeros(len(data.labels), dtype=torch.float64), [0] * len(data.labels)
    mean, chosen = pooled(data.tokens(train), "mean"), []
    for number, (rest, fold) in enumerate(splits(data, n_folds, seed)):
        penalty = _chosen(mean, data, rest, seed)
        fit: Callable[[Tokens], Tensor] = fit_attention(
            data.tokens(train).of_texts(rest), data.labels[rest], penalty
        )
        scores[fold] = fit(data.tokens(test).of_texts(fold))
        chosen.append(penalty)
        for index in fold:
            fold_of[index] = number
    return FoldScores(scores, data.labels, torch.tensor(fold_of), tuple(chosen))


def _result(
    name: str,
    train: Side,
    test: Side,
    found: FoldScores,
    data: ProbeTexts,
    tpr: float,
    seed: int,
) -> ProbeResult:
    return ProbeResult(
        name=name,
        train=train,
        test=test,
        auroc=held_out_auroc(found, data.groups, seed=seed),
        fpr=threshold_rate(found, tpr),
        tpr=tpr,
        penalties=found.penalties,
        n=len(data.labels),
        n_groups=len(set(data.groups)),
    )
