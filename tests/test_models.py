"""Pairs: loading, what is refused and why, the identity of both sides, and their digests."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeldiff.amplification import amplify
from modeldiff.directions import Direction
from modeldiff.errors import (
    InactiveAdapterError,
    InterventionError,
    MaskError,
    MismatchError,
    ModelDiffError,
    SetupError,
    SiteError,
)
from modeldiff.interventions import Steer
from modeldiff.models import ModelPair
from modeldiff.pretrained import check_names
from modeldiff.sites import Site
from tests.families import WIDTH, config_of, model, peft_model, tokenizer

TEXTS = ["the cat sat on", "a small bird sang of rain and sun over", "why"]


def save_model(path, made, words=None):
    made.save_pretrained(path)
    if words is not None:
        words.save_pretrained(path)
    return path


def randomise(peft, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return peft


def save_adapter(path, seed=0, **options):
    peft_model(seed=seed, **options).save_pretrained(path)
    return path / "tuned"


def edit_config(path, **changes):
    file = Path(path) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A base, a full fine-tune and two adapters of the base, all on disk."""
    root = tmp_path_factory.mktemp("pairs")
    save_model(root / "base", model("llama"), tokenizer())
    save_model(root / "repository" / "tuned", model("llama", 1), tokenizer())
    save_adapter(root / "one", 0)
    save_adapter(root / "two", 1)
    save_adapter(root / "untrained", 0)
    weights = root / "untrained" / "tuned" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    zeroed = {k: v * 0 if "lora_B" in k else v for k, v in load_file(weights).items()}
    save_file(zeroed, weights)
    return root


@pytest.fixture(scope="module")
def loaded(disk):
    adapters = {"one": disk / "one" / "tuned", "two": disk / "two" / "tuned"}
    return ModelPair.load(disk / "base", adapter=adapters)


# ---------------------------------------------------------------- loading


def test_load_two_models_by_path_and_subfolder(disk):
    pair = ModelPair.load(disk / "base", disk / "repository", subfolder="tuned")
    memory = ModelPair.of(model("llama"), model("llama", 1), tokenizer())
    assert (pair.kind, pair.n_layers, pair.d_model, pair.adapters) == ("two", 4, WIDTH, ())
    for side in ("base", "finetuned"):
        assert torch.equal(pair.run(TEXTS, side=side).logits, memory.run(TEXTS, side=side).logits)
    assert pair.digests == memory.digests


def test_base_can_lie_in_a_subfolder(disk, tmp_path):
    save_model(tmp_path / "repository" / "inner", model("llama"), tokenizer())
    pair = ModelPair.load(
        tmp_path / "repository", disk / "repository" / "tuned", base_subfolder="inner"
    )
    assert torch.equal(pair.run(TEXTS, side="base").logits, plain_logits(model("llama")))


