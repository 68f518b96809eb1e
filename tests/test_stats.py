import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff import stats
from modeldiff.errors import MismatchError
from modeldiff.stats import (
    Band,
    auroc,
    benjamini_hochberg,
    bootstrap_mean,
    empirical_p,
    null_band,
    outside,
    paired_bootstrap,
    permutation_test,
    proportion_difference,
    wilson,
)

FINITE = st.floats(-1e3, 1e3)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611),
     (1, 29, 0.0061, 0.1718)],
)  # fmt: skip
def test_wilson_agrees_with_newcombes_published_table(successes, n, low, high):
    found = wilson(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.estimate == successes / n


@pytest.mark.parametrize(
    ("s2", "n2", "s1", "n1", "low", "high"),
    [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090),
     (10, 10, 0, 10, 0.6075, 1.0), (5, 56, 0, 29, -0.0381, 0.1926)],
)  # fmt: skip
def test_difference_of_proportions_agrees_with_newcombes_published_table(s2, n2, s1, n1, low, high):
    found = proportion_difference(s1, n1, s2, n2)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.estimate == pytest.approx(s2 / n2 - s1 / n1)


def test_no_trials_say_nothing():
    nothing = wilson(0, 0)
    assert math.isnan(nothing.estimate)
    assert (nothing.low, nothing.high) == (0, 1)
    one_sided = proportion_difference(0, 0, 3, 4)
    assert math.isnan(one_sided.estimate)
    assert (one_sided.low, one_sided.high) == (-1, 1)


@given(n=st.integers(1, 500), data=st.data(), level=st.sampled_from([0.5, 0.9, 0.99]))
def test_wilson_holds_its_estimate_and_mirrors(n, data, level):
    successes = data.draw(st.integers(0, n))
    found, mirror = wilson(successes, n, level), wilson(n - successes, n, level)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    assert found.low == pytest.approx(1 - mirror.high, abs=1e-12)
    assert wilson(successes, n, 0.995).low <= found.low


def chances(n, p):
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


def covered(n, p):
    found = [wilson(k, n) for k in range(n + 1)]
    held = [each.low <= p <= each.high for each in found]
    return sum(c for c, inside in zip(chances(n, p), held, strict=True) if inside)


@pytest.mark.parametrize("n", [1, 10, 40])
def test_wilson_covers_as_often_as_it_says(n):
    assert 0.95 < np.mean([covered(n, p) for p in np.linspace(0.005, 0.995, 100)]) < 0.96
    assert 0.79 < covered(n, wilson(1, n).low - 1e-6) < 0.86  # where one success is too many


def test_newcombes_difference_covers_as_often_as_it_says():
    n, rates = 10, (0.001, 0.02, 0.1, 0.3, 0.5, 0.7, 0.95)
    found = {(a, b): proportion_difference(a, n, b, n) for a in range(11) for b in range(11)}
    covered = [
        sum(chances(n, p)[a] * chances(n, q)[b]
            for (a, b), each in found.items() if each.low <= q - p <= each.high)
        for p in rates for q in rates
    ]  # fmt: skip
    assert 0.95 < np.mean(covered) < 0.975
    assert min(covered) > 0.9


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [
        bootstrap_mean(rng.exponential(size=60), seed=i, n_resamples=400) for i in range(400)
    ]
    covered = np.mean([found.low <= 1 <= found.high for found in intervals])
    assert 0.89 < covered < 0.98


def test_cluster_bootstrap_covers_where_the_naive_one_does_not():
    rng = np.random.default_rng(1)
    texts = np.repeat(np.arange(40), 10)
    hits = {"clustered": 0, "naive": 0}
    for i in range(200):
        values = rng.normal(size=40)[texts] + 0.3 * rng.normal(size=400)
        clustered = bootstrap_mean(values, clusters=texts, seed=i, n_resamples=300)
        naive = bootstrap_mean(values, seed=i, n_resamples=300)
        assert clustered.high - clustered.low > 2 * (naive.high - naive.low)
        assert (clustered.n, naive.n) == (40, 400)
        hits["clustered"] += clustered.low <= 0 <= clustered.high
        hits["naive"] += naive.low <= 0 <= naive.high
    assert hits["clustered"] > 0.88 * 200
    assert hits["naive"] < 0.6 * 200


