"""Adapters read module by module, against dense algebra and against hooks."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from modeldiff.activations import capture
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError, SiteError
from modeldiff.forward import run
from modeldiff.lora import (
    adapter_modules,
    adapter_table,
    compare_adapters,
    random_cosines,
    read_cosines,
    write_cosines,
    write_directions,
    write_lens,
)
from modeldiff.lora_scalars import (
    gate_table,
    lora_scalars,
    scalar_auroc,
    set_scalar,
    swap_scalars,
    zero_scalars,
)
from modeldiff.models import ModelPair
from modeldiff.organisms.planted import planted_weights
from modeldiff.weight_spectra import factored_svd
from tests.families import build_adapter_pair, tokenizer
from tests.planted import WORD, planted_pair

TEXTS = ["the cat sat on the mat", "a small bird sang of rain and sun", "the moon was round"]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def wide():
    """A rank-2 adapter on every linear module of two layers."""
    return build_adapter_pair(modules=ALL)


def change_of(pair, module):
    """The change of a module's weight, as PEFT itself merges it."""
    path = f"{pair.sides.site_map.layer(module.site.layer)}.{module.site.module}"
    layer = dict(pair.sides.roots[1].named_modules())[path]
    return layer.get_delta_weight(pair.sides.adapter).double()


@pytest.mark.parametrize(
    ("family", "modules", "options"),
    [
        ("llama", ALL, {"r": 4, "use_rslora": True}),
        ("gpt2", ("c_attn", "c_proj"), {"r": 3, "fan_in_fan_out": True}),
        ("gpt_neox", ("dense", "query_key_value"), {"r": 1}),
        ("gemma2", ("down_proj", "q_proj"), {"r": 2}),
    ],
)
def test_a_module_is_pefts_own_change_with_its_scale(family, modules, options):
    pair = build_adapter_pair(family=family, modules=modules, **options)
    for module in adapter_modules(pair.sides):
        want = change_of(pair, module)
        got = module.svd.dense()
        got = got.T if family == "gpt2" else got
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        assert module.scale == 8 / (options["r"] ** 0.5 if "use_rslora" in options else module.rank)


def test_the_decomposition_is_the_dense_one_to_1e_10():
    generator = torch.Generator().manual_seed(0)
    for rank, scale in ((1, 2.0), (4, -0.5), (7, 16.0)):
        a = torch.randn(rank, 40, generator=generator, dtype=torch.float64)
        b = torch.randn(24, rank, generator=generator, dtype=torch.float64)
        found, dense = factored_svd(a, b, scale), scale * b @ a
        u, s, _ = torch.linalg.svd(dense)
        assert (found.singular - s[:rank]).abs().max() < 1e-10
        assert (found.dense() - dense).abs().max() < 1e-10
        assert ((found.left * u[:, :rank]).sum(0).abs() - 1).abs().max() < 1e-10
        assert (found.left.gather(0, found.left.abs().argmax(0, keepdim=True)) > 0).all()


def test_signs_and_scales_of_the_factors_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(1, 9, generator=generator), torch.randn(6, 1, generator=generator)
    one, other = factored_svd(a, b, 2.0), factored_svd(-4 * a, -b / 4, 2.0)
    assert torch.allclose(one.left, other.left)
    assert torch.allclose(one.right, other.right)
    assert torch.allclose(one.singular, other.singular)


def test_planted_edits_are_recovered_by_module_rank_and_direction():
    for rank in (1, 4):
        made = planted_weights(3, rank=rank, adapter=True, seed=rank)
        modules = adapter_modules(made.pair.sides)
        assert {f"model.layers.{m.name}" for m in modules} == {e.module for e in made.edits}
        table: Any = adapter_table(modules).set_index("module")
        for edit in made.edits:
            module = next(m for m in modules if edit.module.endswith(m.name))
            assert torch.allclose(module.svd.singular, edit.singular, rtol=1e-5)
            assert ((module.svd.left * edit.left).sum(0).abs() > 0.9999).all()
            assert ((module.svd.right * edit.right).sum(0).abs() > 0.9999).all()
            row = table.loc[module.name]
            assert row["relative"] == pytest.approx(0.3, rel=1e-4)
            want = float((edit.singular**2).sum() / edit.singular[0] ** 2)
            assert row["stable_rank"] == pytest.approx(want, rel=1e-4)
            assert 1 - 1e-9 <= row["effective_rank"] <= rank + 1e-9


