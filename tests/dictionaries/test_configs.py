import math

import pytest
import torch

from modeldiff.dictionaries.configs import DictionaryConfig, Normaliser, TrainConfig
from modeldiff.errors import MismatchError


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"activation": "softmax"}, "softmax"),
        ({"n_models": 1}, "n_models=1"),
        ({"n_models": 2, "inputs": "base"}, "sparse autoencoders"),
        ({"k": 17}, "give 1 to 16"),
        ({"d_model": 0}, "d_model=0"),
        ({"n_exclusive": (1, 2, 3)}, "one number each"),
        ({"n_exclusive": (5, 5), "n_tied": 7}, "7 tied"),
        ({"groups": (4, 8)}, "last of them 16"),
        ({"groups": (8, 4, 16)}, "rising"),
        ({"code_norm": "mean"}, "mean"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(wrong, said):
    DictionaryConfig(4, 16, k=2)
    with pytest.raises(MismatchError, match=said):
        DictionaryConfig(**{"d_model": 4, "n_latents": 16, "k": 2, **wrong})


def test_exclusive_blocks_end_the_latents_in_the_order_of_the_models():
    config = DictionaryConfig(4, 20, 3, k=2, n_exclusive=(2, 0, 5))
    assert [list(config.exclusive(model)) for model in range(3)] == [
        [13, 14],
        [],
        [15, 16, 17, 18, 19],
    ]


def test_the_rate_rises_stays_and_falls():
    config = TrainConfig(steps=200, lr=1.0, warmup=0.1, decay=0.2)
    rates = [config.rate(step, 64) for step in range(200)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.15])
    assert rates[19:161] == pytest.approx([1.0] * 142)
    assert rates[-3:] == pytest.approx([0.075, 0.05, 0.025])


def test_k_falls_linearly():
    config = TrainConfig(steps=100, k_start=20, anneal=0.5)
    assert [config.k_at(step, 10) for step in (0, 25, 50, 99)] == [20, 15, 10, 10]
    assert TrainConfig(steps=100).k_at(0, 10) == 10


def test_latents_die_after_a_tenth_of_a_short_run():
    assert TrainConfig(steps=100, batch_size=50).rows_to_die == 500
    assert TrainConfig(steps=100_000, batch_size=4096).rows_to_die == 10_000_000
    assert TrainConfig(steps=100, dead_after=7).rows_to_die == 7


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"decay": 1.5}, {"aux": -1.0}, {"clip": 0.0}, {"fast": "yes"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(MismatchError):
        TrainConfig(**{"steps": 10, **wrong})


@pytest.fixture
def rows():
    size = torch.tensor([1.0, 40.0])[None, :, None]
    return (torch.randn(500, 2, 12) + torch.randn(2, 12) * 5) * size


def test_normalised_rows_have_mean_zero_and_one_size(rows):
    made = Normaliser.fit(rows).apply(rows)
    assert made.mean(0).abs().max() < 1e-5
    assert made.square().sum(2).mean(0).sqrt().tolist() == pytest.approx([math.sqrt(12)] * 2)


def test_normalising_is_undone(rows):
    fitted = Normaliser.fit(rows)
    assert torch.allclose(fitted.undo(fitted.apply(rows)), rows, atol=1e-4)


def test_batches_give_what_all_rows_give(rows):
    once, streamed = Normaliser.fit(rows), Normaliser.fit(rows.split(7))
    assert torch.allclose(once.mean, streamed.mean, rtol=1e-6)
    assert torch.allclose(once.scale, streamed.scale, rtol=1e-6)


def test_a_mean_far_from_zero_does_not_hide_the_spread():
    rows = torch.randn(400, 1, 8, dtype=torch.float64) * 1e-3 + 1e4
    spread = (rows - rows.mean(0)).square().mean().sqrt()
    assert float(Normaliser.fit(rows).scale) == pytest.approx(1 / float(spread), rel=1e-5)


def test_a_models_own_size_does_not_count(rows):
    larger = rows * torch.tensor([1.0, 3.0])[None, :, None]
    same = Normaliser.fit(larger).apply(larger)
    assert torch.allclose(Normaliser.fit(rows).apply(rows), same, atol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(5, 2, 3),
        torch.full((5, 2, 3), torch.nan),
        torch.randn(1, 2, 3),
        torch.tensor([[[1.0], [2.0]], [[3.0], [2.0]]]),
    ],
    ids=["all the same", "not finite", "one row", "one model constant"],
)
def test_no_normaliser_where_rows_have_no_size(wrong):
    with pytest.raises(MismatchError):
        Normaliser.fit(wrong)


def test_a_normaliser_with_other_shapes_or_signs_is_refused():
    with pytest.raises(MismatchError, match="scale for each"):
        Normaliser(torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(MismatchError, match="not positive"):
        Normaliser(torch.zeros(2, 3), torch.tensor([1.0, 0.0]))
    assert Normaliser.identity(2, 3).is_identity