def test_bootstrap_agrees_with_the_normal_interval_on_a_large_sample():
    values = np.random.default_rng(2).normal(3.0, 2.0, size=4000)
    found = bootstrap_mean(values, seed=0)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )


def test_bootstrap_does_not_depend_on_how_it_is_chunked(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    whole = bootstrap_mean(values, seed=5)
    monkeypatch.setattr(stats, "_CELLS", 130)
    assert bootstrap_mean(values, seed=5) == whole
    assert bootstrap_mean(values, seed=6) != whole


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_every_kind_of_values_and_ids_gives_the_same_interval(make):
    values, ids = [0.0, 1.0, 2.0, 5.0, 4.0], [0, 0, 1, 2, 2]
    reference = bootstrap_mean(values, clusters=["x", "x", "y", "z", "z"], seed=0)
    assert bootstrap_mean(make(values), clusters=make(ids), seed=0) == reference
    assert reference.estimate == 2.4


def test_clusters_of_unequal_size_weigh_by_their_values():
    found = bootstrap_mean([10, 0, 0, 0], clusters=["a", "b", "b", "b"], seed=0)
    # two clusters resample to "aa" (mean 10), "bb" (mean 0) or "ab" (mean 2.5)
    assert (found.estimate, found.low, found.high) == (2.5, 0, 10)


def test_too_little_data_gives_no_interval_rather_than_a_narrow_one():
    one = bootstrap_mean([2.0, 3.0], clusters=["t", "t"], seed=0)
    assert one.estimate == 2.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert one.n == 1
    assert math.isnan(bootstrap_mean([], seed=0).estimate)


def test_paired_bootstrap_is_second_minus_first_and_uses_the_pairing():
    rng = np.random.default_rng(4)
    before = rng.normal(scale=10, size=200)
    after = before + 1 + 0.1 * rng.normal(size=200)
    found = paired_bootstrap(before, after, seed=0)
    assert 0.95 < found.low < 1 < found.high < 1.05
    mirrored = paired_bootstrap(after, before, seed=0)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_unusable_input_is_refused_with_what_was_seen():
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        bootstrap_mean([1.0, math.nan], seed=0)
    with pytest.raises(MismatchError, match="3 cluster ids for 2 values"):
        bootstrap_mean([1, 2], clusters="abc", seed=0)
    with pytest.raises(MismatchError, match="got 1, 2"):
        paired_bootstrap([1], [1, 2], seed=0)
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)
    with pytest.raises(ValueError, match=r"level=95.*inside \(0, 1\)"):
        wilson(1, 2, level=95.0)
    with pytest.raises(ValueError, match="n_resamples=0"):
        bootstrap_mean([1, 2], seed=0, n_resamples=0)
    with pytest.raises(ValueError, match="got 0 and 1"):
        permutation_test([], [1], paired=False, seed=0)
    with pytest.raises(ValueError, match="needs controls"):
        null_band([])
    with pytest.raises(ValueError, match="not finite"):
        empirical_p(math.nan, [1.0])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        benjamini_hochberg([0.5, 1.5])


@pytest.mark.parametrize("paired", [True, False])
def test_permutation_p_is_uniform_under_the_null(paired):
    rng = np.random.default_rng(5)
    p = [
        permutation_test(rng.normal(size=12), rng.normal(size=12), paired=paired, seed=i, n=200)
        for i in range(500)
    ]
    distance = np.abs(np.sort(p) - np.arange(1, 501) / 500).max()
    assert distance < 1.63 / math.sqrt(500)  # Kolmogorov-Smirnov, 1 %


def test_permutation_agrees_with_counting_every_relabelling():
    gaps = np.array([1.0, 2.0, 3.0, -0.5, 4.0])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1)
    exact = np.mean(np.abs(gaps @ signs) >= abs(gaps.sum()))
    found = permutation_test(np.zeros(5), gaps, paired=True, seed=0, n=40_000)
    assert found == pytest.approx(exact, abs=0.01)
    unpaired = permutation_test([0, 0, 0], [1, 1, 1], paired=False, seed=0, n=40_000)
    assert unpaired == pytest.approx(2 / 20, abs=0.01)


