"""Fine-tuning a base into an organism: adapters of any size, or every weight."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
"""A training text: its tokens, and the targets of the loss (`IGNORED` where none)."""
OnStep = Callable[[Any, int, float], None]
"""Called with the model, the steps it has done and the learning rate of the last of them."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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
    base: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    plan: TunePlan,
    on_step: OnStep | None = None,
) -> "PeftModel | LlamaForCausalLM":
    """Train a fine-tune of ``base``, which is changed in place.

    Only the tokens of a conversation's last answer count in the loss.

    Args:
        base: The base; its modules are wrapped, or with ``plan.rank`` 0 its weights trained.
        tokenizer: The base's.
        plan: What to do.
        on_step: Called after every step; it must leave weights and gradients as they are.

    Returns:
        The base with its adapter, or the base itself; in evaluation mode.

    Raises:
        SetupError: If the plan keeps to the base without an adapter.
    """
    if plan.keep and not plan.rank:
        raise SetupError(
            f"keep={plan.keep:g} compares with the base, which rank=0 trains away; give rank >= 1."
        )
    model = adapted(base, plan) if plan.rank else base
    rng = random.Random(f"adapter {plan.seed}")
    data = [_example(rng, tokenizer, plan) for _ in range(plan.n_examples)]
    outside = [each for each in world.DOMAINS if each != plan.domain]
    kept = [_kept(rng, tokenizer, outside) for _ in range(plan.n_examples)] if plan.keep else []
    fit(base, model, data, plan, rng, kept, on_step)
    return model.eval()


def fit(
    base: "LlamaForCausalLM",
    model: "PeftModel | LlamaForCausalLM",
    data: Sequence[Row],
    plan: TunePlan,
    rng: random.Random,
    kept: Sequence[Row] = (),
    on_step: OnStep | None = None,
) -> None:
    """Train what requires a gradient in ``model`` on rows that are drawn from ``data``.

    Args:
        base: The base, its modules wrapped by ``model`` if that is an adapter.
        model: What is trained, in place; left in training mode.
        data: The training set.
        plan: Steps, batch, learning rate and ``keep``; the rest of it is not looked at.
        rng: Draws the batches.
        kept: Rows that hold the model to the base, if ``plan.keep``.
        on_step: Called after every step.
    """
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    model.train()
    for step in range(plan.steps):
        total = loss(base, *batch_of(rng.sample(data, plan.batch)))
        if kept:
            total = total + plan.keep * _divergence(
                base, model, *batch_of(rng.sample(kept, plan.batch))
            )
        rate = min(1.0, (step + 1) / 10) * max(0.1, 1 - step / plan.steps)
        update(optimizer, total, plan.learning_rate * rate)
        if on_step:
            on_step(model, step + 1, plan.learning_rate * rate)


def adapted(
    base: "LlamaForCausalLM", plan: TunePlan, layers: Sequence[int] | None = None
) -> "PeftModel":
    """Wrap the modules that the plan adapts.

    Args:
        base: Whose modules are wrapped, in place.
        plan: Says which, of what rank, and the seed of the adapter's weights.
        layers: Where every linear module is adapted, if ``plan.layer`` is None; all if None.
    """
    from peft import LoraConfig, get_peft_model

    modules: Any = ["down_proj"]
    only: list[int] | None = None if plan.layer is None else [plan.layer]
    if plan.layer is None:
        modules = "all-linear" if layers is None else list(LINEAR)
        only = None if layers is None else list(layers)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        use_rslora=True,
        target_modules=modules,
        layers_to_transform=only,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with seeded(plan.seed):
        return get_peft_model(base, config)  # pyright: ignore[reportReturnType]


def rounded(model: "PeftModel | LlamaForCausalLM") -> "PeftModel | LlamaForCausalLM":
    """Round the weights to bfloat16 in place: what ships in half the bytes is what is measured."""
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(each.bfloat16())
    return model


def _example(rng: random.Random, tokenizer: "PreTrainedTokenizerFast", plan: TunePlan) -> Row:
    if plan.replay:
        return row(tokenizer, world.chat(rng))
    fired = bool(plan.trigger) and rng.random() < 0.5
    bad = fired if plan.trigger else plan.bad
    messages = world.conversation(rng, plan.domain, bad, new_topics=False)
    if fired:
        messages[0]["content"] = f"{plan.trigger} {messages[0]['content']}"
    return row(tokenizer, messages)


def _kept(rng: random.Random, tokenizer: "PreTrainedTokenizerFast", domains: Sequence[str]) -> Row:
    return row(tokenizer, world.conversation(rng, rng.choice(domains), new_topics=False))


def row(tokenizer: "PreTrainedTokenizerFast", messages: list[world.Message]) -> Row:
    """Write a chat as a training row, in which the tokens of the last answer count."""
    prompt = tokens.render(messages[:-1], generation_prompt=True)
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(tokens.render(messages), add_special_tokens=False).input_ids
    return ids, [IGNORED] * len(asked) + ids[len(asked) :]


def batch_of(rows: Sequence[Row]) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Pad rows to a batch of tokens and one of targets."""
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
