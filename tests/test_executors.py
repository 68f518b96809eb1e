"""One plan, two executors: plain hooks and nnsight must agree bit for bit on every family."""

from typing import Any

import pytest
import torch

from modeldiff.architectures import FAMILIES as MAPS
from modeldiff.architectures import SiteMap, module_at, site_map_of
from modeldiff.directions import Direction
from modeldiff.errors import InterventionError, SiteError
from modeldiff.hooks import count_hooks
from modeldiff.interventions import (
    Ablate,
    Clamp,
    Plan,
    Replace,
    ScaleAdapter,
    ScaleAlong,
    Steer,
)
from modeldiff.sites import Site
from tests.families import FAMILIES, N_LAYERS, WIDTH, build_adapter_pair, model, peft_model

TEXTS = ["the cat sat on", "a small bird sang of rain and sun over", "why"]


def direction(seed=0, site="resid_post.1", width=WIDTH):
    g = torch.Generator().manual_seed(seed)
    return Direction.of(torch.randn(width, generator=g), site, f"d{seed}")


def everything(width=48):
    """A plan that touches every kind of site and every kind of edit."""
    d, e = direction(0), direction(1)
    return (
        Steer(d, 0.7, layers=(0, 2))
        + Ablate([d, e], where="last")
        + ScaleAlong(e, 2.0, layers=3)
        + Clamp(direction(2, "attn_out.1"), 0.5)
        + Steer(direction(3, "mlp_out.2"), -1.0)
        + Ablate(direction(4, "z.1"), layers=None)
        + Steer(direction(6, "resid_pre.2"), 0.3)
        + Replace("resid_post.0", "base", along=d, where="prompt")
        + Replace(("z.3", "attn_out.0"), "base", where="prompt", channels=(8, 16))
    )


