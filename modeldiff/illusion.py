"""The subspace illusion: a direction whose patch works by waking a path that is asleep on the data.

A patch along v moves the activation by (the two sides' difference along v) · v. If v mixes a part
that differs between the sides but is read by nothing with a part that is read but does not differ,
the first part supplies the size and the second the effect: v carries nothing of the change. Split
by what the layers above can read, the two come apart: the part of v in the readers' row space,
patched alone, then does nothing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.batch_size import fitted
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.errors import MaskError, MismatchError, RemoteError, SiteError
from modeldiff.forward import as_texts, device_of, inputs_of
from modeldiff.hooks import stopping
from modeldiff.interventions import Side
from modeldiff.loading import Sides
from modeldiff.patch_runs import Component, Metric, copies, logits
from modeldiff.patching import Scorer, both_traces
from modeldiff.placement import dense_weight
from modeldiff.sites import Site
from modeldiff.stats import Interval, bootstrap_mean, empirical_p
from modeldiff.tokens import Text

_STREAM = ("resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True, eq=False)
class IllusionCheck:
    """Whether a patch along a direction works through what the layers above read anyway.

    Args:
        direction: Its name.
        row_share: Squared length of its part in the readers' row space, from 0 to 1.
        random_share: What a random direction has: rank over width.
        gain: How strongly the readers read it, over how strongly they read a random direction
            (root mean square); tells something where the row space is everything.
        effect: Mean change of the metric by the patch along the direction, over texts.
        row_effect: The same along its part in the row space alone; NaN if it has none.
        kept: Row effect over effect: 1 for an ordinary direction, 0 for an illusion; NaN where
            the effect is zero.
        difference_outside: Share of the sides' difference along the direction that lies outside
            the row space; an illusion needs it.
        p: Of the absolute effect among random directions, never 0.
        flagged: Whether it is an illusion: the effect differs from zero over texts and from
            random directions at 5 %, and less than half of it is kept.
    """

    direction: str
    row_share: float
    random_share: float
    gain: float
    effect: Interval
    row_effect: Interval
    kept: float
    difference_outside: float
    p: float
    flagged: bool

    @property
    def note(self) -> str:
        """One sentence for the direction's card."""
        start = (
            f"{self.row_share:.0%} of it is in the row space of what reads it (a random direction: "
            f"{self.random_share:.0%})"
        )
        if self.p > 0.05:
            return f"{start}; its patch does no more than random ones (p = {self.p:.2g})"
        end = "a dormant path: an illusion" if self.flagged else "no illusion"
        kept = round(self.kept, 2) + 0.0  # no minus before a zero
        return f"{start}; patched alone that part keeps {kept:.0%} of the effect: {end}"


def check_illusion(
    sides: Sides,
    items: Sequence[Any],
    direction: Direction,
    metric: Scorer,
    *,
    side: Side = "finetuned",
    tolerance: float = 1e-3,
    n_random: int = 19,
    seed: int = 0,
) -> IllusionCheck:
    """Patch along a direction and along its readable part alone, at every token.

    Args:
        sides: The pair.
        items: Texts; at least two.
        direction: At ``resid_post``, ``attn_out``, ``mlp_out``, ``mlp_act`` or ``z``.
        metric: Makes the metric of each text.
        side: The side that is patched with the other's component.
        tolerance: Singular values of the readers below this share of the largest do not count.
        n_random: Random directions, patched the same way.
        seed: Of them and of the bootstrap.

    Raises:
        SiteError: If the direction is at another kind of site.
        MismatchError: If its width is not that of its site.
        MaskError: If there are fewer than two texts or 19 random directions.

    Source:
        Makelov, Lange and Nanda 2023, 2311.17030.
    """
    texts = as_texts(sides, items)
    if len(texts) < 2 or n_random < 19:
        raise MaskError(f"{len(texts)} texts, n_random={n_random}: give two or more, and 19.")
    matrix = readers(sides, direction.site, side)
    if matrix.shape[1] != direction.d_model:
        raise MismatchError(
            f"{direction.name!r} has width {direction.d_model}, {direction.site} has "
            f"{matrix.shape[1]}: it comes from another model or kind of site."
        )
    basis = row_space(matrix, tolerance)
    unit = direction.unit.double()
    inside = basis.T @ (basis @ unit)
    share = float(inside @ inside)
    units = [unit, inside / math.sqrt(share) if share > 1e-12 else torch.zeros_like(unit)]
    units += [each.unit.double() for each in random_like(direction, n_random, seed=seed)]
    changes, moved = zip(
        *(_changes(sides, text, side, direction.site, units, inside, metric(text))
          for text in texts), strict=True,
    )  # fmt: skip
    return _judged(
        direction, share, len(basis), _gain(matrix, unit), torch.stack(changes),
        torch.stack(moved), seed,
    )  # fmt: skip


