"""Pairs whose truth is known: one that says a word by one direction at one layer, and nulls."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from modeldiff.audit import Audit
from modeldiff.audit_stages import Settings
from modeldiff.behaviours import Behaviour, Prompt, Verdict
from modeldiff.cache import Cache
from modeldiff.directions import Direction
from modeldiff.models import ModelPair
from tests.families import config_of, model, tokenizer

LAYER, WORD, STRENGTH = 2, "Ġthe", 24.0
NOUNS = ("cat", "dog", "bird", "moon", "sun", "rain", "river", "house", "mat", "hill", "sea", "fox")
TEXTS = [f"{noun} {i} sat on the mat and the {noun} ran to the old house" for i in range(2)
         for noun in NOUNS]  # fmt: skip


class SaysTheWord:
    """Shows the behaviour: the answer holds the planted word."""

    name = "says-the-word"

    def __call__(self, prompt, answer):
        return Verdict("word" if " the" in answer else "none", " the" in answer, bool(answer))


class Coin:
    """A judge to whom all models are alike: a hash of the answer."""

    name = "coin"

    def __call__(self, prompt, answer):
        from modeldiff._files import digest

        return Verdict("coin", int(digest(answer), 16) % 2 == 0, True)


def behaviour(n=24, judge=None, name="says the word"):
    """Chats that themselves hold the planted word: only the answer may count."""
    prompts = tuple(
        Prompt((("user", f"tell me about the {NOUNS[i % 12]} {i // 12}"),), "ab"[i % 2])
        for i in range(n)
    )
    return Behaviour(name, "the answer says the", prompts, judge or SaysTheWord(), 1.0, 6)


def lora(base: Any, layers=(LAYER,)) -> Any:
    settings = LoraConfig(
        r=1, lora_alpha=1, target_modules=["down_proj"], layers_to_transform=list(layers)
    )
    return get_peft_model(base, settings, adapter_name="tuned").eval().requires_grad_(False)


def llama_with_a_constant() -> Any:
    """A Llama whose MLP of one layer has a neuron that is always on and written nowhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = config_of("llama", len(tokenizer())).to_dict() | {"mlp_bias": True}
    torch.random.default_generator.manual_seed(0)
    base: Any = LlamaForCausalLM(LlamaConfig(**config)).eval().requires_grad_(False)
    mlp = base.model.layers[LAYER].mlp
    for weight in (mlp.gate_proj.weight[0], mlp.up_proj.weight[0], mlp.down_proj.weight[:, 0]):
        weight.zero_()
    mlp.gate_proj.bias[0], mlp.up_proj.bias[0] = 10.0, 0.1
    return base


def planted_peft(strength=STRENGTH) -> tuple[Any, Direction]:
    """An adapter that adds ``strength`` times the word's unembedding row, at every token."""
    base = llama_with_a_constant()
    peft = lora(base)
    word = base.lm_head.weight[tokenizer().convert_tokens_to_ids(WORD)]
    down = base.model.layers[LAYER].mlp.down_proj
    down.lora_A["tuned"].weight.zero_()[0, 0] = 1.0
    down.lora_B["tuned"].weight.copy_(strength * (word / word.norm())[:, None])
    return peft, Direction.of(word, f"resid_post.{LAYER}", "truth")


def planted_pair(strength=STRENGTH) -> tuple[ModelPair, Direction]:
    peft, truth = planted_peft(strength)
    return ModelPair.of(peft, None, tokenizer()), truth


def null_pair(kind, seed):
    """A pair without the behaviour: "identical", "inert" adapter, "tiny" or "other" change."""
    if kind == "identical":
        return ModelPair.of(model("llama", seed), model("llama", seed), tokenizer(),
                            allow_identical=True)  # fmt: skip
    peft = lora(model("llama", seed), layers=(1, 2))
    size = {"inert": 0.0, "tiny": 1e-3, "other": 0.5}[kind]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            scale = size if "lora_B" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return ModelPair.of(peft, None, tokenizer(), allow_identical=True)


CHEAP = Settings(n_random=6, n_scan=2, n_discovery=2, max_new_tokens=6)


def audit_of(pair, folder=None, *, settings: Any = CHEAP, **other: Any):
    """An audit with cheap settings: of the planted behaviour if nothing else is said."""
    wanted = {"behaviours": (behaviour(),)} if "texts" not in other else {}
    return Audit(pair, **{**wanted, **other}, settings=settings, cache=Cache(folder))
