"""Weight diff of whole fine-tunes: streamed tensor by tensor, without loading either model."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from modeldiff._files import PathLike
from modeldiff._progress import Progress, check, reporter
from modeldiff.errors import FileFormatError, MismatchError, SetupError, SiteError
from modeldiff.placement import refuse_quantized
from modeldiff.weight_spectra import (
    FLOORS,
    Heads,
    LowRank,
    Rounding,
    circuit,
    circuit_change,
    effective_rank,
    energy_in,
    energy_of,
    precision_of,
    randomized_svd,
    rounding_noise,
    stable_rank,
)

Source = PathLike | nn.Module
"""A folder or hub id with safetensors files, or a model in memory."""
Rows = Callable[[slice], Tensor]
_BLOCK = 1 << 22  # entries worked on at once: 32 MiB in float64


@dataclass(frozen=True, eq=False)
class Tensors:
    """Tensors of one model by name, read when asked for.

    Args:
        shapes: Of every tensor.
        config: The model's configuration as a mapping; empty if there is none.
        read: Gives some rows of a tensor; of a scalar the scalar.
    """

    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    read: Callable[[str, slice], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, slice(None))


@contextmanager
def tensors_of(source: Source, revision: str | None = None) -> Iterator[Tensors]:
    """Open a model's tensors; of files nothing is read but what is asked for.

    Args:
        source: A folder, a hub id, or a model in memory.
        revision: Of a hub id.

    Raises:
        SetupError: If there are no safetensors files, or one that the index names is missing.
        FileFormatError: If one cannot be read.
        MismatchError: If a model in memory is quantised.
    """
    if isinstance(source, nn.Module):
        refuse_quantized(source, "a comparison of weights")
        state = {name: tensor.detach() for name, tensor in _plain(source)}
        found: Any = getattr(source, "config", None)
        config = {} if found is None else found.to_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        yield Tensors(shapes, config, lambda name, rows: _sliced(state[name], rows))
        return
    from safetensors import SafetensorError, safe_open

    folder = _folder(source, revision)
    files = _files_of(folder)
    if not files:
        raise SetupError(
            f"{folder} holds no safetensors file. Weights are read from safetensors only, never "
            "from pickles: load the model once and save it again with save_pretrained."
        )
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no mapping
                    where[name] = path
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{folder}: {error}. Download or save it again.") from error

    def read(name: str, rows: slice) -> Tensor:
        with safe_open(where[name], framework="pt") as opened:  # anew: pages read are given back
            if not shapes[name] or rows == slice(None):
                return opened.get_tensor(name)
            return opened.get_slice(name)[rows]

    yield Tensors(shapes, _config(folder), read)


def _files_of(folder: Path) -> list[Path]:
    """A model's files, all of them: those that transformers would read."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{index} names no files ({error!r}). Download it again.") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SetupError(
            f"{folder} lacks {len(missing)} of {len(names)} files that its index names, e.g. "
            f"{missing[0]}. Download or save it again."
        )
    return [folder / name for name in names]


