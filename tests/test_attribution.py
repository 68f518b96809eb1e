import math
from typing import Any

import numpy as np
import pytest
import torch

from modeldiff.attribution import attribute, correlation
from modeldiff.directions import Direction
from modeldiff.errors import InterventionError, MaskError, MismatchError
from modeldiff.hooks import count_hooks
from modeldiff.layer_attribution import layer_attribution
from modeldiff.organisms.nulls import null_pairs
from modeldiff.organisms.planted import planted_shift, tiny_llama
from modeldiff.patching import Component, Metric, kl_to, logit_difference, patch_map
from tests.families import FAMILIES, build_adapter_pair
from tests.planted import TEXTS, null_pair
from tests.straight import (
    CHANNEL,
    DIM,
    free_channel,
    noisy,
    pair_of,
    straight,
    undoer,
    writer,
)

TEXT = "the cat sat on the mat"
DIFFERENCE = logit_difference(7, 9)


def test_on_a_linear_model_the_estimate_is_the_patch():
    model, tokenizer = straight()
    pair = pair_of(model, noisy, tokenizer)
    parts = ("resid_post", "attn_out", "mlp_out", "head")
    found = attribute(pair.sides, TEXT, DIFFERENCE, parts=parts)
    real = patch_map(pair.sides, TEXT, DIFFERENCE, parts=parts)
    assert found.r.estimate > 0.9999
    assert found.components == real.components
    torch.testing.assert_close(found.estimate, real.effect, rtol=1e-3, atol=1e-4)
    assert float(real.effect.abs().max()) > 0.1


def test_on_a_random_adapter_the_estimate_is_close_and_says_so():
    pair = build_adapter_pair()
    for side in ("base", "finetuned"):
        found = attribute(pair.sides, TEXT, DIFFERENCE, side=side,
                          parts=["resid_post", "mlp_out", "adapter"])  # fmt: skip
        real = patch_map(pair.sides, TEXT, DIFFERENCE, side=side,
                         parts=["resid_post", "mlp_out", "adapter"])  # fmt: skip
        whole = np.corrcoef(found.estimate.flatten(), real.effect.flatten())[0, 1]
        assert found.r.low < whole < found.r.high
        assert whole > 0.85
        real_rows: Any = real.table()
        real_rows["position"] = [column[0] for column in real_rows.positions]
        cells = found.sample.merge(real_rows)
        assert len(cells) == len(found.sample) > 10
        assert cells.patched.tolist() == pytest.approx(cells.effect.tolist(), abs=1e-5)
    assert count_hooks(pair.sides.root("base")) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_small_steps(family, family_pairs):
    """Second implementation: a patch of a hundredth of the difference, times a hundred."""
    from modeldiff.patch_runs import Cell, effects
    from modeldiff.patching import both_traces

    pair = family_pairs[family]
    parts: Any = ["attn_out", "mlp_out", "head", "query", "key"]
    found = attribute(pair.sides, TEXT, DIFFERENCE, parts=parts, qk_fix=False, n_sample=4)
    own, other = both_traces(pair.sides, found.text, "finetuned",
                             [c.place for c in found.components])  # fmt: skip
    for row in range(0, len(found.components), 7):
        each, position = found.components[row], found.text.n_tokens - 2
        start, end = own.values[each.place], other.values[each.place]
        near = [start + sign * 0.02 * (end - start) for sign in (1, -1)]
        cells = [Cell(each, (position,), value) for value in near]
        ((_, steps),) = effects(pair.sides, own, cells, DIFFERENCE)
        assert float(steps[0] - steps[1]) / 0.04 == pytest.approx(
            float(found.estimate[row, position]), rel=0.05, abs=5e-3
        )


def saturated(part):
    """One head that attends to an a in one model and to a b in the other."""
    model, tokenizer = straight(n_layers=2)
    first, second = (tokenizer(c, add_special_tokens=False).input_ids[0] for c in "ab")
    free_channel(model)
    model.model.embed_tokens.weight[first, CHANNEL] = 1.0
    model.model.embed_tokens.weight[second, CHANNEL] = -1.0
    attention = model.model.layers[1].self_attn
    attention.q_proj.bias[DIM] = 30.0
    attention.k_proj.weight[DIM, CHANNEL] = 30.0 if part == "query" else 0.0
    attention.k_proj.bias[DIM] = 0.0
    if part == "key":
        attention.k_proj.weight[DIM, CHANNEL] = 5.0

    def change(tuned):
        other = tuned.model.layers[1].self_attn
        if part == "query":
            other.q_proj.bias[DIM] *= -1
        else:
            other.k_proj.weight[DIM] *= -1

    return pair_of(model, change, tokenizer)


