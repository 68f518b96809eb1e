"""Carrying a plan out on the activations of one batch: the part both executors share.

An `Editor` is made for one call. An executor hands it every activation it asked for, in forward
order, and puts back what it returns. The editor counts what it changed; an edit that changed
nothing by the end of the call is an error.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from modeldiff._shapes import Bool, Float
from modeldiff.architectures import SiteMap
from modeldiff.batching import Batch, mask_tensor
from modeldiff.errors import InterventionError
from modeldiff.interventions import Ablate, Clamp, Edit, Plan, Replace, ScaleAlong, Shape, Steer
from modeldiff.masks import parse_mask
from modeldiff.sites import Site


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring rows of a batch that share a plan.

    Args:
        rows: First row and the row after the last.
        plan: What is done to them.
        shape: Shape of the side that they belong to.
        adapter_off: True for rows of the base inside a batch that runs with the adapter on: what
            the adapter writes is then exactly zero on these rows.
        others: Activations for `Replace` edits, by side and site: ``[row, token, width]``.
        cell: Number of the cell they belong to, to tell cells apart over several batches.
    """

    rows: tuple[int, int]
    plan: Plan
    shape: Shape
    adapter_off: bool = False
    others: Mapping[tuple[str, Site], Tensor] = field(default_factory=dict)
    cell: int = 0


@dataclass(frozen=True, eq=False)
class _Placed:
    """One edit at one site for one group of rows."""

    number: int
    edit: Edit
    group: int
    mask: Bool[Tensor, "row token"]
    selected: int
    everywhere: bool
    """Every token but padding, which nothing ever reads: no need to spare it."""
    on_new: bool
    other: Tensor | None


def _other(edit: Edit, site: Site, group: Group) -> Tensor | None:
    if not isinstance(edit, Replace):
        return None
    source = edit.source
    other = group.others[source, site] if isinstance(source, str) else source
    edit.check_width(other.shape[-1])
    return other


@dataclass(frozen=True, eq=False)
class OnNew:
    """What is done at one site to the new tokens of neighbouring rows.

    Args:
        rows: First row and the row after the last.
        silenced: Whether what the adapter writes is set to zero.
        edits: Numbers of the placed edits, and the edits, in order.
    """

    rows: tuple[int, int]
    silenced: bool
    edits: tuple[tuple[int, Edit], ...]


Silent = dict[tuple[int, int, Site], str]
"""Why an edit of a cell changed nothing at a site; an empty string if it did change something."""


def check_fired(batches: Sequence[Silent]) -> None:
    """Verify that every edit changed at least one token in at least one of several batches.

    Raises:
        InterventionError: Listing each edit that did not fire, where, and the likely cause.
    """
    fired = {key for batch in batches for key, why in batch.items() if not why}
    silent = {key: why for batch in batches for key, why in batch.items() if key not in fired}
    if silent:
        raise InterventionError(
            f"{len(silent)} edit(s) did not fire: {'; '.join(list(silent.values())[:5])}. Results "
            "of this call would be those of the unedited model, so none are returned. Check the "
            "layers and `where` of the edit."
        )


