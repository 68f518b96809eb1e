"""Patches of a remote pair: many copies of a text in one job, one patched place each.

A job runs the whole model, since single layers cannot be run there; what a patch copies travels
once for all the copies that share it, and one number a patch comes back. Patches of queries and
keys need an attention function of this package, and stay refused.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.batching import Batch, make_batch, padding_id
from modeldiff.divergence import blocks
from modeldiff.editing import Editor, Group
from modeldiff.errors import RemoteError
from modeldiff.forward import check_sites
from modeldiff.interventions import Plan, Side
from modeldiff.loading import Sides
from modeldiff.patch_runs import Cell, Metric, Trace, columns_of
from modeldiff.remote_runs import (
    LARGEST,
    check_heads,
    head_of,
    norm_of,
    one_side,
    pass_of,
    unembedded,
)
from modeldiff.sites import Site
from modeldiff.tokens import Text


def trace(sides: Sides, text: Text, side: Side, places: Sequence[str]) -> Trace:
    """`modeldiff.patch_runs.trace` without the arguments of layers, which stay on the server.

    Raises:
        SiteError: If a place does not exist.
        RemoteError: If it is a query's or a key's.
    """
    if any(place.startswith(("query.", "key.")) for place in places):
        raise RemoteError(
            "queries and keys are patched by an attention function of this package, which a "
            "server lacks: patch heads (part='head'), or load the pair here."
        )
    sites = tuple(map(Site.parse, places))
    off = side == "base" and any(site.kind == "lora" for site in sites)
    on: Side = "finetuned" if off else side
    check_sites(sites, sides.shape(on))
    batch = _copies(sides, text, 1)
    group = Group((0, 1), Plan(), sides.shape(on), adapter_off=off)
    editor = Editor(batch, (group,), sites, lora=sides.lora if off else ())
    one_side(sides, batch, on, editor, logits=False, grad=False)
    values = {str(site): h[0] for site, h in editor.acts.items()}
    return Trace(side, text, values, {}, off)


def effects(
    sides: Sides, own: Trace, cells: Sequence[Cell], metric: Metric, *, max_tokens: int
) -> Iterator[tuple[slice, Float[Tensor, " cell"]]]:
    """`modeldiff.patch_runs.effects`; the cells may be of several places.

    Args:
        sides: A remote pair.
        own: The side that is patched, on the text.
        cells: Patches.
        metric: What is measured.
        max_tokens: Of a job.

    Yields:
        Which cells, and their changes in float64.

    Raises:
        RemoteError: If a metric that cannot travel needs more logits than may.
    """
    for some in blocks(len(cells), rows_of_a_job(own.text, max_tokens)):
        moved = torch.tensor([_moves(sides, own, cell) for cell in cells[some]])
        found = torch.zeros(len(moved), dtype=torch.float64)
        if bool(moved.any()):
            chosen = [cell for cell, does in zip(cells[some], moved.tolist(), strict=True) if does]
            got = scores(sides, own, chosen, metric).double()
            found[moved] = got[1:] - got[0]
        yield some, found


def rows_of_a_job(text: Text, max_tokens: int) -> int:
    """Patches of a text that one job measures."""
    return max(1, max_tokens // text.n_tokens)


def ends(sides: Sides, text: Text, metric: Metric) -> dict[Side, float]:
    """The metric of both sides without patches."""
    found: dict[Side, float] = {}
    for side in ("base", "finetuned"):
        found[side] = float(scores(sides, Trace(side, text, {}, {}), [], metric)[0])
    return found


def scores(
    sides: Sides, own: Trace, cells: Sequence[Cell], metric: Metric
) -> Float[Tensor, " row"]:
    """The metric of the text as it is and under each patch.

    Raises:
        InterventionError: If it is not finite.
        RemoteError: If it cannot travel and needs more logits than may.
    """
    batch = _copies(sides, own.text, 1 + len(cells))
    given = {"at": list(metric.at), "measure": metric.there, **head_of(sides)}
    size = len(batch.texts) * len(metric.at) * sides.config.get_text_config().vocab_size * 4
    if metric.there is None and size > LARGEST:
        raise RemoteError(
            f"the metric {metric.name!r} is a function of its own, and {size >> 20} MiB of logits "
            "would travel to it: give fewer max_tokens, or one of logit_difference, onset_loss "
            "and kl_to, which are computed on the server."
        )
    measure = metric.there or {}
    if measure.get("side", own.side) != own.side and not sides.adapter:
        check_heads(sides, None)
    program = [*_program(sides, own, cells), norm_of(sides)]
    found = pass_of(sides, own.on, batch, program, _scored, given, None)
    n = own.text.n_tokens
    wanted = {i: len({p % n for p in cell.positions}) for i, cell in enumerate(cells)}
    if {int(number): n for number, n in found["fired"].items()} != wanted:
        raise RemoteError("the server carried out other patches than were asked for.")
    return (
        metric(found["logits"])
        if metric.there is None
        else metric.checked(found["scores"], len(batch.texts))
    )


def _copies(sides: Sides, text: Text, n: int) -> Batch:
    return make_batch([text] * n, padding_id(sides.tokenizer), "right")


def _moves(sides: Sides, own: Trace, cell: Cell) -> bool:
    """Whether a patch changes anything."""
    value, chosen = own.values[cell.component.place], list(cell.positions)
    width = columns_of(sides, cell.component, value.shape[1])
    return not torch.equal(value[chosen, width], cell.other.to(value)[chosen, width])


def _program(sides: Sides, own: Trace, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row a cell, after the row of the text as it is; see `modeldiff.editing`."""
    at: dict[Site, list[int]] = {}
    for number, cell in enumerate(cells):
        at.setdefault(Site.parse(cell.component.place), []).append(number)
    silenced = frozenset(sides.lora if own.off else ())
    program = []
    for site in sorted({*at, *silenced}):
        path, end = sides.site_map.locate(site, sides.adapter_of(own.on))
        edits = {
            number + 1: _edit(sides, own, cells[number], number) for number in at.get(site, [])
        }
        program.append({
            "name": str(site), "path": path, "end": end, "read": False, "leaf": False,
            "groups": _groups(edits, 1 + len(cells), site in silenced),
        })  # fmt: skip
    return program


