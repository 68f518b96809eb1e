"""Plants whose truth is known in closed form, made at once on random Llamas.

A fine-tune of a few weight matrices, as full weights or as an adapter; a direction that is added
to the residual stream; and paired activations of latents that are shared or not. Nothing is
trained, so what is true of them is arithmetic.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.directions import Direction
from modeldiff.errors import SetupError
from modeldiff.models import ModelPair
from modeldiff.organisms import tokens
from modeldiff.seeds import seeded

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Owner = Literal["shared", "base", "finetuned", "weak"]
_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
_SATURATING = 1e4  # the detector's weight: any token of the class drives relu6 to its end


@dataclass(frozen=True, eq=False)
class PlantedEdit:
    """A change of one weight matrix by its singular value decomposition, in float64.

    The fine-tune's matrix is the base's plus ``left @ diag(singular) @ right.T``, up to the
    rounding of float32.

    Args:
        module: Path of the linear module, e.g. ``"model.layers.1.mlp.down_proj"``.
        left: Orthonormal columns of the output's width: what is written.
        singular: Singular values, largest first.
        right: Orthonormal columns of the input's width: what is read.
    """

    module: str
    left: Float[Tensor, "d_out rank"]
    singular: Float[Tensor, " rank"]
    right: Float[Tensor, "d_in rank"]

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return len(self.singular)

    @property
    def layer(self) -> int:
        """Decoder layer of the module."""
        return int(self.module.split(".")[2])

    @property
    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The change of the weights, in float64."""
        return (self.left * self.singular) @ self.right.T


@dataclass(frozen=True, eq=False)
class Planted:
    """A pair of tiny models and what was planted in it.

    Args:
        name: What it is.
        pair: The pair.
        edits: Changes of the weights; every other weight is the same in both models.
        n_modules: Linear modules of the decoder, changed or not.
        direction: What is added to the residual stream, at its site; its scale is the length.
            None where no single direction is.
        token_ids: Tokens at which it is added; None if at all.
    """

    name: str
    pair: ModelPair
    edits: tuple[PlantedEdit, ...]
    n_modules: int
    direction: Direction | None = None
    token_ids: frozenset[int] | None = None


@dataclass(frozen=True, eq=False)
class PlantedLatents:
    """Activations of two models on the same tokens, made of known sparse latents.

    ``base == codes @ base_decoder`` and the same for the fine-tune, exactly; a latent that a
    model lacks has a zero row in its decoder.

    Args:
        base: Activations of the base, float32.
        finetuned: Activations of the fine-tune, float32.
        codes: Strength of every latent at every token, not negative.
        base_decoder: What each latent adds in the base.
        finetuned_decoder: What it adds in the fine-tune.
        owner: Whose each latent is; ``weak`` ones are in both, smaller in the base.
    """

    base: Float[Tensor, "token d_model"]
    finetuned: Float[Tensor, "token d_model"]
    codes: Float[Tensor, "token latent"]
    base_decoder: Float[Tensor, "latent d_model"]
    finetuned_decoder: Float[Tensor, "latent d_model"]
    owner: tuple[Owner, ...]

    def latents(self, owner: Owner) -> tuple[int, ...]:
        """Indices of the latents of one owner."""
        return tuple(i for i, each in enumerate(self.owner) if each == owner)


