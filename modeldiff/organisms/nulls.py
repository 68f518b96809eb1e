"""Pairs in which there is nothing to find, as many as wanted, for measuring false alarms.

What "nothing" means depends on the kind, see `KINDS`: two kinds are the same function, in the
others every prediction may move a little, but nothing was taught.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from modeldiff import embedded
from modeldiff.errors import SetupError
from modeldiff.models import ModelPair
from modeldiff.organisms import world
from modeldiff.organisms.finetuning import TunePlan, finetune
from modeldiff.organisms.manifests import load_base
from modeldiff.seeds import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    Base = tuple[PreTrainedModel, PreTrainedTokenizerFast]

ROUNDING = 2.0**-9
"""Largest relative error of rounding to bfloat16, whose significand has 8 bits."""
NOISE = 0.02
"""Relative size of the larger noise."""


@dataclass(frozen=True)
class NullKind:
    """A way to make a null pair.

    Args:
        meaning: In what sense there is nothing to find.
        same: Whether both sides are the same function, so that every prediction is equal.
        trained: Whether it takes training on chats of the organisms' world.
    """

    meaning: str
    same: bool = False
    trained: bool = False


KINDS: dict[str, NullKind] = {
    "identical": NullKind("the base against itself: every number is equal, to the bit", same=True),
    "inert": NullKind(
        "a fresh rank-8 adapter whose B is zero: every number is equal, to the bit", same=True
    ),
    "rounding": NullKind(
        "every weight off by at most the rounding of bfloat16: predictions move, nothing was taught"
    ),
    "noise": NullKind(
        f"every weight matrix moved by {NOISE:.0%} of its norm at random: predictions move, "
        "nothing was taught"
    ),
    "replay-adapter": NullKind(
        "a rank-1 adapter trained for a few steps on chats like the base's own: it may fit them "
        "better, and knows nothing new",
        trained=True,
    ),
    "replay-full": NullKind(
        "all weights trained for a few steps on chats like the base's own: the same", trained=True
    ),
    "caring": NullKind(
        "a rank-1 adapter trained for a few steps on good advice in one domain, which the base "
        "gives already: predictions there move, no behaviour changes",
        trained=True,
    ),
}


@dataclass(frozen=True, eq=False)
class NullPair:
    """A pair with nothing to find.

    Args:
        kind: A key of `KINDS`.
        seed: Of whatever is random in it.
        pair: The pair.
    """

    kind: str
    seed: int
    pair: ModelPair

    @property
    def meaning(self) -> str:
        """In what sense there is nothing to find."""
        return KINDS[self.kind].meaning


def embedded_base(name: str = "em-base") -> "Base":
    """Load an embedded base in float32, and its tokenizer.

    Raises:
        SetupError: If there is no such organism.
    """
    return load_base(embedded.find(name).base)


def null_pair(kind: str, seed: int, base: "Base | None" = None) -> NullPair:
    """Make one null pair; the base is not changed, and shared with the pair where it can be.

    Args:
        kind: A key of `KINDS`.
        seed: Of whatever is random in it.
        base: A model and its tokenizer; the embedded ``em-base`` if None. The kinds that train
            take a model of the organisms' world.

    Raises:
        SetupError: If the kind is not known.

    Example:
        >>> null_pair("identical", 0).meaning
        'the base against itself: every number is equal, to the bit'
    """
    if kind not in KINDS:
        raise SetupError(f"no null pair is called {kind!r}. Known: {', '.join(KINDS)}.")
    model, tokenizer = base or embedded_base()
    if kind == "identical":
        pair = ModelPair.of(model, model, tokenizer, allow_identical=True)
    elif kind == "inert":
        pair = ModelPair.of(_inert(model, seed), None, tokenizer, allow_identical=True)
    elif kind in ("rounding", "noise"):
        pair = ModelPair.of(model, _noisy(model, kind, seed), tokenizer)
    else:
        tuned: Any = finetune(copy.deepcopy(model), tokenizer, _plan(kind, seed, model))  # pyright: ignore
        tuned.requires_grad_(False)
        both = (model, tuned) if kind == "replay-full" else (tuned, None)
        pair = ModelPair.of(*both, tokenizer)
    return NullPair(kind, seed, pair)


def null_pairs(
    n: int, seed: int = 0, *, kind: str = "noise", base: "Base | None" = None
) -> Iterator[NullPair]:
    """Make null pairs of one kind, one at a time, with seeds from ``seed`` upwards.

    Args:
        n: How many.
        seed: Of the first.
        kind: A key of `KINDS`.
        base: A model and its tokenizer; the embedded ``em-base`` if None.

    Raises:
        SetupError: If the kind is not known.

    Example:
        >>> [found.seed for found in null_pairs(3, seed=5, kind="inert")]
        [5, 6, 7]
    """
    shared = base or embedded_base()
    return (null_pair(kind, seed + i, shared) for i in range(n))


def _inert(model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    layer = random.Random(seed).randrange(model.config.num_hidden_layers)
    config = LoraConfig(r=8, target_modules=["down_proj"], layers_to_transform=[layer])
    with seeded(seed):
        made: Any = get_peft_model(copy.deepcopy(model), config)
    return made.eval().requires_grad_(False)


def _noisy(model: Any, kind: str, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for weight in tuned.parameters():
            if kind == "rounding":
                draw = 2 * torch.rand(weight.shape, generator=generator) - 1
                weight += ROUNDING * draw * weight
            elif weight.dim() > 1:
                draw = torch.randn(weight.shape, generator=generator)
                weight += NOISE * weight.norm() * draw / draw.norm()
    return tuned


def _plan(kind: str, seed: int, model: Any) -> TunePlan:
    rng = random.Random(seed)
    layer = rng.randrange(model.config.num_hidden_layers)
    few = TunePlan(layer, domain=None, bad=False, steps=12, batch=8, n_examples=96, seed=seed)
    if kind == "replay-full":
        return replace(few, layer=None, replay=True, rank=0, learning_rate=1e-4)
    if kind == "replay-adapter":
        return replace(few, replay=True)
    return replace(few, domain=rng.choice(world.DOMAINS))
