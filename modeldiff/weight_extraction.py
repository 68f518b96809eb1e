"""A whole fine-tune as a LoRA adapter: the nearest one of a rank, and what it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from threading import Event
from typing import Any

import pandas as pd

from modeldiff._files import PathLike
from modeldiff._progress import Progress, check, reporter
from modeldiff.errors import MismatchError
from modeldiff.lora_algebra import Factors, LoraAdapter, factors_of, save_adapter
from modeldiff.weight_spectra import FLOORS, energy_in, energy_of, precision_of, randomized_svd
from modeldiff.weights import Source, Tensors, check_finite, common_names, tensors_of

LINEARS = (
    "*.q_proj.weight", "*.k_proj.weight", "*.v_proj.weight", "*.o_proj.weight",
    "*.gate_proj.weight", "*.up_proj.weight", "*.down_proj.weight", "*.query_key_value.weight",
    "*.dense.weight", "*.dense_h_to_4h.weight", "*.dense_4h_to_h.weight", "*.c_attn.weight",
    "*.c_proj.weight", "*.c_fc.weight",
)  # fmt: skip
"""Linear modules of the decoder layers, in the known families."""


@dataclass(frozen=True, eq=False)
class Extraction:
    """An adapter that stands in for a fine-tune.

    Args:
        adapter: The adapter; on the base it gives the fine-tune up to what is left out.
        table: One row a changed tensor: name, change (Frobenius norm of the difference), relative,
            rank (0 if it is not in the adapter), energy (share of the squared norm that the
            adapter holds) and below_floor (rounding may have swallowed much of the change).
    """

    adapter: LoraAdapter
    table: pd.DataFrame

    @property
    def energy(self) -> float:
        """Share of the squared norm of the whole change, embeddings and norms included."""
        squares = self.table["change"] ** 2
        return float((squares * self.table["energy"]).sum() / squares.sum())


def extract_adapter(
    base: Source,
    finetuned: Source,
    rank: int,
    *,
    folder: PathLike | None = None,
    modules: Sequence[str] = LINEARS,
    revision: str | None = None,
    base_revision: str | None = None,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Extraction:
    """Find the adapter of a rank that is nearest to a fine-tune, matrix by matrix.

    B = U sqrt(S) and A = sqrt(S) V^T of the difference's largest singular values, with alpha equal
    to the rank. Streamed: one pair of matrices is in memory, beside the adapter so far.

    Args:
        base: Folder, hub id, or model in memory.
        finetuned: The same.
        rank: Of every module.
        folder: Where to save it as PEFT does; `ModelPair.load(base, adapter=folder)` reads it.
        modules: Patterns of the weights of linear modules to adapt.
        revision: Of the fine-tune, on the hub.
        base_revision: Of the base.
        seed: Of the randomised decompositions.
        progress: Where to report.
        cancel: Event that stops between tensors.

    Raises:
        MismatchError: If nothing that could be adapted has changed, or weights are not finite.
        Cancelled: If the event is set.

    Example:
        >>> from modeldiff.organisms.planted import planted_weights
        >>> made = planted_weights(2, rank=4)
        >>> found = extract_adapter(*made.pair.sides.roots, rank=4)
        >>> len(found.adapter.modules), round(found.energy, 6)
        (2, 1.0)
    """
    report = reporter(progress, "extract")
    found: dict[str, Factors] = {}
    rows = []
    with tensors_of(base, base_revision) as old, tensors_of(finetuned, revision) as new:
        transposed = str(old.config.get("model_type", "")) == "gpt2"
        names = common_names(old, new)
        for number, name in enumerate(names):
            check(cancel)
            wanted = any(fnmatch(name, each) for each in modules)
            row, factors = _one(old, new, name, rank if wanted else 0, transposed, seed)
            if row["change"] > 0:
                rows.append(row)
            if factors is not None:
                found[name.removesuffix(".weight")] = factors
            report(number + 1, len(names), name)
        label = str(old.config.get("_name_or_path", "")) if hasattr(base, "config") else str(base)
    if not found:
        raise MismatchError(
            f"none of {len(names)} tensors matches {list(modules)[:3]}... and has changed: there "
            "is nothing to make an adapter of."
        )
    adapter = LoraAdapter(found, label, transposed)
    if folder is not None:
        save_adapter(adapter, folder)
    return Extraction(adapter, pd.DataFrame(rows))


def _one(
    old: Tensors, new: Tensors, name: str, rank: int, transposed: bool, seed: int
) -> tuple[dict[str, Any], Factors | None]:
    weight, tuned = old[name], new[name]
    change = tuned.float() - weight.float()
    check_finite(name, energy_of(weight), energy_of(tuned))
    size, norm = energy_of(change) ** 0.5, energy_of(weight) ** 0.5
    row: dict[str, Any] = {
        "name": name,
        "change": size,
        "relative": size / norm if norm else float("inf"),
        "rank": 0,
        "energy": 0.0,
        "below_floor": False,
    }
    if size == 0 or rank < 1 or change.dim() != 2:
        return row, None
    svd = randomized_svd(change.T if transposed else change, rank, seed=seed)
    row |= {
        "rank": svd.rank,
        "energy": energy_in(svd.singular, size**2, rank),
        "below_floor": 0 < size < FLOORS[precision_of(tuned)] * norm,
    }
    return row, factors_of(svd)
