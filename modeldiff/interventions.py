"""What is done to activations, as data: frozen edits that compose with ``+`` into a `Plan`.

An edit says what, where (site kind and layers) and on which tokens (`modeldiff.masks`). It holds no
model and no hook, so the same plan runs under plain hooks, under nnsight, locally or remotely. The
arithmetic is done in float32 on a copy; the activations that come in are never modified.

Notation: h an activation, v̂ the unit vector of a direction, s its scale (raw length).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from torch import Tensor

from modeldiff._files import digest
from modeldiff._shapes import Float
from modeldiff.directions import Direction, orthonormal_basis
from modeldiff.errors import InterventionError
from modeldiff.masks import Mask, parse_mask
from modeldiff.sites import Kind, Site, parse_sites

Layers = None | int | tuple[int, ...] | Literal["all"]
Side = Literal["base", "finetuned"]


@dataclass(frozen=True)
class Shape:
    """What an edit must know of a model to find its sites.

    Args:
        n_layers: Number of decoder layers.
        d_model: Width of the residual stream.
        lora: The ``lora`` sites of the active adapter; empty without one.
    """

    n_layers: int
    d_model: int
    lora: tuple[Site, ...] = ()


def _layers(layers: Layers, own: int, shape: Shape, what: str) -> tuple[int, ...]:
    if layers is None or isinstance(layers, int):
        chosen: tuple[int, ...] = (own if layers is None else layers,)
    else:
        chosen = tuple(range(shape.n_layers) if layers == "all" else layers)
    wrong = [i for i in chosen if isinstance(i, str) or not 0 <= i < shape.n_layers]
    if wrong or not chosen:
        raise InterventionError(
            f"{what}: layers {wrong or 'none'} asked for, the model has 0 to "
            f"{shape.n_layers - 1}. Nothing was run."
        )
    return tuple(dict.fromkeys(chosen))


@dataclass(frozen=True, eq=False)
class _Along:
    """Fields and site rule shared by edits along one direction."""

    direction: Direction

    def _sites(self, layers: Layers, shape: Shape) -> tuple[Site, ...]:
        site = self.direction.site
        if site.kind not in ("z", "mlp_act", "lora") and self.direction.d_model != shape.d_model:
            raise InterventionError(
                f"direction {self.direction.name!r} has width {self.direction.unit.shape[0]}, the "
                f"residual stream of this model has {shape.d_model}: it comes from another model."
            )
        chosen = _layers(layers, site.layer, shape, self.direction.name)
        return tuple(Site(site.kind, layer) for layer in chosen)

    def vectors(self) -> Float[Tensor, "k d_model"]:
        """Rows that `apply` receives: the unit vector."""
        return self.direction.unit[None]


class _Composes:
    """``edit + edit`` is a `Plan`."""

    def __add__(self, other: "Edit | Plan") -> "Plan":
        return as_plan(self) + other  # pyright: ignore[reportArgumentType]


@final
@dataclass(frozen=True, eq=False)
class Steer(_Along, _Composes):
    """Add a direction: h + coefficient · s · v̂.

    Args:
        direction: What to add; coefficient 1 adds its raw length.
        coefficient: Multiple of the raw length; negative steers away.
        layers: None for the direction's own layer, "all", a layer or several.
        where: Tokens: a `Mask` or "all", "prompt", "new", "last", a role.

    Source:
        Turner et al. 2023 (activation addition), 2308.10248.
    """

    coefficient: float = 1.0
    layers: Layers = None
    where: "str | Mask" = "all"

    def sites(self, shape: Shape) -> tuple[Site, ...]:
        """Sites at which this acts."""
        return self._sites(self.layers, shape)

    def apply(self, h: Tensor, vectors: Tensor, other: Tensor | None) -> Tensor:
        """Edit float32 activations ``[row, token, width]``; a new tensor."""
        return h + (self.coefficient * self.direction.scale) * vectors[0]

    def describe(self) -> str:
        """One line for tables and plots."""
        return f"steer {self.coefficient:+g}x {self.direction.name}"


@final
@dataclass(frozen=True, eq=False)
class Ablate(_Composes):
    """Project directions out: h - QᵀQ h, Q an orthonormal basis of their span.

    Args:
        directions: One direction or several of the same site kind; removed together.
        layers: "all" (directional ablation, the default), None for the direction's own layer, a
            layer or several.
        where: Tokens, as for `Steer`.

    Raises:
        InterventionError: If there is no direction, if they live at different kinds of site, or
            at different layers while ``layers`` is None.

    Source:
        Arditi et al. 2024 (refusal direction), 2406.11717.
    """

    directions: tuple[Direction, ...]
    layers: Layers = "all"
    where: "str | Mask" = "all"
    basis: Float[Tensor, "k d_model"] = field(init=False, repr=False)

    def __init__(
        self,
        directions: "Direction | tuple[Direction, ...] | list[Direction]",
        layers: Layers = "all",
        where: "str | Mask" = "all",
    ) -> None:
        several = (directions,) if isinstance(directions, Direction) else tuple(directions)
        kinds = {direction.site.kind for direction in several}
        if len(kinds) != 1:
            raise InterventionError(
                f"Ablate needs directions at one kind of site, got {sorted(kinds) or 'none'}. "
                "Write one Ablate for each kind and add them."
            )
        own = sorted({direction.site.layer for direction in several})
        if layers is None and len(own) > 1:
            raise InterventionError(
                f"Ablate(layers=None) with directions of layers {own}: say which layers, or write "
                "one Ablate for each direction and add them."
            )
        object.__setattr__(self, "directions", several)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "basis", orthonormal_basis(several))

    def sites(self, shape: Shape) -> tuple[Site, ...]:
        """Sites at which this acts."""
        return _Along(self.directions[0])._sites(self.layers, shape)

    def vectors(self) -> Float[Tensor, "k d_model"]:
        """Rows that `apply` receives: the orthonormal basis."""
        return self.basis

    def apply(self, h: Tensor, vectors: Tensor, other: Tensor | None) -> Tensor:
        """Edit float32 activations ``[row, token, width]``; a new tensor."""
        return h - (h @ vectors.T) @ vectors

    def describe(self) -> str:
        """One line for tables and plots."""
        return "ablate " + ", ".join(direction.name for direction in self.directions)


@final
@dataclass(frozen=True, eq=False)
class ScaleAlong(_Along, _Composes):
    """Scale the component: h + (factor - 1)(h·v̂) v̂. 0 ablates, 1 changes nothing, 2 doubles.

    Args:
        direction: Along which to scale.
        factor: What the component is multiplied by.
        layers: None for the direction's own layer, "all", a layer or several.
        where: Tokens, as for `Steer`.
    """

    factor: float
    layers: Layers = None
    where: "str | Mask" = "all"

    def sites(self, shape: Shape) -> tuple[Site, ...]:
        """Sites at which this acts."""
        return self._sites(self.layers, shape)

    def apply(self, h: Tensor, vectors: Tensor, other: Tensor | None) -> Tensor:
        """Edit float32 activations ``[row, token, width]``; a new tensor."""
        return h + (self.factor - 1.0) * (h @ vectors.T) @ vectors

    def describe(self) -> str:
        """One line for tables and plots."""
        return f"scale {self.direction.name} x{self.factor:g}"


@final
@dataclass(frozen=True, eq=False)
class Clamp(_Along, _Composes):
    """Set the component: h - (h·v̂) v̂ + value · v̂. With the base's mean it is mean-ablation.

    Args:
        direction: Along which to set.
        value: The component afterwards, in residual-stream units.
        layers: None for the direction's own layer, "all", a layer or several.
        where: Tokens, as for `Steer`.
    """

    value: float
    layers: Layers = None
    where: "str | Mask" = "all"

    def sites(self, shape: Shape) -> tuple[Site, ...]:
        """Sites at which this acts."""
        return self._sites(self.layers, shape)

    def apply(self, h: Tensor, vectors: Tensor, other: Tensor | None) -> Tensor:
        """Edit float32 activations ``[row, token, width]``; a new tensor."""
        return h + (self.value - h @ vectors.T) @ vectors

    def describe(self) -> str:
        """One line for tables and plots."""
        return f"clamp {self.direction.name} to {self.value:g}"


@final
@dataclass(frozen=True, eq=False)
class Replace(_Composes):
    """Copy activations of the same tokens from the other model, or from a tensor.

    Args:
        at: Site or sites to overwrite.
        source: "base" or "finetuned": that side is run first on the same tokens; or a tensor
            ``[row, token, width]`` from another run of the same batch.
        along: If given, only the component along this direction is replaced.
        where: Tokens that existed before generation; generated tokens have no counterpart in the
            other model's run, so ``generate`` needs ``where="prompt"`` or narrower.
        channels: If given, only these channels are replaced: the first, and the one after the
            last. Head i of width w is ``(i * w, (i + 1) * w)`` of a ``z`` site.

    Raises:
        InterventionError: If the channels are no range, or are given beside a direction.

    Source:
        Interchange interventions, Geiger et al. 2021, 2106.02997.

    Example:
        >>> Replace("z.2", channels=(8, 16)).describe()
        'replace z.2[8:16] from base'
    """

    at: "str | Site | tuple[str | Site, ...]"
    source: "Side | Float[Tensor, 'batch seq width']" = "base"
    along: Direction | None = None
    where: "str | Mask" = "all"
    channels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.channels is None:
            return
        several = tuple(self.channels)
        whole = len(several) == 2 and all(type(each) is int for each in several)
        if not whole or not 0 <= several[0] < several[1]:
            raise InterventionError(
                f"channels={self.channels}: give the first and the one after the last, e.g. (0, 8)."
            )
        if self.along is not None:
            raise InterventionError("Replace takes channels or along=, not both: leave one out.")
        object.__setattr__(self, "channels", several)

    def sites(self, shape: Shape) -> tuple[Site, ...]:
        """Sites at which this acts."""
        sites = parse_sites(self.at)
        wrong = [str(site) for site in sites if site.layer >= shape.n_layers]
        if wrong:
            raise InterventionError(
                f"Replace at {wrong}: the model has layers 0 to {shape.n_layers - 1}."
            )
        return sites

    def vectors(self) -> Float[Tensor, "k d_model"]:
        """Rows that `apply` receives: the direction, or none."""
        return torch.empty(0, 0) if self.along is None else self.along.unit[None]

    def apply(self, h: Tensor, vectors: Tensor, other: Tensor | None) -> Tensor:
        """Edit float32 activations ``[row, token, width]``; a new tensor."""
        if other is None:
            raise InterventionError("Replace has no activations to copy for these tokens.")
        self.check_width(h.shape[-1])
        if self.channels is not None:
            first, stop = self.channels
            return torch.cat([h[..., :first], other.to(h)[..., first:stop], h[..., stop:]], -1)
        if self.along is None:
            return other.to(h, copy=True)
        return h + ((other.to(h) - h) @ vectors.T) @ vectors

    def check_width(self, width: int) -> None:
        """Verify that activations have the channels that are replaced.

        Raises:
            InterventionError: If they are narrower.
        """
        if self.channels is not None and self.channels[1] > width:
            raise InterventionError(
                f"{self.describe()!r}: the activations there have channels 0 to {width - 1}."
            )

    def describe(self) -> str:
        """One line for tables and plots."""
        origin = self.source if isinstance(self.source, str) else "another run"
        what = f" along {self.along.name}" if self.along else ""
        part = "[{}:{}]".format(*self.channels) if self.channels else ""
        sites = ", ".join(f"{site}{part}" for site in parse_sites(self.at))
        return f"replace {sites}{what} from {origin}"


@final
@dataclass(frozen=True, eq=False)
class ScaleAdapter(_Composes):
    """Multiply what the adapter writes by ``factor``: 0 removes it, negative reverses it.

    Args:
        factor: Multiplier of scale · B(A x) at each chosen module.
        layers: "all", a layer or several.
        modules: Adapted modules such as ``"mlp.down_proj"``; all of them if empty.
        where: Tokens, as for `Steer`.
    """

    factor: float
    layers: Layers = "all"
    modules: tuple[str, ...] = ()
    where: "str | Mask" = "all"

    def sites(self, shape: Shape) -> tuple[Site, ...]:
        """Sites at which this acts: the outputs of A at the chosen modules."""
        if not shape.lora:
            raise InterventionError(
                "ScaleAdapter needs a side with a LoRA adapter: use it on 'finetuned' of a pair "
                "loaded with adapter=."
            )
        chosen = None if self.layers == "all" else _layers(self.layers, -1, shape, "ScaleAdapter")
        sites = tuple(
            site
            for site in shape.lora
            if (chosen is None or site.layer in chosen)
            and (not self.modules or site.module in self.modules)
        )
        if not sites:
            have = ", ".join(sorted({f"{site.layer}.{site.module}" for site in shape.lora}))
            raise InterventionError(
                f"ScaleAdapter(layers={self.layers}, modules={self.modules}) matches no adapted "
                f"module; the adapter has {have}."
            )
        return sites

    def vectors(self) -> Float[Tensor, "k d_model"]:
        """Rows that `apply` receives: none."""
        return torch.empty(0, 0)

    def apply(self, h: Tensor, vectors: Tensor, other: Tensor | None) -> Tensor:
        """Edit float32 activations ``[row, token, rank]``; a new tensor."""
        return h * self.factor

    def describe(self) -> str:
        """One line for tables and plots."""
        return f"adapter x{self.factor:g}"


Edit = Steer | Ablate | ScaleAlong | Clamp | Replace | ScaleAdapter


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """Edits carried out together; at one site in the order in which they were added.

    Example:
        >>> len(Plan() + Plan())
        0
    """

    edits: tuple[Edit, ...] = ()

    def __add__(self, other: "Edit | Plan") -> "Plan":
        return Plan(self.edits + as_plan(other).edits)

    def __len__(self) -> int:
        return len(self.edits)

    def masks(self) -> tuple[Mask, ...]:
        """The tokens of each edit."""
        return tuple(parse_mask(edit.where) for edit in self.edits)

    def describe(self) -> str:
        """One line for tables and plots."""
        return " + ".join(edit.describe() for edit in self.edits) or "none"

    @property
    def content_key(self) -> str:
        """Hash of everything that the plan does; equal plans have equal keys."""
        return digest([_edit_key(edit) for edit in self.edits])


def _edit_key(edit: Edit) -> list[object]:
    where = parse_mask(edit.where).to_json()
    vectors = edit.vectors().numpy().tobytes()
    head = [type(edit).__name__, where, digest(vectors)]
    if isinstance(edit, Replace):
        origin = edit.source if isinstance(edit.source, str) else _tensor_key(edit.source)
        channels = [] if edit.channels is None else [list(edit.channels)]  # old keys stay
        return [*head, [str(site) for site in parse_sites(edit.at)], origin, *channels]
    layers = list(edit.layers) if isinstance(edit.layers, tuple | list | range) else edit.layers
    if isinstance(edit, ScaleAdapter):
        return [*head, layers, float(edit.factor), list(edit.modules)]
    if isinstance(edit, Ablate):
        return [*head, layers, str(edit.directions[0].site)]
    amount = {"Steer": "coefficient", "ScaleAlong": "factor", "Clamp": "value"}
    site, scale = str(edit.direction.site), edit.direction.scale
    return [*head, layers, site, scale, float(getattr(edit, amount[type(edit).__name__]))]


def _tensor_key(tensor: Tensor) -> list[object]:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [digest(raw), str(tensor.dtype), list(tensor.shape)]


def as_plan(do: "Edit | Plan | None") -> Plan:
    """Read None, one edit or a plan as a plan; anything else is an `InterventionError`."""
    if isinstance(do, Plan | None):
        return do or Plan()
    if not isinstance(do, Edit):
        raise InterventionError(f"a {type(do).__name__} is no edit, such as Steer(direction).")
    return Plan((do,))


@dataclass(frozen=True, eq=False)
class Cell:
    """One column of the grid: a side and what is done to it.

    Args:
        side: "base" or "finetuned".
        name: Name of the edit; "none" without one.
        plan: The edit.
    """

    side: Side
    name: str = "none"
    plan: Plan = Plan()


def grid(
    do: "Edit | Plan | Mapping[str, Edit | Plan | None] | None" = None,
    models: Sequence[Side] = ("base", "finetuned"),
) -> tuple[Cell, ...]:
    """Cells of {models} x {none, edits}, unedited ones first.

    Example:
        >>> [(cell.side, cell.name) for cell in grid()]
        [('base', 'none'), ('finetuned', 'none')]

    Raises:
        InterventionError: If an edit is called "none".
    """
    if isinstance(do, Mapping):
        named = {name: as_plan(edit) for name, edit in do.items()}
    else:
        named = {plan.describe(): plan for plan in [as_plan(do)] if len(plan)}
    if len(named.get("none", Plan())):
        raise InterventionError("'none' names the unedited cells; give the edit another name.")
    plans = {"none": Plan(), **named}
    return tuple(Cell(side, name, plan) for name, plan in plans.items() for side in models)


def moved(edit: Edit, where: "str | Mask") -> Edit:
    """Return the same edit on other tokens."""
    if isinstance(edit, Ablate):
        return Ablate(edit.directions, edit.layers, where)
    return replace(edit, where=where)


def site_kinds(plan: Plan, shape: Shape) -> frozenset[Kind]:
    """Kinds of site that a plan touches."""
    return frozenset(site.kind for edit in plan.edits for site in edit.sites(shape))
