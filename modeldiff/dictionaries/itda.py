"""ITDA: a dictionary whose atoms are activations that occurred, and can be compared by name.

An atom is the activation of one token of one text. Two models (or layers, or checkpoints) that
are read on the same texts can therefore be compared by which tokens became atoms, whatever the
bases of their activation spaces.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from threading import Event
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from modeldiff._files import PathLike
from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Bool, Float, Int
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.files import read_dictionary, write_dictionary
from modeldiff.dictionaries.pursuit import Measure, missing, pursue, pursued_codes
from modeldiff.dictionaries.sources import Rows, Source
from modeldiff.errors import FileFormatError, MismatchError

Side = Literal["base", "finetuned", "difference"]
_CELLS = 1 << 25  # scores held at once while encoding: 128 MiB


@dataclass(frozen=True)
class ItdaConfig:
    """How atoms are chosen, and how many are used.

    Args:
        side: What of the paired rows is read: one model's, or fine-tuned minus base.
        threshold: A row becomes an atom if more than this is missing.
        measure: What is missing of a row x with reconstruction y: ``cosine`` is
            ``1 - cos(x, y)``; ``square`` is ``|x - y|^2 / |x|^2``. Neither depends on the width.
        k: Steps of matching pursuit, and so latents of a row at most.
        max_atoms: Reading ends when there are so many.
        skip_first: Positions at the start of each text that are left out: their activations are
            enormous, and as atoms would be chosen first.

    Raises:
        MismatchError: If a value is out of its range.
    """

    side: Side = "finetuned"
    threshold: float = 0.15
    measure: Measure = "cosine"
    k: int = 40
    max_atoms: int = 8192
    skip_first: int = 1

    def __post_init__(self) -> None:
        if self.side not in get_args(Side) or self.measure not in get_args(Measure):
            raise MismatchError(
                f"side={self.side!r}, measure={self.measure!r}; known are {get_args(Side)} and "
                f"{get_args(Measure)}."
            )
        if not 0 < self.threshold < 1 or min(self.k, self.max_atoms) < 1:
            raise MismatchError(
                f"threshold={self.threshold}, k={self.k}, max_atoms={self.max_atoms}: the first is "
                "a share between 0 and 1, the others are at least 1."
            )


@dataclass(frozen=True, eq=False)
class Itda:
    """Atoms, and what they are.

    Args:
        atoms: Unit length, in the order in which they were chosen.
        document: Text of each.
        position: Its position there.
        token_id: Its token.
        config: How they were chosen.
        provenance: What they were chosen from; JSON-able.
    """

    atoms: Float[Tensor, "latent d_model"]
    document: Int[Tensor, " latent"]
    position: Int[Tensor, " latent"]
    token_id: Int[Tensor, " latent"]
    config: ItdaConfig
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.atoms)

    @property
    def places(self) -> frozenset[tuple[int, int]]:
        """Document and position of every atom."""
        return frozenset(zip(self.document.tolist(), self.position.tolist(), strict=True))

    @cached_property
    def gram(self) -> Float[Tensor, "latent _latent"]:
        """Cosines between atoms."""
        return self.atoms @ self.atoms.T

    def view(self, acts: Float[Tensor, "row model d_model"]) -> Float[Tensor, "row d_model"]:
        """What of paired rows the dictionary sees, in float32."""
        return view(acts, self.config.side)

    def encode(self, x: Float[Tensor, "row d_model"], k: int | None = None) -> Codes:
        """Decompose rows by matching pursuit; values have a sign, and grow with the row.

        Each step takes the atom with the largest inner product with what is left of the row, and
        subtracts that much of it. An atom that is taken again adds to its value.

        Args:
            x: Rows as `view` gives them, raw.
            k: Steps; default as in building.
        """
        if not len(self) or x.shape[1] != self.atoms.shape[1]:
            raise MismatchError(
                f"rows of width {x.shape[1]} and {len(self)} atoms of width {self.atoms.shape[1]}."
            )
        block = max(1, _CELLS // len(self))
        parts = [
            pursue(each @ self.atoms.T, self.gram, k or self.config.k) for each in x.split(block)
        ]
        latents = torch.cat([latent for latent, _ in parts])
        return pursued_codes(latents, torch.cat([value for _, value in parts]), x, len(self))

    def decode(self, codes: Codes) -> Float[Tensor, "row d_model"]:
        """Sums of atoms, in the rows' raw space."""
        return embedding_bag(
            codes.latent, self.atoms, codes.offsets[:-1], mode="sum", per_sample_weights=codes.value
        )

    def reconstruct(
        self, x: Float[Tensor, "row d_model"], k: int | None = None
    ) -> Float[Tensor, "row d_model"]:
        """Encode and decode."""
        return self.decode(self.encode(x, k))

    def save_to(self, folder: PathLike) -> None:
        """Write atoms as safetensors, and the rest as JSON beside them."""
        tensors = {name: getattr(self, name) for name in ("atoms", *_PLACES)}
        about = {"config": asdict(self.config), "provenance": self.provenance}
        write_dictionary(folder, tensors, {"kind": "itda", **about})

    @classmethod
    def load_from(cls, folder: PathLike, device: str = "cpu") -> "Itda":
        """Read what `save_to` wrote.

        Raises:
            FileNotFoundError: If there is nothing.
            FileFormatError: If it is damaged, or no ITDA dictionary.
        """
        tensors, record = read_dictionary(folder, device)
        if record.get("kind") != "itda" or not {"atoms", *_PLACES} <= set(tensors):
            raise FileFormatError(
                f"{str(folder)!r} holds a dictionary, but no ITDA. Dictionary.load_from reads "
                "crosscoders and sparse autoencoders."
            )
        return cls(
            **tensors, config=ItdaConfig(**record["config"]), provenance=record["provenance"]
        )


