"""Texts with labels for probes, and how they are split: by whole groups, never by token."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeldiff._shapes import Bool, Float, Int
from modeldiff.activations import Activations
from modeldiff.errors import DirectionError, MismatchError
from modeldiff.interventions import Side
from modeldiff.probe_fits import Tokens
from modeldiff.sites import Site


@dataclass(frozen=True, eq=False)
class ProbeTexts:
    """Texts with labels, and the activations of their tokens.

    Args:
        base: Activations of the base, one row a token.
        finetuned: The same of the fine-tune.
        text_index: Which text each row belongs to, 0 to n - 1, every text at least once.
        token_ids: Its token, for the bag-of-tokens baseline.
        labels: Of each text.
        groups: Of each text: texts of one group are never on both sides of a split.
        site: Where the activations are from.
    """

    base: Float[Tensor, "token width"]
    finetuned: Float[Tensor, "token width"]
    text_index: Int[Tensor, " token"]
    token_ids: Int[Tensor, " token"]
    labels: Bool[Tensor, " text"]
    groups: tuple[Hashable, ...]
    site: Site

    def __post_init__(self) -> None:
        n = len(self.labels)
        seen = torch.unique(self.text_index).tolist()
        if seen != list(range(n)) or len(self.groups) != n:
            raise MismatchError(
                f"{n} labels and {len(self.groups)} groups for {len(seen)} texts with tokens: give "
                "one of each for every text, and no text whose tokens were all left out."
            )

    @classmethod
    def of(
        cls,
        acts: Activations,
        labels: Sequence[bool] | Tensor,
        groups: Sequence[Hashable] | None = None,
        site: str | Site | None = None,
    ) -> "ProbeTexts":
        """Take captured activations of one site.

        Args:
            acts: From `modeldiff.activations.capture`.
            labels: One for each of its texts.
            groups: One for each; each text is its own if None (a repeated one the first's), which
                is right only if texts share nothing (no question, no template).
            site: Which site, if several were captured.

        Raises:
            MismatchError: If there is not one label and group for every text.
        """
        at = acts.site if site is None else Site.parse(site)
        first: dict[Hashable, int] = {}
        own = [first.setdefault(text.ids, i) for i, text in enumerate(acts.texts)]
        ids = own if groups is None else groups
        found = torch.as_tensor(labels).bool()
        return cls(acts.base[at], acts.finetuned[at], acts.text_index, acts.token_ids, found,
                   tuple(ids), at)  # fmt: skip

    def tokens(self, side: Side) -> Tokens:
        """Activations of a side with the texts they belong to."""
        rows = self.finetuned if side == "finetuned" else self.base
        return Tokens(rows, self.text_index)


def shuffled(
    labels: Bool[Tensor, " text"], groups: Sequence[Hashable], seed: int
) -> Bool[Tensor, " text"]:
    """Shuffle labels: of whole groups where every group has one, else of texts.

    Example:
        >>> shuffled(torch.tensor([True, True, False, False]), ["a", "a", "b", "b"], 1)
        tensor([False, False,  True,  True])
    """
    draw = torch.Generator().manual_seed(seed)
    of: dict[Hashable, set[bool]] = {}
    for group, label in zip(groups, labels.tolist(), strict=True):
        of.setdefault(group, set()).add(label)
    if any(len(each) > 1 for each in of.values()):
        return labels[torch.randperm(len(labels), generator=draw)]
    names, values = list(of), [each.pop() for each in of.values()]
    order = torch.randperm(len(names), generator=draw).tolist()
    new = {names[i]: values[j] for i, j in enumerate(order)}
    return torch.tensor([new[group] for group in groups])


def folds_of(
    labels: Bool[Tensor, " text"], groups: Sequence[Hashable], n_folds: int, seed: int
) -> list[list[int]]:
    """Split texts into folds by whole groups, both labels spread evenly.

    Raises:
        DirectionError: If a label is in fewer than two groups.
    """
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    known = labels.numpy()
    own = {group: np.array([known[rows].sum(), (~known[rows]).sum()])
           for group, rows in members.items()}  # fmt: skip
    counts = np.array(list(own.values()))
    n = min(n_folds, *(counts > 0).sum(0).tolist())
    if n < 2:
        raise DirectionError(
            f"labels lie in {(counts > 0).sum(0)[0]} groups with True and "
            f"{(counts > 0).sum(0)[1]} with False; both need two or more, or nothing can be held "
            "out."
        )
    draw = torch.Generator().manual_seed(seed)
    names = list(members)
    order = [names[i] for i in torch.randperm(len(names), generator=draw).tolist()]
    order.sort(key=lambda group: -len(members[group]))  # stable: ties stay shuffled
    filled, total = np.zeros((n, 2)), counts.sum(0)
    folds: list[list[int]] = [[] for _ in range(n)]
    for group in order:  # where it evens out both labels' shares best
        growth = (own[group] * (2 * filled + own[group]) / total**2).sum(1)
        best = int(growth.argmin())
        filled[best] += own[group]
        folds[best] += members[group]
    return [sorted(fold) for fold in folds]


def splits(data: ProbeTexts, n_folds: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Texts to fit on and texts to hold out, fold by fold; arguments as for `folds_of`."""
    for fold in folds_of(data.labels, data.groups, n_folds, seed):
        held = set(fold)
        yield [i for i in range(len(data.labels)) if i not in held], fold


def replace_rows(data: ProbeTexts, rows: list[int]) -> ProbeTexts:
    """The labels and groups of some texts alone, without activations."""
    none, index = torch.zeros(len(rows), 0), torch.arange(len(rows))
    groups = tuple(data.groups[i] for i in rows)
    return ProbeTexts(none, none, index, index, data.labels[rows], groups, data.site)
