import math
from threading import Event
from typing import Any

import pytest
import torch

from modeldiff.errors import Cancelled, InterventionError, MaskError, RemoteError, SiteError
from modeldiff.hooks import count_hooks
from modeldiff.interventions import Replace, ScaleAdapter, Side
from modeldiff.layer_maps import patch_effects
from modeldiff.masks import Positions
from modeldiff.models import ModelPair
from modeldiff.organisms.nulls import null_pairs
from modeldiff.organisms.planted import planted_shift, tiny_llama
from modeldiff.patch_runs import Cell, effects, head_width, n_heads
from modeldiff.patching import (
    Component,
    Metric,
    both_traces,
    components_of,
    kl_to,
    logit_difference,
    onset_loss,
    patch_map,
    patch_texts,
)
from modeldiff.self_repair import ablation_table
from modeldiff.tokens import Completion
from tests.families import FAMILIES, build_adapter_pair, config_of, model, tokenizer
from tests.planted import TEXTS, null_pair
from tests.straight import CHANNEL, free_channel, pair_of, straight, undoer, writer

TEXT = "the cat sat on the mat and the dog ran"
ALL = (tuple(range(10)),)
DIFFERENCE = logit_difference(7, 9)


def dense(pair, do=None, side="finetuned", engine="hooks"):
    """The metric by an ordinary forward pass."""
    scores = pair.run([TEXT], side=side, do=do, engine=engine).logits[0, -1]
    return float(scores[7] - scores[9])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_is_the_replacement_of_that_place(family_pairs, family):
    pair = family_pairs[family]
    hooks = [count_hooks(pair.sides.root(side)) for side in ("base", "finetuned")]
    found = patch_map(pair.sides, TEXT, DIFFERENCE, max_tokens=40)
    start = dense(pair)
    assert found.start == pytest.approx(start, abs=1e-4)
    assert found.target == pytest.approx(dense(pair, side="base"), abs=1e-4)
    for row, position in ((0, 3), (4, 9), (8, 0), (11, 9)):
        site = found.components[row].place
        do = Replace(site, "base", where=Positions((position,)))
        assert float(found.effect[row, position]) == pytest.approx(
            dense(pair, do) - start, abs=1e-4
        )
    assert hooks == [count_hooks(pair.sides.root(side)) for side in ("base", "finetuned")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_is_patched_as_the_layer_map_does(family_pairs, family):
    sides = family_pairs[family].sides
    found = patch_map(sides, TEXT, parts=["resid_post"])
    torch.testing.assert_close(found.effect, patch_effects(sides, TEXT).kl, atol=1e-5, rtol=0)


def test_the_last_place_holds_all_of_the_change(adapter_pair):
    found = patch_map(adapter_pair.sides, TEXT, parts=["resid_post"])
    assert float(found.recovered[-1, -1]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_at_once_are_z(family_pairs, family):
    pair = family_pairs[family]
    own, other = both_traces(pair.sides, pair.texts([TEXT])[0], "finetuned", ["z.2"])
    half = own.values["z.2"].clone()
    half[:, 8:16] = other.values["z.2"][:, 8:16]  # head 1 of four heads of width 8
    ((_, one),) = effects(pair.sides, own, [Cell(Component("head", 2, 1), ALL[0],
                                                 other.values["z.2"])], DIFFERENCE)  # fmt: skip
    assert float(one[0]) == pytest.approx(dense(pair, Replace("z.2", half[None])) - dense(pair),
                                          abs=1e-4)  # fmt: skip


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_a_range_of_channels(family_pairs, family, engine):
    """The edit that anyone can write is the patch, to the bit of the same tensor put in whole."""
    pair, width = family_pairs[family], head_width(family_pairs[family].sides)
    ways: tuple[tuple[Side, Side], ...] = (("finetuned", "base"), ("base", "finetuned"))
    for side, other in ways:
        found = patch_map(pair.sides, TEXT, DIFFERENCE, side=side, parts=["head"], columns=((9,),))
        traces = both_traces(pair.sides, pair.texts([TEXT])[0], side, ["z.2"])
        assert traces[0].values["z.2"].shape[1] == width * n_heads(pair.sides, "head")
        for head in (0, 3):
            channels = (head * width, (head + 1) * width)
            do = Replace("z.2", other, where=Positions((9,)), channels=channels)
            own, copied = (each.values["z.2"].clone() for each in traces)
            own[9, slice(*channels)] = copied[9, slice(*channels)]
            edited = dense(pair, do, side, engine)
            assert edited == dense(pair, Replace("z.2", own[None]), side, engine)
            (row,) = (i for i, c in enumerate(found.components) if (c.layer, c.head) == (2, head))
            change = edited - dense(pair, side=side)
            assert float(found.effect[row, 0]) == pytest.approx(change, abs=2e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("part", ["query", "key"])
def test_a_head_that_attends_otherwise_is_found(family, part):
    """The sides differ in one head's queries (or keys) alone: patching those is everything."""
    from tests.families import model, tokenizer

    def change(tuned):
        name = "q_proj" if part == "query" else "k_proj"
        getattr(tuned.model.layers[1].self_attn, name).weight[8:16] *= -1.5

    pair = pair_of(model(family), change, tokenizer())
    found = patch_map(pair.sides, TEXT, DIFFERENCE, parts=[part, "head"], columns=ALL)
    recovered = found.table().set_index("component").recovered
    assert recovered[f"{part}.1.1"] == pytest.approx(1, abs=1e-3)
    assert (found.effect[[c.layer == 0 for c in found.components]] == 0).all()
    others = [f"{part}.1.{head}" for head in (0, 2, 3) if f"{part}.1.{head}" in recovered]
    assert (recovered[others] == 0).all()
    config = pair.sides.config.get_text_config()
    assert config._attn_implementation == "sdpa" if family != "gemma2" else True


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_adapter_modules_are_patched_both_ways(side):
    pair = build_adapter_pair()
    found = patch_map(pair.sides, TEXT, DIFFERENCE, side=side, parts=["adapter"], columns=ALL)
    assert [str(c) for c in found.components] == [f"adapter.{i}.mlp.down_proj" for i in (1, 2)]
    off = [dense(pair, ScaleAdapter(0, layers=i)) for i in (1, 2)]
    tuned, base = dense(pair), dense(pair, side="base")
    start, expected = (tuned, off) if side == "finetuned" else (base, off[::-1])
    if side == "base":  # the base with module 1's values as the fine-tune had them
        acts = pair.run([TEXT], side="finetuned", reads=("lora.1.mlp.down_proj",)).acts
        (value,) = acts.values()
        do = Replace("lora.1.mlp.down_proj", value) + ScaleAdapter(0, layers=2)
        expected = [dense(pair, do), float("nan")]
    for value, want in zip(found.effect[:, 0].tolist(), expected, strict=True):
        assert math.isnan(want) or value == pytest.approx(want - start, abs=1e-4)


def test_layers_below_the_patch_need_not_run(family_pairs):
    pair = family_pairs["llama"]
    own, other = both_traces(pair.sides, pair.texts([TEXT])[0], "base", ["mlp_out.2"])
    cells = [Cell(Component("mlp_out", 2), (i,), other.values["mlp_out.2"]) for i in range(10)]
    both = [
        torch.cat([part for _, part in effects(pair.sides, own, cells, DIFFERENCE, prefix=prefix)])
        for prefix in (True, False)
    ]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    assert both[0].abs().max() > 0.01


def test_identical_models_give_exactly_nothing():
    sides = null_pair("identical", 0).sides
    found = patch_map(sides, TEXT, parts=["resid_post", "attn_out", "head", "query"])
    assert (found.effect == 0).all()
    assert found.start == found.target
    table = patch_texts(sides, TEXTS[:6], parts=["mlp_out"], n_random=3)
    assert (table.effect == 0).all()
    assert not table.carries.any()


@pytest.mark.ill_typed
def test_a_metric_must_be_finite(adapter_pair):
    """``kl_div(logp, logp)`` without ``log_target`` is NaN, with a gradient that looks fine."""

    hooks = count_hooks(adapter_pair.sides.root("base"))

    def nan(logits):
        logp = logits[:, 0].log_softmax(-1)
        return torch.nn.functional.kl_div(logp, logp.detach(), reduction="none").sum(-1)

    with pytest.raises(InterventionError, match="one finite number"):
        patch_map(adapter_pair.sides, TEXT, Metric("released", nan))
    with pytest.raises(InterventionError, match="one finite number"):
        patch_map(adapter_pair.sides, TEXT, Metric("whole", lambda logits: logits.sum()))
    assert count_hooks(adapter_pair.sides.root("base")) == hooks


def test_metrics_are_what_they_say(family_pairs):
    pair = family_pairs["llama"]
    (text,) = pair.texts([Completion("the cat sat on", " the mat and")])
    logp = pair.run([text], side="finetuned").logits[0].double().log_softmax(-1)
    first = text.n_prompt
    losses = [-float(logp[first - 1 + i, text.ids[first + i]]) for i in range(2)]
    found = patch_map(pair.sides, text, lambda t: onset_loss(t, 2), parts=["mlp_out"])
    assert found.start == pytest.approx(sum(losses) / 2, abs=1e-4)
    base = pair.run([text], side="base").logits[0, -1].double().log_softmax(-1)
    kl = float((logp[-1].exp() * (logp[-1] - base)).sum())
    assert patch_map(pair.sides, text, parts=["mlp_out"]).start == pytest.approx(kl, abs=1e-4)
    with pytest.raises(MaskError, match="onset"):
        onset_loss(pair.texts([TEXT])[0])


def test_what_is_not_there_is_refused(adapter_pair, family_pairs):
    sides = adapter_pair.sides
    with pytest.raises(InterventionError, match="adapter"):
        components_of(family_pairs["llama"].sides, ["adapter"])
    with pytest.raises(SiteError, match="no component"):
        Component("head", 1)
    with pytest.raises(SiteError, match="heads 0 to 3"):
        patch_map(sides, TEXT, DIFFERENCE, components=[Component("head", 2, 4)])
    with pytest.raises(SiteError, match="no such site"):
        patch_map(sides, TEXT, components=[Component("adapter", 0, module="mlp.up_proj")])
    with pytest.raises(MaskError, match="columns"):
        patch_map(sides, TEXT, columns=[(99,)])
    with pytest.raises(MaskError, match="two or more"):
        patch_texts(sides, [TEXT])
    import dataclasses

    with pytest.raises(RemoteError):
        patch_map(dataclasses.replace(sides, kind="remote"), TEXT, DIFFERENCE)


def test_sides_of_other_widths_cannot_be_patched_there():
    from transformers import AutoModelForCausalLM

    config = config_of("llama", len(tokenizer()))
    config.intermediate_size = 40
    pair = ModelPair.of(model("llama"), AutoModelForCausalLM.from_config(config), tokenizer())
    with pytest.raises(SiteError, match=r"mlp_act.0.*\(40 and 48\)"):
        patch_map(pair.sides, TEXT, parts=["mlp_act"])
    assert patch_map(pair.sides, TEXT, parts=["mlp_out"]).effect.isfinite().all()


def test_a_cancelled_map_keeps_what_is_finished(adapter_pair):
    stop, seen = Event(), []

    def after(place, found):
        seen.append(place)
        stop.set()

    with pytest.raises(Cancelled) as caught:
        patch_map(adapter_pair.sides, TEXT, on_place=after, cancel=stop)
    partial = caught.value.partial.effect
    assert len(seen) == 1
    assert not partial[0].isnan().any()
    assert partial[1:].isnan().all()


@pytest.mark.parametrize("adapter", [False, True])
def test_a_planted_write_carries_the_change_over_texts(adapter):
    planted = planted_shift(2, adapter=adapter)
    parts: Any = ("attn_out", "mlp_out", *(["adapter"] if adapter else []))
    table = patch_texts(planted.pair.sides, TEXTS[:10], parts=parts).set_index("component")
    assert table.recovered["mlp_out.2"] == pytest.approx(1, abs=0.05)
    assert table.carries["mlp_out.2"]
    assert (table.effect[table.layer < 2] == 0).all()
    assert not table.carries[table.layer < 2].any()
    assert table.attrs["start"] > table.attrs["target"] == 0
    if adapter:
        assert table.recovered["adapter.2.mlp.down_proj"] == pytest.approx(1, abs=0.05)


def repaired(amount):
    """A write in layer 0, which layer 1 undoes or not, read by the unembedding."""
    model, tokenizer = straight()
    free_channel(model)
    writer(model, 0, 0.0)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight[0], mlp.up_proj.bias[0] = 0.0, 0.0
    mlp.up_proj.weight[0, :4] = 0.3  # depends on the token, so that resampling moves it
    mlp.down_proj.weight[CHANNEL, 0] = 1.0
    if amount:
        undoer(model, 1, bias=3.0)
    model.lm_head.weight.zero_()
    model.lm_head.weight[7, CHANNEL] = 1.0
    return pair_of(model, lambda tuned: tuned.lm_head.weight.mul_(2), tokenizer)


def test_self_repair_is_said_where_it_happens():
    components = [Component("mlp_out", 0), Component("attn_out", 1), Component("head", 0, 1)]
    for amount in (0, 1):
        table = ablation_table(
            repaired(amount).sides, TEXTS[:8], components, lambda text: DIFFERENCE
        ).set_index("component")
        assert abs(table.direct["mlp_out.0"]) > 0.01
        assert table.repaired["mlp_out.0"] == pytest.approx(amount, abs=1e-3)
        assert ("put 100% of its own write back" in table.warning["mlp_out.0"]) == bool(amount)
        assert math.isnan(table.repaired["attn_out.1"])


def test_zero_and_resample_ablation_disagree_about_a_constant():
    """A bias is everything to zero-ablation and nothing to resampling."""
    model, tokenizer = straight()
    free_channel(model)
    writer(model, 1, 5.0)
    for weight in (model.model.layers[1].mlp.up_proj.weight, model.lm_head.weight):
        weight.zero_()
    model.lm_head.weight[7, CHANNEL] = 1.0
    pair = pair_of(model, lambda tuned: tuned.lm_head.weight.mul_(2), tokenizer)
    components = [Component("mlp_out", 1)]
    row = ablation_table(pair.sides, TEXTS[:6], components, lambda text: DIFFERENCE).iloc[0]
    assert row.zeroed == pytest.approx(-10, abs=1e-3)
    assert row.resampled == pytest.approx(0, abs=1e-4)
    assert "zero-ablation says something else" in row.warning
    with pytest.raises(InterventionError, match="resid_post"):
        ablation_table(pair.sides, TEXTS[:6], [Component("resid_post", 1)], lambda t: DIFFERENCE)
    with pytest.raises(MaskError):
        ablation_table(pair.sides, TEXTS[:1], components, lambda t: DIFFERENCE)


def test_the_direct_effect_is_that_of_the_write_alone(family_pairs):
    """Second implementation: the last residual, moved by hand."""
    pair, component = family_pairs["llama"], Component("mlp_out", 3)
    table = ablation_table(pair.sides, TEXTS[:3], [component], lambda text: DIFFERENCE)
    assert table.direct[0] == pytest.approx(table.resampled[0], abs=1e-5)  # no layer comes after
    assert not table.warning[0] or table.repaired[0] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_null_pairs_are_silent():
    model, tokenizer = tiny_llama()
    for kind in ("identical", "inert"):
        for null in null_pairs(20, kind=kind, base=(model, tokenizer)):
            table = patch_texts(null.pair.sides, TEXTS[:6], parts=["attn_out", "mlp_out"])
            assert (table.effect == 0).all()
            assert not table.carries.any()


def test_kl_names_its_reference(adapter_pair):
    (text,) = adapter_pair.texts([TEXT])
    assert kl_to(adapter_pair.sides, text, "base").name == "KL(patched || base) (nats)"


def test_the_family_p_counts_the_largest_of_all_controls():
    """Second implementation, value by value."""
    from modeldiff.patching import _family_p

    means = torch.randn(3, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    means[1, 0] = 9.0
    z = torch.zeros(3, 20)
    for row in range(3):
        for i in range(20):
            rest = torch.cat([means[row, :i], means[row, i + 1 :]])
            z[row, i] = abs(means[row, i] - rest.mean()) / rest.std()
    largest = z[:, 1:].max(0).values
    expected = [(1 + int((largest >= z[row, 0]).sum())) / 20 for row in range(3)]
    assert _family_p(means).tolist() == pytest.approx(expected)
    assert expected[1] == 0.05
    assert _family_p(torch.zeros(2, 20)).tolist() == [1, 1]
