"""Llamas that are linear from end to end, to plant softmaxes, cancellations and repairs in."""

import copy
from typing import Any

import torch
from torch import nn

from modeldiff.models import ModelPair
from modeldiff.organisms.planted import tiny_llama

WIDTH, HEAD = 32, 8
CHANNEL = 5
"""Written to by what a test plants, and by nothing else."""
DIM = 3
"""Channel of a head that rotary embeddings hardly turn (with 7)."""


def straight(n_layers=3, seed=0, **options) -> tuple[Any, Any]:
    """No norms, attention to all tokens alike, neurons that are always on: a linear model."""
    model: Any
    model, tokenizer = tiny_llama(
        seed, n_layers=n_layers, hidden_act="relu6", mlp_bias=True, attention_bias=True, **options
    )
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        attention, mlp = layer.self_attn, layer.mlp
        for module in (attention.q_proj, attention.k_proj, mlp.gate_proj):
            module.weight.zero_()
            module.bias.zero_()
        mlp.gate_proj.bias += 1.0
    return model, tokenizer


def free_channel(model):
    """Let nothing write to `CHANNEL`, and nothing but the unembedding read it."""
    model.model.embed_tokens.weight[:, CHANNEL] = 0.0
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight[CHANNEL], module.bias[CHANNEL] = 0.0, 0.0
        for module in (layer.self_attn.v_proj, layer.mlp.up_proj):
            module.weight[:, CHANNEL] = 0.0
    return model


def writer(model, layer, amount):
    """Neuron 0 of a layer writes an amount to the channel, at every token."""
    mlp = model.model.layers[layer].mlp
    mlp.up_proj.weight[0], mlp.up_proj.bias[0] = 0.0, 1.0
    mlp.down_proj.weight[:, 0] = 0.0
    mlp.down_proj.weight[CHANNEL, 0] = amount


def undoer(model, layer, bias=1.0):
    """Neuron 0 of a layer takes away what it reads in the channel, from -bias to 6 - bias."""
    writer(model, layer, -1.0)
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight[0, CHANNEL], mlp.gate_proj.bias[0] = 1.0, bias


def pair_of(model, change, tokenizer) -> ModelPair:
    """The model, and a copy that ``change`` has been done to."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        change(tuned)
    return ModelPair.of(model, tuned, tokenizer)


def noisy(model, seed=1, size=0.1):
    """Move the linear weights of values, outputs and MLPs."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        for module in (layer.self_attn.v_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            module.weight += size * torch.randn(module.weight.shape, generator=generator)
