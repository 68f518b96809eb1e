"""Arithmetic on LoRA adapters as values: scale, add, orthogonalise, swap, merge, save.

Nothing here forms a change ``scale * B @ A`` but `merged_weights`, which adds one at a time to its
weight. An adapter that comes in is never modified.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeldiff._files import PathLike, atomic_write
from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.directions import Direction, orthonormal_basis
from modeldiff.errors import DirectionError, FileFormatError, MismatchError
from modeldiff.loading import Sides, check_adapter, raise_all
from modeldiff.weight_spectra import LowRank, factored_svd
from modeldiff.weights import Source, tensors_of

_PREFIX = "base_model.model."
WRITERS = ("*.o_proj", "*.down_proj", "*.c_proj", "*.dense", "*.dense_4h_to_h")
"""Modules that write to the residual stream, in the known families."""


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's change, ``scale * b @ a``.

    Args:
        a: What is read.
        b: What is written.
        scale: Multiplier; ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA.
    """

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of ``a``."""
        return self.a.shape[0]

    def svd(self) -> LowRank:
        """Decompose it without forming it, see `factored_svd`."""
        return factored_svd(self.a, self.b, self.scale)


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter as a value, apart from any model.

    Args:
        modules: Changes by the path of the module, e.g. ``"model.layers.3.mlp.down_proj"``.
        base: What it was made for, as its configuration says; may be empty.
        transposed: Whether the base keeps weights as (in, out), as GPT-2 does.
    """

    modules: Mapping[str, Factors]
    base: str = ""
    transposed: bool = False

    def __post_init__(self) -> None:
        wrong = [path for path, each in self.modules.items() if each.b.shape[1] != each.rank]
        if wrong or not self.modules:
            raise MismatchError(f"not an adapter: {wrong or 'no module'} (ranks of A and B).")

    @property
    def norm(self) -> float:
        """Frobenius norm of all changes together."""
        return sum(each.svd().norm ** 2 for each in self.modules.values()) ** 0.5

    def matching(self, patterns: "str | Sequence[str]") -> tuple[str, ...]:
        """Paths of modules that match a pattern such as ``"*.3.mlp.down_proj"``.

        Raises:
            MismatchError: If none does.
        """
        several = [patterns] if isinstance(patterns, str) else list(patterns)
        found = tuple(p for p in self.modules if any(fnmatch(p, each) for each in several))
        if not found:
            raise MismatchError(f"{several} match none of {', '.join(self.modules)}.")
        return found


def adapter_of(sides: Sides) -> LoraAdapter:
    """Take the active adapter of a pair as a value; tensors are shared, not copied.

    Raises:
        MismatchError: If the pair has no adapter.
    """
    if sides.kind != "adapter":
        raise MismatchError(
            "this pair has two whole models and no adapter: weight_extraction.extract_adapter "
            "makes one of their difference."
        )
    modules, transposed = {}, False
    for site in sides.lora:
        path = f"{sides.site_map.layer(site.layer)}.{site.module}"
        layer: Any = module_at(sides.roots[1], path)
        a, b = (part[sides.adapter].weight.detach() for part in (layer.lora_A, layer.lora_B))
        modules[path] = Factors(a, b, float(layer.scaling[sides.adapter]))
        transposed = transposed or bool(getattr(layer, "fan_in_fan_out", False))
    return LoraAdapter(modules, sides.names[0], transposed)