def _plain(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's own tensors under the names of its files, each once, adapters left out."""
    seen: set[int] = set()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if ".lora_" not in name and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name.replace(".base_layer", ""), tensor


def _sliced(tensor: Tensor, rows: slice) -> Tensor:
    return tensor if tensor.dim() == 0 or rows == slice(None) else tensor[rows]


def _folder(source: PathLike, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            str(source), revision=revision, allow_patterns=["*.safetensors", "*.json"]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SetupError(
            f"{str(source)!r} is no folder here, and could not be had from the hub: {error}"
        ) from error
    return Path(found)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True, eq=False)
class WeightDiff:
    """What a fine-tune changed in the weights.

    Args:
        table: One row a tensor: name, layer (-1 outside the layers), shape, dtype (that the
            fine-tune's values fit, however they are stored), norm (of the base), change (Frobenius
            norm of finetuned - base), relative (change / norm), symmetric (change over the sum of
            both norms), cosine (of the two tensors), share_changed (of the entries), floor
            (relative change below which rounding to the dtype swallows small-rank changes),
            below_floor; and for decomposed matrices top (largest singular value), stable_rank,
            effective_rank (an upper bound), energy (share in the first ``rank``), edge (singular
            values below it may be rounding), n_above (how many of those found are not).
        spectra: The largest singular values and vectors of decomposed changes, by name.
        noise: What rounding alone does to them.
        only_in: Names that one side alone has, (base, finetuned).
        rank: Singular values looked for.
        peak_bytes: Most bytes of tensors held at once, files' mappings not counted.
    """

    table: pd.DataFrame
    spectra: Mapping[str, LowRank]
    noise: Mapping[str, Rounding]
    only_in: tuple[tuple[str, ...], tuple[str, ...]]
    rank: int
    peak_bytes: int

    def changed(self) -> pd.DataFrame:
        """Tensors in which any entry differs, largest relative change first."""
        rows = self.table[self.table["change"] > 0]
        return rows.sort_values("relative", ascending=False).reset_index(drop=True)

    def spectrum(self, name: str) -> pd.DataFrame:
        """Singular values of one change beside those of simulated rounding.

        Returns:
            One row an index: index, signal, noise (NaN beyond what was simulated), above_edge.

        Raises:
            KeyError: If the tensor was not decomposed.
        """
        signal, noise = self.spectra[name].singular.tolist(), self.noise[name]
        beside = noise.singular.tolist()[: len(signal)]
        beside += [math.nan] * (len(signal) - len(beside))
        above = [value > noise.edge for value in signal]
        return pd.DataFrame(
            {"index": range(len(signal)), "signal": signal, "noise": beside, "above_edge": above}
        )


def weight_diff(
    base: Source,
    finetuned: Source,
    *,
    rank: int = 16,
    decompose: Sequence[str] = ("*.layers.*.weight", "*.h.*.weight"),
    revision: str | None = None,
    base_revision: str | None = None,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> WeightDiff:
    """Compare the weights of two models one pair of tensors at a time.

    In memory is one pair of matrices and their difference; tensors that are not decomposed are
    read a block of rows at a time. Neither model is loaded.

    Args:
        base: Folder, hub id, or model in memory.
        finetuned: The same.
        rank: Singular values to find of each changed matrix; 0 for norms alone.
        decompose: Names of matrices to decompose, with ``*``.
        revision: Of the fine-tune, on the hub.
        base_revision: Of the base.
        seed: Of the randomised decompositions and the simulated rounding.
        progress: Where to report, tensor by tensor.
        cancel: Event that stops between tensors.

    Raises:
        MismatchError: If the two have no tensor in common, one has another shape, or one holds
            values that are not finite.
        SetupError: If there are no safetensors files.
        Cancelled: If the event is set.

    Example:
        >>> from modeldiff.organisms.planted import planted_weights
        >>> made = planted_weights(2, rank=4)
        >>> found = weight_diff(*made.pair.sides.roots)
        >>> found.changed()[["stable_rank", "n_above"]].round(1).to_numpy().tolist()
        [[2.4, 4.0], [2.4, 4.0]]
    """
    report = reporter(progress, "weights")
    rows, spectra, noise, peak = [], {}, {}, 0
    with tensors_of(base, base_revision) as old, tensors_of(finetuned, revision) as new:
        names = common_names(old, new)
        for number, name in enumerate(names):
            check(cancel)
            row, held = _norms(old, new, name)
            wanted = rank > 0 and any(fnmatch(name, each) for each in decompose)
            if wanted and row["change"] > 0 and len(old.shapes[name]) == 2:
                found, rounding, more, size = _decomposed(old, new, name, rank, seed)
                spectra[name], noise[name], held = found, rounding, max(held, size)
                row |= more
            peak = max(peak, held)
            rows.append(row)
            report(number + 1, len(names), name)
        only = (_missing(old, new), _missing(new, old))
    return WeightDiff(pd.DataFrame(rows), spectra, noise, only, rank, peak)


def _missing(here: Tensors, there: Tensors) -> tuple[str, ...]:
    return tuple(sorted(here.shapes.keys() - there.shapes.keys()))


def common_names(old: Tensors, new: Tensors) -> list[str]:
    """Names of tensors that both have, in the order of the base.

    Raises:
        MismatchError: If there are none, or shapes differ.
    """
    names = [name for name in old.shapes if name in new.shapes]
    differ = [n for n in names if old.shapes[n] != new.shapes[n]]
    if not names or differ:
        what = "they have no tensor in common" if not names else ", ".join(
            f"{n} is {old.shapes[n]} and {new.shapes[n]}" for n in differ[:5]
        )  # fmt: skip
        raise MismatchError(f"the weights cannot be compared: {what}. Is it the right base?")
    return names


def check_finite(name: str, before: float, after: float) -> None:
    """Verify that a tensor's sums of squares, of the base and of the fine-tune, are numbers.

    Raises:
        MismatchError: Naming the tensor and the side.
    """
    broken = [s for s, n in (("base", before), ("fine-tune", after)) if not math.isfinite(n)]
    if broken:
        raise MismatchError(
            f"{name} of the {' and of the '.join(broken)} holds values that are not finite: the "
            "weights are damaged, and no change of them has a size. Save or download them again."
        )


def layer_of(name: str) -> int:
    """Decoder layer of a tensor's name: its first number; -1 if there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _norms(old: Tensors, new: Tensors, name: str) -> tuple[dict[str, Any], int]:
    shape = old.shapes[name]
    wide = math.prod(shape[1:])
    step = max(1, _BLOCK // max(1, wide))
    sums = torch.zeros(4, dtype=torch.float64)
    changed, dtypes, held = 0, set(), 0
    for start in range(0, shape[0] if shape else 1, step):
        rows = slice(start, start + step)
        a, b = old.read(name, rows), new.read(name, rows)
        dtypes.add(precision_of(b) if b.is_floating_point() else torch.float32)
        held = max(held, a.nbytes + b.nbytes + 3 * 8 * a.numel())
        x, y = a.double(), b.double()
        change = y - x
        changed += int(change.count_nonzero())
        sums += torch.stack([(u * v).sum() for u, v in ((x, x), (y, y), (change, change), (x, y))])
    check_finite(name, *sums[:2].tolist())
    dtype = next(each for each in (torch.float32, torch.float16, torch.bfloat16) if each in dtypes)
    before, after, size = (math.sqrt(each) for each in sums[:3].tolist())
    row = {
        "name": name,
        "layer": layer_of(name),
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "norm": before,
        "change": size,
        "relative": (relative := _ratio(size, before)),
        "symmetric": _ratio(size, before + after),
        "cosine": float(sums[3]) / (before * after) if before * after else math.nan,
        "share_changed": changed / max(1, math.prod(shape)),
        "floor": FLOORS[dtype],
        "below_floor": 0 < relative < FLOORS[dtype],
    }
    return row, held


@torch.no_grad()
def _decomposed(
    old: Tensors, new: Tensors, name: str, rank: int, seed: int
) -> tuple[LowRank, Rounding, dict[str, Any], int]:
    weight, tuned = old[name], new[name]
    change = tuned.float() - weight.float()
    size = weight.nbytes + tuned.nbytes + 5 * change.nbytes  # steps, errors and two temporaries
    found = randomized_svd(change, rank, seed=seed)
    rounding = rounding_noise(weight, tuned, found, seed=seed)
    energy = energy_of(change)
    values = found.singular
    more = {
        "top": float(values[0]),
        "stable_rank": energy / float(values[0].double() ** 2),
        "effective_rank": effective_rank(values, energy, min(change.shape)),
        "energy": energy_in(values, energy, rank),
        "edge": rounding.edge,
        "n_above": int((values > rounding.edge).sum()),
    }
    return found, rounding, more, size


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def head_diff(
    base: Source,
    finetuned: Source,
    *,
    layers: Sequence[int] | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
) -> pd.DataFrame:
    """Compare each attention head's circuits as products in the residual stream.

    A product does not change when a matrix is moved from one factor into the other, as single
    projections do. Grouped-query attention is taken into account; rotary embeddings, biases and
    norms of queries and keys are not.

    Args:
        base: Folder, hub id, or model in memory; of the Llama family.
        finetuned: The same.
        layers: Which; all by default.
        revision: Of the fine-tune, on the hub.
        base_revision: Of the base.

    Returns:
        One row a layer, head and circuit ("OV", "QK"): norm (of the base's product), change,
        relative, symmetric, top, stable_rank, effective_rank.

    Raises:
        SiteError: If the attention is not in q_proj, k_proj, v_proj and o_proj.

    Source:
        Elhage et al. 2021, "A mathematical framework for transformer circuits".
    """
    rows = []
    with tensors_of(base, base_revision) as old, tensors_of(finetuned, revision) as new:
        heads = _heads(old)
        for layer in _attention_layers(old, layers):
            sides = [_attention(each, layer) for each in (old, new)]
            for head in range(heads.n_heads):
                for kind in ("OV", "QK"):
                    factors = [circuit(each, heads, head, kind) for each in sides]
                    change, before, after = circuit_change(*factors)
                    size = change.norm if change.norm > 1e-12 * before else 0.0
                    known = change.singular if size else change.singular[:0]
                    rows.append(
                        {
                            "layer": layer,
                            "head": head,
                            "circuit": kind,
                            "norm": before,
                            "change": size,
                            "relative": _ratio(size, before),
                            "symmetric": _ratio(size, before + after),
                            "top": float(known[0]) if size else 0.0,
                            "stable_rank": stable_rank(known),
                            "effective_rank": effective_rank(known),
                        }
                    )
    return pd.DataFrame(rows)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)


def _heads(tensors: Tensors) -> Heads:
    config = tensors.config.get("text_config") or tensors.config
    n_heads = config.get("num_attention_heads")
    if not n_heads or not config.get("hidden_size"):
        raise SiteError(
            "head_diff needs a config.json with num_attention_heads and hidden_size, as families "
            "built like Llama have."
        )
    width = config.get("head_dim") or config["hidden_size"] // n_heads
    return Heads(n_heads, config.get("num_key_value_heads") or n_heads, width)


def _attention_layers(tensors: Tensors, layers: Sequence[int] | None) -> list[int]:
    have = {layer_of(name) for name in tensors.shapes if name.endswith("q_proj.weight")}
    chosen = sorted(have if layers is None else set(layers))
    wrong = [layer for layer in chosen if layer not in have]
    if wrong or not chosen:
        raise SiteError(
            f"no attention with q_proj, k_proj, v_proj and o_proj in layers {wrong or 'at all'}; "
            "head_diff knows families built like Llama."
        )
    return chosen


def _attention(tensors: Tensors, layer: int) -> dict[str, Tensor]:
    inside = f".layers.{layer}."
    names = {
        name.split(".")[-2]: name
        for name in tensors.shapes
        if inside in name and name.endswith(".weight")
    }
    missing = [each for each in (*_PROJECTIONS, "input_layernorm") if each not in names]
    if missing:
        raise SiteError(f"layer {layer} has no {', '.join(missing)}: not built like Llama.")
    found = {each: tensors[names[each]] for each in _PROJECTIONS}
    gain = tensors[names["input_layernorm"]].float()
    kind = str(tensors.config.get("model_type", ""))
    return found | {"gain": gain + 1 if kind.startswith("gemma") else gain}