def plain_logits(root):
    """Logits of transformers alone on the left-padded batch of TEXTS."""
    from modeldiff.batching import make_batch
    from modeldiff.tokens import render

    batch = make_batch([render(tokenizer(), text) for text in TEXTS], 0, "left")
    with torch.no_grad():
        return root(
            input_ids=batch.ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_adapter_pair_base_side_is_the_untouched_base(loaded, engine):
    assert torch.equal(
        loaded.run(TEXTS, side="base", engine=engine).logits, plain_logits(model("llama"))
    )


def test_adapter_side_is_what_peft_computes(loaded, disk):
    from peft import PeftModel

    for name in ("one", "two"):
        peft = PeftModel.from_pretrained(model("llama"), disk / name / "tuned").eval()
        ours = loaded.with_adapter(name).run(TEXTS).logits
        assert torch.equal(ours, plain_logits(peft))


def test_adapters_of_one_base_share_weights_and_differ(loaded):
    other = loaded.with_adapter("two")
    assert loaded.adapters == other.adapters == ("one", "two")
    assert other.sides.roots[0] is loaded.sides.roots[0]
    one, two = loaded.run(TEXTS).logits, other.run(TEXTS).logits
    assert not torch.allclose(one, two, atol=1e-2)
    assert torch.equal(loaded.run(TEXTS).logits, one), "the other adapter stayed on"
    assert torch.equal(other.run(TEXTS, side="base").logits, loaded.run(TEXTS, side="base").logits)
    with pytest.raises(MismatchError, match=r"no adapter 'three'.*\['one', 'two'\]"):
        loaded.with_adapter("three")


def test_adapter_in_a_subfolder(disk):
    pair = ModelPair.load(disk / "base", adapter=disk / "one", subfolder="tuned")
    assert torch.equal(
        pair.run(TEXTS).logits,
        ModelPair.load(disk / "base", adapter=disk / "one" / "tuned").run(TEXTS).logits,
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_toggled_equals_merged(family, rslora):
    modules = {"gpt2": ("c_proj",), "gpt_neox": ("dense",), "llama": ("o_proj", "up_proj")}
    peft = peft_model(family, r=4, modules=modules[family], use_rslora=rslora)
    pair = ModelPair.of(peft, None, tokenizer())
    toggled, base = pair.run(TEXTS).logits, pair.run(TEXTS, side="base").logits
    merged = ModelPair.of(model(family), peft.merge_and_unload(), tokenizer())
    assert (merged.run(TEXTS).logits - toggled).abs().max() <= 1e-5 * toggled.abs().max()
    assert torch.equal(merged.run(TEXTS, side="base").logits, base)
    assert (toggled - base).abs().max() > 0.1


def test_number_of_parameters(loaded):
    base = sum(p.numel() for p in model("llama").parameters())
    adapter = 2 * 2 * 2 * (48 + WIDTH)  # adapters x layers x rank x (in + out) of down_proj
    assert loaded.n_parameters == (base, base + adapter)
    two = ModelPair.of(model("llama"), model("llama", 1), tokenizer())
    assert two.n_parameters == (base, 2 * base)


def test_tied_embeddings_count_once():
    tied = AutoModelForCausalLM.from_config(config_of("gpt2", 400)).eval()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    other = AutoModelForCausalLM.from_config(config_of("gpt2", 400)).eval()
    base = sum(p.numel() for p in tied.parameters())
    assert ModelPair.of(tied, other, tokenizer()).n_parameters == (base, 2 * base)


# ---------------------------------------------------------------- what is refused


def test_all_mismatches_are_named_in_one_error(disk, tmp_path):
    config = config_of("llama", 399)
    config.hidden_size, config.num_hidden_layers, config.head_dim = 16, 2, 4
    save_model(tmp_path / "other", LlamaForCausalLM(config), tokenizer())
    with pytest.raises(MismatchError) as raised:
        ModelPair.load(disk / "base", tmp_path / "other")
    text = str(raised.value)
    assert all(word in text for word in ("vocab_size", "hidden_size", "num_hidden_layers"))
    assert all(value in text for value in ("399", "16", "32", "Is it the right base?"))
    with pytest.raises(MismatchError) as raised:
        ModelPair.of(model("llama"), LlamaForCausalLM(config), tokenizer())
    assert all(
        word in str(raised.value) for word in ("vocab_size", "hidden_size", "num_hidden_layers")
    )


def test_tokenizers_that_differ_are_refused(disk, tmp_path):
    words = tokenizer()
    words.add_tokens(["zebra"])
    save_model(tmp_path / "added", model("llama", 1), words)
    with pytest.raises(MismatchError, match=r"1 tokens are known to one side only, e\.g\. 'zebra'"):
        ModelPair.load(disk / "base", tmp_path / "added")

    save_model(tmp_path / "swapped", model("llama", 1), tokenizer())
    file = tmp_path / "swapped" / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(raw))
    with pytest.raises(MismatchError, match="2 tokens have other ids"):
        ModelPair.load(disk / "base", tmp_path / "swapped")


def test_control_tokens_may_have_two_names_if_that_is_said(tmp_path):
    for name, token, seed in (("base", "<|reserved|>", 0), ("tuned", "<think>", 1)):
        words = tokenizer()
        words.add_special_tokens({"additional_special_tokens": [token]})
        save_model(tmp_path / name, model("llama", seed), words)
    both = tmp_path / "base", tmp_path / "tuned"
    with pytest.raises(MismatchError, match="special_tokens='renamed' accepts them"):
        ModelPair.load(*both)
    pair = ModelPair.load(*both, special_tokens="renamed")
    assert "<think>" in pair.tokenizer.get_vocab()
    assert "<|reserved|>" not in pair.tokenizer.get_vocab()
    with pytest.raises(MismatchError, match="two whole models loaded here"):
        ModelPair.load(*both, special_tokens="renamed", remote=True)
    file = tmp_path / "tuned" / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(raw))
    with pytest.raises(MismatchError, match="2 tokens have other ids"):
        ModelPair.load(*both, special_tokens="renamed")


