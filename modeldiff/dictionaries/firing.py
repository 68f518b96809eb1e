"""How often latents fire in groups of tokens: roles of a chat, corpora, sets of texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Int
from modeldiff.dictionaries.examples import encode_cpu, starts, whole_documents
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Rows, Source, checked
from modeldiff.errors import MismatchError
from modeldiff.masks import ROLES
from modeldiff.stats import wilson
from modeldiff.tokens import Text

LEFT_OUT = -1


@dataclass(frozen=True)
class Grouping:
    """A group for every row.

    Args:
        names: Of the groups.
        label: Gives the number of the group of each row, or `LEFT_OUT`.
    """

    names: tuple[str, ...]
    label: Callable[[Rows], Int[Tensor, " row"]]


def everything() -> Grouping:
    """One group of all rows."""
    return Grouping(("all",), lambda rows: torch.zeros(len(rows), dtype=torch.int64))


def by_document(labels: Sequence[str]) -> Grouping:
    """Group rows by a label of their text, such as its corpus.

    Args:
        labels: Of text 0, 1, 2 ... of the source.

    Example:
        >>> by_document(["web", "chat", "web"]).names
        ('web', 'chat')
    """
    names = tuple(dict.fromkeys(labels))
    number = torch.tensor([names.index(each) for each in labels])

    def label(rows: Rows) -> Int[Tensor, " row"]:
        if int(rows.document.max()) >= len(number):
            raise MismatchError(
                f"the source has text {int(rows.document.max())}, and {len(number)} labels were "
                "given: one for each text, please."
            )
        return number[rows.document]

    return Grouping(names, label)


def by_role(texts: Sequence[Text]) -> Grouping:
    """Group rows by the role of their token: system, user, assistant, template ...

    Args:
        texts: The texts that the source was harvested from, in its order.
    """
    lengths = torch.tensor([0, *(text.n_tokens for text in texts)]).cumsum(0)
    roles = torch.tensor([ROLES.index(role) for text in texts for role in text.roles])

    def label(rows: Rows) -> Int[Tensor, " row"]:
        if int(rows.document.max()) >= len(texts):
            raise MismatchError(
                f"the source has text {int(rows.document.max())}, and {len(texts)} were given."
            )
        start, end = lengths[rows.document], lengths[rows.document + 1]
        if bool((start + rows.position >= end).any()):
            raise MismatchError("the source has positions that its texts lack: other texts?")
        return roles[start + rows.position]

    return Grouping(ROLES, label)


@torch.no_grad()
def firing(
    dictionary: Dictionary,
    source: Source,
    grouping: Grouping | None = None,
    *,
    batch_size: int = 1024,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Count how often and how strongly each latent fires in each group of rows.

    Args:
        dictionary: Whose latents.
        source: Rows, with their texts.
        grouping: Groups of rows; all in one by default.
        batch_size: Rows encoded at once.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        One row a latent and group that has rows: latent, group, n_rows, n_active, rate (share of
        the group's rows), share_of_firing (share of the latent's active rows that are in the
        group), mean_activation (where it fires), max_activation, n_texts, text_share (of the
        group's texts, in how many it fires) and its 95 % interval, text_low and text_high. The
        interval is of texts, because tokens of one text are not independent.

    Raises:
        MismatchError: If the grouping is of other texts.
        Cancelled: If the event is set; ``partial`` has the table of the rows so far.
    """
    grouping = grouping or everything()
    n_latents, report = dictionary.config.n_latents, reporter(progress, "firing")
    counts, done = _Counts(n_latents, grouping), 0
    for block in whole_documents(checked(source).in_order(batch_size)):
        if cancel is not None and cancel.is_set():
            check(cancel, counts.table())
        counts.add(dictionary, block)
        done += len(block)
        report(done, source.n_rows, f"{done:,} rows")
    return counts.table()


class _Counts:
    """Running counts by group and latent."""

    def __init__(self, n_latents: int, grouping: Grouping) -> None:
        n = len(grouping.names)
        self.grouping, self.n_latents = grouping, n_latents
        self.rows, self.texts = torch.zeros(2, n, dtype=torch.int64)
        self.active, self.active_texts = torch.zeros(2, n * n_latents, dtype=torch.int64)
        self.total, self.peak = torch.zeros(2, n * n_latents, dtype=torch.float64)

    def add(self, dictionary: Dictionary, block: Rows) -> None:
        """Add whole texts."""
        group, text = self.grouping.label(block), starts(block).cumsum(0) - 1
        kept, n = group != LEFT_OUT, len(self.rows)
        self.rows += group[kept].bincount(minlength=n)
        self.texts += (text * n + group)[kept].unique().remainder(n).bincount(minlength=n)
        codes = encode_cpu(dictionary, block)
        on = kept[codes.row]
        row, value = codes.row[on], codes.value[on].double()
        cell = group[row] * self.n_latents + codes.latent[on]
        self.active += cell.bincount(minlength=len(self.active))
        self.total.index_add_(0, cell, value)
        self.peak.scatter_reduce_(0, cell, value, "amax")
        once = (text[row] * len(self.active) + cell).unique().remainder(len(self.active))
        self.active_texts += once.bincount(minlength=len(self.active))

    def table(self) -> pd.DataFrame:
        """One row a latent and group."""
        shape = len(self.rows), self.n_latents
        active, total, peak, texts = (
            each.view(shape).numpy() for each in (self.active, self.total, self.peak,
                                                  self.active_texts)
        )  # fmt: skip
        every = np.maximum(1, active.sum(0))
        parts = []
        for g, name in enumerate(self.grouping.names):
            n_rows, n_texts = int(self.rows[g]), int(self.texts[g])
            if not n_rows:
                continue
            known = {count: wilson(count, n_texts) for count in np.unique(texts[g]).tolist()}
            bounds = [known[count] for count in texts[g].tolist()]
            fires = np.where(active[g] > 0, active[g], np.nan)
            part = {
                "latent": np.arange(self.n_latents), "group": name, "n_rows": n_rows,
                "n_active": active[g], "rate": active[g] / n_rows,
                "share_of_firing": np.where(active.sum(0) > 0, active[g] / every, np.nan),
                "mean_activation": total[g] / fires,
                "max_activation": np.where(active[g] > 0, peak[g], np.nan),
                "n_texts": n_texts, "text_share": texts[g] / n_texts,
                "text_low": [each.low for each in bounds],
                "text_high": [each.high for each in bounds],
            }  # fmt: skip
            parts.append(pd.DataFrame(part))
        return pd.concat(parts).sort_values(["latent"], kind="stable").reset_index(drop=True)
