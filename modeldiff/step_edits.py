"""Edits of new tokens whose numbers lie in tensors: a step that is recorded once follows a slider.

At every step after the prompt an `Editor` does the same: which rows, which edits, in which order
does not change. What changes from call to call, coefficients and vectors, is kept in tensors on the
device, and the arithmetic is that of the edits themselves.
"""

from dataclasses import replace

import torch
from torch import Tensor

from modeldiff.editing import Editor
from modeldiff.errors import InterventionError
from modeldiff.interventions import Ablate, Clamp, Edit, ScaleAdapter, ScaleAlong, Steer
from modeldiff.sites import Site

Structure = tuple[object, ...]


class StepEdits:
    """What an editor does to new tokens, for editors of one structure.

    It takes an editor's place under `modeldiff.hooks.hooked`.

    Args:
        editor: The first of them.
        device: Where the model computes.
    """

    def __init__(self, editor: Editor, device: torch.device) -> None:
        self.step = 0
        self.sites = tuple(sorted(editor.on_new()))
        self.reached: dict[int, int] = {}
        """Tokens that a step changes by each placed edit, by its number, once it was run."""
        edits = _distinct(editor)
        self._parts = editor.on_new()
        self._slots = {id(edit): slot for slot, edit in enumerate(edits)}
        self._amounts = torch.zeros(len(edits), dtype=torch.float64, device=device)
        self._vectors = [edit.vectors().to(device, copy=True) for edit in edits]
        self._edits = [_steady(edit, self._amounts[i]) for i, edit in enumerate(edits)]

    def load(self, editor: Editor) -> None:
        """Take over the coefficients and vectors of an editor of the same structure."""
        edits = _distinct(editor)
        self._amounts.copy_(torch.tensor([_amount(each) for each in edits], dtype=torch.float64))
        for kept, edit in zip(self._vectors, edits, strict=True):
            kept.copy_(edit.vectors())

    def edits(self, site: Site) -> bool:
        """Whether anything is changed at a site: at all that it names."""
        return site in self._parts

    def at(self, site: Site, h: Tensor) -> Tensor:
        """Take the activation at a site, return what takes its place; ``h`` is not modified."""
        parts = []
        for group in self._parts[site]:
            start, stop = group.rows
            part = h if (start, stop) == (0, h.shape[0]) else h[start:stop]
            if group.silenced:
                part = torch.zeros_like(part)
            for number, edit in group.edits:
                slot = self._slots[id(edit)]
                new = self._edits[slot].apply(part.float(), self._vectors[slot], None)
                part = new.to(part.dtype)
                self.reached[number] = stop - start
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def structure_of(editor: Editor) -> Structure:
    """Everything about an editor's work on new tokens but coefficients and vectors; hashable."""
    slots = {id(edit): slot for slot, edit in enumerate(_distinct(editor))}
    return tuple(
        (
            str(site),
            tuple(
                (
                    part.rows,
                    part.silenced,
                    tuple((number, slots[id(edit)]) for number, edit in part.edits),
                )
                for part in parts
            ),
        )
        for site, parts in sorted(editor.on_new().items())
    ) + tuple((type(each).__name__, tuple(each.vectors().shape)) for each in _distinct(editor))


def _distinct(editor: Editor) -> list[Edit]:
    """The edits of new tokens, each once: one edit acts at several sites."""
    found = {
        id(edit): edit
        for _, parts in sorted(editor.on_new().items())
        for part in parts
        for _, edit in part.edits
    }
    return list(found.values())


def _amount(edit: Edit) -> float:
    """The number that a slider moves; of a steered direction with its length."""
    if isinstance(edit, Steer):
        return edit.coefficient * edit.direction.scale
    if isinstance(edit, Clamp):
        return edit.value
    return edit.factor if isinstance(edit, ScaleAlong | ScaleAdapter) else 0.0


def _steady(edit: Edit, amount: Tensor) -> Edit:
    """The edit with a tensor for its number: arithmetic with it rounds as with the number."""
    number: dict[str, object]
    if isinstance(edit, Ablate):
        return edit
    if isinstance(edit, Steer):
        number = {"direction": replace(edit.direction, scale=1.0), "coefficient": amount}
    elif isinstance(edit, Clamp):
        number = {"value": amount}
    elif isinstance(edit, ScaleAlong | ScaleAdapter):
        number = {"factor": amount}
    else:
        raise InterventionError(
            f"{edit.describe()!r} on new tokens: they have no counterpart to copy."
        )
    return replace(edit, **number)  # pyright: ignore[reportArgumentType]