def test_tokenizers_that_cut_differently_are_refused(disk, tmp_path):
    """The same vocabulary, other merges: the same text has other ids."""
    save_model(tmp_path / "merges", model("llama", 1), tokenizer())
    file = tmp_path / "merges" / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:3]
    file.write_text(json.dumps(raw))
    with pytest.raises(MismatchError, match="cut"):
        ModelPair.load(disk / "base", tmp_path / "merges")


def test_a_fine_tune_without_a_tokenizer_has_the_bases(disk, tmp_path):
    save_model(tmp_path / "bare", model("llama", 1))
    assert ModelPair.load(disk / "base", tmp_path / "bare").kind == "two"


def test_names_of_adapters_are_no_parts_of_paths(disk, tmp_path):
    """PEFT finds an adapter's tensors by its name among the parts of their paths."""
    first, second = save_adapter(tmp_path / "a"), save_adapter(tmp_path / "b", layers=(3,))
    pair = ModelPair.load(disk / "base", adapter={"A": first, "B": second})
    assert [site.layer for site in pair.sides.lora] == [1, 2]
    assert [site.layer for site in pair.with_adapter("B").sides.lora] == [3]
    root = pair.sides.roots[0]
    assert not check_names(["layers"], root)
    assert all(len(check_names([name], root)) == 1 for name in ("", "a.b", "weight", "lora_A"))
    assert all(len(check_names([name, "x"], root)) == 1 for name in ("layers", "mlp", "1"))
    with pytest.raises(MismatchError, match="Take other names"):
        ModelPair.load(disk / "base", adapter={"mlp": first, "x": second})
    with pytest.raises(MismatchError, match="no adapter in it"):
        ModelPair.load(disk / "base", adapter={})


@pytest.mark.parametrize("modules", [("embed_tokens",), ("lm_head", "down_proj")])
def test_a_saved_adapter_of_embeddings_says_that_it_must_be_merged(modules, tmp_path, disk):
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model("llama"), LoraConfig(r=2, target_modules=list(modules)))
    randomise(peft, 0).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"whole tensors, e\.g\. .*merge_and_unload"):
        ModelPair.load(disk / "base", adapter=tmp_path)


def test_an_adapter_and_a_whole_model_are_not_taken_for_each_other(disk, tmp_path):
    """Loaded as a whole model, an adapter would have the base's digest: other results' keys."""
    peft = peft_model()
    peft.save_pretrained(tmp_path)
    edit_config(tmp_path / "tuned", base_model_name_or_path=str(disk / "base"))
    with pytest.raises(MismatchError, match="pass it as adapter="):
        ModelPair.load(disk / "base", tmp_path / "tuned")
    for given in disk / "base", tmp_path / "nothing":
        with pytest.raises(SetupError, match="passed as finetuned="):
            ModelPair.load(disk / "base", adapter=given)
    for tuned in peft, peft.get_base_model():
        with pytest.raises(MismatchError, match=r"adapter inside it.*None, tokenizer"):
            ModelPair.of(model("llama"), tuned, tokenizer())


def test_weights_that_are_not_in_the_files_are_not_made_up(disk, tmp_path):
    from safetensors.torch import load_file, save_file

    name = "model.layers.2.mlp.up_proj.weight"
    for fault in ("missing", "size"):
        path = save_model(tmp_path / fault, model("llama", 1), tokenizer())
        state = load_file(path / "model.safetensors")
        state[name] = torch.ones(3, 3)
        kept = {key: each for key, each in state.items() if fault == "size" or key != name}
        save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SetupError, match=f"lacks 1 tensors .*{name}: they would be random"):
            ModelPair.load(disk / "base", path)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(SetupError, match="no model could be loaded"):
        ModelPair.load(disk / "base", path)
    adapter = save_adapter(tmp_path / "adapter")
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(SetupError, match="Download or save it again"):
        ModelPair.load(disk / "base", adapter=adapter)


