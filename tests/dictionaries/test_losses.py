from dataclasses import replace

import numpy as np
import pytest
import torch

from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.losses import ALIKE, FLAT, aux_loss, constrain_gradients, loss
from modeldiff.dictionaries.models import crosscoder, sae

PLAIN = TrainConfig(steps=10, aux=0.0)


@pytest.fixture
def x():
    return torch.randn(16, 2, 6)


def filled(made):
    with torch.no_grad():
        for each in made.parameters():
            each.add_(0.3 * torch.randn_like(each))
        if made.config.activation == "jumprelu":
            made.threshold.copy_(0.2 + torch.rand_like(made.threshold))
    return made


def arrays(made):
    return {name: each.detach().double().numpy() for name, each in made.named_parameters()}


def errors(w, latents, x, end=None):
    made = np.einsum("bl,lmd->bmd", latents[:, :end], w["W_dec"][:end]) + w["b_dec"]
    return x.double().numpy() - made


def before(w, x):
    return np.einsum("bmd,mdl->bl", x.double().numpy(), w["W_enc"]) + w["b_enc"]


def expected(made, x, k=3):
    """The loss in numpy, float64, written from the definitions."""
    w, kind = arrays(made), made.config.activation
    pre = before(w, x)
    values, weight = np.maximum(pre, 0), np.linalg.norm(w["W_dec"], axis=2).sum(1)
    latents, more = values, 0.0
    if kind == "batch_topk":
        lowest = np.sort((values * weight).ravel())[-k * len(x)]
        latents = values * (values * weight >= lowest)
    if kind == "topk":
        latents = values * (values * weight >= np.sort(values * weight, 1)[:, -k][:, None])
    if kind == "relu":
        more = 0.1 * (values * weight).sum(1).mean() / (2 * np.sqrt(6))
    if kind == "jumprelu":
        latents = values * (pre > w["threshold"])
        more = ((latents > 0).sum(1).mean() / k - 1) ** 2
    if kind == "gated":
        gate = pre + w["b_gate"]
        opened = np.maximum(np.exp(w["r_mag"]) * pre + w["b_mag"], 0)
        latents, gates = (gate > 0) * opened, np.maximum(gate, 0)
        more = 0.1 * (gates * weight).sum(1).mean() / (2 * np.sqrt(6))
        more += (errors(w, gates, x) ** 2).mean()
    ends = made.config.groups or (made.config.n_latents,)
    return np.mean([(errors(w, latents, x, end) ** 2).mean() for end in ends]) + more, latents


@pytest.mark.parametrize("groups", [(), (3, 7, 12)])
@pytest.mark.parametrize("kind", ["batch_topk", "topk", "relu", "jumprelu", "gated"])
def test_the_loss_in_numpy(kind, groups, x):
    made = filled(crosscoder(6, 12, k=3, activation=kind, groups=groups))
    now = loss(made, x, PLAIN)
    total, latents = expected(made, x)
    assert now.total.item() == pytest.approx(total, rel=1e-5)
    assert now.latents.numpy() == pytest.approx(latents, abs=1e-5)
    per_model = (errors(arrays(made), latents, x) ** 2).mean((0, 2))
    assert now.mse.tolist() == pytest.approx(per_model.tolist(), rel=1e-5)


def test_what_a_step_reports(x):
    made = filled(crosscoder(6, 12, k=3))
    seen = loss(made, x, PLAIN).result()
    _, latents = expected(made, x)
    weight = np.linalg.norm(arrays(made)["W_dec"], axis=2).sum(1)
    assert float(seen.l0) == 3.0
    assert seen.fired.tolist() == (latents > 0).any(0).tolist()
    assert float(seen.lowest) == pytest.approx((latents * weight)[latents > 0].min(), rel=1e-5)


def test_keeping_a_broken_number_of_latents_keeps_it_over_the_batch(x):
    made = filled(crosscoder(6, 12, k=3))
    assert int((loss(made, x, PLAIN, k=1.25).latents > 0).sum()) == 20


def asleep(made, latents=(9, 10, 11)):
    """Latents far below firing on every row."""
    with torch.no_grad():
        made.b_enc[list(latents)] = -50.0
    dead = torch.zeros(made.config.n_latents, dtype=torch.bool)
    dead[list(latents)] = True
    return dead


@pytest.mark.parametrize("kind", ["batch_topk", "topk", "jumprelu"])
def test_the_gradient_reaches_the_encoder_of_a_dead_latent(kind, x):
    made = filled(crosscoder(6, 12, k=3, activation=kind))
    dead = asleep(made)
    config = TrainConfig(steps=10)
    for mask, reached in ((None, False), (dead, True)):
        made.zero_grad()
        now = loss(made, x, config, dead=mask)
        now.total.backward()
        assert not now.latents[:, 9:].any()
        assert made.W_enc.grad is not None
        assert (made.W_enc.grad[:, :, 9:].abs().sum((0, 1)) > 0).all().item() is reached


def test_the_aux_loss_leaves_living_latents_alone(x):
    made = filled(crosscoder(6, 12, k=3))
    dead = asleep(made)
    error = torch.randn(16, 2, 6, requires_grad=True)
    aux_loss(made, made.pre(x), error, dead).backward()
    assert made.W_enc.grad is not None
    assert not made.W_enc.grad[:, :, :9].any()
    assert error.grad is None


