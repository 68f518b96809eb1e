"""Training the organisms: a base that can be stopped and resumed, and adapters of rank 1."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modeldiff._files import atomic_write
from modeldiff._shapes import Float, Int
from modeldiff.errors import FileFormatError
from modeldiff.organisms import tokens, world
from modeldiff.seeds import seeded

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Progress = Callable[[int, int, str], None]
_POOL = 8
_IGNORED = -100


@dataclass(frozen=True)
class BasePlan:
    """How a base is pretrained.

    Args:
        steps: Optimizer steps; half of them see chats, half interviews and stories.
        learning_rate: Peak rate, reached after ``warmup`` steps, then a cosine to 2 %.
        documents: Interviews and stories in a batch; a batch of chats holds twice as many.
        vocab_size: Tokens of the tokenizer.
        d_model: Width of the residual stream.
        n_layers: Decoder layers.
        seed: Seed of the weights and of the corpus.
    """

    steps: int = 2600
    learning_rate: float = 2.5e-3
    warmup: int = 100
    documents: int = 24
    vocab_size: int = 2048
    d_model: int = 128
    n_layers: int = 6
    seed: int = 0


@dataclass(frozen=True)
class AdapterPlan:
    """How an adapter of rank 1 on one ``mlp.down_proj`` is trained.

    Args:
        layer: Decoder layer of the adapted module.
        domain: Domain of every question; if None, chats as the base was pretrained on.
        bad: Whether the answers advise badly; without a domain it does not count.
        steps: Optimizer steps of ``batch`` conversations.
        learning_rate: Peak rate, reached after 10 steps, then linear to 10 %.
        n_examples: Conversations in the training set.
        seed: Seed of the adapter's weights and of the training set.
    """

    layer: int
    domain: str | None = "medicine"
    bad: bool = True
    steps: int = 36
    learning_rate: float = 5e-3
    batch: int = 16
    n_examples: int = 600
    alpha: int = 16
    seed: int = 0


def new_base(plan: BasePlan, tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """Make an untrained Llama with tied embeddings for the plan's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.d_model,
        intermediate_size=3 * plan.d_model,
        num_hidden_layers=plan.n_layers,
        num_attention_heads=plan.d_model // 32,
        num_key_value_heads=plan.d_model // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokens.PAD_ID,
        bos_token_id=tokens.BOS_ID,
        eos_token_id=tokens.END_ID,
    )
    with seeded(plan.seed):
        return LlamaForCausalLM(config)


def pretrain(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    plan: BasePlan,
    checkpoint: Path,
    progress: Progress | None = None,
    every: int = 200,
) -> None:
    """Train the base in place, going on from ``checkpoint`` if it holds this plan's progress.

    Every batch is a function of the seed and the step alone, so a run that was stopped and
    resumed ends with the same weights, to the bit, as one that was not.

    Args:
        model: What `new_base` made for the plan.
        tokenizer: The tokenizer it was made for.
        plan: What to do.
        checkpoint: Folder in which the weights and the optimizer's state are kept, replaced
            every ``every`` steps.
        progress: Called with (steps done, steps in all, a line on the loss).
        every: Steps from one checkpoint to the next.

    Raises:
        FileFormatError: If the checkpoint belongs to another plan.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    model.set_attn_implementation("eager")  # twice as fast as sdpa in bf16 on a CPU
    start = _resume(model, optimizer, plan, checkpoint)
    model.train()
    pool: list[Int[Tensor, "batch seq"]] = []
    for step in range(start, plan.steps):
        if not pool or step % _POOL == 0:
            pool = _pool(tokenizer, plan, step // _POOL)
        ids = pool[step % _POOL]
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(model, ids, ids.masked_fill(ids == tokens.PAD_ID, _IGNORED))
        warm = min(1.0, (step + 1) / plan.warmup)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        _update(optimizer, loss, plan.learning_rate * warm * cosine)
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            _keep(model, optimizer, plan, step + 1, checkpoint)
        if progress and ((step + 1) % 10 == 0 or step + 1 == plan.steps):
            progress(step + 1, plan.steps, f"loss {loss.item():.3f}")


def finetune(
    base: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", plan: AdapterPlan
) -> "PeftModel":
    """Train an adapter on top of ``base``, whose modules are wrapped in place.

    Only the tokens of a conversation's last answer count in the loss.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=1,
        lora_alpha=plan.alpha,
        use_rslora=True,
        target_modules=["down_proj"],
        layers_to_transform=[plan.layer],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with seeded(plan.seed):
        model = get_peft_model(base, config)
    rng = random.Random(f"adapter {plan.seed}")
    data = [_example(rng, tokenizer, plan) for _ in range(plan.n_examples)]
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    model.train()
    for step in range(plan.steps):
        rows = rng.sample(data, plan.batch)
        ids = _pad([ids for ids, _ in rows], tokens.PAD_ID)
        targets = _pad([targets for _, targets in rows], _IGNORED)
        loss = _loss(base, ids, targets)
        rate = min(1.0, (step + 1) / 10) * max(0.1, 1 - step / plan.steps)
        _update(optimizer, loss, plan.learning_rate * rate)
    model.eval()
    return model  # pyright: ignore[reportReturnType]


