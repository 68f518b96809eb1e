import math
from dataclasses import replace

import pytest
import torch

from modeldiff.direction_components import pca_difference, pca_of_moments
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.moments import Moments
from modeldiff.sites import Site

SITE = Site("resid_post", 12)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(d, seed=0):
    return torch.nn.functional.normalize(normal(d, seed=seed), dim=0)


def direction(seed=0, d=16, **changes):
    return replace(Direction.of(normal(d, seed=seed), SITE, f"v{seed}"), **changes)


# --- principal components --------------------------------------------------------------------


def test_pc_0_is_the_planted_constant_shift():
    base, shift = normal(300, 16), 5 * unit(16, 3)
    finetuned = base + shift
    (only,) = pca_difference(base, finetuned, SITE, 3)
    assert only.cosine(Direction.of(shift, SITE, "shift")) > 0.9999
    assert only.scale == pytest.approx(5)
    assert only.name == "difference PC-0"
    assert only.notes == ("the mean is 100.0% of the mean squared difference",)
    assert only.resid_norm == pytest.approx(float(base.norm(dim=1).mean()))


def test_components_are_those_of_a_full_svd_of_the_centred_difference():
    d, n = 48, 600
    spread = torch.diag(torch.tensor([9.0, 5.0, 3.0] + [0.1] * (d - 3)).double())
    base = normal(n, d)
    change = normal(n, d, seed=1) @ spread @ torch.linalg.qr(normal(d, d, seed=2)).Q
    change = change + 4 * unit(d, 9)
    before = base.clone()
    found = pca_difference(base, base + change, SITE, 3, name="x")
    assert torch.equal(base, before)
    centred = change - change.mean(0)
    _, values, rows = torch.linalg.svd(centred, full_matrices=False)
    basis = torch.stack([pc.unit.double() for pc in found[1:]])
    angle = torch.linalg.svdvals(rows[:3] - (rows[:3] @ basis.T) @ basis).max()
    assert angle <= 1e-3
    for i, pc in enumerate(found[1:]):
        assert pc.scale == pytest.approx(float(values[i]) / (n - 1) ** 0.5, rel=1e-6)
        share = float(values[i] ** 2 / values.square().sum())
        assert pc.explained_variance == pytest.approx(share, rel=1e-6)
        assert float(pc.unit[pc.unit.abs().argmax()]) > 0
    assert [pc.name for pc in found] == ["x PC-0", "x PC-1", "x PC-2", "x PC-3"]
    torch.testing.assert_close(found[0].vector.double(), change.mean(0), atol=1e-6, rtol=1e-5)


def test_streamed_moments_give_the_same_components():
    base, finetuned = normal(200, 12), normal(200, 12, seed=1) + 1
    whole = pca_difference(base, finetuned, SITE, 2)
    parts = [
        Moments.of(finetuned[i : i + 70], minus=base[i : i + 70], covariance=True)
        for i in range(0, 200, 70)
    ]
    streamed = pca_of_moments(parts[0].merged(parts[1]).merged(parts[2]), SITE, 2)
    for a, b in zip(whole, streamed, strict=True):
        assert a.cosine(b) == pytest.approx(1, abs=1e-9)


def test_a_rank_one_change_has_one_component():
    base, written = normal(200, 16), unit(16, 8)
    finetuned = base + normal(200, 1, seed=3).abs() * written
    found = pca_difference(base, finetuned, SITE, 10)
    assert len(found) == 2
    for pc in found:
        assert abs(float(pc.unit.double() @ written)) > 0.9999
    assert found[1].explained_variance == pytest.approx(1)


def test_components_of_nothing_are_refused():
    rows = normal(50, 8)
    with pytest.raises(DirectionError, match="no difference"):
        pca_difference(rows, rows, SITE, 2)
    with pytest.raises(DirectionError, match="at least 8 tokens, got 4"):
        pca_difference(rows[:4], rows[:4] + 1, SITE, 2)
    with pytest.raises(MismatchError, match=r"\(50, 8\) and, to subtract, \(49, 8\)"):
        pca_difference(rows[:49], rows, SITE, 2)
    with pytest.raises(DirectionError, match="hold no covariance"):
        pca_of_moments(Moments.of(rows), SITE, 2)


# --- random controls -------------------------------------------------------------------------


def test_isotropic_controls_spread_evenly():
    d, n = 64, 400
    real = direction(0, d=d, resid_norm=10.0)
    controls = random_like(real, n, seed=1)
    cosines = torch.tensor([real.cosine(control) for control in controls])
    assert float(cosines.abs().mean()) == pytest.approx(math.sqrt(2 / (math.pi * d)), rel=0.1)
    units = torch.stack([control.unit for control in controls])
    torch.testing.assert_close(units.norm(dim=1), torch.ones(n))
    assert float(units.mean(0).norm()) < 3 / math.sqrt(n)
    assert {control.scale for control in controls} == {real.scale}
    assert {control.site for control in controls} == {SITE}
    assert controls[7].name == "random 7 like v0"
    assert controls[7].relative_scale == real.relative_scale


def test_covariance_matched_controls_have_the_variance_ratios_of_the_activations():
    d = 6
    rotation = torch.linalg.qr(normal(d, d, seed=3)).Q
    spread = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0, 0.0]).double()
    acts = (normal(5000, d, seed=4) * spread) @ rotation.T + 100
    real = direction(0, d=d)
    controls = random_like(real, 4000, seed=5, covariance=Moments.of(acts, covariance=True))
    units = torch.stack([control.unit for control in controls]).double() @ rotation
    draws = normal(100_000, d, seed=6) * spread  # the reference: normalised Gaussian draws
    reference = torch.nn.functional.normalize(draws, dim=1).square().mean(0)
    torch.testing.assert_close(units.square().mean(0), reference, rtol=0.12, atol=1e-6)
    matrix = random_like(real, 1, seed=5, covariance=acts.T.cov())[0]
    assert matrix.cosine(controls[0]) > 1 - 1e-6


def test_controls_are_a_prefix_of_more_controls_and_follow_the_seed():
    real = direction(0)
    few, many = random_like(real, 2, seed=3), random_like(real, 9, seed=3)
    for a, b in zip(few, many, strict=False):
        assert torch.equal(a.unit, b.unit)
    assert not torch.equal(random_like(real, 1, seed=4)[0].unit, few[0].unit)
    assert abs(few[0].cosine(few[1])) < 0.99


def test_what_is_no_covariance_is_refused():
    real = direction(0)
    with pytest.raises(MismatchError, match=r"shape \(8, 8\).*d_model=16"):
        random_like(real, 1, seed=0, covariance=torch.eye(8))
    with pytest.raises(DirectionError, match="not a covariance"):
        random_like(real, 1, seed=0, covariance=-torch.eye(16))
    with pytest.raises(DirectionError, match="not a covariance"):
        random_like(real, 1, seed=0, covariance=torch.zeros(16, 16))
