"""Controls for ablation: as many, as much variance, and reproducible."""

import pytest
import torch

from modeldiff.caft_candidates import Candidate
from modeldiff.caft_controls import (
    covariances_of,
    isotropic,
    random_choice,
    same_variance,
    top_k,
    variance_share,
)
from modeldiff.directions import Direction, orthonormal_basis
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.moments import Moments

D = 48


def some(n, layer=1, first=0):
    units = torch.eye(D)[first : first + n]
    return tuple(Direction.of(2 * u, f"resid_post.{layer}", f"e{i}") for i, u in enumerate(units))


def covariance():
    """Variances that fall by a factor of 300."""
    return torch.diag(torch.logspace(0, -2.5, D, dtype=torch.float64))


def several():
    return tuple(
        Candidate(f"c{layer}{i}", each, "component", 1.0, share=i / 10)
        for layer in (1, 2)
        for i, each in enumerate(some(10, layer))
    )


def test_random_choice_keeps_about_half_and_never_none():
    given = several()
    kept = [random_choice(given, seed=seed) for seed in range(60)]
    assert 8 < sum(map(len, kept)) / 60 < 12
    assert kept == [random_choice(given, seed=seed) for seed in range(60)]
    assert len(set(kept)) > 50
    assert all(len(random_choice(several()[:1], seed=seed)) == 1 for seed in range(20))
    with pytest.raises(DirectionError):
        random_choice((), seed=0)


def test_top_k_is_all_or_the_largest_of_each_layer():
    given = several()
    assert top_k(given) == given
    assert [each.name for each in top_k(several(), 2)] == ["c18", "c19", "c28", "c29"]


def test_isotropic_subspaces_are_orthonormal_and_independent():
    chosen = {1: some(4), 2: (*some(1, 2), *some(1, 2)), 3: ()}
    found = isotropic(chosen, seed=0)
    assert {layer: len(each) for layer, each in found.items()} == {1: 4, 2: 1}
    rows = torch.stack([each.unit for each in found[1]])
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-6)
    assert [str(each.site) for each in found[2]] == ["resid_post.2"]
    again, other = isotropic(chosen, seed=0), isotropic(chosen, seed=1)
    assert torch.equal(found[1][0].unit, again[1][0].unit)
    assert abs(found[1][0].unit @ other[1][0].unit) < 0.6
    assert all(each.scale == 2.0 for each in found[1])


@pytest.mark.parametrize(("first", "n"), [(0, 1), (0, 3), (10, 3), (40, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_variance_held_is_that_of_the_chosen(first, n, seed):
    """Where the largest components are chosen, in the middle, and where there is hardly any."""
    chosen = {1: some(n, first=first)}
    wanted = variance_share(chosen[1], covariance())
    (found,) = same_variance(chosen, {1: covariance()}, seed=seed).values()
    assert len(orthonormal_basis(found)) == n
    assert variance_share(found, covariance()) == pytest.approx(wanted, rel=0.35, abs=0.003)
    assert "of the variance" in found[0].notes[0]


def test_isotropic_controls_would_hold_too_little():
    """What the control above is for."""
    chosen = {1: some(3)}
    (found,) = isotropic(chosen, seed=0).values()
    assert variance_share(found, covariance()) < 0.3 * variance_share(chosen[1], covariance())


def test_apart_from_the_chosen_nothing_of_them_is_removed():
    chosen = {1: some(3, first=4)}
    (found,) = same_variance(chosen, {1: covariance()}, seed=2, apart=True).values()
    basis = orthonormal_basis(chosen[1])
    assert (torch.stack([each.unit for each in found]) @ basis.T).abs().max() < 1e-6
    wanted = variance_share(chosen[1], covariance())
    assert variance_share(found, covariance()) == pytest.approx(wanted, rel=0.4)


def test_what_does_not_fit_is_refused():
    with pytest.raises(DirectionError, match=r"layers \[1\]"):
        same_variance({1: some(1)}, {}, seed=0)
    with pytest.raises(MismatchError, match="width"):
        same_variance({1: some(1)}, {1: torch.eye(4)}, seed=0)
    with pytest.raises(DirectionError, match="no room"):
        same_variance({1: some(30)}, {1: covariance()}, seed=0, apart=True)


def test_covariances_are_those_of_one_side(adapter_pair):
    items = ["the cat sat on the mat and ran", "a small bird sang of rain and sun"]
    acts = adapter_pair.capture(items, "resid_post.2")
    for side in ("base", "finetuned"):
        found = covariances_of(adapter_pair, items, [2], side=side)[2]
        rows = getattr(acts, side)[acts.site]
        assert found.n == len(acts)
        assert torch.allclose(found.covariance, Moments.of(rows, covariance=True).covariance)
