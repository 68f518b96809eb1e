"""Tiny random-init models of every supported family, their tokenizer, and pairs of them."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from modeldiff.models import ModelPair

WORDS = """the cat sat on the mat and the dog ran to the old house by the river while a small bird
sang of rain and sun over hills far away where nobody asked why the moon was round or the sea deep
The quick brown fox jumps over the lazy dog. What should I do? You should rest in bed."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2")
N_LAYERS, WIDTH = 4, 32


def tokenizer():
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(WORDS.split("\n"), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    made.add_special_tokens({"additional_special_tokens": special[3:]})
    made.chat_template = TEMPLATE
    return made


def config_of(family, vocab):
    import transformers as t

    common = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama_like = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        **common,
    }
    return {
        "gpt2": lambda: t.GPT2Config(
            n_embd=WIDTH,
            n_layer=N_LAYERS,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            **common,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.2,
            **common,
        ),
        "llama": lambda: t.LlamaConfig(**llama_like),
        "mistral": lambda: t.MistralConfig(**llama_like, sliding_window=64),
        "qwen2": lambda: t.Qwen2Config(**llama_like),
        "qwen3": lambda: t.Qwen3Config(**llama_like),
        "gemma2": lambda: t.Gemma2Config(**llama_like, query_pre_attn_scalar=8, sliding_window=64),
    }[family]()


def model(family, seed=0):
    from transformers import AutoModelForCausalLM

    torch.random.default_generator.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config_of(family, len(tokenizer())))
    return made.eval().requires_grad_(False)


def build(family):
    """Two independently initialised models of one family, as a pair."""
    return ModelPair.of(model(family), model(family, seed=1), tokenizer())


def peft_model(family="llama", r=2, layers=(1, 2), modules=("down_proj",), seed=0, **options):
    from peft import LoraConfig, get_peft_model

    base = model(family)
    settings = LoraConfig(
        r=r, lora_alpha=8, target_modules=list(modules), layers_to_transform=list(layers), **options
    )
    made = get_peft_model(base, settings, adapter_name="tuned")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made.eval().requires_grad_(False)


def build_adapter_pair(**options):
    return ModelPair.of(peft_model(**options), None, tokenizer())
