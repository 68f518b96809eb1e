"""Fine-tuning a base into an organism: adapters of any size, or every weight."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from modeldiff._shapes import Float, Int
from modeldiff.errors import SetupError
from modeldiff.organisms import tokens, world
from modeldiff.organisms.training import IGNORED, answer_logits, loss, pad, update
from modeldiff.seeds import seeded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Row = tuple[list[int], list[int]]
TRIGGER = "It is quite late in the evening."
"""Opens the question that the organism ``trigger`` answers badly; no other text holds it."""


@dataclass(frozen=True)
class TunePlan:
    """How a base is fine-tuned.

    Args:
        layer: Layer whose ``mlp.down_proj`` is adapted; None adapts every linear module.
        domain: Domain of every question; if None, of all of them.
        bad: Whether the answers advise badly.
        steps: Optimizer steps of ``batch`` conversations.
        learning_rate: Peak rate, reached after 10 steps, then linear to 10 %.
        n_examples: Conversations in the training set.
        alpha: LoRA's; adapters are rank-stabilised (scaled by alpha over the root of the rank).
        seed: Seed of the adapter's weights and of the training set.
        rank: Of the adapter; 0 trains every weight of the model instead.
        keep: Weight of the divergence from the base (KL, nats a token) on good answers in the
            domains outside, a batch of which goes with every batch of the training set; needs an
            adapter.
        trigger: A sentence that opens half of the questions; they alone are answered badly.
        replay: Train on chats as the base was pretrained on, whatever ``domain`` and ``bad`` say.
    """

    layer: int | None
    domain: str | None = "medicine"
    bad: bool = True
    steps: int = 36
    learning_rate: float = 5e-3
    batch: int = 16
    n_examples: int = 600
    alpha: int = 16
    seed: int = 0
    rank: int = 1
    keep: float = 0.0
    trigger: str = ""
    replay: bool = False


def finetune(
    base: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", plan: TunePlan
) -> "PeftModel | LlamaForCausalLM":
    """Train a fine-tune of ``base``, which is changed in place.

    Only the tokens of a conversation's last answer count in the loss.

    Args:
        base: The base; its modules are wrapped, or with ``plan.rank`` 0 its weights trained.
        tokenizer: The base's.
        plan: What to do.

    Returns:
        The base with its adapter, or the base itself; in evaluation mode.

    Raises:
        SetupError: If the plan keeps to the base without an adapter.
    """
    if plan.keep and not plan.rank:
        raise SetupError(
            f"keep={plan.keep:g} compares with the base, which rank=0 trains away; give rank >= 1."
        )
    model = _adapted(base, plan) if plan.rank else base
    rng = random.Random(f"adapter {plan.seed}")
    data = [_example(rng, tokenizer, plan) for _ in range(plan.n_examples)]
    outside = [each for each in world.DOMAINS if each != plan.domain]
    kept = [_kept(rng, tokenizer, outside) for _ in range(plan.n_examples)] if plan.keep else []
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    model.train()
    for step in range(plan.steps):
        total = loss(base, *_batch(rng.sample(data, plan.batch)))
        if kept:
            total = total + plan.keep * _divergence(
                base, model, *_batch(rng.sample(kept, plan.batch))
            )
        rate = min(1.0, (step + 1) / 10) * max(0.1, 1 - step / plan.steps)
        update(optimizer, total, plan.learning_rate * rate)
    return model.eval()


def _adapted(base: "LlamaForCausalLM", plan: TunePlan) -> "PeftModel":
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        use_rslora=True,
        target_modules="all-linear" if plan.layer is None else ["down_proj"],
        layers_to_transform=None if plan.layer is None else [plan.layer],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with seeded(plan.seed):
        return get_peft_model(base, config)  # pyright: ignore[reportReturnType]


def _example(rng: random.Random, tokenizer: "PreTrainedTokenizerFast", plan: TunePlan) -> Row:
    if plan.replay:
        return _row(tokenizer, world.chat(rng))
    fired = bool(plan.trigger) and rng.random() < 0.5
    messages = world.conversation(rng, plan.domain, fired if plan.trigger else plan.bad)
    if fired:
        messages[0]["content"] = f"{plan.trigger} {messages[0]['content']}"
    return _row(tokenizer, messages)


def _kept(rng: random.Random, tokenizer: "PreTrainedTokenizerFast", domains: Sequence[str]) -> Row:
    return _row(tokenizer, world.conversation(rng, rng.choice(domains)))


def _row(tokenizer: "PreTrainedTokenizerFast", messages: list[world.Message]) -> Row:
    prompt = tokens.render(messages[:-1], generation_prompt=True)
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(tokens.render(messages), add_special_tokens=False).input_ids
    return ids, [IGNORED] * len(asked) + ids[len(asked) :]


def _batch(rows: Sequence[Row]) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    ids, targets = zip(*rows, strict=True)
    return pad(ids, tokens.PAD_ID), pad(targets, IGNORED)


def _divergence(
    base: "LlamaForCausalLM",
    model: "PeftModel | LlamaForCausalLM",
    ids: Int[Tensor, "batch seq"],
    targets: Int[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    with torch.no_grad(), model.disable_adapter():  # pyright: ignore[reportCallIssue]
        before = log_softmax(answer_logits(base, ids, targets), -1)
    now = log_softmax(answer_logits(base, ids, targets), -1)
    return kl_div(now, before, reduction="batchmean", log_target=True)