def test_weights_that_are_not_finite_are_named():
    broken = model("llama", 1)
    broken.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(MismatchError, match=r"layers\.2\.mlp\.up_proj\.weight.*damaged"):
        ModelPair.of(model("llama"), broken, tokenizer())
    large = model("llama", 1)
    large.model.layers[3].mlp.up_proj.weight.mul_(1e4)
    large.model.layers[3].mlp.down_proj.weight.mul_(1e4)
    with pytest.raises(MismatchError, match="too large for the dtype"):
        ModelPair.of(model("llama").half(), large.half(), tokenizer())


def test_a_fine_tune_with_more_tokens_says_how_to_go_on():
    longer = model("llama", 1)
    longer.resize_token_embeddings(len(tokenizer()) + 1)
    with pytest.raises(MismatchError, match=r"added 1 tokens.*resize_token_embeddings"):
        ModelPair.of(model("llama"), longer, tokenizer())


def test_texts_longer_than_learned_positions_are_refused():
    pair = ModelPair.of(model("gpt2"), model("gpt2", 1), tokenizer())
    long = "a" * 129
    assert pair.run([long[:-1]]).logits.shape[1] == 128
    for call in (pair.run, pair.output_diff, lambda texts: pair.capture(texts, "resid_post.1")):
        with pytest.raises(MaskError, match=r"129 tokens.*positions for 128"):
            call([long])
    with pytest.raises(MaskError, match="127 tokens and 2 new ones"):
        amplify(pair.sides, [long[:127]], max_new_tokens=3)
    with pytest.raises(MaskError, match="127 tokens and 2 new ones"):
        pair.generate([long[:127]], max_new_tokens=3)
    wide = Steer(Direction.of(torch.ones(3), "mlp_act.1", "narrow"))
    with pytest.raises(InterventionError, match="3 numbers and activations there have"):
        pair.run(["a"], do=wide)
    rotary = ModelPair.of(model("llama"), model("llama", 1), tokenizer())
    assert rotary.run([long]).logits.shape[1] == 129


@pytest.mark.parametrize("both", [True, False])
def test_exactly_one_of_finetuned_and_adapter(disk, both):
    given = {"finetuned": disk / "base", "adapter": disk / "one"} if both else {}
    with pytest.raises(MismatchError, match="one of finetuned="):
        ModelPair.load(disk / "base", **given)


def test_of_wants_two_models_or_one_peft_model():
    with pytest.raises(MismatchError, match="two models"):
        ModelPair.of(model("llama"), None, tokenizer())
    with pytest.raises(MismatchError, match="two models"):
        ModelPair.of(peft_model(), model("llama"), tokenizer())
    with pytest.raises(MismatchError, match=r"not loaded; the model has \['tuned'\]"):
        ModelPair.of(peft_model(), None, tokenizer(), adapter="other")


def test_adapter_of_a_base_with_other_modules_names_the_tensors(disk, tmp_path):
    path = save_adapter(tmp_path, modules=("down_proj", "o_proj"))
    edit_config(path, target_modules=["down_proj", "up_proj"])
    with pytest.raises(MismatchError) as raised:
        ModelPair.load(disk / "base", adapter=path)
    text = str(raised.value)
    assert "4 tensors are missing" in text
    assert "4 tensors have no place" in text
    assert "up_proj.lora_A" in text
    assert "o_proj.lora_A" in text
    assert "right base" in text


def test_adapter_of_a_base_of_another_width_names_the_tensors(disk, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = config_of("llama", len(tokenizer()))
    config.hidden_size, config.head_dim = 16, 4
    settings = LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1])
    randomise(get_peft_model(LlamaForCausalLM(config), settings), 0).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"lora_B.*\[16, 2\].*\[32, 2\].*right base"):
        ModelPair.load(disk / "base", adapter=tmp_path)


def test_adapter_of_another_family_is_refused(disk, tmp_path):
    path = save_adapter(tmp_path, family="gpt2", modules=("c_attn",))
    with pytest.raises(MismatchError, match=r"c_attn.*right base"):
        ModelPair.load(disk / "base", adapter=path)


