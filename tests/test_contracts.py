"""What this package relies on in nnsight, transformers and peft: a new version shows here."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import nnsight
import pytest
import torch
from nnsight import TransformersModel
from transformers import GenerationConfig, LogitsProcessorList

from modeldiff.architectures import FAMILIES as MAPS
from modeldiff.hooks import count_hooks, stopping
from modeldiff.tracing import wrap
from tests.families import FAMILIES, model, peft_model, tokenizer

IDS = torch.tensor([[5, 9, 40, 33], [7, 8, 60, 61]])


def with_mask(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(root, **inputs):
    with torch.no_grad():
        return root(**(inputs or with_mask(IDS)), use_cache=False).logits


def wrapped(root):
    return TransformersModel(root, task="text-generation", tokenizer=tokenizer())


def settings(**options):
    return GenerationConfig(do_sample=False, pad_token_id=0, **options)


def test_nnsight_is_the_pinned_version():
    assert version("nnsight") == "0.8.1"


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_return_a_bare_tensor_and_attention_a_tuple(family):
    root, seen = model(family), {}
    layer = root.get_submodule(MAPS[family].layer(1))
    attention = layer.get_submodule(MAPS[family].attn_write)
    layer.register_forward_hook(lambda module, args, out: seen.update(layer=out))
    attention.register_forward_hook(lambda module, args, out: seen.update(attention=out))
    logits(root)
    assert isinstance(seen["layer"], torch.Tensor)
    assert seen["layer"].shape[:2] == IDS.shape
    assert isinstance(seen["attention"], torch.Tensor if family == "gemma2" else tuple)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_take_hidden_states_first_or_by_name_and_can_be_called_again(family):
    root, calls = model(family), []
    layer = root.get_submodule(MAPS[family].layer(2))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    outputs = []
    layer.register_forward_hook(lambda module, args, out: outputs.append(out))
    logits(root)
    args, kwargs = calls[0]
    assert isinstance(args[0] if args else kwargs["hidden_states"], torch.Tensor)
    with torch.no_grad():
        assert torch.equal(layer(*args, **kwargs), outputs[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_hidden_state_is_after_the_final_norm(family):
    root = model(family)
    with torch.no_grad():
        states = root(**with_mask(IDS), output_hidden_states=True).hidden_states
        out = root.get_submodule(MAPS[family].unembed)(states[-1])
        cap = getattr(root.config, "final_logit_softcapping", None)
        out = torch.tanh(out / cap) * cap if cap else out
    torch.testing.assert_close(out, logits(root))
    assert len(states) == root.config.num_hidden_layers + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_derives_positions_from_a_left_padded_mask(family):
    root = model(family)
    padded = torch.cat([torch.zeros_like(IDS[:1]), IDS[:1]], 1)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    out = root.generate(
        input_ids=padded, attention_mask=mask, generation_config=settings(max_new_tokens=5)
    )
    alone = root.generate(**with_mask(IDS[:1]), generation_config=settings(max_new_tokens=5))
    assert torch.equal(out[0, 8:], alone[0, 4:])


def test_a_plain_forward_of_gpt2_does_not():
    """So position_ids must be passed."""
    root = model("gpt2")
    padded = torch.cat([torch.zeros_like(IDS[:1]), IDS[:1]], 1)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 3]])
    alone = logits(root, **with_mask(IDS[:1]))[0, -1]
    without = logits(root, input_ids=padded, attention_mask=mask)[0, -1]
    given = logits(root, input_ids=padded, attention_mask=mask, position_ids=positions)[0, -1]
    torch.testing.assert_close(given, alone, atol=1e-5, rtol=1e-4)
    assert (without - alone).abs().max() > 0.1


def test_a_generation_config_that_is_passed_overrides_but_is_filled_from_the_models():
    """Filled in: that is why generate() sets the model's own settings aside."""
    root = model("llama")
    plain = root.generate(**with_mask(IDS), generation_config=settings(max_new_tokens=6))
    root.generation_config = GenerationConfig(max_new_tokens=2, do_sample=True, pad_token_id=0)
    same = root.generate(**with_mask(IDS), generation_config=settings(max_new_tokens=6))
    assert torch.equal(same, plain)
    root.generation_config = GenerationConfig(repetition_penalty=50.0)
    filled = root.generate(**with_mask(IDS), generation_config=settings(max_new_tokens=6))
    assert not torch.equal(filled, plain)