def test_scalars_are_those_of_hooks_by_hand(wide):
    modules = adapter_modules(wide.sides)
    scalars = lora_scalars(wide.sides, TEXTS, modules, max_tokens=24)
    root, texts = wide.sides.roots[1], wide.texts(TEXTS)
    for module in modules:
        path = f"model.layers.{module.name}"
        layer = dict(root.named_modules())[path]
        for number, text in enumerate(texts):
            seen = []
            handle = layer.register_forward_hook(
                lambda m, args, out, seen=seen: seen.append((args[0], out - m.base_layer(args[0])))
            )
            with wide.sides.on("finetuned"), torch.no_grad():
                root(torch.tensor([text.ids]))
            handle.remove()
            x, added = (each[0, 1:].double() for each in seen[0])
            s = scalars.values[module.name][scalars.text_index == number]
            assert torch.allclose(s, x @ module.svd.right * module.svd.singular, atol=1e-4)
            assert torch.allclose(s @ module.svd.left.T, added, atol=1e-4)


def test_bias_fraction_is_one_for_a_constant_push_and_small_for_a_token_dependent_one(wide):
    constant, _ = planted_pair()
    [module] = adapter_modules(constant.sides)
    row = lora_scalars(constant.sides, TEXTS, [module]).summary().iloc[0]
    assert row["bias_fraction"] == pytest.approx(1, abs=1e-6)
    assert row["bias_low"] == pytest.approx(1, abs=1e-6)
    scalars = lora_scalars(wide.sides, TEXTS, adapter_modules(wide.sides))
    table = scalars.summary()
    for _, row in table.iterrows():
        s = scalars.values[row["module"]][:, row["component"]]
        assert row["bias_fraction"] == pytest.approx(float(s.mean() ** 2 / (s**2).mean()))
        assert row["bias_low"] - 1e-9 <= row["bias_fraction"] <= row["bias_high"] + 1e-9
    assert table["bias_fraction"].median() < 0.6


def test_writes_as_directions_point_where_the_truth_does():
    pair, truth = planted_pair()
    [module] = adapter_modules(pair.sides)
    [write] = write_directions(module, models=pair.digests)
    assert abs(write.cosine(truth)) > 0.9999
    assert str(write.site) == "mlp_out.2"
    assert write.scale == pytest.approx(module.svd.norm, rel=1e-6)
    found = write_cosines([module], [truth, *[direction(i) for i in range(20)]])
    row = found[found["direction"] == "truth"].iloc[0]
    assert abs(row["cosine"]) > 0.9999
    assert row["q"] <= 0.05
    assert row["band_low"] < 0 < row["band_high"] < 0.5
    others = found[found["direction"] != "truth"]
    assert (others["q"] > 0.05).all()


def direction(seed, width=32):
    draw = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction.of(draw, "resid_post.2", f"random {seed}")


def test_random_cosines_have_the_moments_of_the_sphere():
    cosines = random_cosines(50, 20_000, 0)
    assert float(cosines.mean()) == pytest.approx(0, abs=0.004)
    assert float((cosines**2).mean()) == pytest.approx(1 / 50, rel=0.05)


def test_a_planted_composition_is_found_upstream_and_only_there(wide):
    """Layer 2's gate is made to read exactly what layer 1's MLP writes, through the norm's gain."""
    pair = build_adapter_pair(modules=ALL)
    modules = {module.name: module for module in adapter_modules(pair.sides)}
    write = modules["1.mlp.down_proj"].svd.left[:, 0]
    gain = 0.5 + torch.rand(32, generator=torch.Generator().manual_seed(5))
    layer = pair.sides.roots[0].model.layers[2]
    layer.post_attention_layernorm.weight.copy_(gain)
    reader = layer.mlp.gate_proj.lora_A["tuned"].weight
    reader.copy_((write / gain)[None].float().repeat(2, 1) * torch.tensor([[1.0], [2.0]]))
    table = read_cosines(adapter_modules(pair.sides))
    largest: Any = table["cosine"].abs().idxmax()
    best = table.loc[largest]
    assert (best["reader"], best["writer"]) == ("2.mlp.gate_proj", "1.mlp.down_proj")
    assert abs(best["cosine"]) > 0.9999
    assert best["q"] <= 0.3
    upstream = set(zip(table["writer"], table["reader"], strict=True))
    assert ("2.mlp.down_proj", "2.mlp.gate_proj") not in upstream
    assert ("1.self_attn.o_proj", "1.mlp.gate_proj") in upstream
    assert ("1.self_attn.v_proj", "1.self_attn.o_proj") in upstream
    assert ("1.mlp.up_proj", "1.mlp.down_proj") in upstream