def read_adapter(
    path: PathLike, *, revision: str | None = None, subfolder: str = ""
) -> LoraAdapter:
    """Read a PEFT LoRA adapter from its files, by folder or hub id.

    Raises:
        MismatchError: If it is not plain LoRA.
        FileFormatError: If tensors are missing, or named otherwise than PEFT does.
    """
    from peft import PeftConfig
    from peft.utils.other import get_pattern_key

    settings: Any = PeftConfig.from_pretrained(
        str(path), revision=revision, subfolder=subfolder or None
    )
    raise_all(check_adapter(settings), f"adapter {path}", "Merge it and compare whole models.")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _load(path, revision, subfolder).items():
        inside, _, end = name.removeprefix(_PREFIX).partition(".lora_")
        if end not in ("A.weight", "B.weight"):
            raise FileFormatError(f"{path}: {name!r} is no weight of a LoRA matrix A or B.")
        found.setdefault(inside, {})[end[0]] = tensor
    modules = {}
    for inside, parts in sorted(found.items(), key=lambda item: _by_number(item[0])):
        if set(parts) != {"A", "B"}:
            raise FileFormatError(f"{path}: {inside!r} has {set(parts)} and needs A and B.")
        key = get_pattern_key(settings.alpha_pattern.keys(), inside)
        alpha = settings.alpha_pattern.get(key, settings.lora_alpha)
        rank = parts["A"].shape[0]
        scale = alpha / (rank**0.5 if settings.use_rslora else rank)
        modules[inside] = Factors(parts["A"], parts["B"], float(scale))
    base = str(settings.base_model_name_or_path or "")
    return LoraAdapter(modules, base, bool(settings.fan_in_fan_out))


def _load(path: PathLike, revision: str | None, subfolder: str) -> dict[str, Tensor]:
    from huggingface_hub import hf_hub_download
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    local = Path(path) / subfolder / name
    if not Path(path).is_dir():
        local = Path(
            hf_hub_download(str(path), name, revision=revision, subfolder=subfolder or None)
        )
    try:
        return load_file(local)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{local}: {error}. Adapters are safetensors files.") from error


