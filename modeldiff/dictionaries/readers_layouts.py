"""What the tensors of other packages' dictionaries mean, one function a layout.

All come to `Weights`, with the axes ``model d_model latent``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.dictionaries.configs import Activation, CodeNorm
from modeldiff.errors import FileFormatError

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]
CODE_NORMS: Mapping[int, CodeNorm] = {1: "sum", 2: "concat", 4: "none"}
"""The code normalisations of dictionary_learning that are also ours, by its number."""
_NAMED_NORMS = {"CROSSCODER": 1, "SAE": 2, "MIXED": 3, "NONE": 4, "DECOUPLED": 5}


@dataclass(frozen=True, eq=False)
class Weights:
    """A dictionary as a file gives it.

    Args:
        W_enc: Encoders.
        W_dec: Decoders.
        b_enc: Bias of the encoder.
        b_dec: Biases of the decoders.
        activation: Which rule makes latents of pre-activations.
        subtracts: Whether the encoder reads ``x - b_dec``, not ``x``.
        k: Mean latents a row, 0 where the rule has none.
        threshold: One number (batch_topk) or one a latent (jumprelu).
        code_norm: What batch_topk compares with its threshold.
        gate: ``r_mag``, ``b_mag`` and ``b_gate`` of a gated dictionary.
        groups: Ends of the prefixes of a Matryoshka dictionary.
        mean: What is subtracted from each model's activations; None where nothing is.
        scale: What they are multiplied by; None where nothing is.
        needs: Why a normaliser must be given; "" if none need be.
        site: Where it was trained, if the file says.
    """

    W_enc: Float[Tensor, "model d_model latent"]
    W_dec: Float[Tensor, "latent model d_model"]
    b_enc: Float[Tensor, " latent"]
    b_dec: Float[Tensor, "model d_model"]
    activation: Activation
    subtracts: bool = False
    k: int = 0
    threshold: Tensor | None = None
    code_norm: CodeNorm = "none"
    gate: dict[str, Tensor] = field(default_factory=dict)
    groups: tuple[int, ...] = ()
    mean: Float[Tensor, "model d_model"] | None = None
    scale: Float[Tensor, " model"] | None = None
    needs: str = ""
    site: str = ""


def dictionary_learning(tensors: Tensors, settings: Settings) -> Weights:
    """``ae.pt`` and ``config.json``: crosscoders, and SAEs (standard, TopK, BatchTopK, gated)."""
    said = {**settings, **settings.get("trainer", {})}
    if "encoder.weight" in tensors and tensors["encoder.weight"].dim() == 3:
        found = _sof_crosscoder(tensors, said)
    elif "W_enc" in tensors:
        found = _named_like_saelens(tensors, said)
    else:
        found = _linear_sae(tensors, said)
    return replace(_normalised(found, tensors, said), site=_layer_site(said))


def _sof_crosscoder(tensors: Tensors, said: Settings) -> Weights:
    need(tensors, "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    batched = "k" in tensors or "threshold" in tensors
    return Weights(
        W_enc=tensors["encoder.weight"], W_dec=tensors["decoder.weight"].transpose(0, 1),
        b_enc=tensors["encoder.bias"], b_dec=tensors["decoder.bias"],
        activation="batch_topk" if batched else "relu",
        k=int(tensors.get("k", said.get("k", 0))),
        threshold=_learned(tensors) if batched else None, code_norm=_code_norm(tensors, said),
    )  # fmt: skip


def _code_norm(tensors: Tensors, said: Settings) -> CodeNorm:
    name = str(said.get("code_normalization", "CROSSCODER")).upper()
    number = int(tensors.get("code_normalization_id", _NAMED_NORMS.get(name, 0)))
    if number not in CODE_NORMS:
        names = {number: name for name, number in _NAMED_NORMS.items()}
        raise FileFormatError(
            f"code normalisation {names.get(number, name)!r} has no counterpart here; "
            "CROSSCODER, SAE and NONE can be read."
        )
    return CODE_NORMS[number]


def _linear_sae(tensors: Tensors, said: Settings) -> Weights:
    need(tensors, "encoder.weight", "decoder.weight")
    gated = "r_mag" in tensors
    bias = next((tensors[n] for n in ("b_dec", "decoder_bias", "bias") if n in tensors), None)
    if bias is None:
        raise missing(tensors, ("b_dec", "decoder_bias", "bias"))
    W_enc, W_dec = tensors["encoder.weight"].T[None], tensors["decoder.weight"].T[:, None]
    nothing = torch.zeros(W_enc.shape[2], device=W_enc.device)
    gate: dict[str, Tensor] = {}
    if gated:
        need(tensors, "mag_bias", "gate_bias")
        gate = {"r_mag": tensors["r_mag"], "b_mag": tensors["mag_bias"],
                "b_gate": tensors["gate_bias"]}  # fmt: skip
    kind = _kind(tensors, said, gated=gated)
    return Weights(
        W_enc=W_enc, W_dec=W_dec, b_enc=tensors.get("encoder.bias", nothing), b_dec=bias[None],
        activation=kind, subtracts=True, k=int(tensors.get("k", said.get("k", 0))), gate=gate,
        threshold=_learned(tensors) if kind == "batch_topk" else None,
    )  # fmt: skip


def _kind(tensors: Tensors, said: Settings, *, gated: bool) -> Activation:
    if gated:
        return "gated"
    if "k" not in tensors:
        return "relu"
    name = str(said.get("dict_class", ""))
    if "BatchTopK" in name:
        return "batch_topk"
    if name == "AutoEncoderTopK":
        return "topk"
    raise FileFormatError(
        f"'dict_class' is {name!r}: this file may be AutoEncoderTopK (k latents of each row) or "
        'BatchTopKSAE (a threshold). Say which: read(..., settings={"dict_class": "BatchTopKSAE"}).'
    )


def _named_like_saelens(tensors: Tensors, said: Settings) -> Weights:
    """JumpReLU and Matryoshka BatchTopK of dictionary_learning."""
    need(tensors, "W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    plain = _plain(tensors)
    if tensors["threshold"].dim():
        subtracts = bool(said.get("apply_b_dec_to_input"))
        threshold = tensors["threshold"]
        return replace(plain, activation="jumprelu", threshold=threshold, subtracts=subtracts)
    sizes = [int(size) for size in tensors.get("group_sizes", torch.zeros(0))]
    ends = tuple(sum(sizes[: i + 1]) for i in range(len(sizes)))
    return replace(
        plain, activation="batch_topk", k=int(tensors.get("k", said.get("k", 0))),
        threshold=_learned(tensors), groups=ends, subtracts=True,
    )  # fmt: skip


def _plain(tensors: Tensors) -> Weights:
    nothing = torch.zeros(tensors["W_enc"].shape[1], device=tensors["W_enc"].device)
    return Weights(
        W_enc=tensors["W_enc"][None], W_dec=tensors["W_dec"][:, None],
        b_enc=tensors.get("b_enc", nothing), b_dec=tensors["b_dec"][None], activation="relu",
    )  # fmt: skip


def _normalised(found: Weights, tensors: Tensors, said: Settings) -> Weights:
    """With the normaliser that the file holds; crosscoders say by NaN that they have none."""
    n_models, d_model = found.b_dec.shape
    mean, std = tensors.get("activation_mean"), tensors.get("activation_std")
    if mean is None or std is None:
        if n_models == 1:  # its trainer folds the scale of activations into the biases
            return found
        return replace(found, needs="it holds neither activation_mean nor activation_std")
    if mean.isnan().any() or std.isnan().any():
        if said.get("normalize_activations"):
            return replace(found, needs="its activation_mean is NaN, though normalising was on")
        return found
    scale = tensors.get("activation_global_scale")
    if scale is None:
        if "target_rms" not in said and "target_rms" not in tensors:
            return replace(found, needs="it holds neither activation_global_scale nor target_rms")
        rms = float(tensors.get("target_rms", said.get("target_rms", 0.0)))
        scale = rms / (std.reshape(n_models, d_model).square().sum(1) + 1e-8).sqrt()
    return replace(
        found, mean=mean.reshape(n_models, d_model), scale=scale.reshape(-1).expand(n_models)
    )


def saelens(tensors: Tensors, settings: Settings) -> Weights:
    """``sae_weights.safetensors`` and ``cfg.json``: standard, jumprelu, topk, gated, batchtopk."""
    need(tensors, "W_enc", "W_dec", "b_dec")
    kind = str(settings.get("architecture", "standard"))
    if kind not in ("standard", "jumprelu", "topk", "gated"):
        raise FileFormatError(f"SAELens architecture {kind!r} cannot be read here.")
    function = settings.get("activation_fn_str", settings.get("activation_fn"))
    if settings.get("finetuning_scaling_factor") or function == "tanh-relu":
        raise FileFormatError("a fine-tuned scaling factor or tanh-relu has no counterpart here.")
    k = settings.get("k", (settings.get("activation_fn_kwargs") or {}).get("k", 0))
    if function == "topk":
        kind = "topk"
    rescaled = bool(settings.get("rescale_acts_by_decoder_norm"))
    found = replace(
        _plain(tensors), activation="relu" if kind == "standard" else kind, k=int(k or 0),
        code_norm="concat" if rescaled else "none",
    )  # fmt: skip
    if kind == "jumprelu":
        need(tensors, "b_enc", "threshold")
        found = replace(found, threshold=tensors["threshold"])
    if kind == "gated":
        need(tensors, "b_gate", "r_mag", "b_mag")
        found = replace(found, gate={name: tensors[name] for name in ("r_mag", "b_mag", "b_gate")})
    if "apply_b_dec_to_input" not in settings:
        raise FileFormatError("the settings do not say apply_b_dec_to_input.")
    meta = settings.get("metadata") or {}
    site = hook_site(str(settings.get("hook_name", meta.get("hook_name", ""))))
    return replace(
        found, site=site, needs=_saelens_needs(settings),
        subtracts=bool(settings["apply_b_dec_to_input"]),
    )  # fmt: skip


def _saelens_needs(settings: Settings) -> str:
    name = settings.get("normalize_activations") or "none"
    if name == "none":
        return ""
    if name == "expected_average_only_in":
        return "its activations were scaled by a factor (expected_average_only_in) it does not hold"
    raise FileFormatError(
        f"normalize_activations={name!r} scales each row by itself, which has no counterpart here."
    )


def gemma_scope(tensors: Tensors, settings: Settings) -> Weights:
    """``params.npz``: JumpReLU on raw activations."""
    need(tensors, "W_enc", "W_dec", "b_enc", "b_dec", "threshold")
    site = hook_site(str(settings.get("hook_name", "")))
    return replace(
        _plain(tensors), activation="jumprelu", threshold=tensors["threshold"], site=site
    )


def sparsify(tensors: Tensors, settings: Settings) -> Weights:
    """``sae.safetensors`` and ``cfg.json``: TopK."""
    need(tensors, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    odd = [name for name in ("transcode", "skip_connection") if settings.get(name)]
    if odd or settings.get("activation", "topk") != "topk":
        raise FileFormatError(
            f"{', '.join(odd) or settings['activation']!r} has no counterpart here: sparse "
            "autoencoders with activation 'topk' can be read."
        )
    if not settings.get("k"):
        raise FileFormatError("the settings do not say k, the number of latents a row.")
    return Weights(
        W_enc=tensors["encoder.weight"].T[None], W_dec=tensors["W_dec"][:, None],
        b_enc=tensors["encoder.bias"], b_dec=tensors["b_dec"][None], activation="topk",
        subtracts=True, k=int(settings["k"]),
    )  # fmt: skip


def crosscode(tensors: Tensors, settings: Settings) -> Weights:
    """``model.pt`` and ``model_cfg.yaml``: axes latent, model, hookpoint, d_model (LMPD)."""
    W_enc = first(tensors, "_W_enc_XiDiL", "W_enc_MPDL", "_W_enc_MPDL", "W_enc_XDL")
    W_dec = first(tensors, "_W_dec_LXoDo", "W_dec_LMPD", "_W_dec_LMPD", "W_dec_LXD")
    W_enc, W_dec = _one_hookpoint(W_enc, 1), _one_hookpoint(W_dec, 2)
    n_models, d_model, n_latents = W_enc.shape
    nothing = torch.zeros(n_models, d_model, device=W_dec.device)
    names = ("_b_dec_XoDo", "b_dec_MPD", "_b_dec_MPD", "b_dec_XD")
    b_dec = next((tensors[name] for name in names if name in tensors), nothing)
    activation, k, threshold = _crosscode_rule(tensors, settings)
    folded = bool(tensors.get("is_folded", torch.tensor(False)))
    return Weights(
        W_enc=W_enc, W_dec=W_dec, b_dec=b_dec.reshape(n_models, d_model),
        b_enc=tensors.get("b_enc_L", torch.zeros(n_latents, device=W_dec.device)),
        activation=activation, k=k, threshold=threshold,
        needs="" if folded else "the scaling of activations was not folded into its weights",
    )  # fmt: skip


def _crosscode_rule(tensors: Tensors, settings: Settings) -> tuple[Activation, int, Tensor | None]:
    said = settings.get("activation_fn") or {}
    name, more = str(said.get("classname", "")), said.get("cfg") or {}
    if name == "AnthropicSTEJumpReLUActivation":
        return "jumprelu", 0, first(tensors, "_activation_fn.log_threshold_L").exp()
    if name == "ReLUActivation":
        return "relu", 0, None
    if name == "TopkActivation":
        return "topk", int(more["k"]), None
    if name == "BatchTopkActivation":
        return "batch_topk", int(more["k_per_example"]), tensors.get("threshold")
    raise FileFormatError(f"activation_fn {name!r} of crosscode cannot be read here.")


def _one_hookpoint(weight: Tensor, axis: int) -> Tensor:
    if weight.dim() == 3:
        return weight
    if weight.dim() != 4 or weight.shape[axis] != 1:
        raise FileFormatError(
            f"weights of shape {tuple(weight.shape)}: a dictionary here reads one site; this one "
            "reads several hookpoints."
        )
    return weight.squeeze(axis)


def _learned(tensors: Tensors) -> Tensor | None:
    """The threshold, or None if training never came to estimate one."""
    threshold = tensors.get("threshold")
    return None if threshold is None or float(threshold.max()) < 0 else threshold.reshape(())


def need(tensors: Tensors, *names: str) -> None:
    """Raise if a tensor is missing."""
    if any(name not in tensors for name in names):
        raise missing(tensors, names)


def first(tensors: Tensors, *names: str) -> Tensor:
    """The first of these tensors that there is."""
    for name in names:
        if name in tensors:
            return tensors[name]
    raise missing(tensors, names)


def missing(tensors: Tensors, names: tuple[str, ...]) -> FileFormatError:
    """The error for tensors that are not there."""
    left = [name for name in names if name not in tensors]
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
    return FileFormatError(f"tensors {left} are missing; the file holds {shapes}.")


def hook_site(name: str) -> str:
    """Our name of a TransformerLens hook: "blocks.12.hook_resid_post" is "resid_post.12"."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_out|attn_out)", name)
    return f"{found[2]}.{found[1]}" if found else ""


def _layer_site(said: Settings) -> str:
    found = re.fullmatch(r"resid_post_layer_(\d+)", str(said.get("submodule_name") or ""))
    return f"resid_post.{found[1]}" if found else ""