_PLACES = ("document", "position", "token_id")


def view(acts: Float[Tensor, "row model d_model"], side: Side) -> Float[Tensor, "row d_model"]:
    """One model's rows, or fine-tuned minus base, in float32."""
    wide = acts.float()
    if side == "difference":
        return wide[:, 1] - wide[:, 0]
    return wide[:, 0 if side == "base" else 1]


class _Growing:
    """Atoms and their inner products, in buffers that double."""

    def __init__(self, d_model: int, max_atoms: int) -> None:
        self.n, self.max_atoms = 0, max_atoms
        self.atoms, self.gram = torch.zeros(0, d_model), torch.zeros(0, 0)
        self.places: list[tuple[int, int, int]] = []

    def missing(self, unit: Float[Tensor, "row d_model"], config: ItdaConfig) -> Tensor:
        scores = unit @ self.atoms[: self.n].T
        return missing(scores, self.gram[: self.n, : self.n], config.k, config.measure)

    def add(self, atom: Float[Tensor, " d_model"], place: tuple[int, int, int]) -> None:
        if self.n == len(self.atoms):
            size = min(self.max_atoms, max(64, 2 * self.n))
            atoms, gram = self.atoms.new_zeros(size, len(atom)), self.gram.new_zeros(size, size)
            atoms[: self.n], gram[: self.n, : self.n] = self.atoms, self.gram
            self.atoms, self.gram = atoms, gram
        self.atoms[self.n] = atom
        self.n += 1
        inner = self.atoms[: self.n] @ atom
        self.gram[self.n - 1, : self.n] = self.gram[: self.n, self.n - 1] = inner
        self.places.append(place)


