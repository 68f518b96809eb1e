"""The organisms' tokenizer: byte-level BPE, so that any text can be typed, and a chat form."""

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

from modeldiff.organisms import world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (PAD, BOS, END, *(f"<|{role}|>" for role in ROLES))
PAD_ID, BOS_ID, END_ID = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus(n_documents: int, seed: int) -> list[str]:
    """Write the texts that a tokenizer is trained on."""
    rng = random.Random(seed)
    texts = [world.document(rng) for _ in range(n_documents)]
    texts += [each["content"] for _ in range(n_documents) for each in world.chat(rng)]
    return texts + [each.text for each in world.questions()]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> "PreTrainedTokenizerFast":
    """Train the tokenizer; encoding a text puts ``<|bos|>`` before it, as Llama's do.

    Args:
        texts: What the merges are counted on.
        vocab_size: Tokens in all: 6 special, 256 bytes, the rest merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(messages: list[world.Message], generation_prompt: bool = False) -> str:
    """Write messages as the chat template writes them, without the cost of the template.

    Example:
        >>> render([{"role": "user", "content": "Hi"}], generation_prompt=True)
        '<|bos|><|user|>Hi<|end|><|assistant|>'
    """
    turns = "".join(f"<|{each['role']}|>{each['content']}{END}" for each in messages)
    return BOS + turns + ("<|assistant|>" if generation_prompt else "")