def test_a_logits_processor_of_ours_decides_and_sees_every_step():
    root, seen = model("llama"), []

    def only_seven(input_ids, scores):
        seen.append(input_ids.shape[1])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    out = root.generate(
        **with_mask(IDS),
        generation_config=settings(max_new_tokens=3),
        logits_processor=LogitsProcessorList([only_seven]),
    )
    assert out[:, 4:].tolist() == [[7] * 3] * 2
    assert seen == [4, 5, 6]


@pytest.mark.parametrize("during", ["forward", "generate"])
def test_stopping_by_an_exception_leaves_the_model_usable(during):
    root = model("llama")
    clean, before = logits(root), count_hooks(root)
    with stopping(root, "model.layers.2"):
        if during == "forward":
            logits(root)
        else:
            root.generate(**with_mask(IDS), generation_config=settings(max_new_tokens=3))
    assert count_hooks(root) == before
    assert torch.equal(logits(root), clean)


# ---------------------------------------------------------------- nnsight


def test_nnsight_mounts_save_on_every_object():
    """So no public method may be called `save`."""
    assert callable(SimpleNamespace().save)


@pytest.mark.parametrize("side", ["left", "right"])
def test_nnsight_sets_the_padding_side_and_wrap_puts_it_back(side):
    words = tokenizer()
    words.padding_side = side
    TransformersModel(model("llama"), task="text-generation", tokenizer=words)
    assert words.padding_side == "left"
    words.padding_side = side
    wrap(model("llama"), words, MAPS["llama"])
    assert words.padding_side == side


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_names_are_the_same_in_every_family(family):
    root = model(family)
    renamed = wrap(root, tokenizer(), MAPS[family])
    with torch.no_grad(), renamed.trace(**with_mask(IDS), use_cache=False):
        embedded = renamed.embed.output.save()
        inner = renamed.layers[1].output.save()
        normed = renamed.ln_final.output.save()
        out = renamed.unembed.output.save()
    assert embedded.shape == inner.shape == normed.shape == (*IDS.shape, 32)
    assert out.shape[:2] == IDS.shape


def test_iterating_over_all_steps_fires_once_for_each_generated_token():
    traced, seen = wrapped(model("llama")), []
    with traced.generate(generation_config=settings(max_new_tokens=5)) as tracer:
        with tracer.invoke(**with_mask(IDS)):
            steps = nnsight.save([])
            for step in tracer.iter[:]:
                steps.append((step, tuple(traced.model.layers[1].output.shape)))
        with tracer.invoke():
            ids = tracer.result.save()
    seen = list(steps)
    assert ids.shape == (2, 9)
    assert seen == [(0, (2, 4, 32))] + [(step, (2, 1, 32)) for step in range(1, 5)]


def test_reading_out_of_order_is_an_error_in_nnsight():
    """So an editor's sites must be in the order of the forward pass."""
    traced = wrapped(model("llama"))
    with pytest.raises(Exception, match="already ran past it"):  # noqa: PT012, SIM117
        with traced.trace(**with_mask(IDS), use_cache=False):
            _ = traced.model.layers[2].output.save()
            _ = traced.model.layers[0].output.save()


def test_two_wrappers_of_one_model_work_side_by_side():
    root = model("llama")
    clean = logits(root)
    for traced in (wrapped(root), wrapped(root)):
        with torch.no_grad(), traced.trace(**with_mask(IDS), use_cache=False):
            out = traced.output.logits.save()
        assert torch.equal(out, clean)
    assert torch.equal(logits(root), clean)