@pytest.mark.parametrize("part", ["query", "key"])
def test_a_saturated_head_is_seen_by_the_fix_alone(part):
    pair, text = saturated(part), "ccacbc"
    components = [Component(part, 1, 0)]
    real = patch_map(pair.sides, text, DIFFERENCE, components=components).effect[0]
    plain, fixed = (
        attribute(pair.sides, text, DIFFERENCE, components=components, qk_fix=fix, n_sample=6)
        for fix in (False, True)
    )
    place = int(real.abs().argmax())
    size = float(real[place].abs())
    assert size > 0.1
    assert size > 10 * float(plain.estimate[0, place].abs())
    assert 1 / 1.5 < float(fixed.estimate[0, place] / real[place]) < 1.5
    torch.testing.assert_close(fixed.estimate[0], real, rtol=1e-3, atol=1e-4)


def cancelling():
    """Layer 1 takes back what layer 0 writes, but no further than its neuron goes."""
    model, tokenizer = straight()
    free_channel(model)
    writer(model, 0, 0.0)
    undoer(model, 1)
    model.lm_head.weight[:, CHANNEL] = 0.0
    model.lm_head.weight[7, CHANNEL] = 1.0

    def change(tuned):
        tuned.model.layers[0].mlp.down_proj.weight[CHANNEL, 0] = 8.0

    return pair_of(model, change, tokenizer)


def test_grad_drop_recovers_what_cancels():
    pair, components = cancelling(), [Component("mlp_out", layer) for layer in range(3)]
    options = {"side": "base", "components": components}
    real = patch_map(pair.sides, TEXT, DIFFERENCE, **options).effect
    plain = attribute(pair.sides, TEXT, DIFFERENCE, **options).estimate
    dropped = attribute(pair.sides, TEXT, DIFFERENCE, grad_drop=True, **options)
    assert float(real[0, -1]) == pytest.approx(8 - 5, abs=1e-3)  # relu6 ends at 6, it began at 1
    assert float(plain[0, -1].abs()) < 1e-4
    assert float(dropped.estimate[0, -1]) == pytest.approx(8 / 2, abs=1e-3)  # one pass of two
    assert dropped.r.estimate > 0.9
    assert dropped.grad_drop
    assert (dropped.estimate >= 0).all()


def test_grad_drop_keeps_what_does_not_cancel():
    """Where no path goes through another layer, L/(L-1) makes the mean the plain size."""
    model, tokenizer = straight(n_layers=4)
    free_channel(model)
    writer(model, 1, 0.0)
    model.lm_head.weight[7, CHANNEL] = 1.0

    def change(tuned):
        tuned.model.layers[1].mlp.down_proj.weight[CHANNEL, 0] = 8.0

    pair, components = pair_of(model, change, tokenizer), [Component("mlp_out", 1)]
    plain, dropped = (
        attribute(pair.sides, TEXT, DIFFERENCE, components=components, grad_drop=drop).estimate
        for drop in (False, True)
    )
    torch.testing.assert_close(dropped, plain.abs())
    assert float(plain.abs().max()) > 1


def test_a_metric_without_a_gradient_is_refused(adapter_pair):
    """KL(p || p) has value 0 and gradient 0: an attribution of it would be all zeros."""
    (text,), hooks = adapter_pair.texts([TEXT]), count_hooks(adapter_pair.sides.root("base"))
    with pytest.raises(InterventionError, match="exactly zero"):
        attribute(adapter_pair.sides, text, Metric("nothing", lambda x: 0 * x.sum((1, 2))))

    def nan(logits):
        logp = logits[:, 0].log_softmax(-1)
        return torch.nn.functional.kl_div(logp, logp.detach(), reduction="none").sum(-1)

    with pytest.raises(InterventionError, match="one finite number"):
        attribute(adapter_pair.sides, text, Metric("released", nan))
    found = attribute(adapter_pair.sides, text, kl_to(adapter_pair.sides, text, "base"))
    assert float(found.estimate.abs().max()) > 0
    assert count_hooks(adapter_pair.sides.root("base")) == hooks