def test_permutation_finds_a_planted_shift_and_is_never_zero():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=40), rng.normal(size=60) + 2
    assert permutation_test(a, b, paired=False, seed=0, n=999) == 1 / 1000
    assert permutation_test(b, a, paired=False, seed=0, n=999) == 1 / 1000


def test_constant_equal_groups_have_p_one():
    same = [0.1 + 0.2] * 7
    assert permutation_test(same, [0.3] * 5, paired=False, seed=0, n=100) == 1


def test_benjamini_hochberg_rejects_the_four_of_its_paper():
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459,
         0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]  # fmt: skip
    assert (benjamini_hochberg(p) <= 0.05).tolist() == [True] * 4 + [False] * 11


@given(st.lists(st.floats(0, 1), max_size=30))
def test_benjamini_hochberg_equals_its_definition(p):
    q = benjamini_hochberg(p)
    ranked = sorted(p)
    for value, adjusted in zip(p, q, strict=True):
        candidates = [x * len(p) / (i + 1) for i, x in enumerate(ranked) if x >= value]
        assert adjusted == pytest.approx(min(candidates))
        assert value - 1e-12 <= adjusted <= 1
    assert (np.diff(q[np.argsort(p, kind="stable")]) >= -1e-12).all()


def test_few_controls_give_their_range_and_say_so():
    band = null_band([0.3, -0.1, 0.2] * 6)
    assert (band.low, band.high, band.n) == (-0.1, 0.3, 18)
    assert band.is_range
    assert band.level == pytest.approx(17 / 19)
    assert "range of 18 controls" in str(band)
    enough = null_band(np.arange(39.0))
    assert (enough.low, enough.high) == pytest.approx((0, 38))
    assert (enough.level, enough.is_range) == (0.95, False)


def test_null_band_holds_a_further_control_as_often_as_it_says():
    rng = np.random.default_rng(7)
    for n, asked in [(20, 0.95), (60, 0.95), (100, 0.8)]:
        bands = [null_band(rng.normal(size=n), asked) for _ in range(1500)]
        inside = np.mean([not outside(band, rng.normal()) for band in bands])
        assert inside == pytest.approx(bands[0].level, abs=0.025)


def test_outside_is_strict_and_nan_shows_nothing():
    band = Band(-1.0, 1.0, 50, 0.95)
    assert [outside(band, v) for v in (-1.1, -1.0, 0.0, 1.0, 1.1, math.nan)] == [
        True, False, False, False, True, False,
    ]  # fmt: skip


def test_empirical_p_counts_the_value_itself():
    null = [1, 2, 3, 4]
    assert empirical_p(0.0, null, "lower") == 1 / 5
    assert empirical_p(2.0, null, "lower") == 3 / 5
    assert empirical_p(2.0, null, "upper") == 4 / 5
    assert empirical_p(9.0, null) == 2 / 5
    assert empirical_p(2.5, null) == 1
    assert empirical_p(2.5, []) == 1


@settings(max_examples=30, deadline=None)
@given(values=st.lists(FINITE, min_size=2, max_size=20), seed=st.integers(0, 99))
def test_bootstrap_interval_stays_between_the_extremes(values, seed):
    found = bootstrap_mean(values, seed=seed, n_resamples=50)
    slack = 1e-9 * max(1, *map(abs, values))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack


def test_auroc_counts_pairs_and_its_interval_covers():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    pairs = [(a > b) + 0.5 * (a == b) for a in high for b in low]
    assert auroc(high, low).estimate == pytest.approx(np.mean(pairs))
    assert auroc(low, high).estimate == pytest.approx(1 - np.mean(pairs))
    assert math.isnan(auroc([], [1.0]).estimate)
    assert auroc([2.0, 3.0], [0.0, 1.0]).estimate == 1.0
    for gap, n_high, n_low in [(1, 40, 60), (2, 5, 5), (3, 20, 20), (2, 1, 20)]:
        truth = NormalDist().cdf(gap / math.sqrt(2))  # of two unit normals
        found = [auroc(rng.normal(gap, 1, n_high), rng.normal(0, 1, n_low)) for _ in range(300)]
        assert np.mean([each.low <= truth <= each.high for each in found]) > 0.92
    wide = [each.high - each.low for each in (auroc(range(2, 4), range(2)), auroc(high, low))]
    assert wide[0] > 0.5 > wide[1]