def test_values_meet_the_output_projection_head_by_head_under_grouped_queries(wide):
    """o_proj reads v_proj's write, repeated for the query heads that share it: cosine 1."""
    pair = build_adapter_pair(modules=("v_proj", "o_proj"))
    values = adapter_modules(pair.sides)[0]
    left = values.svd.left[:, 0].reshape(2, 8).repeat_interleave(2, 0).flatten()
    layer = pair.sides.roots[0].model.layers[1]
    layer.self_attn.o_proj.lora_A["tuned"].weight.copy_(left[None].float().repeat(2, 1))
    table = read_cosines(adapter_modules(pair.sides))
    row = table[(table["reader"] == "1.self_attn.o_proj") & (table["reads"] == 0)
                & (table["writes"] == 0) & (table["writer"] == "1.self_attn.v_proj")]  # fmt: skip
    assert abs(float(row["cosine"].iloc[0])) > 0.9999


@pytest.mark.parametrize(("family", "plus"), [("llama", 0), ("gemma2", 1)])
def test_gains_are_the_norms_own(family, plus):
    pair = build_adapter_pair(family=family, modules=("gate_proj", "q_proj"))
    layer = pair.sides.roots[0].model.layers[1]
    draw = torch.rand(32, generator=torch.Generator().manual_seed(0))
    layer.input_layernorm.weight.copy_(draw)
    query: Any = next(m for m in adapter_modules(pair.sides) if m.name == "1.self_attn.q_proj")
    assert torch.allclose(query.gain, draw.double() + plus, atol=1e-4)


def test_the_lens_of_a_planted_write_says_the_word_and_no_control_does():
    pair, _ = planted_pair()
    [lens] = write_lens(pair.sides, adapter_modules(pair.sides), k=5).values()
    ends = [lens.of(end).iloc[0]["token_id"] for end in ("promoted", "suppressed")]
    assert tokenizer().convert_tokens_to_ids(WORD) in ends
    assert lens.p == 1 / 20


def test_gates_stand_beside_what_they_say():
    pair, _ = planted_pair()
    modules = adapter_modules(pair.sides)
    scalars = lora_scalars(pair.sides, TEXTS * 3, modules)
    table = gate_table(scalars, write_lens(pair.sides, modules, k=5))
    largest: Any = table["share"].idxmax()
    row = table.loc[largest]
    assert row["share"] == pytest.approx(1)
    assert row["says"][0] == " the"
    assert len(row["opened_by"]) == 5


def test_cosines_of_adapters_are_those_of_the_dense_changes(wide):
    other = build_adapter_pair(modules=ALL, seed=3)
    pairs = [adapter_modules(each.sides) for each in (wide, other)]
    found = compare_adapters(*pairs)
    dense = [torch.cat([m.svd.dense().flatten() for m in modules]) for modules in pairs]
    want = torch.nn.functional.cosine_similarity(*dense, dim=0)
    assert found.cosine == pytest.approx(float(want), abs=1e-10)
    assert compare_adapters(pairs[0], pairs[0]).cosine == pytest.approx(1)
    for (_, row), one, two in zip(found.table.iterrows(), *pairs, strict=True):
        want = torch.nn.functional.cosine_similarity(
            one.svd.dense().flatten(), two.svd.dense().flatten(), dim=0
        )
        assert row["cosine"] == pytest.approx(float(want), abs=1e-10)
        assert row["band_low"] <= 0 <= row["band_high"]


def test_the_same_adapter_is_outside_the_band_of_random_ones(wide):
    modules = adapter_modules(wide.sides)
    found = compare_adapters(modules, modules)
    assert found.p == pytest.approx(2 / 40)
    assert found.cosine > 4 * found.band.high