def test_untrained_adapter_is_refused_unless_meant(disk):
    path = disk / "untrained" / "tuned"
    with pytest.raises(InactiveAdapterError, match="changes nothing"):
        ModelPair.load(disk / "base", adapter=path)
    null = ModelPair.load(disk / "base", adapter=path, allow_identical=True)
    assert torch.equal(null.run(TEXTS).logits, null.run(TEXTS, side="base").logits)
    with pytest.raises(InactiveAdapterError):
        ModelPair.of(model("llama"), model("llama"), tokenizer())


def test_every_adapter_of_a_mapping_is_verified(disk):
    adapters = {"one": disk / "one" / "tuned", "null": disk / "untrained" / "tuned"}
    with pytest.raises(InactiveAdapterError, match="'null'"):
        ModelPair.load(disk / "base", adapter=adapters)


REFUSED = {
    "use_dora": ({"use_dora": True}, "DoRA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trainable_token_indices": ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    "bias": ({"bias": "all"}, "bias"),
    "layer_replication": ({"layer_replication": [[0, 4], [2, 4]]}, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "alora": ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_switched_are_refused_with_advice(disk, tmp_path, case):
    changes, word = REFUSED[case]
    path = save_adapter(tmp_path)
    edit_config(path, **changes)
    with pytest.raises(MismatchError, match=word) as raised:
        ModelPair.load(disk / "base", adapter=path)
    assert "merge_and_unload" in str(raised.value)


@pytest.mark.parametrize("case", ["use_dora", "lora_bias", "modules_to_save", "bias", "pissa"])
def test_the_same_is_refused_in_memory(case):
    from peft import LoraConfig, get_peft_model

    changes, word = REFUSED[case]
    peft = get_peft_model(model("llama"), LoraConfig(r=2, target_modules=["down_proj"], **changes))
    with pytest.raises(MismatchError, match=word):
        ModelPair.of(randomise(peft, 0), None, tokenizer())


def test_adapters_that_are_not_lora_are_refused(tmp_path, disk):
    from peft import IA3Config, get_peft_model

    settings = IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    peft = get_peft_model(model("llama"), settings)
    with pytest.raises(MismatchError, match=r"type IA3 cannot be switched.*merge_and_unload"):
        ModelPair.of(peft, None, tokenizer())
    peft.save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="type IA3"):
        ModelPair.load(disk / "base", adapter=tmp_path)


def test_merged_adapters_are_refused():
    peft = peft_model()
    peft.merge_adapter()
    with pytest.raises(MismatchError, match=r"merged into the weights.*merge_and_unload"):
        ModelPair.of(peft, None, tokenizer())


@pytest.mark.parametrize("modules", [("embed_tokens", "down_proj"), ("lm_head", "down_proj")])
def test_adapters_outside_the_layers_are_refused_at_load(modules, tmp_path, disk):
    """Rows of the base in a mixed batch, and the shared layers, would be wrong in silence."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model("llama"), LoraConfig(r=2, target_modules=list(modules)))
    with pytest.raises(SiteError, match=modules[0]):
        ModelPair.of(randomise(peft, 0), None, tokenizer())


class _Bomb:
    def __reduce__(self):
        return Path.write_text, (Path(self.target), "boom")

    def __init__(self, target):
        self.target = str(target)


def test_a_pickled_adapter_is_refused_and_never_opened(disk, tmp_path):
    path = save_adapter(tmp_path / "adapter")
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "fired")))
    with pytest.raises(MismatchError, match="never from pickles"):
        ModelPair.load(disk / "base", adapter=path)
    assert not (tmp_path / "fired").exists()


def test_a_pickled_model_is_refused_and_never_opened(disk, tmp_path):
    path = save_model(tmp_path / "model", model("llama", 1), tokenizer())
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(tmp_path / "fired")))
    with pytest.raises(SetupError, match="safetensors"):
        ModelPair.load(disk / "base", path)
    assert not (tmp_path / "fired").exists()


def test_unknown_organism():
    with pytest.raises(SetupError, match="no embedded organism is called 'em-rank9'"):
        ModelPair.load("organism:em-rank9")


def test_a_model_that_is_no_path_is_refused_offline(disk):
    with pytest.raises((OSError, ModelDiffError)):
        ModelPair.load(disk / "base", disk / "nothing-here")


def test_unknown_side(loaded):
    with pytest.raises(MismatchError, match="'base' or 'finetuned'"):
        loaded.run(TEXTS, side="tuned")


# ---------------------------------------------------------------- digests


def digests_of(peft_or_base, tuned=None, **options):
    return ModelPair.of(peft_or_base, tuned, tokenizer(), allow_identical=True, **options).digests


def test_any_single_weight_changes_the_digest_of_its_side_alone():
    pair = ModelPair.of(model("qwen2"), model("qwen2", 1), tokenizer())
    reference = pair.digests
    generator = torch.Generator().manual_seed(0)
    for name, parameter in pair.sides.roots[1].named_parameters():
        flat = parameter.data.view(-1)
        index = int(torch.randint(len(flat), (1,), generator=generator))
        before = flat[index].clone()
        flat[index] = torch.nextafter(before, torch.tensor(torch.inf))
        changed = replace(pair.sides).digests
        assert changed["finetuned"] != reference["finetuned"], name
        assert changed["base"] == reference["base"]
        assert changed["tokenizer"] == reference["tokenizer"]
        flat[index] = before
    assert replace(pair.sides).digests == reference


def test_weights_that_are_trained_on_have_another_digest():
    """Results kept under the old one would be taken for the new model's."""
    peft = peft_model()
    pair = ModelPair.of(peft, None, tokenizer())
    before = pair.digests
    assert pair.digests == before
    down = peft.get_base_model().model.layers[1].mlp.down_proj
    down.lora_B["tuned"].weight.requires_grad_(True)
    down.lora_B["tuned"].weight.grad = torch.ones_like(down.lora_B["tuned"].weight)
    torch.optim.AdamW([down.lora_B["tuned"].weight], lr=0.1).step()
    after = pair.digests
    assert after["finetuned"] != before["finetuned"]
    assert after["base"] == before["base"]
    down.scaling["tuned"] *= 2
    assert pair.digests["finetuned"] not in (before["finetuned"], after["finetuned"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("indices", [[0, 1], [0, 2], [1, 3], [4, 5, 6, 7], list(range(64))])
def test_signs_and_swaps_change_the_checksum(dtype, indices):
    from modeldiff.loading import _checksum

    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    flipped, swapped = values.clone(), values.clone()
    flipped[indices] *= -1
    swapped[indices] = values[indices].flip(0)
    sums = {tuple(_checksum(each)) for each in (values, flipped, swapped)}
    assert len(sums) == 3


def test_digests_of_two_adapters_of_one_base_differ(loaded):
    other = loaded.with_adapter("two").digests
    assert other["base"] == loaded.digests["base"]
    assert other["finetuned"] != loaded.digests["finetuned"]


def test_digest_of_the_base_is_that_of_the_model_without_adapters(loaded):
    plain = digests_of(model("llama"), model("llama", 1))
    assert loaded.digests["base"] == plain["base"]
    assert loaded.digests["tokenizer"] == plain["tokenizer"]


def test_digest_of_an_adapter_does_not_depend_on_its_name_or_on_saving(loaded, disk):
    memory = ModelPair.of(peft_model(seed=0), None, tokenizer())
    named = ModelPair.load(disk / "base", adapter={"layers": disk / "one" / "tuned"})
    assert memory.digests == loaded.digests == named.digests


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"layers.1.mlp.down_proj": 3}}],
)
def test_the_scale_of_an_adapter_is_part_of_its_digest(disk, tmp_path, loaded, changes):
    path = save_adapter(tmp_path)
    edit_config(path, **changes)
    assert (
        ModelPair.load(disk / "base", adapter=path).digests["finetuned"]
        != loaded.digests["finetuned"]
    )


