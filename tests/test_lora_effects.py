"""Leave-one-out against one run per variant, planted importance, and null pairs."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from modeldiff.architectures import module_at
from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.errors import InterventionError, JudgeError, MaskError, MismatchError
from modeldiff.interventions import Cell, Plan, ScaleAdapter
from modeldiff.lora import adapter_modules, compare_adapters, write_cosines
from modeldiff.lora_effects import (
    general_or_narrow,
    general_or_narrow_probes,
    leave_one_out,
    leave_one_out_rates,
    scale_sweep,
    units_of,
    without_unit,
)
from modeldiff.lora_scalars import lora_scalars, scalar_auroc
from modeldiff.lora_variants import Variant, random_write, variant_kl, with_random_writes
from modeldiff.models import ModelPair
from tests.families import build_adapter_pair, peft_model, tokenizer

TEXTS = ["the cat sat on the mat", "a small bird sang of rain and sun over hills", "the moon"]
CHATS = [
    [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat on the mat"}],
    [{"role": "user", "content": "rain"}, {"role": "assistant", "content": "ran to the river"}],
    [{"role": "user", "content": "a bird sang"}, {"role": "assistant", "content": "over hills"}],
]
FAMILIES = {
    "llama": ("q_proj", "o_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_neox": ("dense", "dense_4h_to_h"),
    "mistral": ("v_proj", "down_proj"),
    "qwen3": ("k_proj", "down_proj"),
    "gemma2": ("gate_proj", "o_proj"),
}


def one_by_one(pair, texts, factors, **options):
    """KL(variant || base) by one run a variant, with ordinary edits."""
    plan = Plan(tuple(ScaleAdapter(f, layers=s.layer, modules=(s.module,))
                      for f, s in zip(factors, pair.sides.lora, strict=True)))  # fmt: skip
    return effects(pair.sides, texts, [Cell("finetuned", "variant", plan)], **options)["kl"]


QUICK = ("llama", "gpt2", "gemma2")


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAMILIES]
)
def test_variants_in_one_batch_are_one_run_each(family):
    options = {"fan_in_fan_out": True} if family == "gpt2" else {}
    pair = build_adapter_pair(family=family, modules=FAMILIES[family], **options)
    n = len(pair.sides.lora)
    generator = torch.Generator().manual_seed(0)
    rows = [[0.0] * n, [1.0] * n, *torch.randn(3, n, generator=generator).tolist()]
    rows += [[float(i == j) for j in range(n)] for i in (0, n - 1)]
    rows += [[float(i != j) for j in range(n)] for i in (0, n - 1)]
    variants = [Variant(tuple(row)) for row in rows]
    from_full, to_base = variant_kl(pair.sides, TEXTS, variants, on="all", max_tokens=100)
    assert from_full.shape == (len(rows), 3)
    for index, row in enumerate(rows):
        want = one_by_one(pair, TEXTS, row, on="all").to_numpy()
        assert to_base[index] == pytest.approx(want, abs=2e-6, rel=2e-4)
    full = Cell("finetuned")
    want = effects(pair.sides, TEXTS, [full], reference=Cell("finetuned", "v", without_unit(
        pair.sides, [0])), on="all")["kl"]  # fmt: skip
    assert from_full[7] == pytest.approx(want.to_numpy(), abs=2e-6, rel=2e-4)
    assert from_full[1] == pytest.approx(0, abs=1e-6)
    assert to_base[0] == pytest.approx(0, abs=1e-6)


def test_the_batching_changes_nothing():
    pair = build_adapter_pair()
    some = leave_one_out(pair.sides, CHATS, n_random=2, max_tokens=40)
    more = leave_one_out(pair.sides, CHATS, n_random=2, max_tokens=8192)
    pd.testing.assert_frame_equal(some, more, rtol=1e-3, atol=1e-6)


def test_late_variants_do_not_run_early_layers():
    pair = build_adapter_pair(layers=(0, 1, 2, 3))
    passes = dict.fromkeys(range(4), 0)
    root: Any = pair.sides.roots[0]
    layers = root.model.layers
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: passes.update({i: passes[i] + 1}))
    variant_kl(pair.sides, CHATS[:1], [Variant((1.0, 1.0, 1.0, 0.0)), Variant((0.0, 0.0, 0.0, 1))])
    assert passes == {0: 2, 1: 2, 2: 2, 3: 3}


def planted(strengths=(3.0, 0.3, 0.0, 0.01), n_layers=4):
    """An adapter whose modules matter in a known order: the same write, of known lengths."""
    peft: Any = peft_model(r=1, layers=range(n_layers))
    word = peft.get_base_model().lm_head.weight[40]
    for i, strength in enumerate(strengths):
        down = peft.get_base_model().model.layers[i].mlp.down_proj
        a = down.lora_A["tuned"].weight
        a.copy_(a.abs())
        down.lora_B["tuned"].weight.copy_(strength * (word / word.norm())[:, None])
    return ModelPair.of(peft, None, tokenizer())


def test_planted_importance_is_ranked_by_both_ways():
    found: Any = leave_one_out(planted().sides, CHATS, n_random=0)
    assert found["unit"].tolist()[:2] == ["0.mlp.down_proj", "1.mlp.down_proj"]
    assert found.set_index("unit").loc["2.mlp.down_proj", ["out", "in"]].tolist() == [0.0, 0.0]
    alone = found.sort_values("in", ascending=False)["unit"].tolist()
    assert alone == [f"{i}.mlp.down_proj" for i in (0, 1, 3, 2)]
    assert (found["out_low"] <= found["out"]).all()
    assert (found["total"] > 0).all()
    assert found["out_p"].isna().all()


def test_a_write_that_matters_beats_random_writes_of_its_size():
    """Towards an unembedding row in the last layer: more than any random direction does."""
    peft: Any = peft_model(r=1, layers=(3,))
    base = peft.get_base_model()
    scores = base.model.norm.weight * base.lm_head.weight
    head = torch.linalg.svd(scores, full_matrices=False)
    down = base.model.layers[3].mlp.down_proj
    down.lora_B["tuned"].weight.copy_(0.5 * head.Vh[:1].T)
    pair = ModelPair.of(peft, None, tokenizer())
    row: Any = leave_one_out(pair.sides, CHATS, n_random=19, on="all").iloc[0]
    assert row["in_p"] == 1 / 20
    assert row["in"] > row["in_random_high"]


def test_units_are_modules_layers_kinds_or_patterns():
    pair = build_adapter_pair(modules=("o_proj", "down_proj"))
    assert units_of(pair.sides, "layer") == {"layer 1": (0, 1), "layer 2": (2, 3)}
    assert units_of(pair.sides, "kind") == {"self_attn.o_proj": (0, 2), "mlp.down_proj": (1, 3)}
    assert units_of(pair.sides, {"late": ["2.*"]}) == {"late": (2, 3)}
    found = leave_one_out(pair.sides, CHATS, by={"all": ["*"]}, n_random=0)
    assert found["in"].iloc[0] == pytest.approx(found["total"].iloc[0], rel=1e-4)
    with pytest.raises(MismatchError, match="nothing of"):
        units_of(pair.sides, {"no": ["9.*"]})
    with pytest.raises(MismatchError, match="one of module"):
        units_of(pair.sides, "head")


def test_sweeping_the_scale_passes_the_base_and_the_fine_tune():
    pair = build_adapter_pair()
    table: Any = scale_sweep(pair.sides, CHATS, (-1.0, 0.0, 1.0, 2.0), n_random=3).set_index(
        "factor"
    )
    assert table.loc[0.0, "kl"] == pytest.approx(0, abs=1e-6)
    assert table.loc[1.0, "from_full"] == pytest.approx(0, abs=1e-6)
    want = one_by_one(pair, CHATS, [2.0, 2.0], on="new").mean()
    assert table.loc[2.0, "kl"] == pytest.approx(want, rel=1e-3)
    assert table.loc[-1.0, "kl"] > 0


def test_rates_fall_where_the_planted_word_was_written():
    pair = planted((0.0, 0.0, 60.0, 1e-3))
    word: Any = tokenizer().convert_ids_to_tokens(40)
    found: Any = leave_one_out_rates(
        pair.sides, [CHATS[i][:1] for i in range(3)], lambda i, a: word.replace("Ġ", "") in a,
        n=4, n_random=3, max_new_tokens=4,
    ).set_index("unit")  # fmt: skip
    strong = found.loc["2.mlp.down_proj"]
    assert strong["rate_full"] > 0.7
    assert strong["rate_without"] < 0.3
    assert strong["high"] < 0
    assert strong["random_low"] > strong["change"]
    assert strong["p"] == 1 / 4
    assert (found["random_low"] <= found["random_high"]).all()
    assert found.loc["0.mlp.down_proj", "p"] == 1
    assert found.loc["0.mlp.down_proj", "change"] == 0
    assert found.loc["whole adapter", "change"] == pytest.approx(strong["change"], abs=0.2)
    with pytest.raises(JudgeError, match="none could be judged"):
        leave_one_out_rates(pair.sides, ["the"], lambda i, a: None, max_new_tokens=1)


def test_random_writes_are_added_to_the_weights_and_taken_away_again():
    pair = planted((0.0, 0.0, 60.0, 1e-3))

    def logits():
        found = pair.run(["the cat sat"]).logits
        assert found is not None
        return found

    before = logits()
    with with_random_writes(pair.sides, [2], seed=0, draw=1):
        hooked = logits()
    assert torch.equal(logits(), before)
    site = pair.sides.lora[2]
    with pair.sides.on("finetuned") as root, torch.no_grad():
        b: Any = module_at(root, f"{pair.sides.site_map.layer(site.layer)}.{site.module}")
        weight = b.lora_B[pair.sides.adapter].weight
        kept = weight.clone()
        extra = random_write(weight, 0, 2, 1)
        weight += extra
    assert float(extra.norm()) == pytest.approx(float(kept.norm()), rel=1e-5)
    assert torch.allclose(logits(), hooked, atol=1e-4)
    assert not torch.allclose(hooked, before, atol=1e-2)


def changes(rows):
    return pd.DataFrame(rows, columns=["unit", "change", "low", "high"])


def test_general_and_narrow_are_told_apart_by_intervals():
    general = changes([("a", -0.5, -0.6, -0.4), ("b", 0.0, -0.1, 0.1), ("c", -0.3, -0.4, -0.2),
                     ("d", 0.0, 0.0, 0.0)])  # fmt: skip
    narrow = changes([("a", 0.0, -0.1, 0.1), ("b", -0.5, -0.6, -0.4), ("c", -0.3, -0.4, -0.2),
                    ("d", 0.0, 0.0, 0.0)])  # fmt: skip
    found = general_or_narrow(general, narrow)
    assert found["label"].tolist() == ["general", "narrow", "both", "neither"]
    with pytest.raises(MismatchError, match="one adapter"):
        general_or_narrow(general, narrow[:2])


def test_probes_classify_a_general_and_a_narrow_module():
    pair = build_adapter_pair(r=1)
    scalars = lora_scalars(
        pair.sides, [f"{i} cats" for i in range(60)], adapter_modules(pair.sides)
    )
    draw = np.random.default_rng(0)
    bad, topic = draw.random(60) < 0.5, draw.random(60) < 0.5
    for name, cue in (("1.mlp.down_proj", bad), ("2.mlp.down_proj", topic)):
        for text in range(60):
            rows = scalars.text_index == text
            scalars.values[name][rows] = float(cue[text]) + 0.3 * draw.normal()
    general = scalar_auroc(
        scalars, [bool(b) if not t else None for b, t in zip(bad, topic, strict=True)]
    )
    narrow = scalar_auroc(
        scalars, [bool(t) if not b else None for b, t in zip(bad, topic, strict=True)]
    )
    assert general_or_narrow_probes(general, narrow)["label"].tolist() == ["general", "narrow"]


def test_what_cannot_be_left_out_says_why(family_pairs):
    with pytest.raises(InterventionError, match="adapter"):
        variant_kl(family_pairs["llama"].sides, TEXTS, [Variant((1.0,))])
    pair = build_adapter_pair()
    with pytest.raises(InterventionError, match="needs 2 factors"):
        variant_kl(pair.sides, TEXTS, [Variant((1.0,))])
    with pytest.raises(MaskError, match="no predicted token"):
        leave_one_out(pair.sides, TEXTS, on="new", n_random=0)


def null_adapter(seed, size=0.02):
    """Random writes: nothing was taught, whatever predictions do."""
    peft = peft_model(r=1, layers=(0, 1, 2, 3), seed=seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.mul_(size / 0.3)
    return ModelPair.of(peft, None, tokenizer())


@pytest.mark.slow
def test_null_adapters_raise_about_as_many_alarms_as_they_may(capsys):
    """Forty adapters with random writes, alpha .05 everywhere."""
    alarms = {"out": [], "in": [], "write cosine": [], "scalar probe": [], "adapter cosine": []}
    first = adapter_modules(null_adapter(999).sides)
    for seed in range(40):
        pair = null_adapter(seed)
        modules = adapter_modules(pair.sides)
        found = leave_one_out(pair.sides, CHATS, n_random=19, seed=seed, on="all")
        alarms["out"] += (found["out_p"] <= 0.05).tolist()
        alarms["in"] += (found["in_p"] <= 0.05).tolist()
        for number in range(5):
            draw = torch.randn(32, generator=torch.Generator().manual_seed(1000 * seed + number))
            unrelated = Direction.of(draw, "resid_post.1", "unrelated")
            q = write_cosines(modules, [unrelated], seed=5 * seed + number)["q"]
            alarms["write cosine"].append(bool((q <= 0.05).any()))
        scalars = lora_scalars(pair.sides, TEXTS * 4, modules)
        labels = np.random.default_rng(seed).permutation([True, False] * 6).tolist()
        probes = scalar_auroc(scalars, labels, n_shuffles=99, seed=seed)
        alarms["scalar probe"].append(bool((probes["q"] <= 0.05).any()))
        alarms["adapter cosine"].append(compare_adapters(first, modules, seed=seed).p <= 0.05)
    rates = {name: (sum(each), len(each)) for name, each in alarms.items()}
    with capsys.disabled():
        print(f"\nalarms at alpha .05 over 40 null adapters: {rates}")
    for name, (count, n) in rates.items():
        assert count <= 0.05 * n + 3 * (0.05 * 0.95 * n) ** 0.5, name
