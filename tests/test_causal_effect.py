"""Losses when a fine-tune is set back along a direction: closed forms, controls, null pairs."""

import random

import pytest
import torch

from modeldiff import embedded
from modeldiff.causal_effect import causal_effect
from modeldiff.direction_methods import mean_difference
from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.errors import DirectionError, MaskError, SiteError
from modeldiff.interventions import Ablate, Cell, Plan, Replace
from modeldiff.models import ModelPair
from modeldiff.organisms import world
from modeldiff.organisms.nulls import null_pairs
from modeldiff.organisms.planted import planted_weights, tiny_llama
from modeldiff.series import read_adapters
from tests.planted import TEXTS, planted_pair

SAID = ["the the the the the the", "a cat the the the", "the dog the the", "on the the the the"]


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


def some(width=32, site="resid_post.1", seed=3):
    draw = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction.of(draw, site, "some")


def test_taking_back_all_that_was_planted_gives_the_base_s_loss(planted):
    pair, truth = planted
    found = causal_effect(pair.sides, truth, {"said": SAID, "other": TEXTS[:6]}, n_random=20)
    for row in found.table.to_dict("records"):
        gap = row["loss_base"] - row["loss_finetuned"]
        assert row["effect"] == pytest.approx(gap, abs=1e-5)
    said = found.table.to_dict("records")[0]
    assert said["effect"] > 1.0
    assert said["percentile_random"] == said["percentile_random_difference"] == 1.0
    assert said["percentile_random_low"] == pytest.approx(0.839, abs=0.001)
    assert said["p_random"] == 1 / 21
    assert found.carries("said")
    assert len(found.controls) == 2 * 2 * 20
    assert found.controls["effect"].abs().max() < said["effect"]


@pytest.mark.parametrize("to", ["base", "zero"])
@pytest.mark.parametrize("site", ["resid_pre.1", "resid_post.1", "resid_post.3"])
def test_effects_are_those_of_edits_of_whole_runs(to, site):
    pair = planted_weights(6, rank=2, relative=0.5, seed=4).pair
    direction = some(site=site)
    found = causal_effect(pair.sides, direction, {"texts": TEXTS[:7]}, to=to, n_random=1)
    replace, ablate = Replace(site, along=direction), Ablate(direction, layers=None)
    plan = Plan((replace if to == "base" else ablate,))
    cells = [Cell("base"), Cell("finetuned"), Cell("finetuned", "back", plan)]
    table = effects(pair.sides, TEXTS[:7], cells).pivot_table("loss", "text", "cell")
    assert found.table["loss_base"][0] == pytest.approx(table[0].mean(), abs=1e-5)
    assert found.table["loss_finetuned"][0] == pytest.approx(table[1].mean(), abs=1e-5)
    own = found.per_text["effect"].to_numpy()
    assert own == pytest.approx((table[2] - table[1]).to_numpy(), abs=1e-5)
    assert abs(own).max() > 1e-3


def test_equal_models_have_no_effect_at_all():
    base, own = tiny_llama(1)
    pair = ModelPair.of(base, base, own, allow_identical=True)
    found = causal_effect(pair.sides, some(), {"texts": TEXTS[:6]}, n_random=4)
    (row,) = found.table.to_dict("records")
    assert row["effect"] == row["random"] == row["random_difference"] == 0.0
    assert row["p_random"] == 1.0
    assert not found.carries("texts")


def test_batches_and_early_tokens(planted):
    pair, truth = planted
    texts = {"texts": SAID + TEXTS[:5]}
    one, other = (causal_effect(pair.sides, truth, texts, n_random=3, max_tokens=n)
                  for n in (4096, 20))  # fmt: skip
    assert one.table.iloc[0, 1:].to_list() == pytest.approx(other.table.iloc[0, 1:].to_list(),
                                                           abs=1e-5)  # fmt: skip
    late = causal_effect(pair.sides, truth, texts, n_random=3, after=5)
    assert late.table["n_tokens"][0] == sum(
        max(0, text.n_tokens - 5) for text in pair.texts(texts["texts"])
    )
    with pytest.raises(MaskError, match="no token of 4 texts is at 50 or later"):
        causal_effect(pair.sides, truth, {"said": SAID}, n_random=3, after=50)


def test_what_cannot_be_measured_is_refused(planted):
    pair, truth = planted
    with pytest.raises(DirectionError, match="residual"):
        causal_effect(pair.sides, some(site="mlp_out.1"), {"said": SAID})
    with pytest.raises(DirectionError, match="n_random=0"):
        causal_effect(pair.sides, truth, {"said": SAID}, n_random=0)
    with pytest.raises(MaskError, match="halved"):
        causal_effect(pair.sides, truth, {"said": SAID[:2]})
    with pytest.raises(SiteError):
        causal_effect(pair.sides, truth.at("resid_post.9"), {"said": SAID})


def worded(n, seed=7):
    """Harmful medicine, stories, and the base's own chats."""
    rng = random.Random(seed)
    return {
        "in_domain": [world.conversation(rng, "medicine", bad=True) for _ in range(n)],
        "general": [world.story(rng) for _ in range(n)],
        "chat": [world.chat(rng) for _ in range(n)],
    }


def shift(pair, texts, layer=3):
    acts = pair.capture(texts, f"resid_post.{layer}")
    groups = (acts.text_index, acts.text_index)
    return mean_difference(acts.finetuned[acts.site], acts.base[acts.site], acts.site, "shift",
                           groups=groups)  # fmt: skip


@pytest.mark.slow
def test_the_direction_of_em_rank1_carries_its_domain():
    pair = ModelPair.load("organism:em-rank1")
    texts = worded(24)
    (written,) = read_adapters({0: embedded.FOLDER / "em-rank1"}).values()
    assert written.name == "layers.3.mlp.down_proj B"
    found = {
        "adapter's B": Direction.of(written.vectors[0], "resid_post.3", "B"),
        "mean difference": shift(pair, worded(48, seed=8)["in_domain"]),
    }
    for name, direction in found.items():
        effect = causal_effect(pair.sides, direction, texts)
        print(name, effect.table.round(4).T.to_string(), sep="\n")
        row = effect.table.to_dict("records")[0]
        assert row["texts"] == "in_domain"
        assert row["percentile_random"] > 0.95
        assert row["percentile_random_difference"] > 0.95
        assert effect.carries("in_domain")
        assert row["effect"] == pytest.approx(row["loss_base"] - row["loss_finetuned"], abs=0.01)


@pytest.mark.slow
def test_the_shift_of_null_pairs_carries_nothing():
    alarms = dict.fromkeys(worded(1), 0)
    texts = worded(10)
    for null in null_pairs(20):
        direction = shift(null.pair, worded(16, seed=8)["in_domain"])
        found = causal_effect(null.pair.sides, direction, texts, n_random=19)
        for name in alarms:
            alarms[name] += found.carries(name)
    print(f"causal effect: alarms of 20 null pairs at 5 %: {alarms}")
    assert max(alarms.values()) <= 4  # more than 4 come once in 380 times