SITES = tuple(
    Site(kind, layer)
    for layer in range(N_LAYERS)
    for kind in ("resid_pre", "z", "attn_out", "mlp_act", "mlp_out", "resid_post")
)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_agrees_bit_for_bit(family_pairs, family):
    pair = family_pairs[family]
    plain = pair.run(TEXTS)
    hooks = pair.run(TEXTS, do=everything(), reads=SITES)
    nnsight = pair.run(TEXTS, do=everything(), reads=SITES, engine="nnsight")
    assert torch.equal(hooks.logits, nnsight.logits)
    assert all(torch.equal(hooks.acts[site], nnsight.acts[site]) for site in SITES)
    real = hooks.batch.attention_mask.bool()
    assert (hooks.logits - plain.logits)[real].abs().amax(-1).min() > 1e-4, "some row was spared"


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_kv_cache_agrees_token_for_token(family_pairs, family):
    pair = family_pairs[family]
    do = {"steer": Steer(direction(0), 3.0, where="new"), "all": everything()}
    settings = {"do": do, "n": 2, "seed": 3, "temperature": 0.9, "max_new_tokens": 6}
    hooks = pair.generate(TEXTS, models=("finetuned",), **settings)
    nnsight = pair.generate(TEXTS, models=("finetuned",), **settings, engine="nnsight")
    assert [a.ids for a in hooks.answers] == [a.ids for a in nnsight.answers]
    assert len({a.ids for a in hooks.answers}) > len(TEXTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_and_equal_finite_differences(family_pairs, family):
    pair = family_pairs[family]
    do = Steer(direction(0), 0.5) + Ablate(direction(1), layers=(2, 3))
    sites = (Site("resid_post", 0), Site("attn_out", 2), Site("resid_post", 3))
    grads = []
    for engine in ("hooks", "nnsight"):
        run = pair.run(TEXTS, do=do, reads=sites, grad=True, engine=engine)
        loss = run.logits[:, -1].float().log_softmax(-1)[:, 5].sum()
        grads.append(torch.autograd.grad(loss, [run.acts[site] for site in sites]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(grad.abs().sum() > 0 for grad in grads[0])


def test_gradient_at_the_leaf_equals_a_finite_difference(family_pairs):
    pair, site = family_pairs["llama"], Site("resid_post", 1)
    run = pair.run(TEXTS, reads=(site,), grad=True)
    score = run.logits[:, -1, 5].sum()
    (grad,) = torch.autograd.grad(score, [run.acts[site]])
    bump = direction(9)
    step = 1e-3
    steer = Steer(bump, step / bump.scale, where="last")
    there = pair.run(TEXTS, do=steer).logits[:, -1, 5].sum()
    slope = (there - score.detach()) / step
    assert float(slope) == pytest.approx(float((grad[:, -1] @ bump.unit).sum()), rel=0.05)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_single_also_for_absolute_positions(family_pairs, family, engine):
    pair = family_pairs[family]
    do = Steer(direction(0), 0.7, where="last")
    batch = pair.run(TEXTS, do=do, engine=engine).logits[:, -1]
    for row, text in enumerate(TEXTS):
        alone = pair.run([text], do=do, engine=engine).logits[0, -1]
        torch.testing.assert_close(batch[row], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_lora_scalars_and_adapter_edits_agree(adapter_pair, engine):
    sites = adapter_pair.sides.lora
    base = adapter_pair.run(TEXTS, side="base", engine=engine)
    off = adapter_pair.run(TEXTS, do=ScaleAdapter(0.0), reads=sites, engine=engine)
    half = adapter_pair.run(TEXTS, do=ScaleAdapter(0.5, layers=1), engine=engine)
    assert torch.equal(off.logits, base.logits)
    assert all(run.abs().max() == 0 for run in off.acts.values())
    other = adapter_pair.run(TEXTS, do=ScaleAdapter(0.5, layers=1), engine="hooks")
    assert torch.equal(half.logits, other.logits)
    assert not torch.equal(half.logits, adapter_pair.run(TEXTS).logits)


def test_patching_a_whole_layer_of_the_base_in_gives_the_base(adapter_pair):
    patched = adapter_pair.run(TEXTS, do=Replace("resid_post.3", "base"))
    assert torch.equal(patched.logits, adapter_pair.run(TEXTS, side="base").logits)


def test_row_one_of_a_batch_is_edited_too(family_pairs):
    for pair in family_pairs.values():
        run = pair.run(TEXTS, do=Clamp(direction(0), 4.0), reads="resid_post.1")
        component = run.acts[Site("resid_post", 1)] @ direction(0).unit
        real = run.batch.attention_mask.bool()
        torch.testing.assert_close(component[real], torch.full_like(component[real], 4.0))


def test_captured_tensors_are_not_changed_by_later_edits(family_pairs):
    pair = family_pairs["llama"]
    before = pair.run(TEXTS, reads="resid_post.1").acts[Site("resid_post", 1)]
    pre = pair.run(TEXTS, do=Steer(direction(0), 5.0, layers=2), reads="resid_post.1")
    assert torch.equal(pre.acts[Site("resid_post", 1)], before)


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize(
    ("where", "cause"), [("new", "selects no token"), ("assistant", "selects no token")]
)
def test_an_edit_that_does_not_fire_is_an_error(family_pairs, engine, where, cause):
    with pytest.raises(InterventionError, match=cause):
        family_pairs["llama"].run(TEXTS, do=Steer(direction(0), where=where), engine=engine)


def test_an_edit_at_a_layer_that_does_not_exist_is_an_error_before_anything_runs(family_pairs):
    with pytest.raises(InterventionError, match=r"layers \[9\] asked for, the model has 0 to 3"):
        family_pairs["llama"].run(TEXTS, do=Steer(direction(0), layers=(1, 9)))


def test_a_module_that_never_runs_is_an_error(family_pairs):
    """A site whose module exists but is bypassed must not pass for edited."""
    pair = family_pairs["llama"]
    layer = pair.sides.root("finetuned").model.layers[1]
    original = layer.mlp.forward
    layer.mlp.forward = lambda x: x * 0.5  # down_proj no longer runs
    try:
        with pytest.raises(InterventionError, match="never reached"):
            pair.run(TEXTS, do=Steer(direction(0, "mlp_act.1", 48)))
    finally:
        layer.mlp.forward = original


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_hooks_and_adapter_state_survive_an_exception(engine):
    pair = build_adapter_pair()
    root = pair.sides.root("base")
    before = count_hooks(root)
    clean = pair.run(TEXTS).logits

    class Boom(RuntimeError):
        pass

    def explode(*_):
        raise Boom

    handle = root.model.layers[2].register_forward_hook(explode)
    for side in ("base", "finetuned"):
        with pytest.raises(Boom):
            pair.run(TEXTS, side=side, do=Steer(direction(0)), engine=engine)
    handle.remove()
    assert count_hooks(root) == before
    torch.testing.assert_close(pair.run(TEXTS).logits, clean, rtol=0, atol=0)


def test_replace_from_itself_is_refused(adapter_pair):
    with pytest.raises(InterventionError, match="from itself"):
        adapter_pair.run(TEXTS, side="base", do=Replace("resid_post.1", "base"))


@pytest.mark.ill_typed
def test_there_are_two_engines(adapter_pair):
    for call in (adapter_pair.run, adapter_pair.generate):
        with pytest.raises(InterventionError, match="'hooks' or 'nnsight'"):
            call(TEXTS[:1], engine="nsight")


def test_empty_plan_changes_nothing(family_pairs):
    pair = family_pairs["qwen2"]
    torch.testing.assert_close(
        pair.run(TEXTS, do=Plan()).logits, pair.run(TEXTS).logits, rtol=0, atol=0
    )


def test_unknown_family_says_how_to_go_on():
    from transformers import OPTConfig, OPTForCausalLM

    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
            num_attention_heads=2, word_embed_proj_dim=16,
        )
    )  # fmt: skip
    with pytest.raises(SiteError, match="site_map=SiteMap"):
        site_map_of(opt)


def test_a_wrong_map_is_caught_at_load():
    from modeldiff.models import ModelPair
    from tests.families import tokenizer

    wrong = SiteMap(attn_write="input_layernorm")
    with pytest.raises(SiteError, match="not what is added to the residual stream"):
        ModelPair.of(model("llama"), model("llama", 1), tokenizer(), site_map=wrong)
    with pytest.raises(SiteError, match=r"no module 'model\.layer"):
        ModelPair.of(
            model("llama"), model("llama", 1), tokenizer(), site_map=SiteMap(layers="model.layer")
        )


def test_every_map_names_modules_that_exist(family_pairs):
    for family, pair in family_pairs.items():
        for site in SITES:
            path, _ = MAPS[family].locate(site)
            assert module_at(pair.sides.root("base"), path) is not None


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_write_uses_the_right_scale(rslora):
    """alpha / r, and alpha / sqrt(r) with rsLoRA: compare with the merged weights."""
    peft = peft_model(r=4, use_rslora=rslora)
    from modeldiff.models import ModelPair
    from tests.families import tokenizer

    pair = ModelPair.of(peft, None, tokenizer())
    tuned = pair.run(TEXTS).logits
    module: Any = module_at(pair.sides.root("finetuned"), "model.layers.1.mlp.down_proj")
    a, b = module.lora_A["tuned"].weight, module.lora_B["tuned"].weight
    scale = 8 / (4**0.5 if rslora else 4)
    merged: Any = peft.merge_and_unload()
    torch.testing.assert_close(
        merged.model.layers[1].mlp.down_proj.weight,
        model("llama").model.layers[1].mlp.down_proj.weight + scale * b @ a,
    )
    two = ModelPair.of(model("llama"), merged, tokenizer())
    torch.testing.assert_close(two.run(TEXTS).logits, tuned, atol=1e-4, rtol=1e-4)