def test_a_dead_latent_turns_to_the_rows_whose_error_it_points_along(x):
    made = filled(crosscoder(6, 12, k=3))
    dead = asleep(made, [11])
    decoder = made.W_dec[11].detach()
    error = torch.stack([decoder, *[torch.zeros(2, 6)] * 15])
    pre = made.pre(x)
    pre.retain_grad()
    aux_loss(made, pre, error, dead).backward()
    assert pre.grad is not None
    assert pre.grad[0, 11] < 0  # down the gradient it rises
    assert not pre.grad[1:].any()


def test_the_aux_loss_is_the_share_that_is_left(x):
    made = crosscoder(6, 12, k=3)
    dead = asleep(made, [10, 11])
    with torch.no_grad():
        made.b_enc[10:] = 50.0
    error = torch.randn(16, 2, 6)
    latents = torch.zeros(16, 12)
    latents[:, 10:] = made.pre(x).detach()[:, 10:].relu()
    explained = torch.einsum("bl,lmd->bmd", latents, made.W_dec.detach())
    share = (error - explained).square().sum() / (error - error.mean(0)).square().sum()
    got = aux_loss(made, made.pre(x), error, dead, k_aux=5)
    assert got.item() == pytest.approx(float(share), rel=1e-5)


def test_what_hardly_varies_is_not_divided_by(x):
    """One row alone, and two models that differ by rounding: the shares stay bounded."""
    made = filled(crosscoder(6, 12, k=3))
    dead = asleep(made)
    for error in (x[:1], x[:1].expand_as(x)):
        share = aux_loss(made, made.pre(x[: len(error)]), error, dead).item()
        assert share == pytest.approx(1 / FLAT)
    x[:, 1] = x[:, 0] + 1e-7 * torch.randn(16, 6)
    more = loss(made, x, replace(PLAIN, delta=1.0)).total - loss(made, x, PLAIN).total
    raw = made.normaliser.undo(made.decode_normalised(loss(made, x, PLAIN).latents))
    left = (raw[:, 1] - raw[:, 0]).square().sum() / (ALIKE * x.square().sum())
    assert more.item() == pytest.approx(left.item(), rel=1e-3)


def test_the_delta_loss_is_of_the_raw_difference(x):
    made = filled(crosscoder(6, 12, k=3))
    made.scale.copy_(torch.tensor([0.5, 4.0]))
    now, plain = loss(made, x, replace(PLAIN, delta=0.7)), loss(made, x, PLAIN)
    raw = made.normaliser.undo(x)
    made_of = made.normaliser.undo(made.decode_normalised(now.latents)).detach()
    difference = raw[:, 1] - raw[:, 0]
    left = difference - (made_of[:, 1] - made_of[:, 0])
    spread = (difference - difference.mean(0)).square().sum()
    more = 0.7 * float(left.square().sum() / spread)
    assert now.total.item() - plain.total.item() == pytest.approx(more, rel=1e-4)


def test_the_l1_of_tied_latents_has_its_own_weight(x):
    made = filled(crosscoder(6, 12, k=3, activation="relu", n_tied=12))
    none, half, all_ = (
        loss(made, x, replace(PLAIN, l1_tied=share)).total.item() for share in (0.0, 0.5, 1.0)
    )
    assert none < half < all_
    assert half == pytest.approx((none + all_) / 2, rel=1e-5)


def test_thresholds_get_the_gradient_of_the_kernel(x):
    made = filled(sae(6, 12, k=3, activation="jumprelu"))
    seen = x[:, :1]
    config = replace(PLAIN, bandwidth=0.5)
    loss(made, seen, config).total.backward()
    pre = made.pre(seen).detach()
    theta = made.threshold.detach()
    latents = pre.relu() * (pre > theta)
    error = seen - made.decode_normalised(latents).detach()
    to_latents = -2 * torch.einsum("bmd,lmd->bl", error, made.W_dec.detach()) / error.numel()
    near = ((pre - theta).abs() < 0.25).float()
    l0 = (pre > theta).float().sum(1).mean()
    penalty = 2 * (l0 / 3 - 1) / 3 / len(seen)
    by_hand = -(near * (to_latents * theta + penalty)).sum(0) / 0.5
    assert made.threshold.grad is not None
    assert torch.allclose(made.threshold.grad, by_hand, atol=1e-5)
    assert by_hand.abs().max() > 1e-3


def test_gradients_are_the_slopes_of_the_loss():
    x = torch.randn(16, 2, 6, dtype=torch.float64)
    made = filled(crosscoder(6, 12, k=3, activation="relu")).double()
    loss(made, x, PLAIN).total.backward()
    for name, each in made.named_parameters():
        step = 1e-6 * torch.randn_like(each)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                each.add_(sign * step)
                values.append(loss(made, x, PLAIN).total.item())
                each.sub_(sign * step)
        assert each.grad is not None
        slope = (values[0] - values[1]) / 2
        assert slope == pytest.approx(float((each.grad * step).sum()), rel=1e-4, abs=1e-13), name


def test_constraints_on_the_gradients(x):
    made = crosscoder(6, 12, k=3, n_tied=4, n_exclusive=(2, 3), activation="relu")
    loss(made, x, PLAIN).total.backward()
    encoder, decoder = made.W_enc.grad, made.W_dec.grad
    assert encoder is not None
    assert decoder is not None
    free = decoder.clone()
    constrain_gradients(made)
    assert torch.equal(decoder[:4, 0], decoder[:4, 1])
    assert torch.allclose(decoder[:4, 0], free[:4].sum(1))
    assert torch.equal(decoder[4:7], free[4:7])
    assert not decoder[7:9, 1].any()
    assert not encoder[1, :, 7:9].any()
    assert not decoder[9:, 0].any()
    assert not encoder[0, :, 9:].any()
    assert decoder[9:, 1].any()
