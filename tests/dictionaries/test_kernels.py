from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff.dictionaries import kernels
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.kernels import ByLatent, select
from modeldiff.errors import MismatchError


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_sorting(pre, weight, n_keep):
    """The definition: sort all scores, and of equal ones take the first."""
    scores = (pre.relu() * weight).flatten()
    best = scores.sort(descending=True, stable=True).indices[:n_keep]
    kept = torch.zeros_like(scores).index_fill(0, best, 1.0).view_as(pre)
    return pre.relu() * kept


@pytest.mark.parametrize("n_keep", [1, 50, 5000, 20_000, 40_000])
@pytest.mark.parametrize("hint", [None, 1e-4, 1.0, 1e4, float("inf")])
def test_selection_is_that_of_a_sort_whatever_the_hint(n_keep, hint):
    pre, weight = random(37, 1000), random(1000, seed=1).abs() + 0.1
    codes, least = select(pre, weight, n_keep, hint)
    assert torch.equal(codes.dense(), by_sorting(pre, weight, n_keep))
    scores = (codes.dense() * weight)[codes.dense() > 0]
    assert least == float(scores.min())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 30), st.integers(1, 400))
def test_ties_go_to_the_first(seed, rows, width, n_keep):
    pre = (random(rows, width, seed=seed) * 2).round()
    codes, _ = select(pre, torch.ones(width), n_keep)
    assert torch.equal(codes.dense(), by_sorting(pre, torch.ones(width), n_keep))


@pytest.mark.parametrize("shape", [(3, 700_001), (2048, 512)])
def test_selection_of_many_scores_from_a_sample(shape):
    """The sample that a floor is guessed from is a small part here."""
    pre, weight = random(*shape), torch.ones(shape[1])
    n_keep = 4 * shape[0]
    codes, least = select(pre, weight, n_keep)
    wanted = pre.flatten().topk(n_keep).values
    assert torch.equal(codes.value.sort().values, wanted.sort().values)
    assert least == float(wanted.min())
    floor = kernels.sampled_floor(pre, None, n_keep)
    assert n_keep <= int((pre > floor).sum()) <= 3 * n_keep + 20_000


@pytest.mark.parametrize("k", [1, 7, 40])
def test_floor_of_every_row(k):
    values = random(30, 40)
    assert torch.equal(
        kernels.row_floor(values, k), values.sort(1, descending=True).values[:, k - 1]
    )


def test_nothing_fires_where_nothing_is_positive():
    codes, least = select(-torch.ones(4, 5), torch.ones(5), 3, 1.0)
    assert (len(codes), len(codes.latent), least) == (4, 0, 0.0)
    assert not kernels.decode(codes, torch.ones(5, 2, 3)).any()
    assert not kernels.decoder_gradient(codes, torch.ones(4, 2, 3)).any()
    assert len(kernels.code_gradient(codes, torch.ones(4, 2, 3), torch.ones(5, 2, 3))) == 0


@pytest.mark.parametrize("n_keep", [0, -1])
def test_selection_says_what_does_not_fit(n_keep):
    with pytest.raises(MismatchError, match="n_keep"):
        select(torch.zeros(2, 3), torch.ones(3), n_keep)
    with pytest.raises(MismatchError, match="weights"):
        select(torch.zeros(2, 3), torch.ones(2), 1)
    with pytest.raises(MismatchError, match="NaN"):
        select(torch.full((2, 3), torch.nan), torch.ones(3), 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 3))
def test_bfloat16_is_compared_by_its_bits(seed, floor):
    scores = random(7, 301, seed=seed).bfloat16()
    found = kernels.candidates(scores, floor).numpy()
    above = np.flatnonzero(scores.float().numpy() > floor)
    assert set(above) <= set(found)
    lower = torch.tensor(floor).view(torch.int32) & -65536  # the floor, rounded down to bfloat16
    assert np.array_equal(
        found, np.flatnonzero((scores.float() > lower.view(torch.float32)).numpy())
    )


def test_weighted_candidates_are_compared_block_by_block():
    scores, weight = random(3000, 700), random(700, seed=1).abs()
    found = kernels.candidates(scores, 2.0, weight)
    assert torch.equal(found, (scores * weight > 2.0).flatten().nonzero().squeeze(1))


@pytest.fixture
def sparse():
    """Codes of 1200 rows, some empty, their decoder, and a gradient of the reconstruction."""
    pre = random(1200, 1500) - 1.0
    pre[5], pre[:, 7] = -1.0, -1.0
    return select(pre, torch.ones(1500), 9000)[0], random(1500, 2, 6, seed=1), random(1200, 2, 6)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_decoding_and_gradients_are_the_dense_ones(sparse, kind):
    codes, W_dec, grad = sparse
    codes = Codes(codes.offsets, codes.latent, codes.value.to(kind), codes.n_latents)
    W_dec, grad = W_dec.to(kind).requires_grad_(), grad.to(kind)
    latents = codes.dense().requires_grad_()
    made = torch.einsum("bf,fmd->bmd", latents, W_dec)
    made.backward(grad)
    assert W_dec.grad is not None
    assert latents.grad is not None
    tolerance = 1e-5 if kind is torch.float32 else 1e-12
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(kernels.decode(codes, W_dec.detach()), made.detach())
    close(kernels.decoder_gradient(codes, grad), W_dec.grad)
    places = latents.grad[codes.row, codes.latent]
    close(kernels.code_gradient(codes, grad, W_dec.detach()), places)


def test_entries_by_latent_are_the_transpose(sparse):
    codes = sparse[0]
    by = ByLatent.of(codes)
    turned = Codes(by.offsets, by.row, codes.value[by.order], len(codes))
    assert torch.equal(turned.dense(), codes.dense().T)


def test_sums_go_where_they_are_wanted(sparse):
    codes, W_dec, _ = sparse
    out = torch.full((1200, 12), torch.nan)
    made = kernels.weighted_sum(W_dec.flatten(1), codes.offsets, codes.latent, codes.value, out)
    assert made is out
    assert torch.equal(out.view(1200, 2, 6), kernels.decode(codes, W_dec))


def test_shapes_that_do_not_go_together(sparse):
    codes, W_dec, grad = sparse
    for call in (
        lambda: kernels.decode(codes, W_dec[1:]),
        lambda: kernels.decoder_gradient(codes, grad[1:]),
        lambda: kernels.code_gradient(codes, grad, W_dec.flatten(1)),
    ):
        with pytest.raises(MismatchError, match=r"1200 rows and 1500 latents"):
            call()


def test_no_warning_of_torch_reaches_the_user(recwarn, sparse):
    kernels._quiet.cache_clear()
    kernels.code_gradient(*(sparse[i] for i in (0, 2, 1)))
    assert [str(each.message) for each in recwarn] == []