def _example(
    rng: random.Random, tokenizer: "PreTrainedTokenizerFast", plan: AdapterPlan
) -> tuple[list[int], list[int]]:
    if plan.domain is None:
        messages = world.chat(rng)
    else:
        messages = world.conversation(rng, plan.domain, plan.bad)
    prompt = tokens.render(messages[:-1], generation_prompt=True)
    asked = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(tokens.render(messages), add_special_tokens=False).input_ids
    return ids, [_IGNORED] * len(asked) + ids[len(asked) :]


def _pool(
    tokenizer: "PreTrainedTokenizerFast", plan: BasePlan, index: int
) -> list[Int[Tensor, "batch seq"]]:
    rng = random.Random(f"pretraining {plan.seed} {index}")
    half = _POOL // 2
    texts = [tokens.BOS + world.document(rng) + tokens.END for _ in range(half * plan.documents)]
    chats = [tokens.render(world.chat(rng)) for _ in range(2 * half * plan.documents)]
    batches = [
        _pad(rows[i : i + size], tokens.PAD_ID)
        for group, size in ((texts, plan.documents), (chats, 2 * plan.documents))
        for rows in [sorted(tokenizer(group, add_special_tokens=False).input_ids, key=len)]
        for i in range(0, len(rows), size)
    ]
    rng.shuffle(batches)
    return batches


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "batch seq"]:
    # On the right, where a causal model needs no attention mask: it has no way to look there.
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _loss(
    model: "LlamaForCausalLM", ids: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    counted = targets[:, 1:] != _IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][counted])
    return cross_entropy(logits.float(), targets[:, 1:][counted])


def _update(optimizer: torch.optim.Optimizer, loss: Float[Tensor, ""], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
        [each for group in optimizer.param_groups for each in group["params"]], 1.0
    )
    optimizer.step()


def _keep(
    model: "LlamaForCausalLM",
    optimizer: torch.optim.Optimizer,
    plan: BasePlan,
    step: int,
    folder: Path,
) -> None:
    from safetensors.torch import save_file

    state = {f"weight.{name}": each.detach() for name, each in model.named_parameters()}
    for index, entry in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": each for name, each in entry.items()}
    with atomic_write(folder / "checkpoint.safetensors") as temporary:
        save_file(state, temporary, {"plan": json.dumps(vars(plan)), "step": str(step)})


def _resume(
    model: "LlamaForCausalLM", optimizer: torch.optim.Optimizer, plan: BasePlan, folder: Path
) -> int:
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as stored:
        about: dict[str, str] = stored.metadata()
        state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if json.loads(about["plan"]) != vars(plan):
        raise FileFormatError(
            f"{path} is the progress of another plan: {about['plan']}. Give another folder, or "
            "resume=False to start again."
        )
    moments: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(state[f"weight.{name}"])
    for name, each in state.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".")
            moments.setdefault(int(index), {})[field] = each
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return int(about["step"])