class Editor:
    """The edits and reads of one call.

    Args:
        batch: The rows, padded; masks are resolved on its texts.
        groups: Groups of rows, in order, covering the batch.
        reads: Sites whose (edited) activations are kept in ``acts``.
        lora: ``lora`` sites that must be silenced for groups with ``adapter_off``.
        leaf: Make the first site that is read a leaf that requires grad.
    """

    def __init__(
        self,
        batch: Batch,
        groups: tuple[Group, ...],
        reads: tuple[Site, ...] = (),
        lora: tuple[Site, ...] = (),
        leaf: bool = False,
    ) -> None:
        self.step = 0
        self.acts: dict[Site, Tensor] = {}
        self.fired: Counter[int] = Counter()
        """Tokens changed by each placed edit, by its number; plain data, so it travels back."""
        self.groups = groups
        self._reads = frozenset(reads)
        self._leaf = min(reads) if leaf and reads else None
        self._placed = _place(batch, groups)
        silenced = lora if any(group.adapter_off for group in groups) else ()
        self._silenced = frozenset(silenced)
        self.sites = tuple(sorted({*self._placed, *reads, *silenced}))
        self._vectors: dict[tuple[int, str], Tensor] = {}

    def edits(self, site: Site) -> bool:
        """Whether anything at this site is changed rather than only read."""
        return site in self._placed or site in self._silenced or site == self._leaf

    @property
    def first_layer(self) -> int | None:
        """First layer whose own work on the prompts an edit can change; None if there is none.

        An edit of a layer's output is the next layer's affair.
        """
        layers = [
            site.layer + (site.kind == "resid_post")
            for site, placed in self._placed.items()
            if any(one.selected for one in placed)
        ]
        return min(layers, default=None)

    def at(self, site: Site, h: Tensor) -> Tensor:
        """Take the activation at a site, return what takes its place; ``h`` is not modified."""
        if self.edits(site):
            h = self._edited(site, h)
        if site == self._leaf:
            h = h.detach().requires_grad_(True)
        if site in self._reads:
            self.acts[site] = h
        return h

    def on_new(self) -> dict[Site, tuple[OnNew, ...]]:
        """What is done to every token after the prompts; sites at which nothing is are left out."""
        found = {}
        for site in self.sites:
            parts = tuple(
                OnNew(
                    group.rows,
                    group.adapter_off and site in self._silenced,
                    tuple(
                        (one.number, one.edit)
                        for one in self._placed.get(site, ())
                        if one.group == index and one.on_new
                    ),
                )
                for index, group in enumerate(self.groups)
            )
            if any(part.silenced or part.edits for part in parts):
                found[site] = parts
        return found

    def program(self, site_map: SiteMap, adapter: str = "") -> list[dict[str, Any]]:
        """The edits and reads as builtins and tensors, site by site in forward order.

        What `modeldiff.tracing` carries out, here or on a server that lacks this package.

        Args:
            site_map: Where the sites are.
            adapter: Active adapter, for ``lora`` sites.
        """
        vectors: dict[int, Tensor] = {}
        places = [(site, *site_map.locate(site, adapter)) for site in self.sites]
        return [self._at_site(*place, vectors) for place in places]

    def _at_site(
        self, site: Site, path: str, end: str, vectors: dict[int, Tensor]
    ) -> dict[str, Any]:
        placed = self._placed.get(site, ())
        groups = [
            {
                "rows": group.rows,
                "silenced": group.adapter_off and site in self._silenced,
                "edits": [_plain(one, vectors) for one in placed if one.group == index],
            }
            for index, group in enumerate(self.groups)
        ]
        return {
            "name": str(site),
            "path": path,
            "end": end,
            "read": site in self._reads,
            "leaf": site == self._leaf,
            "groups": groups if site in self._placed or site in self._silenced else [],
        }

    def silent(self) -> Silent:
        """Say of each edit at each site why it changed nothing; nothing if it did change some."""
        found: Silent = {}
        for site, placed in self._placed.items():
            for one in placed:
                why = "never reached" if one.selected else "its mask selects no token"
                message = f"{one.edit.describe()!r} at {site}: {why}"
                key = self.groups[one.group].cell, id(one.edit), site
                found[key] = "" if self.fired[one.number] else message
        return found

    def check_fired(self) -> None:
        """Verify that every edit changed at least one token at each of its sites.

        Raises:
            InterventionError: Listing each edit that did not fire, where, and the likely cause.
        """
        check_fired([self.silent()])

    def _edited(self, site: Site, h: Tensor) -> Tensor:
        parts = []
        for index, group in enumerate(self.groups):
            start, stop = group.rows
            part = h if (start, stop) == (0, h.shape[0]) else h[start:stop]
            if group.adapter_off and site in self._silenced:
                part = torch.zeros_like(part)
            for one in self._placed.get(site, ()):
                if one.group == index:
                    part = self._apply(one, part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _apply(self, one: _Placed, h: Tensor) -> Tensor:
        mask = self._mask_now(one, h)
        if mask is None:
            return h
        other = None if self.step > 0 else one.other
        if other is not None and other.shape != h.shape:
            raise InterventionError(
                f"{one.edit.describe()!r} copies a tensor of shape {list(other.shape)} to "
                f"activations of shape {list(h.shape)}: it must come from a run of the same batch."
            )
        vectors = self._vectors_on(one, h.device)
        if vectors.numel() and vectors.shape[-1] != h.shape[-1]:
            raise InterventionError(
                f"{one.edit.describe()!r} has {vectors.shape[-1]} numbers and activations there "
                f"have {h.shape[-1]}: the direction must be of the site that it edits."
            )
        new = one.edit.apply(h.float(), vectors, other)
        self.fired[one.number] += h.shape[0] if self.step > 0 else one.selected
        if mask is True:
            return new.to(h.dtype)
        return torch.where(mask[..., None], new, h.float()).to(h.dtype)

    def _mask_now(self, one: _Placed, h: Tensor) -> Tensor | Literal[True] | None:
        """Tokens to change: a mask, True if it is all of them, None if it is none."""
        if self.step > 0:
            return True if one.on_new else None
        if h.shape[1] != one.mask.shape[1]:
            raise InterventionError(
                f"the model runs on {h.shape[1]} tokens where the plan was resolved on "
                f"{one.mask.shape[1]}; run() and generate() keep the two equal."
            )
        if one.selected == 0:
            return None
        return True if one.everywhere else one.mask.to(h.device)

    def _vectors_on(self, one: _Placed, device: torch.device) -> Float[Tensor, "k d_model"]:
        key = one.number, str(device)
        if key not in self._vectors:
            self._vectors[key] = one.edit.vectors().to(device)
        return self._vectors[key]


def _plain(one: _Placed, vectors: dict[int, Tensor]) -> dict[str, Any]:
    """One placed edit without classes; an edit's vectors are one tensor at all its sites."""
    if id(one.edit) not in vectors:
        vectors[id(one.edit)] = one.edit.vectors().clone()
    tokens = one.mask.shape
    if one.other is not None and one.other.shape[:2] != tokens:
        raise InterventionError(
            f"{one.edit.describe()!r} copies a tensor of shape {list(one.other.shape)} to "
            f"{tokens[0]} rows of {tokens[1]} tokens: it must come from a run of the same batch."
        )
    operation, amount = _operation(one.edit)
    return {
        "number": one.number,
        "operation": operation,
        "amount": amount,
        "vectors": vectors[id(one.edit)],
        "mask": True if one.everywhere else one.mask,
        "width": tokens[1],
        "selected": one.selected,
        "on_new": one.on_new,
        "other": one.other,
    }


def _operation(edit: Edit) -> tuple[str, float | tuple[int, int]]:
    """Name and numbers of an edit's arithmetic, see `modeldiff.tracing`."""
    if isinstance(edit, Steer):
        return "add", edit.coefficient * edit.direction.scale
    if isinstance(edit, Ablate):
        return "ablate", 0.0
    if isinstance(edit, ScaleAlong):
        return "scale along", edit.factor - 1.0
    if isinstance(edit, Clamp):
        return "clamp", edit.value
    if isinstance(edit, Replace):
        if edit.channels is not None:
            return "copy channels", edit.channels
        return ("copy" if edit.along is None else "copy along"), 0.0
    return "multiply", edit.factor


def _place(batch: Batch, groups: tuple[Group, ...]) -> dict[Site, list[_Placed]]:
    placed: dict[Site, list[_Placed]] = {}
    covered = [row for group in groups for row in range(*group.rows)]
    if covered != list(range(len(batch.texts))):
        raise InterventionError(f"groups cover rows {covered} of a batch of {len(batch.texts)}.")
    for index, group in enumerate(groups):
        for edit in group.plan.edits:
            where = parse_mask(edit.where)
            rows = slice(*group.rows)
            mask = mask_tensor(batch, where)[rows]
            everywhere = torch.equal(mask, batch.attention_mask[rows].bool())
            for site in edit.sites(group.shape):
                one = _Placed(
                    number=sum(map(len, placed.values())),
                    edit=edit,
                    group=index,
                    mask=mask,
                    selected=int(mask.sum()),
                    everywhere=everywhere,
                    on_new=where.on_new,
                    other=_other(edit, site, group),
                )
                placed.setdefault(site, []).append(one)
    return placed