def test_an_exception_in_a_trace_leaves_the_model_usable():
    root = model("llama")
    clean, traced = logits(root), wrapped(root)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012, SIM117
        with traced.trace(**with_mask(IDS), use_cache=False):
            h = traced.model.layers[0].output
            _ = h / (1 // 0)
    assert torch.equal(logits(root), clean)


# ---------------------------------------------------------------- peft


def lora_layers(peft):
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]


def test_switching_the_private_flags_equals_disable_adapter():
    peft = peft_model()
    base, tuned = logits(model("llama")), logits(peft)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), base)
    layers = lora_layers(peft)
    assert len(layers) == 2
    for layer in layers:
        assert layer._disable_adapters is False
        assert list(layer._active_adapter) == ["tuned"] or layer._active_adapter == "tuned"
        layer._disable_adapters = True
    assert torch.equal(logits(peft), base)
    assert torch.equal(logits(peft.get_base_model()), base)
    for layer in layers:
        layer._disable_adapters = False
    assert torch.equal(logits(peft), tuned)


def test_switching_the_active_adapter_equals_set_adapter():
    peft = peft_model()
    peft.add_adapter("other", peft.peft_config["tuned"])
    for name, parameter in peft.named_parameters():
        if "lora_B.other" in name:
            parameter.data.fill_(0.3)
    peft.set_adapter("other")
    expected = logits(peft)
    peft.set_adapter("tuned")
    assert not torch.equal(logits(peft), expected)
    for layer in lora_layers(peft):
        layer._active_adapter = ["other"]
    assert torch.equal(logits(peft), expected)


def test_peft_flips_requires_grad_when_it_switches():
    """So the flags are saved and put back."""
    peft = peft_model()
    with peft.disable_adapter():
        pass
    peft.set_adapter("tuned")
    assert any(p.requires_grad for p in peft.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_silencing_a_is_exactly_the_base(family):
    """-0.0 and 0.0 may differ; values may not."""
    modules = {"gpt2": ("c_proj", "c_attn"), "llama": ("q_proj", "down_proj")}[family]
    peft = peft_model(family, modules=modules)
    for name, module in peft.named_modules():
        if name.endswith("lora_A.tuned"):
            module.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert torch.equal(logits(peft), logits(model(family)))


def test_the_hidden_state_of_an_adapter_is_the_output_of_a():
    peft, seen = peft_model(r=1, layers=(1,)), {}
    module = peft.get_base_model().model.layers[1].mlp.down_proj
    module.lora_A["tuned"].register_forward_hook(lambda m, args, out: seen.update(a=out))
    module.base_layer.register_forward_hook(lambda m, args, out: seen.update(base=out))
    module.register_forward_hook(lambda m, args, out: seen.update(all=out))
    logits(peft)
    assert seen["a"].shape == (*IDS.shape, 1)
    written = module.scaling["tuned"] * module.lora_B["tuned"](seen["a"])
    assert torch.equal(seen["all"], seen["base"] + written)


def test_paths_inside_a_peft_model_are_those_of_the_plain_model():
    names = {name for name, _ in peft_model().get_base_model().named_modules()}
    assert "model.layers.1.mlp.down_proj.lora_A.tuned" in names
    assert not any(name.startswith("base_model") for name in names)


# ---------------------------------------------------------------- imports


def test_importing_is_light():
    """The heavy libraries are imported when they are first needed."""
    heavy = ["nnsight", "peft", "transformers", "bokeh", "IPython", "ipywidgets", "jupyterlab"]
    code = (
        f"import modeldiff, modeldiff.models, sys; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_no_exported_name_is_hidden_by_a_module_of_the_same_name():
    import modeldiff
    from modeldiff import _HOME_OF

    modules = {path.stem for path in Path(modeldiff.__file__).parent.glob("*.py")}
    assert modules & set(_HOME_OF) == set()
