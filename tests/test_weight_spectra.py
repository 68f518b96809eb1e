"""Decompositions against dense ones, and rounding against what rounding really does."""

import math

import pytest
import torch

from modeldiff.errors import MismatchError
from modeldiff.weight_spectra import (
    FLOORS,
    Heads,
    circuit,
    circuit_change,
    effective_rank,
    energy_in,
    energy_of,
    factored_svd,
    precision_of,
    randomized_svd,
    rounding_noise,
    stable_rank,
    steps,
)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_randomised_decomposition_is_the_dense_one():
    """A decaying spectrum, as changes of weights have: the first four to 1e-6."""
    u, v = (torch.linalg.qr(draw(n, 60, seed=n)).Q for n in (90, 70))
    values = 0.8 ** torch.arange(60, dtype=torch.float64)
    found = randomized_svd((u * values) @ v.T, 4)
    assert (found.singular - values[:4]).abs().max() < 1e-6
    assert ((found.left * u[:, :4]).sum(0).abs() > 1 - 1e-6).all()
    assert ((found.right * v[:, :4]).sum(0).abs() > 1 - 1e-6).all()


def test_an_exact_rank_is_exact_to_1e_10_and_a_wide_matrix_is_turned():
    for shape in ((40, 30), (30, 40)):
        matrix = draw(shape[0], 3) @ draw(3, shape[1], seed=1)
        found = randomized_svd(matrix, 3)
        assert (found.dense() - matrix).abs().max() < 1e-10
        want = torch.linalg.svdvals(matrix)[:3]
        assert (found.singular - want).abs().max() < 1e-10
    assert randomized_svd(draw(5, 4), 50).rank == 4
    with pytest.raises(MismatchError, match="a matrix"):
        randomized_svd(draw(5), 1)


def test_without_oversampling_and_iterations_it_would_not_do():
    """The settings are needed: a flat noise floor under a weak signal."""
    signal = 1.5 * 2 * math.sqrt(300) * torch.linalg.qr(draw(300, 1)).Q
    matrix = signal @ torch.linalg.qr(draw(300, 1, seed=1)).Q.T + draw(300, 300, seed=2)
    want = torch.linalg.svdvals(matrix)[0]
    poor = randomized_svd(matrix, 1, oversample=0, n_iter=0).singular[0]
    assert poor < 0.9 * want
    assert randomized_svd(matrix, 1).singular[0] == pytest.approx(float(want), rel=1e-3)


def test_ranks_and_energies_have_their_closed_forms():
    assert stable_rank(torch.tensor([2.0, 2.0, 1.0])) == pytest.approx(9 / 4)
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert math.isnan(effective_rank(torch.zeros(3)))
    full = torch.tensor([2.0, 1.0, 1.0, 1.0])
    part = effective_rank(full[:1], energy=float((full**2).sum()), n=4)
    assert part == pytest.approx(effective_rank(full))
    assert energy_in(full, 7.0, 2) == pytest.approx(5 / 7)
    assert energy_of(full) == 7.0


def test_the_grid_of_a_dtype_is_found_however_it_is_stored():
    weight = draw(50, 50, dtype=torch.float32)
    assert precision_of(weight) == torch.float32
    assert precision_of(weight.bfloat16().float()) == torch.bfloat16
    assert precision_of(weight.half().float()) == torch.float16
    for dtype in (torch.bfloat16, torch.float16):
        value = weight.abs().clamp(min=0.01).to(dtype)
        after = torch.nextafter(value, torch.full_like(value, math.inf))
        assert torch.equal(steps(value, dtype), after.float() - value.float())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("relative", "changed", "cosine", "energy"),
    [(3e-4, 0.055, 0.93, 0.27), (1e-3, 0.17, 0.97, 0.61), (3e-3, 0.39, 0.996, 0.87),
     (1e-2, 0.67, 0.9995, 0.98)],
)  # fmt: skip
def test_merging_in_bfloat16_loses_what_is_documented(relative, changed, cosine, energy):
    weight = (0.02 * draw(1024, 1024, dtype=torch.float32)).bfloat16().float()
    left, right = (torch.linalg.qr(draw(1024, 1, seed=s, dtype=torch.float32)).Q for s in (1, 2))
    merged = (weight + relative * weight.norm() * left @ right.T).bfloat16().float()
    change = merged - weight
    found = randomized_svd(change, 8)
    assert float((change != 0).float().mean()) == pytest.approx(changed, abs=0.02)
    assert float((found.left[:, 0] @ left).abs()) == pytest.approx(cosine, abs=0.015)
    share = energy_in(found.singular, float(change.double().norm() ** 2), 1)
    assert share == pytest.approx(energy, abs=0.04)
    noise = rounding_noise(weight, merged, found)
    assert int((found.singular > noise.edge).sum()) == 1
    assert (relative < FLOORS[torch.bfloat16]) == (cosine < 0.99)


def test_rounding_alone_stays_below_the_edge_and_a_planted_change_above_it():
    """Twenty matrices: rounding to bfloat16 is never called signal, a planted rank 3 always is."""
    for seed in range(20):
        weight = draw(96, 64, seed=seed, dtype=torch.float32)
        rounded = weight.bfloat16().float()
        null = randomized_svd(rounded - weight, 8)
        noise = rounding_noise(weight, rounded, null)
        assert int((null.singular > noise.edge).sum()) == 0
        assert noise.relative == pytest.approx(2**-9, rel=0.35)
        left, right = (torch.linalg.qr(draw(n, 3, seed=seed + n, dtype=torch.float32)).Q
                       for n in (96, 64))  # fmt: skip
        change = left @ torch.diag(torch.tensor([3.0, 2.0, 1.5])) @ right.T
        tuned = (rounded + change).bfloat16().float()
        found = randomized_svd(tuned - rounded, 8)
        noise = rounding_noise(rounded, tuned, found)
        assert int((found.singular > noise.edge).sum()) == 3


@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_circuits_are_the_dense_products_under_grouped_queries(n_kv):
    heads = Heads(4, n_kv, 3)
    both = []
    for seed in (0, 7):
        names = {"q_proj": (12, 10), "k_proj": (3 * n_kv, 10), "v_proj": (3 * n_kv, 10),
                 "o_proj": (10, 12)}  # fmt: skip
        weights = {n: draw(*s, seed=seed + i) for i, (n, s) in enumerate(names.items())}
        both.append(weights | {"gain": draw(10, seed=seed + 5).abs()})
    dense = []
    for weights in both:
        gain = weights["gain"]
        repeat = 4 // n_kv
        k, v = (weights[n].view(n_kv, 3, 10).repeat_interleave(repeat, 0).view(12, 10)
                for n in ("k_proj", "v_proj"))  # fmt: skip
        rows = slice(6, 9)
        ov = weights["o_proj"][:, rows] @ (v[rows] * gain)
        qk = (weights["q_proj"][rows] * gain).T @ (k[rows] * gain)
        dense.append({"OV": ov, "QK": qk})
    for kind in ("OV", "QK"):
        factors = [circuit(each, heads, 2, kind) for each in both]
        for (a, b), want in zip(factors, dense, strict=True):
            assert torch.allclose(b @ a, want[kind])
        change, before, after = circuit_change(*factors)
        assert torch.allclose(change.dense(), dense[1][kind] - dense[0][kind], atol=1e-10)
        assert before == pytest.approx(float(dense[0][kind].norm()))
        assert after == pytest.approx(float(dense[1][kind].norm()))


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(MismatchError, match="no factors"):
        factored_svd(draw(2, 5), draw(5, 3))