def test_an_identical_pair_has_nothing_to_attribute():
    found = attribute(null_pair("identical", 0).sides, TEXT, DIFFERENCE)
    assert (found.estimate == 0).all()
    assert len(found.sample) == 0
    assert math.isnan(found.r.estimate)


def test_correlation_has_fishers_interval():
    x = np.arange(12.0)
    y = x + 3 * np.sin(7 * x)
    found = correlation(x, y)
    r = np.corrcoef(x, y)[0, 1]
    assert found.estimate == pytest.approx(r)
    assert math.atanh(found.high) - math.atanh(r) == pytest.approx(1.959964 / 3)
    assert math.isnan(correlation(x, np.ones(12)).estimate)
    assert correlation(x[:3], y[:3]).low == -1
    assert correlation(x, -x).high == pytest.approx(-1)


def test_the_layer_where_a_direction_is_read_is_found():
    """Only layer 2's neuron reads the channel, so after it the direction does nothing."""
    model, tokenizer = straight(n_layers=4)
    free_channel(model)
    mlp = model.model.layers[2].mlp
    mlp.up_proj.weight[0] = 0.0
    mlp.up_proj.weight[0, CHANNEL], mlp.down_proj.weight[:, 0] = 1.0, 0.0
    mlp.down_proj.weight[6, 0] = 1.0
    for module in (model.model.layers[3].self_attn.v_proj, model.model.layers[3].mlp.up_proj):
        module.weight[:, 6] = 0.0
    model.lm_head.weight[:, CHANNEL], model.lm_head.weight[7, 6] = 0.0, 3.0
    pair = pair_of(model, noisy, tokenizer)
    unit = torch.zeros(32)
    unit[CHANNEL] = 1.0
    table = layer_attribution(pair.sides, TEXTS[:12], Direction.of(unit, "resid_post.1", "read"),
                              lambda text: DIFFERENCE, side="base")  # fmt: skip
    assert table.attrs["r"].estimate > 0.95
    assert table.attrs["layer"] in (0, 1)
    assert (table.attribution[:2] > 0.1).all()
    assert (table.attribution[2:].abs() < 1e-6).all()
    assert table.measured.tolist() == pytest.approx(table.attribution.tolist(), rel=0.5, abs=1e-4)


def test_the_planted_direction_beats_random_ones():
    planted = planted_shift(2, size=8.0)
    direction = planted.direction
    assert direction is not None
    pair = planted.pair
    (text,) = pair.texts([TEXT])
    (before,) = [kl_to(pair.sides, text, "base")]
    table = layer_attribution(pair.sides, [text], direction, lambda t: before)
    assert table.p[2] <= 0.05
    assert table.attribution[2] > table.random[2]
    with pytest.raises(MaskError):
        layer_attribution(pair.sides, [], direction, lambda t: before)
    with pytest.raises(MismatchError, match="width"):
        layer_attribution(pair.sides, [text], {9: direction}, lambda t: before)


@pytest.mark.slow
def test_null_pairs_are_silent_and_random_directions_are_as_random():
    """Twenty inert pairs give exactly nothing; on twenty noisy ones p is uniform."""
    base = tiny_llama()
    for null in null_pairs(20, kind="inert", base=base):
        found = attribute(null.pair.sides, TEXT, DIFFERENCE)
        assert (found.estimate == 0).all()
    alarms = []
    for null in null_pairs(24, kind="noise", base=base):
        draw = torch.randn(32, generator=torch.Generator().manual_seed(1000 + null.seed))
        unit = Direction.of(draw, "resid_post.2", "random")
        table = layer_attribution(null.pair.sides, TEXTS[:4], {2: unit}, lambda text: DIFFERENCE,
                                  n_check=1)  # fmt: skip
        alarms.append(bool(table.p[0] <= 0.05))
    assert sum(alarms) <= 4  # of 24 at 5 %: 5 or more happen once in 150 times
