"""LoRA adapters opened up: what each module reads and writes, and how adapters compare.

A module adds ``scale * B A x`` to its output. Neither A nor B alone means anything (A may be
doubled and B halved), so everything here is of the product, by its singular value decomposition,
which is made of thin factors: component i reads ``right[:, i]``, multiplies by ``singular[i]`` and
writes ``left[:, i]``. For rank 1 that is the scale, the read and the write direction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MismatchError, RemoteError, SiteError
from modeldiff.loading import Sides
from modeldiff.logit_lens import LogitLens, logit_lens
from modeldiff.placement import dense_weight
from modeldiff.sites import Site
from modeldiff.stats import Band, benjamini_hochberg, empirical_p, null_band
from modeldiff.weight_spectra import LowRank, effective_rank, factored_svd, stable_rank

_NORMS = (  # of what a module reads, first that exists
    ("self_attn.", ("input_layernorm",)),
    ("attention.", ("input_layernorm",)),
    ("attn.", ("ln_1",)),
    ("mlp.", ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")),
)


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """One adapted module.

    Args:
        site: Its ``lora`` site; activations there are ``A x``, before B and the scale.
        a: What it reads, in the model's dtype.
        b: What it writes.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA.
        base_norm: Frobenius norm of the weight that is adapted.
        read_at: Site whose activations it reads; None if it reads the residual stream through a
            norm, or another place without a site.
        write_at: Site of the residual stream that it writes to; None if it writes elsewhere.
        gain: If it reads the residual stream, gains of the norm in between; else None.
        copies: How often each head of what it writes is read (grouped values), and a head's width.
    """

    site: Site
    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    scale: float
    base_norm: float
    read_at: Site | None
    write_at: Site | None
    gain: Float[Tensor, " d_model"] | None
    copies: tuple[int, int] = (1, 0)

    @property
    def name(self) -> str:
        """Layer and module, e.g. ``"3.mlp.down_proj"``."""
        return f"{self.site.layer}.{self.site.module}"

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.a.shape[0]

    @cached_property
    def svd(self) -> LowRank:
        """``scale * B A``, decomposed in float64 from thin QR; made once."""
        return factored_svd(self.a.cpu(), self.b.cpu(), self.scale)

    @cached_property
    def mixing(self) -> Float[Tensor, "rank rank"]:
        """What turns ``A x`` into components: ``x @ right * singular == A x @ mixing``."""
        return self.scale * self.b.detach().cpu().double().T @ self.svd.left

    def reads_in_stream(self) -> Float[Tensor, "d_model rank"]:
        """Read directions as they apply to the residual stream: unit columns, gains folded in.

        The norm's division by the stream's length is a positive factor and changes no direction.

        Raises:
            SiteError: If it reads something else than the residual stream through a norm.
        """
        if self.gain is None:
            raise SiteError(f"{self.name} reads {self.read_at}, not the residual stream.")
        return torch.nn.functional.normalize(self.svd.right * self.gain[:, None], dim=0)


def adapter_modules(sides: Sides) -> tuple[AdapterModule, ...]:
    """Read the active adapter of a pair, module by module in forward order.

    Raises:
        MismatchError: If the pair has no adapter.
        RemoteError: If the weights are not here.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> [found] = adapter_modules(ModelPair.load("organism:em-rank1").sides)
        >>> found.name, found.rank, str(found.write_at)
        ('3.mlp.down_proj', 1, 'mlp_out.3')
    """
    if sides.kind == "remote":
        raise RemoteError(
            "an adapter's matrices are read, and this pair's are on a server. Its modules are "
            "switched there with do=ScaleAdapter(0.0, layers=..., modules=...), patched with "
            "patch_map(parts=['adapter']), and their scalars read at `lora` sites. Or load the "
            "pair here."
        )
    if sides.kind != "adapter":
        raise MismatchError(
            "this pair has two whole models and no adapter; weight_extraction.extract_adapter "
            "makes one of their difference, to be loaded as adapter=."
        )
    return tuple(_module(sides, site) for site in sides.lora)


def _module(sides: Sides, site: Site) -> AdapterModule:
    site_map, name = sides.site_map, sides.adapter
    layer: Any = module_at(sides.roots[1], f"{site_map.layer(site.layer)}.{site.module}")
    reads = {site_map.down_proj: "mlp_act", site_map.o_proj: "z"}.get(site.module)
    writes = {
        (site_map.down_proj, site_map.mlp_write): "mlp_out",
        (site_map.o_proj, site_map.attn_write): "attn_out",
    }.get((site.module, site.module.rpartition(".")[0]))
    return AdapterModule(
        site=site,
        a=layer.lora_A[name].weight.detach(),
        b=layer.lora_B[name].weight.detach(),
        scale=float(layer.scaling[name]),
        base_norm=float(dense_weight(layer.base_layer).double().norm()),
        read_at=None if reads is None else Site(reads, site.layer),  # pyright: ignore[reportArgumentType]
        write_at=None if writes is None else Site(writes, site.layer),  # pyright: ignore[reportArgumentType]
        gain=None if reads else _gain(sides, site, layer.lora_A[name].weight.shape[1]),
        copies=_copies(sides, site),
    )


@torch.no_grad()
def _gain(sides: Sides, site: Site, width: int) -> Tensor | None:
    """Gains of the norm that a module reads the residual stream through, found by calling it."""
    decoder = module_at(sides.roots[0], sides.site_map.layer(site.layer))
    names = next((names for start, names in _NORMS if site.module.startswith(start)), ())
    norm = next((getattr(decoder, each) for each in names if hasattr(decoder, each)), None)
    if norm is None or width != sides.shape("base").d_model or width % 2:
        return None
    probe = torch.ones(width)
    probe[1::2] = -1.0  # mean 0 and variance 1: any norm gives its gains and biases
    probe = probe.to(next(norm.parameters()))
    return ((norm(probe) - norm(-probe)) / 2 * probe).cpu().double()


def _copies(sides: Sides, site: Site) -> tuple[int, int]:
    text = sides.config.get_text_config()
    n_kv = getattr(text, "num_key_value_heads", None)
    if not site.module.endswith("v_proj") or not n_kv:
        return 1, 0
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return text.num_attention_heads // n_kv, width


def adapter_table(modules: Sequence[AdapterModule]) -> pd.DataFrame:
    """Size and shape of every module's change.

    Returns:
        One row a module: module, layer, rank, scale, norm (Frobenius, of the change), relative (to
        the weight's), norm_a, norm_b, top (largest singular value), stable_rank, effective_rank,
        first_energy (share of the squared norm in the first component), writes_to.
    """
    rows = []
    for module in modules:
        values, norm = module.svd.singular, module.svd.norm
        rows.append(
            {
                "module": module.name,
                "layer": module.site.layer,
                "rank": module.rank,
                "scale": module.scale,
                "norm": norm,
                "relative": norm / module.base_norm,
                "norm_a": float(module.a.double().norm()),
                "norm_b": float(module.b.double().norm()),
                "top": float(values[0]),
                "stable_rank": stable_rank(values),
                "effective_rank": effective_rank(values),
                "first_energy": float(values[0] ** 2) / norm**2 if norm else float("nan"),
                "writes_to": str(module.write_at or ""),
            }
        )
    return pd.DataFrame(rows)


def write_directions(
    module: AdapterModule, n: int | None = None, *, models: Mapping[str, str] | None = None
) -> list[Direction]:
    """What a module writes to the residual stream, as directions; largest singular value first.

    Args:
        module: One whose output is added to the residual stream.
        n: How many; all that are not zero by default.
        models: Content hashes for their provenance, e.g. ``sides.digests``.

    Returns:
        Directions whose scale is the singular value: the length written where a unit of the read
        direction is in what the module reads.

    Raises:
        DirectionError: If the module writes elsewhere, or its change is zero.
    """
    if module.write_at is None:
        raise DirectionError(
            f"{module.name} does not write to the residual stream, so it has no direction there. "
            "Modules that do are the output projections of attention and MLP."
        )
    values = module.svd.singular
    kept = int((values > 1e-9 * values[0]).sum()) if values[0] > 0 else 0
    if kept == 0:
        raise DirectionError(f"{module.name} writes nothing: its change is zero.")
    found = []
    for i in range(min(kept, n or kept)):
        made = Direction.of(
            module.svd.left[:, i] * values[i],
            module.write_at,
            f"{module.name} write {i}",
            "left singular vector of scale * B A",
        )
        share = float(values[i] ** 2) / module.svd.norm**2
        note = f"component {i} of rank {module.rank}; {share:.3g} of the change's squared norm"
        sign = "its largest entry is positive; the adapter writes both signs"
        found.append(replace(made, models=dict(models or {}), sign=sign, notes=(note,)))
    return found


def write_cosines(
    modules: Sequence[AdapterModule],
    directions: Sequence[Direction],
    *,
    n_random: int = 999,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosines of what modules write to given directions, beside random unit vectors.

    Sites may differ: all is in the residual stream. Modules that write elsewhere are left out.

    Args:
        modules: From `adapter_modules`.
        directions: Any of the model's width.
        n_random: Random unit vectors in the null.
        level: Of the null band.
        seed: Of the null.

    Returns:
        One row a module, component and direction: module, component, singular, direction, cosine,
        band_low, band_high, p (two-sided), q (Benjamini-Hochberg over the table).

    Raises:
        DirectionError: If no module writes to the residual stream, or no direction is given.
        MismatchError: If a width differs.
    """
    writers = [module for module in modules if module.write_at is not None]
    if not writers or not directions:
        raise DirectionError(
            f"{len(writers)} modules that write to the residual stream, {len(directions)} "
            "directions: cosines need one of each."
        )
    rows = []
    for module in writers:
        for direction in directions:
            if direction.d_model != len(module.svd.left):
                raise MismatchError(
                    f"{direction.name!r} has width {direction.d_model}, {module.name} writes "
                    f"{len(module.svd.left)}: it is of another model."
                )
            cosines = direction.unit.double() @ module.svd.left
            rows += [
                (module.name, i, float(module.svd.singular[i]), direction.name, float(cosine))
                for i, cosine in enumerate(cosines)
                if module.svd.singular[i] > 0
            ]
    columns = ["module", "component", "singular", "direction", "cosine"]
    width = directions[0].d_model
    return _beside_random(pd.DataFrame(rows, columns=columns), width, n_random, level, seed)


def read_cosines(
    modules: Sequence[AdapterModule],
    *,
    components: int = 4,
    n_random: int = 999,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosines of what modules read to what other modules of the adapter write upstream of them.

    Compared are writes to the residual stream with reads of it through a norm (gains folded in),
    and, inside a layer, values with what attention's output projection reads (grouped heads
    repeated; attention mixes tokens, not channels) and the up projection with what the down
    projection reads (where the gate passes channels on).

    Args:
        modules: From `adapter_modules`.
        components: Of each module at most.
        n_random: Random unit vectors in the null, of each width.
        level: Of the null band.
        seed: Of the null.

    Returns:
        One row a pair of components: reader, reads, writer, writes, cosine, width, band_low,
        band_high, p, q. Empty if nothing of the adapter is upstream of anything.
    """
    parts = []
    for reader in modules:
        for writer in modules:
            arriving = _arriving(writer, reader)
            if arriving is None:
                continue
            reads = reader.svd.right if reader.gain is None else reader.reads_in_stream()
            cosines = reads[:, :components].T @ arriving[:, :components]
            parts += [
                (reader.name, i, writer.name, j, float(cosines[i, j]), len(arriving))
                for i in range(cosines.shape[0])
                for j in range(cosines.shape[1])
            ]
    columns = ["reader", "reads", "writer", "writes", "cosine", "width"]
    table = pd.DataFrame(parts, columns=columns)
    several = [
        _beside_random(rows, int(width), n_random, level, seed)  # pyright: ignore[reportArgumentType]
        for width, rows in table.groupby("width", sort=False)
    ]
    if not several:
        return table.assign(band_low=[], band_high=[], p=[], q=[])
    joined = pd.concat(several).sort_index()
    return joined.assign(q=benjamini_hochberg(joined["p"].to_numpy()))


def _arriving(writer: AdapterModule, reader: AdapterModule) -> Tensor | None:
    """Write directions as the reader meets them; None where they cannot meet."""
    if not writer.site < reader.site:
        return None
    if writer.write_at is not None and reader.gain is not None:
        return writer.svd.left
    if writer.site.layer != reader.site.layer or reader.read_at is None:
        return None
    left, kind = writer.svd.left, reader.read_at.kind
    if kind == "mlp_act" and writer.site.module.endswith("up_proj"):
        return left if len(left) == reader.a.shape[1] else None
    if kind != "z" or not writer.site.module.endswith("v_proj"):
        return None
    times, width = writer.copies
    heads = left.reshape(-1, width, left.shape[1]).repeat_interleave(times, 0)
    return torch.nn.functional.normalize(heads.reshape(-1, left.shape[1]), dim=0)


def random_cosines(width: int, n: int, seed: int) -> Float[Tensor, " n"]:
    """Cosines of random unit vectors with a fixed one, in float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return draws[:, 0] / draws.norm(dim=1)


def _beside_random(
    table: pd.DataFrame, width: int, n_random: int, level: float, seed: int
) -> pd.DataFrame:
    null = random_cosines(width, n_random, seed)
    band = null_band(null, level)
    p = [empirical_p(value, null) for value in table["cosine"]]
    return table.assign(band_low=band.low, band_high=band.high, p=p, q=benjamini_hochberg(p))


def write_lens(
    sides: Sides,
    modules: Sequence[AdapterModule],
    *,
    components: int = 1,
    k: int = 10,
    n_random: int = 19,
    seed: int = 0,
) -> dict[str, LogitLens]:
    """Read what modules write through the unembedding, each beside random directions.

    Args:
        sides: The pair.
        modules: Those that write to the residual stream are read, the others left out.
        components: Of each module at most.
        k: Tokens at each end.
        n_random: Random directions of the same length beside each.
        seed: Of the controls.

    Returns:
        By the direction's name, e.g. ``"3.mlp.down_proj write 0"``.
    """
    models = sides.digests
    return {
        write.name: logit_lens(sides, write, k=k, n_random=n_random, seed=seed)
        for module in modules
        if module.write_at is not None and module.svd.norm > 0
        for write in write_directions(module, components, models=models)
    }


@dataclass(frozen=True, eq=False)
class AdapterComparison:
    """How alike two adapters' changes are.

    Args:
        table: One row a module that both adapt: module, cosine (of the changes, as vectors of all
            weights), write_cosine and read_cosine (of the first components, up to sign), band_low,
            band_high and p of the cosine under random vectors with the second's singular values.
        cosine: Of all modules together; modules of one adapter alone count as zero in the other.
        band: Of random adapters with the second's singular values.
        p: Two-sided.
    """

    table: pd.DataFrame
    cosine: float
    band: Band
    p: float


def compare_adapters(
    first: Sequence[AdapterModule],
    second: Sequence[AdapterModule],
    *,
    n_random: int = 39,
    level: float = 0.95,
    seed: int = 0,
) -> AdapterComparison:
    """Compare two adapters of one base without forming their changes.

    <dW1, dW2> is the sum of ``(left1^T left2) * (S1 right1^T right2 S2)``, of rank x rank.

    Args:
        first: Modules of one adapter.
        second: Of another, e.g. of ``adapter_modules(sides.with_adapter(name))``.
        n_random: Random adapters in the null.
        level: Of the null bands.
        seed: Of the null.

    Raises:
        MismatchError: If no module is adapted by both, or one has other shapes.
    """
    theirs = {module.name: module for module in second}
    shared = [(one, theirs[one.name]) for one in first if one.name in theirs]
    if not shared:
        raise MismatchError("the adapters have no module in common: their changes have cosine 0.")
    generator = torch.Generator().manual_seed(seed)
    rows, inner, nulls = [], 0.0, torch.zeros(n_random, dtype=torch.float64)
    for one, other in shared:
        if one.svd.left.shape[0] != other.svd.left.shape[0]:
            raise MismatchError(f"{one.name} has other shapes in the other adapter: two bases.")
        product = _inner(one.svd, other.svd)
        controls = [_inner(one.svd, _random_like(other.svd, generator)) for _ in range(n_random)]
        null = torch.tensor(controls, dtype=torch.float64)
        inner, nulls = inner + product, nulls + null
        sizes = one.svd.norm * other.svd.norm or 1.0
        band = null_band(null / sizes, level)
        rows.append(
            {
                "module": one.name,
                "cosine": product / sizes,
                "write_cosine": float((one.svd.left[:, 0] @ other.svd.left[:, 0]).abs()),
                "read_cosine": float((one.svd.right[:, 0] @ other.svd.right[:, 0]).abs()),
                "band_low": band.low,
                "band_high": band.high,
                "p": empirical_p(product / sizes, null / sizes),
            }
        )
    size = _norm(first) * _norm(second) or 1.0
    p = empirical_p(inner / size, nulls / size)
    return AdapterComparison(pd.DataFrame(rows), inner / size, null_band(nulls / size, level), p)


def _norm(modules: Sequence[AdapterModule]) -> float:
    return sum(module.svd.norm**2 for module in modules) ** 0.5


def _inner(one: LowRank, other: LowRank) -> float:
    """Inner product of two matrices in factored form."""
    reads = one.singular[:, None] * (one.right.T @ other.right) * other.singular
    return float((one.left.T @ other.left * reads).sum())


def _random_like(found: LowRank, generator: torch.Generator) -> LowRank:
    left, right = (
        torch.linalg.qr(torch.randn(each.shape, generator=generator, dtype=torch.float64)).Q
        for each in (found.left, found.right)
    )
    return LowRank(left, found.singular, right)
