"""What an edit does to the predictions: distance to a reference model and loss, text by text."""

from collections.abc import Sequence
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch, mask_tensor
from modeldiff.divergence import check_finite, kl_and_loss, unembedding
from modeldiff.errors import MaskError
from modeldiff.forward import as_texts, device_of, final_states
from modeldiff.interventions import Cell
from modeldiff.loading import Sides
from modeldiff.masks import Mask


def effects(
    sides: Sides,
    items: Sequence[Any],
    cells: Sequence[Cell],
    *,
    reference: Cell | None = None,
    on: "str | Mask" = "all",
    max_tokens: int = 4096,
    budget: int = 256 << 20,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Measure KL(cell || reference) and the cell's loss on given texts.

    Args:
        sides: The pair.
        items: Texts, chats, completions; teacher-forced.
        cells: Sides with edits.
        reference: What they are compared with; the unedited base by default.
        on: Which *predicted* tokens count; the first token of a text never does.
        max_tokens: Budget of a batch, padding included.
        budget: Bytes for temporaries over the vocabulary.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        One row a cell and text: cell (index), side, edit, text, n_tokens, kl (nats a token, mean
        over the text's tokens), loss (the same).

    Raises:
        MaskError: If no token is compared.
        MismatchError: If a comparison is not finite.
        InterventionError: If an edit did not fire in some batch.
        SetupError: If memory runs out on a single text.
        Cancelled: If the event is set.
    """
    texts, reference = as_texts(sides, items), reference or Cell("base")
    report = reporter(progress, "effects")
    rows: list[dict[str, Any]] = []

    def work(batch: Batch) -> list[dict[str, Any]]:
        keep = mask_tensor(batch, on)
        keep[:, 0] = False
        found = []
        if keep.any():
            known = _predicting(sides, batch, reference, keep, cancel)
            for index, cell in enumerate(cells):
                check(cancel)
                one = _compare(sides, batch, keep, cell, reference, known, budget, cancel)
                found += _rows(batch, keep, index, cell, *one)
        return found

    done = 0
    for batch, found in each_batch(sides, texts, max_tokens, work, what="effects"):
        rows += found
        done += len(batch.texts)
        report(done, len(texts), f"{done}/{len(texts)} texts")
    if not rows:
        raise MaskError(f"the mask {on!r} leaves no predicted token in {len(texts)} texts.")
    table = pd.DataFrame(rows).sort_values(["cell", "text"], kind="stable")
    return table.reset_index(drop=True)


def _predicting(
    sides: Sides, batch: Batch, cell: Cell, keep: Tensor, cancel: Event | None
) -> Tensor:
    states = final_states(sides, batch, cell.side, cell.plan, cancel)
    row, column = keep.nonzero(as_tuple=True)
    return states[row.to(states.device), column.to(states.device) - 1]


def _compare(
    sides: Sides,
    batch: Batch,
    keep: Tensor,
    cell: Cell,
    reference: Cell,
    known: Tensor,
    budget: int,
    cancel: Event | None,
) -> tuple[Tensor, Tensor]:
    """KL to the reference and loss of each kept token, under one cell."""
    if sides.kind == "remote":
        from modeldiff.remote_runs import effect

        return effect(sides, batch, keep, cell, reference, known, budget, cancel=cancel)
    states = _predicting(sides, batch, cell, keep, cancel)
    root, other = sides.root(cell.side), sides.root(reference.side)
    with torch.no_grad():
        return kl_and_loss(
            states,
            known,
            unembedding(root, sides.site_map),
            unembedding(other, sides.site_map),
            batch.ids[keep].to(device_of(root)),
            budget,
        )


def _rows(
    batch: Batch, keep: Tensor, index: int, cell: Cell, kl: Tensor, loss: Tensor
) -> list[dict[str, Any]]:
    check_finite(kl, f"comparisons of {cell.side} ({cell.name}) with the reference")
    owner = keep.nonzero(as_tuple=True)[0]
    rows = []
    for row in owner.unique().tolist():
        mine = (owner == row).to(kl.device)
        rows.append(
            {
                "cell": index,
                "side": cell.side,
                "edit": cell.name,
                "text": batch.order[row],
                "n_tokens": int(mine.sum()),
                "kl": float(kl[mine].mean()),
                "loss": float(loss[mine].mean()),
            }
        )
    return rows