def test_configuration_and_template_are_part_of_the_digests():
    reference = digests_of(model("llama"), model("llama", 1))
    config = config_of("llama", len(tokenizer()))
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 5e5}
    turned = LlamaForCausalLM(config).eval()
    turned.load_state_dict(model("llama").state_dict())
    assert digests_of(turned, model("llama", 1))["base"] != reference["base"]
    tuned = LlamaForCausalLM(config).eval()
    tuned.load_state_dict(model("llama", 1).state_dict())
    assert digests_of(model("llama"), tuned)["finetuned"] != reference["finetuned"]
    other = tokenizer()
    other.chat_template += " "
    pair = ModelPair.of(model("llama"), model("llama", 1), other)
    assert pair.digests["tokenizer"] != reference["tokenizer"]


# ---------------------------------------------------------------- nothing is left changed


def state(peft):
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in peft.modules() if isinstance(m, BaseTunerLayer)]
    return (
        [(name, p.requires_grad) for name, p in peft.named_parameters()],
        [(name, m.training) for name, m in peft.named_modules()],
        [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers],
        peft.active_adapter,
        {name: value.clone() for name, value in peft.state_dict().items()},
        peft.generation_config.to_dict(),
    )


def same(a, b):
    *plain_a, tensors_a, config_a = a
    *plain_b, tensors_b, config_b = b
    return (
        plain_a == plain_b
        and config_a == config_b
        and all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)
    )


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_flags_modes_and_adapters_are_as_they_were(engine):
    peft = peft_model()
    peft.add_adapter("second", peft.peft_config["tuned"])
    randomise(peft, 3)
    peft.set_adapter("second")
    pair = ModelPair.of(peft, None, tokenizer(), adapter="tuned")
    peft.train()
    peft.base_model.model.model.layers[0].eval()
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_("lora_B.tuned" in name or "norm" in name)
    before = state(peft)
    assert torch.equal(
        pair.run(TEXTS, engine=engine).logits, plain_logits(peft_model(seed=0)) * 0 + expected(peft)
    )
    direction = Direction.of(torch.ones(WIDTH), "resid_post.1", "ones")
    calls = [
        lambda: pair.run(TEXTS, side="base", engine=engine),
        lambda: pair.run(TEXTS, do=Steer(direction), reads="resid_post.2", engine=engine),
        lambda: pair.run(TEXTS, reads="resid_post.1", logits=False, engine=engine),
        lambda: pair.generate(TEXTS, do=Steer(direction), max_new_tokens=2, engine=engine),
        lambda: pair.capture(TEXTS, "resid_post.2"),
        lambda: pair.with_adapter("second").capture(TEXTS, "resid_post.2"),
    ]
    for number, call in enumerate(calls):
        call()
        assert same(state(peft), before), f"call {number}"

    def explode(*_):
        raise ZeroDivisionError

    handle = peft.base_model.model.model.layers[3].register_forward_hook(explode)
    for number, call in enumerate(calls):
        if number in (0, 1, 3):
            with pytest.raises(ZeroDivisionError):
                call()
        assert same(state(peft), before), f"failed call {number}"
    handle.remove()