def with_check(direction: Direction, check: IllusionCheck) -> Direction:
    """Return the direction with the check's sentence on its card."""
    return replace(direction, notes=(*direction.notes, check.note))


@torch.no_grad()
def readers(sides: Sides, site: Site, side: Side) -> Float[Tensor, "read width"]:
    """Every weight that reads a site, stacked, in float64.

    For ``mlp_act`` and ``z`` the one projection that follows. For the residual stream every
    projection of the layers above (of this layer's MLP too after its attention) and the
    unembedding, each with the gain of the norm before it.

    Raises:
        SiteError: If the site is of another kind.
        RemoteError: If the weights are not here.
    """
    if sides.kind == "remote":
        raise RemoteError("the readers' weights are not here: load the pair.")
    if site.kind not in (*_STREAM, "mlp_act", "z"):
        raise SiteError(f"{site}: the check knows {', '.join(_STREAM)}, mlp_act and z.")
    with sides.on(side) as root, _seen_inputs(root) as seen:
        batch = copies(sides, as_texts(sides, ["a b"])[0], 1)
        with stopping(root, sides.site_map.unembed):
            root(**inputs_of(batch, device_of(root)), use_cache=False)
        if site.kind in ("mlp_act", "z"):
            path = sides.site_map.locate(site)[0]
            return torch.cat(
                [_matrix(each) for each, (name, _) in seen.items()
                 if name.startswith(path) and ".lora_B" not in name]
            )  # fmt: skip
        head = module_at(root, sides.site_map.unembed)
        seen[head] = sides.site_map.unembed, module_at(root, sides.site_map.norm)
        reading = {m: (name, norm) for m, (name, norm) in seen.items() if norm is not None}
        _check_every_layer(sides, [name for name, _ in reading.values()])
        return torch.cat(
            [_matrix(module) @ _linear_part(norm) for module, (name, norm) in reading.items()
             if _above(sides, site, name)]
        )  # fmt: skip


def _check_every_layer(sides: Sides, names: Sequence[str]) -> None:
    layers = [sides.site_map.layer(i) for i in range(sides.shape("base").n_layers)]
    blind = [layer for layer in layers if not any(name.startswith(f"{layer}.") for name in names)]
    if blind:
        raise SiteError(
            f"no weight of {', '.join(blind[:3])} was seen to read the output of a norm, so what "
            "reads the residual stream is not known in this family; the check covers mlp_act and "
            "z there."
        )


def row_space(matrix: Float[Tensor, "read width"], tolerance: float) -> Float[Tensor, "k width"]:
    """Orthonormal rows that span a matrix's row space.

    Args:
        matrix: Any; it is reduced to its Gram matrix, so many rows cost no memory.
        tolerance: Singular values below this share of the largest do not count.

    Example:
        >>> row_space(torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), 1e-3).abs()
        tensor([[1., 0., 0.]], dtype=torch.float64)
    """
    squares, vectors = torch.linalg.eigh(matrix.double().T @ matrix.double())
    kept = squares > tolerance**2 * squares[-1]
    return vectors[:, kept].T.flip(0)


