import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from modeldiff.activations import capture
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.organisms.nulls import null_pairs
from modeldiff.organisms.planted import planted_shift, tiny_llama
from modeldiff.probe_fits import Tokens, fit_logistic, fit_mean_difference, pooled
from modeldiff.probe_scores import FoldScores, held_out_auroc, threshold_rate
from modeldiff.probe_texts import ProbeTexts, folds_of, shuffled
from modeldiff.probes import (
    probe,
    probe_direction,
    probe_features,
    probe_report,
    shuffled_aurocs,
)
from modeldiff.sites import Site

SITE = Site("resid_post", 3)


def made(
    n=240,
    width=12,
    tokens=5,
    shift=6.0,
    base_shift=0.0,
    group_size=4,
    leak=0.0,
    at=slice(None),
    seed=0,
) -> ProbeTexts:
    """Gaussian activations; positives differ along axis 0, groups along axes of their own."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) // group_size % 2 == 0
    groups = (torch.arange(n) // group_size).tolist()
    fingerprint = torch.randn(n // group_size, width, generator=draw)
    sides = []
    for size in (base_shift, shift):
        rows = torch.randn(n, tokens, width, generator=draw)
        rows[:, at, 0] += size * labels[:, None]
        rows += leak * fingerprint[groups][:, None]
        sides.append(rows.flatten(0, 1))
    ids = torch.randint(50, (n * tokens,), generator=draw)
    index = torch.arange(n).repeat_interleave(tokens)
    base, tuned = sides
    return ProbeTexts(base, tuned, index, ids, labels, tuple(groups), SITE)


@pytest.mark.parametrize("method", ["logistic", "mean difference"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_planted_feature_is_read(method, pooling):
    found = probe(made(), method=method, pooling=pooling)
    assert found.auroc.estimate > 0.99
    assert found.auroc.low > 0.98
    assert found.fpr < 0.02
    assert (found.n, found.n_groups) == (240, 60)
    on_base = probe(made(), train="base", method=method, pooling=pooling)
    assert on_base.auroc.low < 0.5 < on_base.auroc.high


def test_shuffled_labels_tell_nothing():
    data = made(n=400, group_size=1, tokens=1)
    values = shuffled_aurocs(data, 8)
    assert abs(sum(values) / 8 - 0.5) < 0.03
    assert max(values) < 0.7
    assert probe(data).auroc.estimate > 0.99
    mixed = shuffled(data.labels, data.groups, 0)
    assert int(mixed.sum()) == int(data.labels.sum())
    assert not torch.equal(mixed, data.labels)


def test_whole_groups_are_shuffled_where_groups_have_one_label():
    data = made()
    mixed = shuffled(data.labels, data.groups, 3)
    by_group = mixed.reshape(-1, 4)
    assert (by_group == by_group[:, :1]).all()


def test_groups_do_not_leak():
    """Texts of a group look alike and share a label; nothing but that tells the label."""
    data = made(shift=0.0, leak=3.0, n=160)
    by_group = probe(data)
    singly = probe(ProbeTexts(data.base, data.finetuned, data.text_index, data.token_ids,
                              data.labels, tuple(range(160)), SITE))  # fmt: skip
    assert singly.auroc.estimate > 0.8  # what a split by text would claim
    assert by_group.auroc.low < 0.5 < by_group.auroc.high
    for fold in folds_of(data.labels, data.groups, 5, 0):
        rest = set(range(160)) - set(fold)
        assert not {data.groups[i] for i in fold} & {data.groups[i] for i in rest}
        assert 10 <= int(data.labels[fold].sum()) <= 22  # labels are spread evenly


def test_pooled_scores_of_folds_would_be_biased():
    """With nothing to find, leaving positives out lowers the intercept; within folds it cannot."""
    labels = torch.tensor([True, False] * 20)
    fold_of = torch.arange(40) // 8
    prior = torch.tensor([float(labels[fold_of != f].double().mean()) for f in range(5)])
    scores = FoldScores(prior[fold_of].double(), labels, fold_of, ())
    assert held_out_auroc(scores, range(40), seed=0, n_resamples=0).estimate == 0.5


def test_groups_of_both_labels_do_not_pull_the_interval_towards_their_own_pairs():
    """One text in two models: the fine-tune's scores above the base's by little, every time."""
    rng, n = np.random.default_rng(0), 15
    scores = np.concatenate([between := rng.normal(size=n), between + 0.2])
    labels, folds = torch.arange(2 * n) >= n, torch.arange(2 * n) % n % 5
    groups = [i % n for i in range(2 * n)]
    found = held_out_auroc(FoldScores(torch.tensor(scores), labels, folds, ()), groups, seed=0)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=1000)
    byhand = []
    for counts in drawn:  # a pair of one group counts as often as the group was drawn
        pairs = [
            (counts[i] if i == j else counts[i] * counts[j], between[i] + 0.2 > between[j])
            for i in range(n) for j in range(n) if i % 5 == j % 5
        ]  # fmt: skip
        total = sum(weight for weight, _ in pairs)
        byhand.append(sum(weight * above for weight, above in pairs) / total)
    low, high = np.quantile(byhand, [0.025, 0.975])
    wider = math.sqrt(1 + 5 / 4)
    assert found.low == pytest.approx(found.estimate - wider * (found.estimate - low))
    high = min(1.0, found.estimate + wider * (high - found.estimate))
    assert found.high == pytest.approx(high)
    assert found.low < found.estimate < found.high


def test_transfer_says_whether_the_feature_was_in_the_base():
    new, old = made(), made(base_shift=6.0)
    assert probe(new, train="finetuned", test="base").auroc.estimate < 0.7
    assert probe(old, train="base", test="finetuned").auroc.estimate > 0.99
    assert probe(old, train="finetuned", test="base").auroc.estimate > 0.99


def test_attention_pooling_finds_the_token_that_matters():
    """One token of 16 tells; the mean drowns it. The token is marked in channel 1."""
    data = made(n=64, tokens=16, shift=4.0, at=slice(7, 8), width=6, group_size=2)
    for rows in (data.base, data.finetuned):
        rows.view(64, 16, 6)[:, 7, 1] += 8.0
    mean, attention = (probe(data, pooling=pooling) for pooling in ("mean", "attention"))
    assert attention.auroc.estimate > 0.88
    assert attention.auroc.estimate > mean.auroc.estimate + 0.1
    with pytest.raises(MismatchError, match="learned"):
        probe(data, pooling="attention", method="mean difference")


def test_logistic_regression_is_at_its_minimum():
    """Second implementation: the gradient by autograd, wide and narrow."""
    for n, width in ((40, 5), (20, 60)):
        draw = torch.Generator().manual_seed(n)
        x = 3 * torch.randn(n, width, generator=draw, dtype=torch.float64) + 7
        y = torch.rand(n, generator=draw) < torch.sigmoid(x[:, 0] - 7)
        fitted = fit_logistic(x, y, 0.3)
        mean, spread = x.mean(0), x.std(0, correction=0)
        w = (fitted.weight * spread).requires_grad_(True)
        b = torch.tensor(fitted.bias + float(mean @ fitted.weight)).requires_grad_(True)
        score = (x - mean) / spread @ w + b
        loss = torch.nn.functional.softplus(score) - y.double() * score
        (0.3 * loss.sum() + (w @ w) / 2).backward()
        assert w.grad is not None
        assert b.grad is not None
        assert float(w.grad.abs().max()) < 1e-7
        assert abs(float(b.grad)) < 1e-7
        torch.testing.assert_close(fitted(x), score.detach())


def test_separable_data_and_constant_features_do_no_harm():
    x = torch.cat([torch.arange(10.0)[:, None], torch.ones(10, 1)], 1)
    y = torch.arange(10) > 4
    fitted = fit_logistic(x, y, 1.0)
    assert ((fitted(x) > 0) == y).all()
    assert float(fitted.weight[1]) == 0
    assert bool(fit_mean_difference(x, y)(x).isfinite().all())


def test_aurocs_interval_resamples_groups():
    """Second implementation: pairs one by one; four copies of every text add no certainty."""
    draw = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(60, generator=draw).round(decimals=1), torch.arange(60) % 3 == 0
    scores = scores + labels
    fold_of = torch.arange(60) // 20
    pairs = [
        (scores[i] > scores[j]).double() + (scores[i] == scores[j]).double() / 2
        for i in range(60) for j in range(60)
        if labels[i] and not labels[j] and fold_of[i] == fold_of[j]
    ]  # fmt: skip
    once = held_out_auroc(FoldScores(scores, labels, fold_of, ()), range(60), seed=0)
    assert once.estimate == pytest.approx(float(torch.stack(pairs).mean()))
    four = FoldScores(scores.repeat(4), labels.repeat(4), fold_of.repeat(4), ())
    grouped = held_out_auroc(four, list(range(60)) * 4, seed=0)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=0.03)
    naive = held_out_auroc(four, range(240), seed=0)
    assert naive.high - naive.low < 0.7 * (grouped.high - grouped.low)


def test_false_alarms_at_a_share_found():
    labels = torch.tensor([True] * 4 + [False] * 4)
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 7.5, 6.0, 2.0, 0.0])
    found = FoldScores(scores, labels, torch.zeros(8), ())
    assert [threshold_rate(found, tpr) for tpr in (0.5, 0.75, 1.0)] == [0.0, 0.25, 0.75]
    assert math.isnan(threshold_rate(FoldScores(scores[:4], labels[:4], torch.zeros(4), ()), 0.5))


def test_a_probe_is_a_direction():
    data = made(base_shift=2.0)
    for method, cosine in (("logistic", 0.5), ("mean difference", 0.99)):
        found = probe_direction(data, "trait", method=method)  # pyright: ignore
        assert float(found.unit[0]) > cosine  # a probe may look away from noise
        gap = found.scale / float(found.unit[0])
        assert gap == pytest.approx(6, abs=0.5)
        assert found.site == SITE
        assert found.n_tokens == 600
        assert "held-out AUROC" in found.notes[0]
    assert probe_direction(data, "in the base", side="base").scale == pytest.approx(2, abs=0.3)


def test_the_report_has_its_baselines():
    data = made(n=64)
    extra = {"mean activations": pooled(data.tokens("finetuned"), "mean")}
    table = probe_report(data, extra=extra, poolings=["mean"], n_shuffles=9)
    assert table.name.tolist()[-3:] == ["mean activations", "bag of tokens", "text length"]
    rows: Any = table.set_index(["name", "train", "test"])
    own = rows.loc[("logistic probe, mean pooling", "finetuned", "finetuned")]
    assert own.above_chance
    assert own.auroc > 0.99
    assert not rows.loc[("logistic probe, mean pooling", "base", "base")].above_chance
    assert not rows.loc[("bag of tokens", "texts", "texts")].above_chance
    assert rows.loc[("mean activations", "texts", "texts")].auroc == own.auroc
    assert table.attrs["shuffled"].n == 9


def test_captured_activations_are_probed():
    """In the fine-tune texts with a vowel at the end hold the planted direction."""
    planted = planted_shift(1, characters="aeiou", adapter=True)
    words = [c * 3 + v for c in "bcdfghjklm" for v in "aeioxqzw"]
    labels = [word[-1] in "aeiou" for word in words]
    acts = capture(planted.pair.sides, words, "resid_post.1")
    data = ProbeTexts.of(acts, labels, [word[0] for word in words])
    assert probe(data).auroc.estimate > 0.99
    assert planted.direction is not None
    found = probe_direction(data, "planted", method="mean difference")
    assert found.cosine(planted.direction) > 0.8
    twice = replace(acts, texts=(*acts.texts[:-1], acts.texts[0]))  # or probes see what they judge
    assert ProbeTexts.of(twice, labels).groups == (*range(len(words) - 1), 0)
    with pytest.raises(MismatchError, match="79 labels"):
        ProbeTexts.of(acts, labels[:-1])


def test_what_cannot_be_probed_is_refused():
    data = made(n=8)
    with pytest.raises(DirectionError, match="two or more"):
        probe(ProbeTexts(data.base, data.finetuned, data.text_index, data.token_ids, data.labels,
                         ("a",) * 8, SITE))  # fmt: skip
    with pytest.raises(MismatchError, match="known are"):
        probe(data, method="forest")  # pyright: ignore[reportArgumentType]
    with pytest.raises(MismatchError, match="rows of features"):
        probe_features(data, torch.zeros(3, 1), "latents")
    with pytest.raises(MismatchError, match="no features"):
        pooled(Tokens(torch.zeros(2, 1), torch.tensor([0, 1])), "attention")


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "most"), [(0.0, 20), (0.3, 20)])
def test_intervals_cover_what_they_say(shift, most):
    """Two hundred sets of texts: 95 % intervals, whose misses are printed."""
    found = [
        probe(made(n=160, shift=shift, width=8, group_size=2, seed=20_000 + seed),
              method="mean difference").auroc
        for seed in range(200)
    ]  # fmt: skip
    truth = sum(each.estimate for each in found) / 200 if shift else 0.5
    missed = sum(not each.low <= truth <= each.high for each in found)
    width = sum(each.high - each.low for each in found) / 200
    print(f"probes, shift {shift}: {missed} of 200 miss {truth:.3f}; mean width {width:.3f}")
    assert missed <= most  # of 200 at 5 %: 21 or more happen once in 1000 times
    assert width < 0.35


@pytest.mark.slow
def test_intervals_hold_chance_where_there_is_nothing():
    """Forty sets of texts without a feature, and twenty null pairs: alarms at 5 %."""
    alarms = []
    for seed in range(40):
        found = probe(made(n=160, shift=0.0, width=8, group_size=2, seed=100 + seed)).auroc
        alarms.append(not found.low <= 0.5 <= found.high)
    assert sum(alarms) <= 6  # of 40 at 5 %: 7 or more happen once in 300 times
    base = tiny_llama()
    words = [c * 3 + v for c in "bcdfghjklm" for v in "aeioxqzw"]
    draw = torch.Generator().manual_seed(0)
    for null in null_pairs(20, kind="noise", base=base):
        acts = capture(null.pair.sides, words, "resid_post.1")
        labels = torch.rand(80, generator=draw) < 0.5
        found = probe(ProbeTexts.of(acts, labels, [word[0] for word in words]))
        alarms.append(not found.auroc.low <= 0.5 <= found.auroc.high)
    assert sum(alarms[40:]) <= 4