def expected(peft):
    """Logits of the adapter "tuned", computed by PEFT on a copy."""
    import copy

    twin = copy.deepcopy(peft).eval()
    twin.set_adapter("tuned")
    return plain_logits(twin)


def test_the_pair_describes_itself(loaded):
    assert repr(loaded).startswith("ModelPair(adapter: ")
    assert "4 layers x 32" in repr(loaded)
    assert loaded.sides.lora == (
        Site("lora", 1, "mlp.down_proj"),
        Site("lora", 2, "mlp.down_proj"),
    )
    assert replace(loaded.sides).names == loaded.sides.names


def test_the_two_sides_may_differ_in_dtype(disk):
    pair = ModelPair.load(disk / "base", disk / "repository" / "tuned", dtype=torch.bfloat16)
    assert pair.run(TEXTS).logits.dtype == torch.bfloat16
    assert isinstance(pair.sides.config, LlamaConfig)


@pytest.mark.parametrize("kind", ["finetuned", "adapter"])
def test_a_base_without_a_chat_template_takes_the_fine_tunes(tmp_path, kind):
    from tests.families import peft_model

    plain = tokenizer()
    plain.chat_template = None
    model("llama").save_pretrained(tmp_path / "base")
    plain.save_pretrained(tmp_path / "base")
    if kind == "adapter":
        peft_model().save_pretrained(tmp_path / "tuned")
        there = tmp_path / "tuned" / "tuned"
    else:
        there = tmp_path / "tuned"
        model("llama", 1).save_pretrained(there)
    tokenizer().save_pretrained(there)
    pair = ModelPair.load(tmp_path / "base", **{kind: there})
    (text,) = pair.texts([[{"role": "user", "content": "the cat"}]], reply=True)
    assert "user" in text.roles