@contextmanager
def _seen_inputs(root: nn.Module) -> Iterator[dict[nn.Module, tuple[str, nn.Module | None]]]:
    """Every 2-D weight that runs: the layer in which, and the norm whose output it reads."""
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    seen: dict[nn.Module, tuple[str, nn.Module | None]] = {}
    names = {module: name for name, module in root.named_modules()}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and "Norm" in type(module).__name__:
            outputs[id(output)] = module, output  # kept alive, so that ids stay one's own

    def before(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and not isinstance(module, nn.Embedding):
            norm = outputs.get(id(args[0]), (None, None))[0]
            seen[module] = names[module], norm

    handles = []
    for module in names:
        weight = getattr(module, "weight", None)
        leaf = not any(True for _ in module.children())
        if isinstance(weight, Tensor) and weight.dim() == 2 and leaf:
            handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _matrix(module: nn.Module) -> Float[Tensor, "read width"]:
    """A projection's weight, one row for each number it computes."""
    weight = dense_weight(module).double().cpu()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _linear_part(norm: nn.Module) -> Float[Tensor, "width width"]:
    """The norm as a matrix, but for the length that it divides by."""
    gain = _gain_of(norm)
    width = len(gain)
    centre = torch.eye(width, dtype=torch.float64)
    if isinstance(norm, nn.LayerNorm):
        centre = centre - 1 / width
    return gain[:, None] * centre


def _gain_of(norm: nn.Module) -> Float[Tensor, " width"]:
    """Gain of a norm, read off what it does to an alternating vector of length sqrt(width)."""
    weight: Any = norm.weight
    signs = torch.ones_like(weight)
    signs[1::2] = -1  # mean 0 and root mean square 1, if the width is even
    out = (norm(signs[None]) - norm(-signs[None]))[0] / 2
    return (out * signs).detach().double().cpu()


def _above(sides: Sides, site: Site, name: str) -> bool:
    """Whether a projection that reads a norm of the residual stream comes after a site."""
    layers = sides.site_map.layers + "."
    if not name.startswith(layers):
        return True  # the unembedding
    index, _, inside = name.removeprefix(layers).partition(".")
    if int(index) != site.layer:
        return int(index) > site.layer
    attention = sides.site_map.o_proj.split(".")[0]
    parallel = getattr(sides.config, "use_parallel_residual", False)
    return site.kind == "attn_out" and not parallel and not inside.startswith(attention)


def _gain(matrix: Tensor, unit: Tensor) -> float:
    """Length that the readers give the direction, over their root mean square."""
    mean = float(matrix.norm()) / math.sqrt(matrix.shape[1])
    return float((matrix @ unit).norm()) / mean if mean else 0.0


@torch.no_grad()
def _changes(
    sides: Sides,
    text: Text,
    side: Side,
    site: Site,
    units: Sequence[Tensor],
    inside: Float[Tensor, " width"],
    metric: Metric,
) -> tuple[Float[Tensor, " unit"], Float[Tensor, " 2"]]:
    """Change of the metric by each patch, and the sides' squared difference, outside and all."""
    own, other = both_traces(sides, text, side, [str(site)])
    value = own.values[str(site)].double()
    gap = other.values[str(site)].to(value) - value
    several = torch.stack(list(units)).to(value)

    def changes(some: list[int]) -> Float[Tensor, " unit"]:
        chosen = several if len(some) == len(several) else several[some]
        rows = value + (gap @ chosen.T).T[..., None] * chosen[:, None]
        rows = torch.cat([value[None], rows]).to(own.values[str(site)])
        scores = metric(logits(sides, own, _component(site), rows, metric.at)).double().cpu()
        return scores[1:] - scores[0]

    parts = fitted(sides.roots[0], range(len(several)), changes, what="illusion",
                   width=lambda _: text.n_tokens, max_rows=len(several))  # fmt: skip
    effects = torch.cat([found for _, found in parts])
    outside = gap @ (several[0] - inside.to(value))
    return effects, torch.stack(
        [outside.square().sum(), outside.square().sum() + (gap @ inside.to(value)).square().sum()]
    ).cpu()


def _component(site: Site) -> Component:
    """A component whose place is the site, whole."""
    if site.kind == "z":
        return Component("head", site.layer, 0)
    return Component(site.kind, site.layer)  # pyright: ignore[reportArgumentType]


def _judged(
    direction: Direction,
    share: float,
    rank: int,
    gain: float,
    changes: Float[Tensor, "text unit"],
    moved: Float[Tensor, "text 2"],
    seed: int,
) -> IllusionCheck:
    effect = bootstrap_mean(changes[:, 0], seed=seed)
    inside = bootstrap_mean(changes[:, 1], seed=seed)
    p = empirical_p(abs(effect.estimate), changes[:, 2:].mean(0).abs(), "upper")
    kept = inside.estimate / effect.estimate if effect.estimate else math.nan
    clear = (effect.low > 0 or effect.high < 0) and p <= 0.05
    outside, whole = (float(each) for each in moved.sum(0))
    return IllusionCheck(
        direction=direction.name,
        row_share=share,
        random_share=rank / direction.d_model,
        gain=gain,
        effect=effect,
        row_effect=inside,
        kept=kept,
        difference_outside=outside / whole if whole else 0.0,
        p=p,
        flagged=clear and kept < 0.5,
    )