def _by_number(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def scaled(adapter: LoraAdapter, factor: "float | Mapping[str, float]") -> LoraAdapter:
    """Multiply changes: 0 removes one, a negative factor reverses it.

    Args:
        adapter: The adapter.
        factor: Of every module, or by pattern; modules that match none keep theirs.

    Raises:
        MismatchError: If a pattern matches nothing.
    """
    factors = factor if isinstance(factor, Mapping) else {"*": factor}
    scales = {path: each.scale for path, each in adapter.modules.items()}
    for pattern, by in factors.items():
        for path in adapter.matching(pattern):
            scales[path] *= by
    return _with(adapter, {p: replace(each, scale=scales[p]) for p, each in _items(adapter)})


def added(*adapters: LoraAdapter) -> LoraAdapter:
    """Sum of adapters' changes, module by module; ranks add up, see `compressed`.

    Raises:
        MismatchError: If none is given, or a module has different shapes.
    """
    if not adapters:
        raise MismatchError("a sum needs adapters, got none.")
    modules: dict[str, Factors] = {}
    for adapter in adapters:
        for path, each in _items(adapter):
            modules[path] = _sum(path, modules[path], each) if path in modules else each
    return _with(adapters[0], modules)


def _sum(path: str, first: Factors, second: Factors) -> Factors:
    if first.a.shape[1] != second.a.shape[1] or first.b.shape[0] != second.b.shape[0]:
        raise MismatchError(f"{path} has different shapes: the adapters have different bases.")
    a = torch.cat([first.a, second.a.to(first.a)])
    b = torch.cat([first.scale * first.b, second.scale * second.b.to(first.b)], 1)
    return Factors(a, b)


def compressed(adapter: LoraAdapter, rank: int) -> LoraAdapter:
    """Keep the ``rank`` largest singular values of every change: the nearest of that rank."""
    modules = {}
    for path, each in _items(adapter):
        modules[path] = factors_of(each.svd().first(rank), each.a.dtype)
    return _with(adapter, modules)


def factors_of(found: LowRank, dtype: torch.dtype = torch.float32) -> Factors:
    """Split a decomposition evenly: B = U sqrt(S), A = sqrt(S) V^T, scale 1."""
    root = found.singular.sqrt()
    a = (found.right * root).T.to(dtype).contiguous()
    return Factors(a, (found.left * root).to(dtype).contiguous())


def without_directions(
    adapter: LoraAdapter,
    directions: "Direction | Sequence[Direction]",
    modules: Sequence[str] = WRITERS,
) -> LoraAdapter:
    """Orthogonalise what modules write to directions of the residual stream: B - Q Q^T B.

    The sites of the directions do not matter: what is written stays in the stream.

    Args:
        adapter: The adapter.
        directions: One or several; their span is taken out.
        modules: Patterns of the modules to change.

    Raises:
        MismatchError: If no module matches.
        DirectionError: If a width differs.
    """
    basis = orthonormal_basis(directions).double()
    changed = {}
    for path in adapter.matching(modules):
        each = adapter.modules[path]
        if each.b.shape[0] != basis.shape[1]:
            raise DirectionError(
                f"{path} writes {each.b.shape[0]} values, the directions have {basis.shape[1]}: "
                "it does not write to the residual stream, or they are of another model."
            )
        q = basis.to(each.b.device)
        b = each.b.double()
        b = b - q.T @ (q @ b)
        changed[path] = replace(each, b=(b - q.T @ (q @ b)).to(each.b.dtype))
    return _with(adapter, {**adapter.modules, **changed})


def swapped(
    adapter: LoraAdapter, other: LoraAdapter, modules: "str | Sequence[str]"
) -> LoraAdapter:
    """Take the changes of some modules from another adapter; where it has none, none is left.

    Raises:
        MismatchError: If neither has a module that matches, or shapes differ.
    """
    several = [modules] if isinstance(modules, str) else list(modules)
    every = dict.fromkeys([*adapter.modules, *other.modules])
    chosen = [path for path in every if any(fnmatch(path, each) for each in several)]
    if not chosen:
        raise MismatchError(f"{several} match none of {', '.join(every)}.")
    result: dict[str, Factors] = {}
    for path in every:
        source = (other if path in chosen else adapter).modules
        if path not in source:
            continue
        result[path] = source[path]
        if path in adapter.modules and path in other.modules:
            _sum(path, adapter.modules[path], other.modules[path])  # one shape
    return _with(adapter, result)


@torch.no_grad()
def merged_weights(adapter: LoraAdapter, base: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapted weights of the merged model, one at a time, in the base's dtype.

    In bfloat16 small changes drown in rounding; see `modeldiff.weight_spectra.FLOORS`.

    Args:
        adapter: The adapter.
        base: Folder, hub id, or model in memory.

    Yields:
        Names and new weights of the adapted modules; every other weight is the base's.

    Raises:
        MismatchError: If the base has no such weight, or one of another shape.
    """
    with tensors_of(base) as tensors:
        for path, each in _items(adapter):
            name = f"{path}.weight"
            change = each.scale * (each.b.double() @ each.a.double())
            change = change.T if adapter.transposed else change
            if tensors.shapes.get(name) != tuple(change.shape):
                raise MismatchError(
                    f"{name} is {tensors.shapes.get(name, 'missing')} in the base, and the adapter "
                    f"changes {tuple(change.shape)}. Is it the right base?"
                )
            weight = tensors[name]
            yield name, (weight.double() + change.to(weight.device)).to(weight.dtype)


def save_adapter(
    adapter: LoraAdapter, folder: PathLike, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write it as PEFT does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    Scales are multiplied into B, and alpha is the rank: any loader gets the same changes.

    Args:
        adapter: The adapter.
        folder: Made if it is not there. Each of the two files is written whole or not at all.
        dtype: Of the tensors.
    """
    from safetensors.torch import save_file

    tensors = {}
    for path, each in _items(adapter):
        b = (each.scale * each.b.double()).to(dtype)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = each.a.detach().to("cpu", dtype).contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = b.cpu().contiguous()
    with atomic_write(Path(folder) / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    ranks = {path: each.rank for path, each in _items(adapter)}
    first = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != first}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": first,
        "lora_alpha": first,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": adapter.transposed,
        "target_modules": sorted(ranks),
        "inference_mode": True,
    }
    with atomic_write(Path(folder) / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _items(adapter: LoraAdapter) -> list[tuple[str, Factors]]:
    return list(adapter.modules.items())


def _with(adapter: LoraAdapter, modules: Mapping[str, Factors]) -> LoraAdapter:
    return replace(adapter, modules=dict(modules))