def build_itda(
    source: Source,
    config: ItdaConfig = ItdaConfig(),
    *,
    batch_size: int = 1024,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Itda:
    """Read rows in order, once, and make an atom of each that the atoms so far do not explain.

    Rows are tested a batch at a time, but those that fail are tested again one by one against the
    atoms that were added meanwhile: no batch adds two atoms for one thing.

    Args:
        source: Rows that know their texts and positions, as those of a store do.
        config: What to read, and when a row is explained.
        batch_size: Rows that are tested at once.
        progress: Where to report.
        cancel: Event that stops between batches; ``Cancelled.partial`` holds the atoms so far.

    Raises:
        MismatchError: If no row is left after ``skip_first``, or all are zero, or the source does
            not know where its rows come from.
        Cancelled: If the event is set.

    Source:
        Leask, Nanda & Al Moubayed 2025, "Inference-time decomposition of activations" (arXiv
        2505.17769). There a whole batch of failing rows is added at once, and the error is
        averaged over the width.
    """
    growing, report = _Growing(source.d_model, config.max_atoms), reporter(progress, "itda")
    n_read, n_kept, n_used = 0, 0, 0
    for rows in source.in_order(batch_size):
        if cancel is not None and cancel.is_set():
            check(cancel, _built(growing, config, source, n_read, n_used))
        unit, kept = _usable(rows, config)
        n_used += _extend(growing, unit, _places(rows, kept), config)
        n_read, n_kept = n_read + len(rows), n_kept + len(unit)
        report(n_read, source.n_rows, f"{growing.n} atoms")
        if growing.n == config.max_atoms:
            break
    if not n_kept:
        raise MismatchError(
            f"none of {n_read} rows is left to choose atoms from: they are at the first "
            f"{config.skip_first} positions of their texts, or zero. Give skip_first=0 if the "
            "source leaves these positions out itself and does not know the others."
        )
    return _checked(_built(growing, config, source, n_read, n_used))


def _usable(
    rows: Rows, config: ItdaConfig
) -> tuple[Float[Tensor, "kept d_model"], Bool[Tensor, " row"]]:
    x = view(rows.acts, config.side).cpu()
    norm = x.norm(dim=1)
    kept = (rows.position >= config.skip_first) & (norm > 0)
    return x[kept] / norm[kept, None], kept


def _places(rows: Rows, kept: Bool[Tensor, " row"]) -> list[tuple[int, int, int]]:
    columns = (rows.document[kept], rows.position[kept], rows.token_id[kept])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _extend(
    growing: _Growing, unit: Tensor, places: list[tuple[int, int, int]], config: ItdaConfig
) -> int:
    """Add atoms from one batch; return how many of its rows were looked at."""
    poor = growing.missing(unit, config) > config.threshold
    for i in poor.nonzero()[:, 0].tolist():
        if growing.n == config.max_atoms:
            return i
        if float(growing.missing(unit[i : i + 1], config)) > config.threshold:
            growing.add(unit[i], places[i])
    return len(unit)


def _built(growing: _Growing, config: ItdaConfig, source: Source, n_read: int, n_used: int) -> Itda:
    places = torch.tensor(growing.places, dtype=torch.long).reshape(-1, 3)
    document, position, token_id = (column.contiguous() for column in places.unbind(1))
    about = {
        "source": source.key,
        "n_rows": source.n_rows,
        "n_read": n_read,
        "n_used": n_used,
        "full": growing.n == config.max_atoms,
    }
    atoms = growing.atoms[: growing.n].clone()
    return Itda(atoms, document, position, token_id, config, about)


def _checked(made: Itda) -> Itda:
    if len(made.places) < len(made):
        raise MismatchError(
            f"{len(made)} atoms come from {len(made.places)} places: the source does not know text "
            "and position of its rows. Give TensorRows document= and position=, or use a store."
        )
    return made


def jaccard(a: Itda, b: Itda) -> float:
    """Share of atoms that two dictionaries have in common, of those that either has.

    Atoms are compared by text and position, so both must be built on the same texts.

    Raises:
        MismatchError: If a text has another token at the same position, or one has no atoms.

    Source:
        arXiv 2505.17769.
    """
    if not len(a) or not len(b):
        raise MismatchError(f"dictionaries of {len(a)} and {len(b)} atoms cannot be compared.")
    tokens = [
        dict(zip(zip(x.document.tolist(), x.position.tolist(), strict=True), x.token_id.tolist(),
                 strict=True))
        for x in (a, b)
    ]  # fmt: skip
    common = a.places & b.places
    if differing := [place for place in common if tokens[0][place] != tokens[1][place]]:
        raise MismatchError(
            f"{len(differing)} of {len(common)} common places hold other tokens, e.g. document and "
            f"position {differing[0]}: the dictionaries were not built on the same texts."
        )
    return len(common) / len(a.places | b.places)


def rank_by_difference(
    dictionary: Itda,
    source: Source,
    *,
    k: int | None = None,
    batch_size: int = 1024,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Rank atoms by how much more the fine-tune uses them than the base on the same tokens.

    Both sides' rows are brought to unit length and encoded with the same atoms; the values have
    a sign, so a fine-tune that turns against an atom counts as a negative difference.

    Args:
        dictionary: Atoms, of either side.
        source: Paired rows.
        k: Steps of matching pursuit; default as in building.
        batch_size: Rows at once.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        One row an atom, the largest absolute ``difference`` first: ``latent``, its ``document``,
        ``position`` and ``token_id``, mean value on either side over all rows (``mean_base``,
        ``mean_finetuned``), ``difference`` (fine-tuned minus base), and on how many rows it is
        used (``frequency_base``, ``frequency_finetuned``).

    Raises:
        MismatchError: If no row is left after ``skip_first``.
        Cancelled: If the event is set.
    """
    n, totals = 0, torch.zeros(2, 2, len(dictionary), dtype=torch.float64)
    report, done = reporter(progress, "itda ranking"), 0
    for rows in source.in_order(batch_size):
        check(cancel)
        used = rows.position >= dictionary.config.skip_first
        for side, name in enumerate(("base", "finetuned")):
            x = view(rows.acts, name).cpu()[used]
            codes = dictionary.encode(x / x.norm(dim=1, keepdim=True).clamp(min=1e-30), k)
            totals[side, 0].index_add_(0, codes.latent, codes.value.double())
            totals[side, 1] += torch.bincount(codes.latent, minlength=len(dictionary))
        n, done = n + int(used.sum()), done + len(rows)
        report(done, source.n_rows, f"{done}/{source.n_rows} rows")
    if not n:
        raise MismatchError("no row is left after skip_first; see build_itda.")
    mean, frequency = (totals / n).unbind(1)
    table = pd.DataFrame({
        "latent": range(len(dictionary)),
        **{name: getattr(dictionary, name).tolist() for name in _PLACES},
        "mean_base": mean[0].numpy(),
        "mean_finetuned": mean[1].numpy(),
        "difference": (mean[1] - mean[0]).numpy(),
        "frequency_base": frequency[0].numpy(),
        "frequency_finetuned": frequency[1].numpy(),
    })  # fmt: skip
    order = table["difference"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)