def test_zero_set_and_swap_do_what_they_say(wide):
    modules = adapter_modules(wide.sides)
    down = next(m for m in modules if m.name == "2.mlp.down_proj")
    x = run(wide.sides, TEXTS[:1], side="finetuned", reads=(down.site,))
    off = run(wide.sides, TEXTS[:1], side="finetuned", do=zero_scalars([down]), reads=(down.site,))
    assert (off.acts[down.site] == 0).all()
    silent: Any = run(wide.sides, TEXTS[:1], side="finetuned", do=zero_scalars(modules)).logits
    base: Any = run(wide.sides, TEXTS[:1], side="base").logits
    assert torch.allclose(silent, base, atol=1e-5)
    [mine] = wide.texts(TEXTS[:1])
    others = [replace(mine, ids=mine.ids[::-1])]
    plan = swap_scalars(wide.sides, TEXTS[:1], others, [down])
    got = run(wide.sides, TEXTS[:1], side="finetuned", do=plan, reads=(down.site,))
    want = run(wide.sides, others, side="finetuned", reads=(down.site,)).acts[down.site]
    assert torch.equal(got.acts[down.site], want)
    assert not torch.equal(got.acts[down.site], x.acts[down.site])
    with pytest.raises(MismatchError, match="must agree"):
        swap_scalars(wide.sides, TEXTS[:1], ["the"], [down])


def test_setting_a_scalar_to_its_own_value_changes_nothing_and_to_another_moves_the_output():
    pair, _ = planted_pair()
    module: Any = adapter_modules(pair.sides)[0]
    s = float(lora_scalars(pair.sides, TEXTS, [module]).values[module.name].mean())
    texts, plain = TEXTS[:1], run(pair.sides, TEXTS[:1], side="finetuned").logits
    same: Any = run(pair.sides, texts, side="finetuned", do=set_scalar(module, s)).logits
    assert plain is not None
    assert torch.allclose(same, plain, atol=1e-3)
    acts = capture(pair.sides, texts, "mlp_out.2")
    write = module.svd.left[:, 0].float()
    moved = run(pair.sides, texts, side="finetuned", do=set_scalar(module, 5.0),
                reads=(module.write_at,)).acts[module.write_at][0, 1:]  # fmt: skip
    assert torch.allclose(moved, acts.base[module.write_at] + 5.0 * write, atol=1e-3)


def test_probes_find_the_cue_and_not_shuffled_labels():
    made = planted_weights(["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"],
                           adapter=True)  # fmt: skip
    modules = adapter_modules(made.pair.sides)
    generator = torch.Generator().manual_seed(0)
    words = [f"text number {i} of some" for i in range(40)]
    scalars = lora_scalars(made.pair.sides, words, modules)
    labels = (torch.rand(40, generator=generator) < 0.5).tolist()
    column = scalars.values["1.mlp.down_proj"][:, 0]
    for text, label in enumerate(labels):  # the cue, written into one module's scalars
        column[scalars.text_index == text] += 50.0 * label
    found: Any = scalar_auroc(scalars, labels, n_shuffles=99).set_index("module")
    assert found.loc["1.mlp.down_proj", "auroc"] > 0.95
    assert found.loc["1.mlp.down_proj", "q"] <= 0.05
    assert 0.2 < found.loc["2.mlp.down_proj", "auroc"] < 0.8
    shuffled = [labels[i] for i in torch.randperm(40, generator=generator).tolist()]
    null = scalar_auroc(scalars, shuffled, n_shuffles=99)
    assert (null["q"] > 0.05).all()
    with pytest.raises(MismatchError, match="one label"):
        scalar_auroc(scalars, labels[:3])


def test_what_cannot_be_read_says_why(wide, family_pairs):
    with pytest.raises(MismatchError, match="two whole models"):
        adapter_modules(family_pairs["llama"].sides)
    query = next(m for m in adapter_modules(wide.sides) if m.name.endswith("q_proj"))
    down = next(m for m in adapter_modules(wide.sides) if m.name.endswith("down_proj"))
    with pytest.raises(DirectionError, match="does not write"):
        write_directions(query)
    with pytest.raises(SiteError, match="not the residual"):
        down.reads_in_stream()
    with pytest.raises(MismatchError, match="another model"):
        write_cosines([down], [direction(0, 16)])


def test_an_inert_adapter_writes_nothing():
    pair = ModelPair.load("organism:em-rank1")
    [module] = adapter_modules(pair.sides)
    silent = type(module)(**{**module.__dict__, "b": torch.zeros_like(module.b)})
    with pytest.raises(DirectionError, match="change is zero"):
        write_directions(silent)
    row = adapter_table([silent]).iloc[0]
    assert row["norm"] == 0
    assert math.isnan(row["stable_rank"])
