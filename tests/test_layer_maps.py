from threading import Event

import pytest
import torch

from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, MaskError, MismatchError
from modeldiff.interventions import Ablate, Replace, Steer
from modeldiff.layer_maps import (
    ablate_effects,
    before,
    layer_differences,
    patch_effects,
    steer_effects,
)
from modeldiff.masks import Positions
from tests.families import FAMILIES
from tests.planted import LAYER, null_pair, planted_pair

TEXT = "the cat sat on the mat and the dog ran"


def direction(seed=0, layer=0, width=32):
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction.of(vector, f"resid_post.{layer}", "d")


def dense(pair, side, do, token):
    """KL(edited || base) and log p of a token after the last one, in float64."""
    own = pair.run([TEXT], side=side, do=do).logits[0, -1].double().log_softmax(-1)
    base = pair.run([TEXT], side="base").logits[0, -1].double().log_softmax(-1)
    return float((own.exp() * (own - base)).sum()), float(own[token])


def check(pair, found, edit_at, places):
    start = dense(pair, found.side, None, found.token_id)
    assert found.start_kl == pytest.approx(start[0], abs=1e-5)
    assert found.start_logprob == pytest.approx(start[1], abs=1e-5)
    for layer, column in places:
        kl, logprob = dense(pair, found.side, edit_at(layer, column), found.token_id)
        assert float(found.kl[layer, column]) == pytest.approx(kl - start[0], abs=2e-5)
        assert float(found.logprob[layer, column]) == pytest.approx(logprob - start[1], abs=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_a_place_is_replacing_there(family_pairs, family):
    pair = family_pairs[family]
    found = patch_effects(pair.sides, TEXT, max_tokens=40)
    check(pair, found, lambda i, p: Replace(f"resid_post.{i}", "base", where=Positions((p,))),
          [(0, 3), (1, 0), (2, 9), (3, 2)])  # fmt: skip


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_ablating_and_steering_are_the_edits_of_that_name(adapter_pair, side):
    d, amounts = direction(), (-1.0, 0.0, 0.5)
    found = ablate_effects(adapter_pair.sides, TEXT, d, side=side)
    check(adapter_pair, found, lambda i, p: Ablate(d, layers=i, where=Positions((p,))),
          [(0, 4), (2, 9), (3, 9)])  # fmt: skip
    found = steer_effects(adapter_pair.sides, TEXT, d, amounts, side=side)
    check(
        adapter_pair, found, lambda i, c: Steer(d, amounts[c], layers=i), [(0, 0), (2, 2), (3, 0)]
    )
    assert found.columns == amounts
    assert (found.kl[:, 1] == 0).all()
    assert (found.logprob[:, 1] == 0).all()


def test_the_base_patched_with_the_fine_tune_becomes_it(adapter_pair):
    found = patch_effects(adapter_pair.sides, TEXT, side="base")
    tuned = patch_effects(adapter_pair.sides, TEXT)
    assert found.start_kl == 0
    assert float(found.kl[-1, -1]) == pytest.approx(tuned.start_kl, abs=1e-5)


def test_the_last_place_holds_everything_and_the_layers_below_the_change_nothing(adapter_pair):
    found = patch_effects(adapter_pair.sides, TEXT)
    assert float(found.kl[-1, -1]) == pytest.approx(-found.start_kl, abs=1e-5)
    assert (found.kl[0] == 0).all()  # the adapter is on layers 1 and 2
    assert (found.kl[-1, :-1] == 0).all()  # above the last layer nothing looks back
    assert (found.kl[1] != 0).any()


def test_identical_models_give_exactly_nothing():
    pair = null_pair("identical", 0)
    maps = layer_differences(pair.sides, TEXT, direction())
    assert (maps["relative_norm"] == 0).all()
    assert (maps["cosine"] == 1).all()
    assert (maps["projection_difference"] == 0).all()
    found = patch_effects(pair.sides, TEXT)
    assert (found.kl == 0).all()
    assert (found.logprob == 0).all()


def test_a_planted_direction_is_found_at_its_layer():
    pair, truth = planted_pair()
    maps = layer_differences(pair.sides, TEXT, truth)
    norm, moved = maps["relative_norm"], maps["projection_difference"]
    assert (norm[:LAYER] == 0).all()
    assert (norm[LAYER] > 0.5).all()
    torch.testing.assert_close(moved[LAYER], torch.full_like(moved[LAYER], 24.0), rtol=0.02, atol=0)
    found = ablate_effects(pair.sides, TEXT, truth)
    last = found.kl[:, -1]
    assert int(last.argmin()) >= LAYER
    assert float(last[LAYER]) < -0.5 * found.start_kl
    random = ablate_effects(pair.sides, TEXT, direction(3))
    assert float(random.kl[LAYER, -1].abs()) < 0.2 * float(last[LAYER].abs())


def test_differences_are_those_of_the_captured_activations(adapter_pair):
    d = direction()
    maps = layer_differences(adapter_pair.sides, TEXT, d)
    sites = [f"resid_post.{i}" for i in range(4)]
    acts = adapter_pair.capture([TEXT], sites, skip_first=0)
    for i, site in enumerate(acts.sites):
        base, tuned = acts.base[site].double(), acts.finetuned[site].double()
        norm = (tuned - base).norm(dim=1) / base.norm(dim=1)
        torch.testing.assert_close(maps["relative_norm"][i], norm)
        cosine = torch.cosine_similarity(tuned, base, dim=1)
        torch.testing.assert_close(maps["cosine"][i], cosine)
        torch.testing.assert_close(maps["projection_ft"][i], tuned @ d.unit.double())
        torch.testing.assert_close(maps["projection_base"][i], base @ d.unit.double())


def test_rows_come_one_by_one_and_a_cancelled_sweep_keeps_them(adapter_pair):
    cancel, seen = Event(), []

    def on_row(layer, found):
        seen.append((layer, int((~found.kl.isnan()).all(1).sum())))
        if layer == 1:
            cancel.set()

    with pytest.raises(Cancelled) as caught:
        patch_effects(adapter_pair.sides, TEXT, on_row=on_row, cancel=cancel)
    assert seen == [(0, 1), (1, 2)]
    table = caught.value.partial.table()
    assert table[table["layer"] <= 1]["kl"].notna().all()
    assert table[table["layer"] > 1]["kl"].isna().all()
    some = patch_effects(adapter_pair.sides, TEXT, layers=[2])
    assert some.kl.shape == (1, some.text.n_tokens)


def test_before_cuts_a_text_where_a_token_is_predicted(adapter_pair):
    chat = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "the moon was"}]
    (text,) = adapter_pair.texts([chat])
    part = before(text, text.n_prompt + 1)
    assert part.ids == text.ids[: text.n_prompt + 1]
    assert part.pieces == text.pieces[: text.n_prompt + 1]
    assert part.n_prompt == text.n_prompt
    assert before(text, text.n_tokens) == text
    for position in (0, text.n_tokens + 1):
        with pytest.raises(MaskError, match="are predicted"):
            before(text, position)


def test_a_direction_of_another_width_is_refused(adapter_pair):
    for function in (layer_differences, ablate_effects, steer_effects):
        with pytest.raises(MismatchError, match="width 16"):
            function(adapter_pair.sides, TEXT, direction(width=16))
