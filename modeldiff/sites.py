"""Where in a transformer an activation lives."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from modeldiff.errors import SiteError

Kind = Literal["resid_pre", "z", "attn_out", "mlp_act", "mlp_out", "resid_post", "lora"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_ORDER = {"resid_pre": 0, "z": 3, "attn_out": 5, "mlp_act": 8, "mlp_out": 10, "resid_post": 11}
_LORA_ORDER = (  # q runs before k and v, gate before up
    (re.compile(r"(^|\.)[kv]_proj$"), 2),
    (re.compile(r"(^|\.)(o_proj|dense|attn\.c_proj)$"), 4),
    (re.compile(r"(^|\.)(down_proj|dense_4h_to_h|mlp\.c_proj)$"), 9),
    (re.compile(r"(^|\.)mlp\."), 7),
)


@dataclass(frozen=True)
class Site:
    """One activation in the forward pass: a kind, a layer and, for adapters, a module.

    Sites sort in the order in which the forward pass reaches them.

    Args:
        kind: ``resid_pre`` and ``resid_post`` are the input and the output of a decoder layer;
            ``attn_out`` and ``mlp_out`` are what attention and MLP add to the residual stream;
            ``z`` is the input of the attention's output projection (heads side by side);
            ``mlp_act`` is the input of the MLP's output projection; ``lora`` is the output of
            an adapter's ``A`` (for rank 1 the scalar hidden state, before ``B`` and its scale).
        layer: Decoder layer, from 0. Negative layers are not accepted: a Site means the same
            thing for every model.
        module: For ``lora`` the adapted module inside the layer, e.g. ``"mlp.down_proj"``.

    Raises:
        SiteError: If the layer is negative, the kind is unknown, or a module is missing or not
            wanted.

    Example:
        >>> Site.parse("resid_post.12")
        Site(kind='resid_post', layer=12, module='')
        >>> [str(s) for s in sorted([Site("resid_post", 3), Site("attn_out", 3)])]
        ['attn_out.3', 'resid_post.3']
        >>> str(Site.parse("lora.2.mlp.down_proj"))
        'lora.2.mlp.down_proj'
    """

    kind: Kind
    layer: int
    module: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = get_close_matches(self.kind, KINDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SiteError(f"unknown site kind {self.kind!r}.{hint} Known: {', '.join(KINDS)}.")
        if self.layer < 0:
            raise SiteError(f"layer {self.layer} of {self.kind!r}: layers count from 0 upwards.")
        if (self.kind == "lora") != bool(self.module):
            raise SiteError(
                f"site kind {self.kind!r} with module {self.module!r}: a module is needed for "
                "'lora' sites and for no other, e.g. 'lora.2.mlp.down_proj'."
            )

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """Read ``"kind.layer"`` or ``"lora.layer.module"``; a Site is returned as it is.

        Raises:
            SiteError: If the text is not of that form, or the kind is unknown.
        """
        if isinstance(text, Site):
            return text
        match = re.fullmatch(r"([A-Za-z_]+)\.(\d+)(?:\.([\w.]+))?", text)
        if match is None:
            raise SiteError(
                f"{text!r} is not a site. Write it as 'kind.layer', e.g. 'resid_post.12'."
            )
        kind, layer, module = match.groups()
        return cls(kind, int(layer), module or "")  # pyright: ignore[reportArgumentType]

    @property
    def order(self) -> tuple[int, int, str]:
        """Sorting key: the order of the forward pass."""
        if self.kind != "lora":
            return self.layer, _ORDER[self.kind], ""
        rank = next((rank for pattern, rank in _LORA_ORDER if pattern.search(self.module)), 1)
        return self.layer, rank, self.module

    def __lt__(self, other: "Site") -> bool:
        return self.order < other.order

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}" + (f".{self.module}" if self.module else "")


def parse_sites(sites: "str | Site | Iterable[str | Site]") -> tuple[Site, ...]:
    """Read one site or several; the result is sorted in forward order without repeats.

    Example:
        >>> [str(s) for s in parse_sites(["mlp_out.1", "attn_out.1"])]
        ['attn_out.1', 'mlp_out.1']
    """
    several = [sites] if isinstance(sites, str | Site) else sites
    return tuple(sorted({Site.parse(site) for site in several}))
