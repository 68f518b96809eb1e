"""What concept ablation does to one activation and to its gradient, mode by mode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.directions import Direction, orthonormal_basis
from modeldiff.errors import DirectionError, InterventionError, MismatchError

Mode = Literal["project", "mean", "forward", "backward", "steer"]
MODES: tuple[Mode, ...] = get_args(Mode)


class _Ablation(torch.autograd.Function):
    """Ablate the value, the gradient, or both; everything else passes unchanged."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, basis: Tensor, value: bool, gradient: bool, offset: Tensor | None
    ) -> Tensor:
        ctx.basis, ctx.gradient = basis, gradient
        if not value:
            return h.view_as(h)
        left = without(h, basis)
        return (left if offset is None else left + offset).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.gradient:
            gradient = without(gradient, ctx.basis).to(gradient.dtype)
        return gradient, None, None, None, None


def without(
    h: Float[Tensor, "*rows d_model"], basis: Float[Tensor, "k d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """Project the span of an orthonormal basis out, in float32 whatever autocast asks for.

    It is done twice: the second time takes away what TF32 matrix products leave over.

    Returns:
        A new tensor, float32 (float64 if ``h`` is).
    """
    with torch.autocast(h.device.type, enabled=False):
        rows = h.to(torch.promote_types(h.dtype, torch.float32))
        basis = basis.to(rows)
        for _ in range(2):
            rows = rows - (rows @ basis.T) @ basis
    return rows


def along(
    h: Float[Tensor, "*rows d_model"], basis: Float[Tensor, "k d_model"]
) -> Float[Tensor, "*rows k"]:
    """Components along an orthonormal basis, float32."""
    with torch.autocast(h.device.type, enabled=False):
        return h.float() @ basis.T.to(h.device, torch.float32)


@dataclass(frozen=True, eq=False)
class Ablated:
    """What is done at one layer.

    Args:
        layer: After which decoder layer.
        directions: Whose span is meant.
        mode: See `modeldiff.caft.caft`.
        mean: The base's mean activation there, for "mean".
        coefficient: Multiple of the sum of the directions that "steer" adds.
    """

    layer: int
    directions: tuple[Direction, ...]
    mode: Mode = "project"
    mean: Float[Tensor, " d_model"] | None = None
    coefficient: float = 1.0
    basis: Float[Tensor, "k d_model"] = field(init=False, repr=False)
    added: Float[Tensor, " d_model"] | None = field(init=False, repr=False)
    _moved: dict[torch.device, tuple[Tensor, Tensor | None]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", orthonormal_basis(self.directions))
        object.__setattr__(self, "added", self._constant())

    def _constant(self) -> Float[Tensor, " d_model"] | None:
        """What is added to every token, apart from the ablation."""
        if self.mode == "steer":
            return self.coefficient * torch.stack([d.vector for d in self.directions]).sum(0)
        if self.mode != "mean":
            return None
        mean, width = self.mean, self.basis.shape[1]
        if mean is None or mean.shape != (width,) or not bool(mean.isfinite().all()):
            seen = "none" if mean is None else f"one of shape {tuple(mean.shape)}"
            raise InterventionError(
                f"layer {self.layer}: mode 'mean' needs the base's mean activation, {width} finite "
                f"numbers; got {seen}. caft.base_means(pair, texts, layers) measures them."
            )
        row = mean.detach().cpu().float()
        return (row @ self.basis.T) @ self.basis

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Basis and constant on a device; copied there once."""
        if device not in self._moved:
            constant = None if self.added is None else self.added.to(device)
            self._moved[device] = self.basis.to(device), constant
        return self._moved[device]

    def __call__(self, h: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Return what takes the place of an activation, in its dtype; ``h`` is not modified.

        Raises:
            InterventionError: If its width is not that of the directions.
        """
        if h.shape[-1] != self.basis.shape[1]:
            raise InterventionError(
                f"layer {self.layer} has activations of width {h.shape[-1]}, the directions "
                f"{self.basis.shape[1]}: they come from another model."
            )
        basis, constant = self.on(h.device)
        if self.mode == "steer":
            assert constant is not None
            return (h.to(torch.promote_types(h.dtype, torch.float32)) + constant).to(h.dtype)
        value, gradient = self.mode != "backward", self.mode != "forward"
        found = _Ablation.apply(h, basis, value, gradient, constant)
        assert isinstance(found, Tensor)
        return found


def ablations(
    directions: Sequence[Direction] | Mapping[int, Sequence[Direction]],
    layers: Sequence[int] | None,
    mode: Mode,
    means: Mapping[int, Tensor] | None,
    coefficient: float,
) -> dict[int, Ablated]:
    """What is done at each layer; layers without directions are left out.

    Raises:
        InterventionError: If mode, layers, directions and means do not go together.
    """
    if mode not in MODES:
        raise InterventionError(f"mode {mode!r}: it is one of {', '.join(MODES)}.")
    if (means is not None) != (mode == "mean"):
        raise InterventionError(
            f"mode {mode!r} with means {'given' if means else 'missing'}: 'mean' sets the "
            "component to the base's mean and needs them, the other modes do not use them."
        )
    found = {}
    for layer, several in sorted(_by_layer(directions, layers).items()):
        if not several:
            continue
        mean = None if means is None else means.get(layer)
        try:
            found[layer] = Ablated(layer, several, mode, mean, coefficient)
        except (MismatchError, DirectionError) as error:
            raise InterventionError(f"layer {layer}: {error}") from error
    return found


def _by_layer(
    directions: Sequence[Direction] | Mapping[int, Sequence[Direction]],
    layers: Sequence[int] | None,
) -> dict[int, tuple[Direction, ...]]:
    if isinstance(directions, Mapping):
        if layers is not None:
            raise InterventionError(
                f"layers={list(layers)} beside directions by layer {sorted(directions)}: say the "
                "layers once."
            )
        found = {layer: tuple(several) for layer, several in directions.items()}
        return _checked(found, ("resid_post", "resid_pre", "attn_out", "mlp_out"))
    if layers is not None:
        if directions and not len(layers):
            raise InterventionError("layers=[] with directions: nothing would be ablated.")
        found = dict.fromkeys(layers, tuple(directions))
        return _checked(found, ("resid_post", "resid_pre", "attn_out", "mlp_out"))
    own: dict[int, tuple[Direction, ...]] = {}
    for each in directions:
        own[each.site.layer] = (*own.get(each.site.layer, ()), each)
    return _checked(own, ("resid_post",))


def _checked(
    found: dict[int, tuple[Direction, ...]], kinds: tuple[str, ...]
) -> dict[int, tuple[Direction, ...]]:
    for each in {id(d): d for several in found.values() for d in several}.values():
        if each.site.kind not in kinds:
            raise InterventionError(
                f"{each.name!r} is at {each.site}; concepts are ablated at the output of decoder "
                f"layers. Say the layers, or move it: .at('resid_post.{each.site.layer}')."
            )
    return found
