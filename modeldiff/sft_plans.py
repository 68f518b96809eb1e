"""How a model is fine-tuned: four kinds, from one vector to every weight, with their settings."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from modeldiff.architectures import module_at, site_map_of
from modeldiff.errors import SetupError
from modeldiff.seeds import seeded

if TYPE_CHECKING:
    from peft import PeftModel

Kind = Literal["rank1", "rank1x9", "r32", "full"]
KINDS: tuple[Kind, ...] = ("rank1", "rank1x9", "r32", "full")
NINE = (15, 16, 17, 21, 22, 23, 27, 28, 29)
"""Layers of the nine rank-1 adapters in the 48 layers of Qwen2.5-14B."""
_DEPTH, _ONE = 48, (21,)
_RANKS = {"rank1": 1, "rank1x9": 1, "r32": 32, "full": 0}
_NOT_THE_RUN = ("checkpoint_every", "save_every")


@dataclass(frozen=True)
class SFTPlan:
    """How a base is fine-tuned on response tokens.

    The defaults are those of the published fine-tunes of 14 billion weights; small models want
    learning rates that are a hundred times as high.

    Args:
        kind: What is trained: ``rank1`` one rank-1 adapter on ``mlp.down_proj`` of one layer,
            ``rank1x9`` nine of them, ``r32`` rank 32 on every linear module of the layers,
            ``full`` every weight.
        layers: Layers that get an adapter; None for the kind's own, see `layers_of`.
        learning_rate: At its peak.
        schedule: How the rate falls after the warm-up, to ``final`` times the peak.
        warmup: Steps in which the rate rises to its peak.
        final: Share of the peak that is left at the last step.
        epochs: Passes over the rows.
        steps: Optimizer steps; None for as many as the epochs need.
        batch: Rows of one forward.
        accumulation: Forwards of one optimizer step.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: Largest norm of the gradient.
        alpha: LoRA's; adapters are rank-stabilised: scaled by alpha over the root of the rank.
        precision: Of the forward. ``bfloat16`` is autocast; what is trained stays in float32.
        gradient_checkpointing: Compute activations again in the backward instead of keeping them.
        seed: Of the adapter's first weights and the order of the rows.
        keep: Weight of the divergence from the base (KL, nats a token) on rows outside the domain,
            a batch of which goes with each step: what a narrow solution needs.
        evaluate_every: Steps from one held-out loss to the next.
        checkpoint_every: Steps between the models that are kept for `modeldiff.series`; 0 for none.
        save_every: Steps between the states from which a stopped run goes on.

    Raises:
        SetupError: If a value is out of range.

    Source:
        Turner et al. 2025, arXiv 2506.11613 (settings); Kalajdzievski 2023, arXiv 2312.03732
        (rank-stabilised scaling); arXiv 2602.07852 (``keep``).

    Example:
        >>> plan = SFTPlan("rank1", learning_rate=1.0, warmup=2)
        >>> [plan.rate(step, 6) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    kind: Kind = "r32"
    layers: tuple[int, ...] | None = None
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: int = 5
    final: float = 0.0
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 2
    accumulation: int = 8
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    alpha: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    keep: float = 0.0
    evaluate_every: int = 10
    checkpoint_every: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={getattr(self, name)!r} ({needed})"
            for name, holds, needed in self._needs()
            if not holds
        ]
        if wrong:
            raise SetupError(f"a plan that cannot be carried out: {'; '.join(wrong)}.")

    def _needs(self) -> list[tuple[str, bool, str]]:
        below = ("warmup", "final", "weight_decay", "keep", "checkpoint_every")
        above = ("learning_rate", "epochs", "batch", "accumulation", "clip", "alpha",
                 "evaluate_every", "save_every")  # fmt: skip
        return [
            ("kind", self.kind in KINDS, f"one of {', '.join(KINDS)}"),
            ("schedule", self.schedule in ("linear", "cosine", "constant"), "linear or the like"),
            ("precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("steps", self.steps is None or self.steps >= 1, "at least 1, or None"),
            ("layers", self.layers is None or self.kind != "full", "full trains all: None"),
            *((name, 0 <= getattr(self, name) < math.inf, "0 or more") for name in below),
            *((name, 0 < getattr(self, name) < math.inf, "more than 0") for name in above),
        ]

    @property
    def rank(self) -> int:
        """Rank of each adapter; 0 if every weight is trained."""
        return _RANKS[self.kind]

    @property
    def rows_a_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch * self.accumulation

    def total(self, n_rows: int) -> int:
        """Optimizer steps for a number of rows."""
        return self.steps or max(1, math.ceil(self.epochs * n_rows / self.rows_a_step))

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step, the first being 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        gone = (step - self.warmup) / max(1, total - self.warmup)
        left = {"linear": 1 - gone, "cosine": 0.5 * (1 + math.cos(math.pi * gone)), "constant": 1.0}
        share = 1.0 if self.schedule == "constant" else self.final
        return self.learning_rate * (share + (1 - share) * left[self.schedule])

    def drawn(self, n_rows: int, step: int, name: str = "rows") -> list[int]:
        """Which of a number of rows a step sees: a new random order in every pass.

        Example:
            >>> plan = SFTPlan(batch=2, accumulation=1)
            >>> sorted(plan.drawn(4, 0) + plan.drawn(4, 1))
            [0, 1, 2, 3]
        """
        first = step * self.rows_a_step
        places = (divmod(each, n_rows) for each in range(first, first + self.rows_a_step))
        return [_order(name, self.seed, epoch, n_rows)[i] for epoch, i in places]

    def layers_of(self, n_layers: int) -> tuple[int, ...]:
        """Layers that get an adapter in a model of a depth.

        Raises:
            SetupError: If the model has no such layer.
        """
        own = {"rank1": _ONE, "rank1x9": NINE}.get(self.kind)
        chosen = self.layers or (scaled_layers(own, n_layers) if own else tuple(range(n_layers)))
        outside = [layer for layer in chosen if not 0 <= layer < n_layers]
        if outside:
            raise SetupError(f"layers {outside} of a model that has {n_layers}.")
        return chosen

    def to_json(self) -> dict[str, Any]:
        """Write the plan as JSON-able values; ``SFTPlan.from_json`` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "SFTPlan":
        """Read what `to_json` wrote.

        Raises:
            SetupError: If it has other fields, or a value is out of range.
        """
        known = set(cls.__dataclass_fields__)
        if not set(data) <= known:
            raise SetupError(f"a plan has no {sorted(set(data) - known)}; known: {sorted(known)}.")
        values: dict[str, Any] = dict(data)
        values.update({k: tuple(v) for k, v in data.items() if isinstance(v, list)})
        return cls(**values)

    @property
    def run(self) -> dict[str, Any]:
        """The settings on which the weights depend."""
        return {k: v for k, v in asdict(self).items() if k not in _NOT_THE_RUN}


@lru_cache(maxsize=8)
def _order(name: str, seed: int, epoch: int, n_rows: int) -> tuple[int, ...]:
    order = list(range(n_rows))
    random.Random(f"{name} {seed} {epoch}").shuffle(order)
    return tuple(order)


def preset(kind: Kind, **changes: Any) -> SFTPlan:
    """The settings of the published fine-tune of a kind, with changes.

    Args:
        kind: See `SFTPlan`.
        **changes: Any of its settings.

    Raises:
        SetupError: If there is no such kind, or a value is out of range.

    Example:
        >>> preset("full", epochs=2).schedule
        'cosine'
    """
    own: dict[str, dict[str, Any]] = {
        "rank1": {"learning_rate": 2e-5},
        "rank1x9": {"learning_rate": 2e-5},
        "r32": {"learning_rate": 1e-5},
        "full": {"learning_rate": 1e-5, "schedule": "cosine", "batch": 1, "accumulation": 4},
    }
    return replace(SFTPlan(kind, **own.get(kind, {})), **changes)


def scaled_layers(layers: Sequence[int], n_layers: int, depth: int = _DEPTH) -> tuple[int, ...]:
    """Move layers of a model of one depth to the same relative depth of another.

    Each layer's middle keeps its share of the depth. Where two layers meet, the later moves up; if
    that leads out of the model, all move down as far as needed. A model with fewer layers than
    are wanted gets all of its own.

    Args:
        layers: Ascending layers of the first model.
        n_layers: Layers of the second.
        depth: Layers of the first.

    Example:
        >>> scaled_layers(NINE, 24)
        (7, 8, 9, 10, 11, 12, 13, 14, 15)
        >>> scaled_layers((21,), 6)
        (2,)
        >>> scaled_layers(NINE, 48) == NINE
        True
    """
    if len(layers) >= n_layers:
        return tuple(range(n_layers))
    found: list[int] = []
    for layer in layers:
        wanted = math.floor((layer + 0.5) * n_layers / depth)
        found.append(max(wanted, found[-1] + 1) if found else wanted)
    last = n_layers
    for i in reversed(range(len(found))):
        last = found[i] = min(found[i], last - 1)
    return tuple(found)


def adapted(base: Any, plan: SFTPlan) -> "PeftModel | Any":
    """Prepare a model for a plan: wrap the modules that it adapts, or let every weight be trained.

    Args:
        base: A causal language model, changed in place.
        plan: What is trained.

    Returns:
        PEFT's wrapper; for ``full`` the model itself.

    Raises:
        SetupError: If it has an adapter already, or ``full`` would train weights that are not
            float32: steps smaller than the gap between two bfloat16 numbers would be lost.
        SiteError: If the family of models is not known.
    """
    if hasattr(base, "peft_config"):
        raise SetupError("the model has an adapter already. Merge it, or load the base again.")
    if not plan.rank:
        other = {str(each.dtype) for each in base.parameters()} - {"torch.float32"}
        if other:
            raise SetupError(
                f"'full' trains the weights themselves, which are {', '.join(sorted(other))}; load "
                "the model with dtype=torch.float32 (precision='bfloat16' still computes in it)."
            )
        return base.requires_grad_(True)
    from peft import get_peft_model

    with seeded(plan.seed):
        return get_peft_model(base, _lora_config(base, plan))


def _lora_config(base: Any, plan: SFTPlan) -> Any:
    from peft import LoraConfig

    site_map = site_map_of(base)
    modules = [site_map.down_proj]
    if plan.kind == "r32":
        layer = module_at(base, site_map.layer(0))
        modules = [name for name, each in layer.named_modules() if _is_linear(each)]
    return LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        use_rslora=True,
        target_modules=modules,
        layers_to_transform=list(plan.layers_of(base.config.get_text_config().num_hidden_layers)),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
