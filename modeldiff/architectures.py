"""Which module holds each Site, family by family.

One table serves both executors: plain hooks look the path up on the torch module, nnsight on its
envoy tree. A family that is not here is used by passing a `SiteMap` of your own to
`ModelPair.load(..., site_map=...)`.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from torch import nn

from modeldiff.errors import SiteError
from modeldiff.sites import Site

End = Literal["input", "output"]


@dataclass(frozen=True)
class SiteMap:
    """Module paths of one model family; the defaults are those of Llama.

    Paths of ``attn_write`` to ``down_proj`` are relative to a decoder layer, the others to the
    causal language model. ``attn_write`` and ``mlp_write`` are the modules whose *output is added*
    to the residual stream (in Gemma 2 the norms after attention and MLP).

    Example:
        >>> SiteMap().locate(Site("mlp_act", 3))
        ('model.layers.3.mlp.down_proj', 'input')
    """

    layers: str = "model.layers"
    norm: str = "model.norm"
    embed: str = "model.embed_tokens"
    unembed: str = "lm_head"
    attn_write: str = "self_attn"
    o_proj: str = "self_attn.o_proj"
    mlp_write: str = "mlp"
    down_proj: str = "mlp.down_proj"

    def layer(self, index: int) -> str:
        """Path of decoder layer ``index``."""
        return f"{self.layers}.{index}"

    def locate(self, site: Site, adapter: str = "") -> tuple[str, End]:
        """Module path of a site and which end of the module it is.

        Args:
            site: Where.
            adapter: Name of the active adapter; needed for ``lora`` sites only.

        Raises:
            SiteError: If a ``lora`` site is asked of a model without an adapter.
        """
        layer = self.layer(site.layer)
        if site.kind == "lora":
            if not adapter:
                raise SiteError(f"{site} is inside an adapter, and this side has none.")
            return f"{layer}.{site.module}.lora_A.{adapter}", "output"
        places: dict[str, tuple[str, End]] = {
            "resid_pre": (layer, "input"),
            "z": (f"{layer}.{self.o_proj}", "input"),
            "attn_out": (f"{layer}.{self.attn_write}", "output"),
            "mlp_act": (f"{layer}.{self.down_proj}", "input"),
            "mlp_out": (f"{layer}.{self.mlp_write}", "output"),
            "resid_post": (layer, "output"),
        }
        return places[site.kind]

    @property
    def renames(self) -> dict[str, str]:
        """One vocabulary for nnsight: ``layers``, ``ln_final``, ``embed``, ``unembed``."""
        return {
            self.layers: "layers",
            self.norm: "ln_final",
            self.embed: "embed",
            self.unembed: "unembed",
        }


_LLAMA = SiteMap()
_GPT2 = SiteMap(
    layers="transformer.h",
    norm="transformer.ln_f",
    embed="transformer.wte",
    attn_write="attn",
    o_proj="attn.c_proj",
    down_proj="mlp.c_proj",
)
_GPT_NEOX = SiteMap(
    layers="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    embed="gpt_neox.embed_in",
    attn_write="attention",
    o_proj="attention.dense",
    down_proj="mlp.dense_4h_to_h",
)
_GEMMA2 = SiteMap(attn_write="post_attention_layernorm", mlp_write="post_feedforward_layernorm")

FAMILIES: dict[str, SiteMap] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA2,
}


def site_map_of(model: nn.Module) -> SiteMap:
    """Find the map of a model's family by ``config.model_type``.

    Raises:
        SiteError: If the family is not in the table; the message shows how to pass a map.
    """
    config = getattr(model, "config", None)
    family = str(getattr(config, "model_type", type(model).__name__))
    if family in FAMILIES:
        return FAMILIES[family]
    near = get_close_matches(family, FAMILIES, n=1)
    hint = f" The nearest known family is {near[0]!r}." if near else ""
    raise SiteError(
        f"no site map for the model family {family!r}; known: {', '.join(FAMILIES)}.{hint} Pass "
        "one: ModelPair.load(..., site_map=SiteMap(layers='model.layers', norm='model.norm', "
        "...)) with the module paths that print(model) shows. It is verified at load."
    )


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path.

    Raises:
        SiteError: If the model has no such module; names the last part that exists.
    """
    module, walked = root, []
    for part in path.split("."):
        child = dict(module.named_children()).get(part)
        if child is None:
            inside = ".".join(walked) or type(root).__name__
            near = ", ".join(name for name, _ in module.named_children())
            raise SiteError(f"no module {path!r}: {inside} has {near or 'no children'}.")
        module, walked = child, [*walked, part]
    return module


def adapted_modules(root: nn.Module, site_map: SiteMap, adapter: str) -> tuple[Site, ...]:
    """List the ``lora`` sites of one adapter, in forward order.

    Raises:
        SiteError: If an adapted module lies outside the decoder layers.
    """
    found = set()
    for path, _ in root.named_parameters():
        inside, _, end = path.partition(".lora_")
        if end.split(".")[1:2] != [adapter]:
            continue
        rest = inside.removeprefix(site_map.layers + ".")
        index, _, module = rest.partition(".")
        if rest == inside or not index.isdigit() or "embedding" in end:
            raise SiteError(
                f"adapter {adapter!r} changes {inside!r}, which is not inside "
                f"{site_map.layers}.*; such adapters must be merged: pass the merged model as "
                "finetuned=."
            )
        found.add(Site("lora", int(index), module))
    return tuple(sorted(found))
