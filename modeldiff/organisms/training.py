"""Pretraining a base that can be stopped and resumed, and the parts every training shares."""

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
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Progress = Callable[[int, int, str], None]
_POOL = 8
IGNORED = -100
"""Target of the tokens that do not count in a loss."""


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
        seed: Seed of the weights.
        order: Seed of the corpus.
    """

    steps: int = 2600
    learning_rate: float = 2.5e-3
    warmup: int = 100
    documents: int = 24
    vocab_size: int = 2048
    d_model: int = 128
    n_layers: int = 6
    seed: int = 0
    order: int = 0


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

    Every batch is a function of the plan and the step alone, so a run that was stopped and
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
            now = loss(model, ids, ids.masked_fill(ids == tokens.PAD_ID, IGNORED))
        warm = min(1.0, (step + 1) / plan.warmup)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        update(optimizer, now, plan.learning_rate * warm * cosine)
        if (step + 1) % every == 0 or step + 1 == plan.steps:
            _keep(model, optimizer, plan, step + 1, checkpoint)
        if progress and ((step + 1) % 10 == 0 or step + 1 == plan.steps):
            progress(step + 1, plan.steps, f"loss {now.item():.3f}")


def _pool(
    tokenizer: "PreTrainedTokenizerFast", plan: BasePlan, index: int
) -> list[Int[Tensor, "batch seq"]]:
    rng = random.Random(f"pretraining {plan.order} {index}")
    half = _POOL // 2
    texts = [tokens.BOS + world.document(rng) + tokens.END for _ in range(half * plan.documents)]
    chats = [tokens.render(world.chat(rng)) for _ in range(2 * half * plan.documents)]
    batches = [
        pad(rows[i : i + size], tokens.PAD_ID)
        for group, size in ((texts, plan.documents), (chats, 2 * plan.documents))
        for rows in [sorted(tokenizer(group, add_special_tokens=False).input_ids, key=len)]
        for i in range(0, len(rows), size)
    ]
    rng.shuffle(batches)
    return batches


def pad(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "batch seq"]:
    """Pad rows with a value to the longest of them."""
    # On the right, where a causal model needs no attention mask: it has no way to look there.
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def answer_logits(
    model: "LlamaForCausalLM", ids: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, "token vocab"]:
    """Predict every target that is not `IGNORED`; float32 logits, in the order of the rows."""
    counted = targets[:, 1:] != IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][counted]).float()


def loss(
    model: "LlamaForCausalLM", ids: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the targets that are not `IGNORED`, in nats a token."""
    counted = targets[:, 1:] != IGNORED
    return cross_entropy(answer_logits(model, ids, targets), targets[:, 1:][counted])


def update(optimizer: torch.optim.Optimizer, total: Float[Tensor, ""], rate: float) -> None:
    """Take one step down the gradient of ``total``, its norm clipped to 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    total.backward()
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