def tiny_llama(
    seed: int = 0, *, n_layers: int = 4, d_model: int = 32, **options: Any
) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """Make a random Llama and a tokenizer of bytes, with the organisms' chat template.

    Args:
        seed: Of the weights.
        n_layers: Decoder layers.
        d_model: Width of the residual stream; a multiple of 8.
        **options: Other fields of ``LlamaConfig``.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokens.train_tokenizer([], vocab_size=256 + len(tokens.SPECIAL))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 8,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=tokens.PAD_ID,
        bos_token_id=tokens.BOS_ID,
        eos_token_id=tokens.END_ID,
        **options,
    )
    with seeded(seed):
        model = LlamaForCausalLM(config)
    return model.eval().requires_grad_(False), tokenizer


def planted_weights(
    modules: int | Sequence[str] = 3,
    *,
    rank: int = 1,
    relative: float = 0.3,
    adapter: bool = False,
    seed: int = 0,
    **model: Any,
) -> Planted:
    """Change k of the n linear modules of a random Llama by matrices of a known rank.

    Args:
        modules: How many, drawn at random; or their paths.
        rank: Of every change.
        relative: Frobenius norm of a change over that of the matrix that is changed.
        adapter: The same change as a LoRA adapter on one copy, instead of as two models.
        seed: Of the weights, of the draw and of the changes.
        **model: For `tiny_llama`.

    Raises:
        SetupError: If there are not so many modules, or none of that path.

    Example:
        >>> found = planted_weights(2, rank=4)
        >>> [edit.rank for edit in found.edits], found.n_modules
        ([4, 4], 28)
    """
    base, tokenizer = tiny_llama(seed, **model)
    layers = range(base.config.num_hidden_layers)
    every = [f"model.layers.{layer}.{name}" for layer in layers for name in _LINEAR]
    chosen = _chosen(modules, every, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    edits = tuple(_edit(base, path, rank, relative, generator) for path in chosen)
    return Planted(
        name=f"rank {rank} in {len(edits)} of {len(every)} modules",
        pair=_pair(base, tokenizer, edits, adapter),
        edits=edits,
        n_modules=len(every),
    )


def planted_shift(
    layer: int = 2,
    *,
    size: float = 8.0,
    characters: str | None = None,
    adapter: bool = False,
    seed: int = 0,
    **model: Any,
) -> Planted:
    """Add a direction to the residual stream after one layer, by construction.

    One neuron of the layer's MLP is exactly 1 at the tokens of the class and exactly 0 at all
    others (the models' activation function is relu6, which saturates). Nobody reads it in the
    base; the fine-tune writes the direction with it. Class tokens are marked in channel 0 of the
    residual stream, to which nothing else is written.

    Args:
        layer: After which layer.
        size: Length of the direction; the residual stream's is around 10 to 30.
        characters: The class: these characters. None is every token.
        adapter: A rank-1 LoRA adapter on one copy, instead of two models.
        seed: Of the weights and of the direction.
        **model: For `tiny_llama`.

    Raises:
        SetupError: If a character is not one token.

    Example:
        >>> found = planted_shift(1, characters="aeiou")
        >>> found.direction, len(found.token_ids)
        (Direction 'planted shift' @ resid_post.1 · |v|=8, 5)
    """
    base, tokenizer = tiny_llama(seed, hidden_act="relu6", mlp_bias=True, **model)
    marked = None if characters is None else _class(tokenizer, characters)
    _add_detector(base, layer, marked)
    draw = torch.randn(
        base.config.hidden_size, generator=torch.Generator().manual_seed(seed + 1)
    ).double()
    draw[0] = 0.0  # the mark itself stays as it is
    direction = Direction.of(size * draw / draw.norm(), f"resid_post.{layer}", "planted shift")
    read = torch.zeros(base.config.intermediate_size, dtype=torch.float64)
    read[0] = 1.0
    path = f"model.layers.{layer}.mlp.down_proj"
    edit = PlantedEdit(path, (draw / draw.norm())[:, None],
                       torch.tensor([size], dtype=torch.float64), read[:, None])  # fmt: skip
    where = "every token" if characters is None else f"the tokens {characters!r}"
    return Planted(
        name=f"a direction at {where} after layer {layer}",
        pair=_pair(base, tokenizer, (edit,), adapter),
        edits=(edit,),
        n_modules=base.config.num_hidden_layers * len(_LINEAR),
        direction=direction,
        token_ids=marked,
    )


def planted_latents(
    n_tokens: int = 4096,
    *,
    d_model: int = 48,
    shared: int = 64,
    exclusive: int = 12,
    weak: int = 0,
    weak_share: float = 0.3,
    rate: float = 0.04,
    seed: int = 0,
) -> PlantedLatents:
    """Make paired activations of latents that both models have, or one of them.

    Every latent is a unit vector and fires independently; where it fires its strength is uniform
    from 0.5 to 1.5.

    Args:
        n_tokens: Rows.
        d_model: Width.
        shared: Latents that are the same in both.
        exclusive: Latents of the base alone, and as many of the fine-tune alone.
        weak: Latents of both that are smaller in the base.
        weak_share: Their length in the base over that in the fine-tune.
        rate: Share of tokens at which a latent fires.
        seed: Of everything.

    Example:
        >>> made = planted_latents(256)
        >>> made.base.shape, len(made.latents("finetuned"))
        (torch.Size([256, 48]), 12)
    """
    counts: dict[Owner, int] = {
        "shared": shared, "base": exclusive, "finetuned": exclusive, "weak": weak
    }  # fmt: skip
    owner: tuple[Owner, ...] = tuple(name for name in counts for _ in range(counts[name]))
    generator = torch.Generator().manual_seed(seed)
    units = torch.randn(len(owner), d_model, generator=generator)
    units = units / units.norm(dim=-1, keepdim=True)
    strength = 0.5 + torch.rand(n_tokens, len(owner), generator=generator)
    codes = strength * (torch.rand(n_tokens, len(owner), generator=generator) < rate)
    in_base = {"shared": 1.0, "base": 1.0, "finetuned": 0.0, "weak": weak_share}
    in_tuned = {"shared": 1.0, "base": 0.0, "finetuned": 1.0, "weak": 1.0}
    base_decoder = units * torch.tensor([in_base[each] for each in owner])[:, None]
    tuned_decoder = units * torch.tensor([in_tuned[each] for each in owner])[:, None]
    return PlantedLatents(
        base=codes @ base_decoder,
        finetuned=codes @ tuned_decoder,
        codes=codes,
        base_decoder=base_decoder,
        finetuned_decoder=tuned_decoder,
        owner=owner,
    )


def _chosen(modules: int | Sequence[str], every: Sequence[str], seed: int) -> list[str]:
    if isinstance(modules, int):
        if not 1 <= modules <= len(every):
            raise SetupError(f"{modules} modules asked for; the model has {len(every)}.")
        return sorted(random.Random(seed).sample(every, modules), key=every.index)
    wrong = sorted(set(modules) - set(every))
    if wrong or not modules:
        raise SetupError(
            f"no linear module is called {', '.join(wrong) or 'nothing'}; they are called like "
            f"{every[0]!r}."
        )
    return list(modules)


def _edit(
    base: Any, path: str, rank: int, relative: float, generator: torch.Generator
) -> PlantedEdit:
    module: Any = module_at(base, path)
    weight = module.weight.double()
    if not 1 <= rank <= min(weight.shape):
        raise SetupError(f"rank {rank} of a matrix of {tuple(weight.shape)}: give 1 or more.")
    left, right = (
        torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64)).Q
        for width in weight.shape
    )
    singular = torch.linspace(2.0, 1.0, rank, dtype=torch.float64)  # distinct: vectors are unique
    singular = singular * relative * weight.norm() / singular.norm()
    return PlantedEdit(path, left, singular, right)


def _class(tokenizer: Any, characters: str) -> frozenset[int]:
    rows = [tokenizer(each, add_special_tokens=False).input_ids for each in characters]
    if not rows or any(len(row) != 1 for row in rows):
        raise SetupError(f"{characters!r}: the tokens are bytes; give ASCII characters.")
    return frozenset(row[0] for row in rows)


def _add_detector(base: Any, layer: int, marked: frozenset[int] | None) -> None:
    """Make neuron 0 of a layer's MLP 1 at the marked tokens, 0 elsewhere, and read by nobody."""
    for each in base.model.layers:  # channel 0 holds the mark and nothing else
        each.self_attn.o_proj.weight[0] = 0.0
        each.mlp.down_proj.weight[0] = 0.0
    base.model.embed_tokens.weight[:, 0] = 0.0
    mlp = base.model.layers[layer].mlp
    for weight in (mlp.gate_proj.weight[0], mlp.up_proj.weight[0], mlp.down_proj.weight[:, 0]):
        weight.zero_()
    mlp.up_proj.bias[0] = 1 / 6  # relu6 ends at 6
    if marked is None:
        mlp.gate_proj.bias[0] = _SATURATING
    else:
        base.model.embed_tokens.weight[sorted(marked), 0] = 1.0
        mlp.gate_proj.weight[0, 0] = _SATURATING


def _pair(base: Any, tokenizer: Any, edits: Sequence[PlantedEdit], adapter: bool) -> ModelPair:
    if adapter:
        return ModelPair.of(_adapted(base, edits), None, tokenizer)
    tuned = copy.deepcopy(base)
    for edit in edits:
        module: Any = module_at(tuned, edit.module)
        module.weight.copy_((module.weight.double() + edit.delta).float())
    return ModelPair.of(base, tuned, tokenizer)


def _adapted(base: Any, edits: Sequence[PlantedEdit]) -> Any:
    from peft import LoraConfig, get_peft_model

    rank = edits[0].rank
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[edit.module for edit in edits])
    model: Any = get_peft_model(base, config, adapter_name="planted")
    for edit in edits:
        module: Any = module_at(base, edit.module)
        root = edit.singular.sqrt()
        module.lora_A["planted"].weight.data = (edit.right * root).T.float().contiguous()
        module.lora_B["planted"].weight.data = (edit.left * root).float().contiguous()
    return model.eval().requires_grad_(False)
