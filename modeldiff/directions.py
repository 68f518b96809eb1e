"""Directions in activation space: what they are, their algebra, and the files they live in.

How to find one is in `modeldiff.direction_methods`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from html import escape

import pandas as pd
import torch
from torch import Tensor

from modeldiff._files import PathLike, digest
from modeldiff._shapes import Float
from modeldiff.direction_files import Record, damaged, read_vectors, write_vectors
from modeldiff.errors import DirectionError, FileFormatError, MismatchError
from modeldiff.sites import Site

_ROUNDING = 1e-6  # shorter than this, relative to what it came from, is float32 rounding


@dataclass(frozen=True, eq=False, repr=False)
class Direction:
    """A named direction at a site, its raw length, and everything needed to judge it.

    ``a + b``, ``a - b``, ``-a`` and ``2.0 * a`` give new directions; the first two need one
    site, see `at`. Two directions compare equal only if they are the same object; compare
    `content_key` instead.

    Args:
        unit: Shape ``(d_model,)``, L2 norm 1, float32, on the CPU. See `of` for raw vectors.
        scale: Length before normalising, in residual-stream units. Steering with
            coefficient 1 adds ``unit * scale``.
        site: Where it was found.
        name: Shown in tables and plots.
        method: How it was found.
        sources: Names of the sets of text it was found on.
        n_tokens: Tokens on the smaller side of the contrast; 0 if it was not found on tokens.
        seed: Of whatever was random in finding it.
        models: Content hashes of the models, e.g. ``{"base": ..., "adapter": ...}``; ``"mixed"``
            where the parts of a sum disagree.
        sign: Where it points, in words, e.g. ``"towards finetuned"``.
        resid_norm: Mean norm of the residual stream at the site.
        split_half: Cosine between the directions that two halves of the data give.
        text_null: Cosine with the same contrast of texts in the base model. Near 1 the
            direction is a property of the texts, not of the fine-tune.
        explained_variance: For a principal component, its share of the centred variance.
        notes: Anything a reader should know, one sentence each.

    Raises:
        DirectionError: If ``unit`` is not one finite float32 vector of norm 1 (within 1e-4) on
            the CPU, or ``scale`` is not positive and finite.

    Example:
        >>> Direction.of(torch.tensor([3.0, 4.0]), Site("resid_post", 12), "toy")
        Direction 'toy' @ resid_post.12 · |v|=5
    """

    unit: Float[Tensor, " d_model"]
    scale: float
    site: Site
    name: str
    method: str = "given"
    sources: tuple[str, ...] = ()
    n_tokens: int = 0
    seed: int | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    sign: str = ""
    resid_norm: float | None = None
    split_half: float | None = None
    text_null: float | None = None
    explained_variance: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unit = self.unit
        if unit.dim() != 1 or unit.dtype != torch.float32 or unit.device.type != "cpu":
            raise DirectionError(
                f"the unit of {self.name!r} has shape {tuple(unit.shape)}, {unit.dtype}, on "
                f"{unit.device}; it must be one float32 vector on the CPU. Direction.of takes "
                "any vector."
            )
        norm = float(unit.double().norm())
        if not abs(norm - 1) <= 1e-4:
            raise DirectionError(
                f"the unit of {self.name!r} has norm {norm:.6g}; it must be 1. Direction.of "
                "takes a vector of any length."
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise DirectionError(
                f"the scale of {self.name!r} is {self.scale}; it must be positive and finite. "
                "A negative one is the negative direction: -direction."
            )

    @classmethod
    def of(
        cls,
        vector: Float[Tensor, " d_model"],
        site: Site | str,
        name: str,
        method: str = "given",
    ) -> "Direction":
        """Make a direction of a raw vector of any length, dtype and device; it is not modified.

        Use `dataclasses.replace` to add provenance.

        Raises:
            DirectionError: If the vector is zero, not finite, or not one vector.
        """
        if vector.dim() != 1:
            raise DirectionError(
                f"{name!r} has shape {tuple(vector.shape)}; a direction is one vector."
            )
        raw = vector.detach().cpu().double()
        scale = float(raw.norm())
        if scale == 0 or not math.isfinite(scale):
            raise DirectionError(
                f"{name!r} has length {scale}: there is no direction in it. If it is a "
                "difference, the two sides are the same."
            )
        return cls((raw / scale).float(), scale, Site.parse(site), name, method)

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """``unit * scale``: what steering with coefficient 1 adds."""
        return self.unit * self.scale

    @property
    def d_model(self) -> int:
        """Width of the residual stream it lives in."""
        return len(self.unit)

    @property
    def relative_scale(self) -> float | None:
        """``scale`` as a fraction of the residual norm at the site, if that is known."""
        return self.scale / self.resid_norm if self.resid_norm else None

    @property
    def content_key(self) -> str:
        """Hash of what the direction does: vector and site, not its name or provenance."""
        return digest(self.unit.numpy().astype("<f4").tobytes(), self.scale, str(self.site))

    def cosine(self, other: "Direction") -> float:
        """Cosine similarity, in [-1, 1]. The sites may differ.

        Raises:
            MismatchError: If the widths differ.
        """
        _same_width([self, other])
        return float((self._double_unit() @ other._double_unit()).clamp(-1, 1))

    def renamed(self, name: str) -> "Direction":
        """The same direction under another name."""
        return replace(self, name=name)

    def at(self, site: Site | str) -> "Direction":
        """The same vector at another site, where its residual norm is not known."""
        moved = Site.parse(site)
        if moved == self.site:
            return self
        note = f"found at {self.site}, moved to {moved}"
        return replace(self, site=moved, resid_norm=None, notes=(*self.notes, note))

    def orthogonal_to(self, *others: "Direction") -> "Direction":
        """What is left of it outside the span of the others, e.g. of the base model's contrast.

        Raises:
            MismatchError: If widths or sites differ.
            DirectionError: If nothing is left, or no other direction is given.
        """
        _same_place([self, *others])
        basis = orthonormal_basis(others).double()
        raw = self._double_unit() * self.scale
        left = raw - (raw @ basis.T) @ basis
        left = left - (left @ basis.T) @ basis  # again: exact even if little is left
        names = ", ".join(repr(other.name) for other in others)
        name = f"{self.name} ⊥ {', '.join(other.name for other in others)}"
        share = float(left.norm()) / self.scale
        note = f"orthogonal to {names}: {share:.3g} of the length is left"
        return self._derived(left, self.scale, name, "orthogonal_to", others, note)

    def __add__(self, other: "Direction") -> "Direction":
        return self._combined(other, 1.0) if isinstance(other, Direction) else NotImplemented

    def __sub__(self, other: "Direction") -> "Direction":
        return self._combined(other, -1.0) if isinstance(other, Direction) else NotImplemented

    def __neg__(self) -> "Direction":
        away = "opposite of: "
        sign = self.sign.removeprefix(away) if self.sign.startswith(away) else away + self.sign
        return replace(
            self, unit=-self.unit, name=_negated(self.name), sign=sign if self.sign else ""
        )

    def __mul__(self, factor: float | int) -> "Direction":
        turned = -self if factor < 0 else self
        scaled = replace(turned, scale=turned.scale * abs(float(factor)))
        return scaled.renamed(f"{factor:g} {_bracketed(self.name)}")

    __rmul__ = __mul__

    def _double_unit(self) -> Float[Tensor, " d_model"]:
        return torch.nn.functional.normalize(self.unit.double(), dim=0)

    def _combined(self, other: "Direction", factor: float) -> "Direction":
        _same_place([self, other])
        word, method = ("+", "sum") if factor > 0 else ("-", "difference")
        name = f"{self.name} {word} {other.name if factor > 0 else _bracketed(other.name)}"
        raw = self._double_unit() * self.scale + factor * other._double_unit() * other.scale
        note = f"{method} of {self.name!r} and {other.name!r}"
        return self._derived(raw, self.scale + other.scale, name, method, [other], note)

    def _derived(
        self,
        raw: Float[Tensor, " d_model"],
        size: float,
        name: str,
        method: str,
        others: Sequence["Direction"],
        note: str,
    ) -> "Direction":
        """A direction made of this one and others; ``size`` is the length of what went in."""
        if float(raw.norm()) <= _ROUNDING * size:
            raise DirectionError(
                f"{name!r} is zero: nothing but rounding is left of {self.name!r} (length "
                f"{float(raw.norm()):.2g} of {size:.4g}). The vectors are dependent."
            )
        parts = [self, *others]
        models: dict[str, str] = {}
        for part in parts:
            for role, key in part.models.items():
                models[role] = key if models.get(role, key) == key else "mixed"
        notes = [text for part in parts for text in part.notes] + [note]
        made_of = ", ".join(dict.fromkeys(part.method for part in parts))
        return replace(
            Direction.of(raw, self.site, name, f"{method} of {made_of}"),
            sources=tuple(dict.fromkeys(text for part in parts for text in part.sources)),
            n_tokens=min(part.n_tokens for part in parts),
            seed=self.seed if all(part.seed == self.seed for part in parts) else None,
            models=models,
            resid_norm=self.resid_norm,
            notes=tuple(dict.fromkeys(notes)),
        )

    def save_to(self, path: PathLike) -> None:
        """Write it to one safetensors file, with its provenance in the header."""
        save_directions(path, [self])

    @classmethod
    def load_from(cls, path: PathLike) -> "Direction":
        """Read what `save_to` wrote, bit for bit.

        Raises:
            FileFormatError: As for `load_directions`, or if the file holds several directions.
        """
        found = load_directions(path)
        if len(found) != 1:
            raise FileFormatError(
                f"{str(path)!r} holds {len(found)} directions, not one: use load_directions."
            )
        return found[0]

    def __repr__(self) -> str:
        relative = self.relative_scale
        parts = [f"Direction {self.name!r} @ {self.site}", f"|v|={self.scale:.3g}"]
        if relative is not None:
            parts[-1] += f" ({relative:.2g} of the residual norm)"
        if self.n_tokens:
            parts.append(f"n={self.n_tokens:,} tokens")
        if self.split_half is not None:
            parts.append(f"split-half {self.split_half:.2f}")
        if self.text_null is not None:
            parts.append(f"text null {self.text_null:.2f}")
        return " · ".join(parts)

    def _repr_html_(self) -> str:
        facts = {
            "method": self.method,
            "points": self.sign,
            "texts": ", ".join(self.sources),
            "seed": "" if self.seed is None else str(self.seed),
            "models": ", ".join(f"{role} {key}" for role, key in self.models.items()),
            "notes": "; ".join(self.notes),
        }
        rows = "".join(
            f"<tr><th>{escape(fact)}</th><td>{escape(text)}</td></tr>"
            for fact, text in facts.items()
            if text
        )
        return f"<table><caption>{escape(repr(self))}</caption>{rows}</table>"


def cosine_table(directions: Iterable[Direction]) -> pd.DataFrame:
    """Cosines between all pairs, with names as index and columns.

    Names that occur twice get their site appended, and a number if that is not enough.

    Raises:
        MismatchError: If the widths differ.
        DirectionError: If there are no directions.

    Example:
        >>> a = Direction.of(torch.tensor([1.0, 0.0]), "resid_post.1", "a")
        >>> b = Direction.of(torch.tensor([0.0, 1.0]), "resid_post.1", "b")
        >>> cosine_table([a, b]).loc["a", "b"]
        np.float64(0.0)
    """
    several = list(directions)
    if not several:
        raise DirectionError("a cosine table needs directions, got none.")
    _same_width(several)
    units = torch.stack([direction._double_unit() for direction in several])
    cosines = (units @ units.T).clamp(-1, 1).fill_diagonal_(1)
    labels = _labels(several)
    return pd.DataFrame(cosines.numpy(), index=labels, columns=labels)


def orthonormal_basis(
    directions: Direction | Iterable[Direction] | Float[Tensor, "n d_model"],
) -> Float[Tensor, "k d_model"]:
    """An orthonormal basis of the span of directions or of the rows of a matrix.

    Gram-Schmidt with reorthogonalisation in float64: the first row is the first direction, and
    a row that adds nothing to the ones before it (within 1e-6 of its length) is left out.

    Args:
        directions: One or several directions, or vectors as rows; any lengths.

    Returns:
        Float32 rows on the CPU, ``k <= n``.

    Raises:
        MismatchError: If the widths differ.
        DirectionError: If nothing is given, all of it is zero, or a value is not finite.
    """
    rows = _rows(directions)
    if not bool(rows.isfinite().all()):
        raise DirectionError("a basis of values that are not finite cannot be made.")
    basis = rows.new_zeros(0, rows.shape[1])
    for row in torch.nn.functional.normalize(rows, dim=1, eps=1e-300):
        left = row - (row @ basis.T) @ basis
        left = left - (left @ basis.T) @ basis
        if float(left.norm()) > _ROUNDING:
            basis = torch.cat([basis, torch.nn.functional.normalize(left, dim=0)[None]])
    if len(basis) == 0:
        raise DirectionError(
            f"{len(rows)} vectors span nothing: a basis needs at least one that is not zero."
        )
    return basis.float()


def save_directions(path: PathLike, directions: Iterable[Direction]) -> None:
    """Write directions to one safetensors file, whole or not at all.

    Raises:
        DirectionError: If there are none.
    """
    several = list(directions)
    if not several:
        raise DirectionError(f"nothing to write to {str(path)!r}: no directions were given.")
    names = [entry.name for entry in fields(Direction) if entry.name != "unit"]
    records = [
        {name: getattr(direction, name) for name in names}
        | {"site": str(direction.site), "models": dict(direction.models)}
        for direction in several
    ]
    write_vectors(path, [direction.unit for direction in several], records)


def load_directions(path: PathLike) -> list[Direction]:
    """Read what `save_directions` or `Direction.save_to` wrote, bit for bit and in order.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If the file is cut short or damaged, is not a file of directions, or
            has another format version.
    """
    pairs = read_vectors(path)
    try:
        return [_from_record(unit, record) for unit, record in pairs]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, error) from error


def _from_record(unit: Float[Tensor, " d_model"], record: Record) -> Direction:
    parsed: Record = {
        "site": Site.parse(record["site"]),
        "n_tokens": int(record["n_tokens"]),
        "models": {str(role): str(key) for role, key in record["models"].items()},
        **{key: str(record[key]) for key in ("name", "method", "sign")},
        **{key: tuple(map(str, record[key])) for key in ("sources", "notes")},
    }
    for key in ("resid_norm", "split_half", "text_null", "explained_variance"):
        parsed[key] = None if record[key] is None else float(record[key])
    return Direction(unit, **(record | parsed))


def _rows(
    directions: Direction | Iterable[Direction] | Float[Tensor, "n d_model"],
) -> Float[Tensor, "n d_model"]:
    if isinstance(directions, Tensor):
        rows = directions.detach().cpu().double()
    else:
        several = [directions] if isinstance(directions, Direction) else list(directions)
        _same_width(several)
        rows = torch.stack([d._double_unit() for d in several]) if several else torch.empty(0, 0)
    if rows.dim() != 2 or len(rows) == 0:
        raise DirectionError(
            f"a basis needs directions, or vectors as rows; got shape {tuple(rows.shape)}."
        )
    return rows


def _same_width(directions: Sequence[Direction]) -> None:
    for other in directions[1:]:
        first = directions[0]
        if other.d_model != first.d_model:
            raise MismatchError(
                f"{first.name!r} (d_model={first.d_model}) and {other.name!r} "
                f"(d_model={other.d_model}) come from models of different width."
            )


def _same_place(directions: Sequence[Direction]) -> None:
    _same_width(directions)
    for other in directions[1:]:
        first = directions[0]
        if other.site != first.site:
            raise MismatchError(
                f"{first.name!r} is at {first.site} and {other.name!r} at {other.site}. To "
                f"combine them anyway, move one: .at({str(first.site)!r})."
            )


def _labels(directions: Sequence[Direction]) -> list[str]:
    names = [direction.name for direction in directions]
    labels = [d.name if names.count(d.name) == 1 else f"{d.name} @ {d.site}" for d in directions]
    return [
        label if labels.count(label) == 1 else f"{label} #{labels[:i].count(label) + 1}"
        for i, label in enumerate(labels)
    ]


def _is_compound(name: str) -> bool:
    return any(word in name for word in (" + ", " - ", " ⊥ "))


def _bracketed(name: str) -> str:
    return f"({name})" if _is_compound(name) else name


def _negated(name: str) -> str:
    if name.startswith("-") and not _is_compound(name):
        return name[1:]
    return f"-{_bracketed(name)}"