def _groups(edits: dict[int, dict[str, Any]], n: int, silenced: bool) -> list[dict[str, Any]]:
    """Rows with an edit by themselves, and the runs of rows between them."""
    found, start = [], 0
    for row in [*sorted(edits), n]:
        if row > start:
            found.append({"rows": (start, row), "silenced": silenced, "edits": []})
        if row < n:
            found.append({"rows": (row, row + 1), "silenced": silenced, "edits": [edits[row]]})
        start = row + 1
    return found


def _edit(sides: Sides, own: Trace, cell: Cell, number: int) -> dict[str, Any]:
    """One patch as `modeldiff.tracing` carries it out."""
    n, width = cell.other.shape
    channels = columns_of(sides, cell.component, width)
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, list(cell.positions)] = True
    whole = (channels.start, channels.stop) == (0, width)
    edit = {
        "number": number, "width": n, "mask": mask, "selected": int(mask.sum()), "on_new": False,
        "operation": "copy" if whole else "copy channels",
        "amount": 0.0 if whole else (channels.start, channels.stop),
        "vectors": _NONE, "other": cell.other[None],
    }  # fmt: skip
    if cell.move is None:
        return edit
    lengths, unit = cell.move
    vector = torch.zeros(1, width)
    vector[0, channels] = unit.float()
    amount = lengths.float()[None]
    return {**edit, "operation": "move", "amount": amount, "vectors": vector, "other": None}


_NONE = torch.empty(0, 0)


def _scored(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    """The metric where the model is, or the logits that it is a function of."""
    logits = unembedded(model, acts["final"][:, given["at"]], given)
    measure = given["measure"]
    if measure is None:
        return {"logits": logits.cpu()}
    if measure["kind"] == "difference":
        return {"scores": (logits[:, 0, measure["of"]] - logits[:, 0, measure["less"]]).cpu()}
    own = logits.log_softmax(-1)
    if measure["kind"] == "loss":
        came = measure["came"].to(own.device).expand(len(own), -1)[..., None]
        return {"scores": -own.gather(-1, came)[..., 0].mean(-1).cpu()}
    states = measure["states"].to(acts["final"])
    reference = unembedded(model, states, given).log_softmax(-1)
    return {"scores": (own.exp() * (own - reference)).sum(-1).mean(-1).cpu()}
