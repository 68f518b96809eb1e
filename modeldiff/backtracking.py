"""Directions from what comes just before a sentence: windows of tokens, averaged over texts.

A fine-tune that takes its own steps back may read a feature which its base has too. So the mean
activation in a window before each such sentence, less the mean before all sentences, is taken from
both models on the same tokens. Windows are averaged batch by batch; memory does not grow with the
number of texts.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch
from modeldiff.direction_methods import mean_difference
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MaskError, MismatchError
from modeldiff.forward import as_texts, run
from modeldiff.interventions import Side
from modeldiff.loading import SIDES, Sides
from modeldiff.models import ModelPair
from modeldiff.moments import Moments
from modeldiff.sites import Site, parse_sites
from modeldiff.thinking_spans import Sentence
from modeldiff.tokens import Text

Ids = int | tuple[int, ...]
Offsets = tuple[int, int]
Found = dict[str, dict[Side, dict[Site, Direction]]]
BEFORE: Offsets = (-13, -8)
"""Tokens before a sentence, first and last, where the feature was found to be."""


@dataclass(frozen=True)
class Window:
    """Some tokens of one text, half-open.

    Args:
        text: Which of the texts.
        first: First token.
        stop: One after the last.
    """

    text: int
    first: int
    stop: int


@dataclass(frozen=True, eq=False)
class WindowMeans:
    """Weighted means of windows, in float64.

    Args:
        mean: ``[group, d_model]`` by side and site: of the windows' mean activations.
        norm: ``[group]`` by side and site: of the windows' mean norms.
    """

    mean: dict[tuple[Side, Site], Float[Tensor, "group d_model"]]
    norm: dict[tuple[Side, Site], Float[Tensor, " group"]]

    def moments(self, side: Side, site: Site, group: int, n_tokens: int) -> Moments:
        """One group as moments."""
        key = side, site
        return Moments(n_tokens, self.mean[key][group], float(self.norm[key][group]))


@dataclass(frozen=True, eq=False)
class WindowDirections:
    """Directions of one label in both models, and what they rest on.

    Args:
        base: By site, from the base's activations.
        finetuned: By site, from the fine-tune's; their ``text_null`` is the cosine with the base's.
        window: First and last token, counted from the sentence's first.
        label: Of the sentences.
        n_windows: Windows of the label.
        n_all: Windows of all sentences, from which the mean is taken.
        n_clipped: Windows that reached over an end of their text and were cut.
        n_dropped: Windows that did and were left out.
        n_replaced: Tokens that the base saw replaced.
    """

    base: dict[Site, Direction]
    finetuned: dict[Site, Direction]
    window: Offsets
    label: str
    n_windows: int
    n_all: int
    n_clipped: int
    n_dropped: int
    n_replaced: int

    def table(self) -> pd.DataFrame:
        """One row a site: site, cosine (of the two models'), and scale and split half of both."""
        return pd.DataFrame(
            {
                "site": str(site),
                "cosine": self.finetuned[site].cosine(direction),
                "base_scale": direction.scale,
                "finetuned_scale": self.finetuned[site].scale,
                "base_split_half": direction.split_half,
                "finetuned_split_half": self.finetuned[site].split_half,
            }
            for site, direction in self.base.items()
        )


def for_base(text: Text, table: Mapping[Ids, Ids], lacks: Collection[int] = ()) -> tuple[Text, int]:
    """Replace tokens that the base does not know; every other token keeps its place.

    Args:
        text: As the fine-tune reads it.
        table: Tokens, or runs of them, and what the base reads instead: as many tokens.
        lacks: Tokens that the base must not be given, such as a reasoning model's control tokens
            whose rows the base never trained.

    Returns:
        The text with other ids, and how many tokens were replaced.

    Raises:
        MismatchError: If a replacement has another length, or a token that the base lacks is left.

    Example:
        >>> plain = Text((1, 9, 2), "a<t>b", ((0, 1), (1, 4), (4, 5)), ("text",) * 3,
        ...              (False, True, False), 0, ("",) * 3)
        >>> for_base(plain, {9: 4})[0].ids
        (1, 4, 2)
    """
    known = {_run(key): _run(value) for key, value in table.items()}
    uneven = [f"{key} by {value}" for key, value in known.items() if len(key) != len(value)]
    if uneven or () in known:
        raise MismatchError(
            f"replacements {uneven or ['of nothing']}: both models must read the same number of "
            "tokens, or their windows would not be the same tokens. Give as many as are replaced."
        )
    ids, at, n = list(text.ids), 0, 0
    lengths = sorted({len(key) for key in known}, reverse=True)
    while at < len(ids):
        size = next((k for k in lengths if text.ids[at : at + k] in known), 0)
        if size:
            ids[at : at + size] = known[text.ids[at : at + size]]
            n += size
        at += max(1, size)
    left = sorted(set(ids) & set(lacks))
    if left:
        raise MismatchError(
            f"the base lacks the tokens {left[:8]}, which the texts hold: say what it reads "
            "instead, with table={id: other id}, or leave those texts out."
        )
    return replace(text, ids=tuple(ids)), n


def _run(ids: Ids) -> tuple[int, ...]:
    return (ids,) if isinstance(ids, int) else tuple(ids)


def windows_before(
    texts: Sequence[Text],
    sentences: Sequence[Sentence],
    window: Offsets = BEFORE,
    *,
    edges: Literal["drop", "clip"] = "drop",
    skip_first: int = 1,
) -> list[Window | None]:
    """Place a window at every sentence.

    Args:
        texts: The texts.
        sentences: Of them.
        window: First and last token, counted from the sentence's first token, 0.
        edges: What is done with windows that reach over an end of the text; such that lie outside
            are dropped in any case.
        skip_first: Tokens at the start of a text that no window holds.

    Returns:
        A window for each sentence, or None where it was dropped.

    Raises:
        MaskError: If the window ends before it begins.
    """
    first, last = window
    if last < first:
        raise MaskError(f"window {window}: give first and last token, e.g. {BEFORE}.")
    found: list[Window | None] = []
    for each in sentences:
        start, stop = each.first + first, each.first + last + 1
        cut = max(start, skip_first), min(stop, texts[each.text].n_tokens)
        whole = cut == (start, stop)
        kept = whole or (edges == "clip" and cut[0] < cut[1])
        found.append(Window(each.text, *cut) if kept else None)
    return found


def window_directions(
    pair: ModelPair,
    items: Sequence[Any],
    sentences: Sequence[Sentence],
    at: "str | Site | Sequence[str | Site]",
    *,
    label: str = "backtracking",
    window: Offsets = BEFORE,
    edges: Literal["drop", "clip"] = "drop",
    table: Mapping[Ids, Ids] | None = None,
    lacks: Collection[int] = (),
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> WindowDirections:
    """Find what is there before the sentences of a label, in base and fine-tune alike.

    The mean of the windows before them minus the mean of the windows before all sentences; every
    window counts once.

    Args:
        pair: The pair.
        items: Reasoning, rendered or to be rendered.
        sentences: All sentences of these texts with their labels, the label's among them.
        at: Site or sites.
        label: Whose windows.
        window: First and last token, counted from a sentence's first token, 0.
        edges: See `windows_before`.
        table: See `for_base`; what the base reads instead of tokens that it does not know.
        lacks: Tokens that the base must not be given.
        seed: Of the split into halves, by text.
        max_tokens: Of a batch.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        DirectionError: If no window of the label is left, or too few.
        MismatchError: If the base would read tokens that it lacks.
        Cancelled: If the event is set.

    Source:
        Ward et al. 2025, 2507.12638: windows -13 to -8 at layer 10 of Llama-3.1-8B.
    """
    sites, texts = parse_sites(at), as_texts(pair.sides, items)
    placed = windows_before(texts, sentences, window, edges=edges)
    kept = [i for i, each in enumerate(placed) if each is not None]
    windows = [each for each in placed if each is not None]
    mine = [n for n, i in enumerate(kept) if sentences[i].label == label]
    read, n_replaced = base_texts(pair.sides, texts, table, lacks)
    found, _ = group_directions(
        pair, texts, windows, {label: mine}, range(len(windows)), sites, base=read,
        what=f"window {window[0]} to {window[1]}", seed=seed, max_tokens=max_tokens,
        progress=progress, cancel=cancel,
    )  # fmt: skip
    size = window[1] - window[0] + 1
    return WindowDirections(
        base=found[label]["base"],
        finetuned=found[label]["finetuned"],
        window=window,
        label=label,
        n_windows=len(mine),
        n_all=len(windows),
        n_clipped=sum(each.stop - each.first < size for each in windows),
        n_dropped=len(placed) - len(windows),
        n_replaced=n_replaced,
    )


def base_texts(
    sides: Sides,
    texts: Sequence[Text],
    table: Mapping[Ids, Ids] | None,
    lacks: Collection[int] = (),
) -> tuple[tuple[Text, ...], int]:
    """The texts as the base reads them, and how many tokens were replaced.

    Raises:
        MismatchError: As for `for_base`; tokens beyond the base's embedding are always lacking.
    """
    rows = len(sides.root("base").get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    beyond = {i for text in texts for i in text.ids if i >= rows}
    done = [for_base(text, table or {}, {*lacks, *beyond}) for text in texts]
    return tuple(text for text, _ in done), sum(n for _, n in done)


def group_directions(
    pair: ModelPair,
    texts: Sequence[Text],
    windows: Sequence[Window],
    groups: Mapping[str, Sequence[int]],
    overall: Sequence[int],
    sites: Sequence[Site],
    *,
    base: Sequence[Text] | None = None,
    what: str = "windows",
    models: Sequence[Side] = SIDES,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> tuple[Found, dict[tuple[Side, Site], float]]:
    """Mean of each group of windows minus the mean of some windows, at every site and side.

    Args:
        pair: The pair.
        texts: What the fine-tune reads.
        windows: Windows of them.
        groups: Which windows each group has, by name.
        overall: Windows whose mean is taken off.
        sites: Where.
        base: What the base reads; the same if None.
        what: Of the windows, for names.
        models: Sides.
        seed: Of the split of the texts into halves.
        max_tokens: Of a batch.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        Directions by group, side and site; and the length of the overall mean by side and site.

    Raises:
        DirectionError: If a group has too few tokens, or does not differ from the others.
    """
    empty = [name for name, several in groups.items() if not several]
    if empty or not overall:
        raise DirectionError(
            f"no window before a sentence labelled {', '.join(empty) or 'at all'}; sentences near "
            "the start of a text have no window: give longer texts, another window, or edges='clip'"
            "."
        )
    weights, counts = _weights(texts, windows, groups, overall, seed)
    means = window_means(
        pair.sides, texts, windows, weights, sites, base=base, models=models,
        max_tokens=max_tokens, progress=progress, cancel=cancel,
    )  # fmt: skip
    found: Found = {
        name: {
            side: {
                site: _direction(pair, means, counts, (name, what), number, side, site, seed)
                for site in sites
            }
            for side in models
        }
        for number, name in enumerate(groups)
    }
    lengths = {key: float(mean[2].norm()) for key, mean in means.mean.items()}
    return found, lengths


def _weights(
    texts: Sequence[Text],
    windows: Sequence[Window],
    groups: Mapping[str, Sequence[int]],
    overall: Sequence[int],
    seed: int,
) -> tuple[Float[Tensor, "row window"], list[int]]:
    """Six rows a group: its windows in both halves and in all, and the overall ones likewise."""
    rows, counts = [], []
    draw = torch.Generator().manual_seed(seed)
    for several in groups.values():
        mine = {windows[i].text for i in several}
        first = set[int]()
        for part in (sorted(mine), sorted(set(range(len(texts))) - mine)):
            order = torch.randperm(len(part), generator=draw).tolist()
            first |= {part[k] for k in order[: len(part) // 2]}
        for chosen in (overall, several):
            halves = [[i for i in chosen if (windows[i].text in first) == h] for h in (True, False)]
            for part in (*halves, list(chosen)):
                row = torch.zeros(len(windows), dtype=torch.float64)
                row[part] = 1 / len(part) if part else 0.0
                rows.append(row)
                counts.append(sum(windows[i].stop - windows[i].first for i in part))
    return torch.stack(rows), counts


def _direction(
    pair: ModelPair,
    means: WindowMeans,
    counts: Sequence[int],
    names: tuple[str, str],
    number: int,
    side: Side,
    site: Site,
    seed: int,
) -> Direction:
    def of(who: Side, row: int) -> Moments:
        return means.moments(who, site, 6 * number + row, counts[6 * number + row])

    halves = (of(side, 3), of(side, 0)), (of(side, 4), of(side, 1))
    both = side == "finetuned" and ("base", site) in means.mean
    found = mean_difference(
        of(side, 5),
        of(side, 2),
        site,
        f"{names[0]}, {side}",
        halves=halves if all(each.n for pair_ in halves for each in pair_) else None,
        base_contrast=(of("base", 5), of("base", 2)) if both else None,
        sources=(f"{names[0]}: {names[1]}", f"all sentences: {names[1]}"),
        models=pair.digests,
        seed=seed,
    )
    return replace(found, seed=seed, method="mean difference of windows")


def window_means(
    sides: Sides,
    texts: Sequence[Text],
    windows: Sequence[Window],
    weights: Float[Tensor, "group window"],
    sites: Sequence[Site],
    *,
    base: Sequence[Text] | None = None,
    models: Sequence[Side] = SIDES,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> WindowMeans:
    """Weighted sums of the mean activations of windows, in one pass a side.

    Args:
        sides: The pair.
        texts: What the fine-tune reads.
        windows: Windows of them.
        weights: Float64; the weight of each window in each group.
        sites: Where.
        base: What the base reads; the same if None.
        models: Sides.
        max_tokens: Of a batch.
        progress: Where to report.
        cancel: Event that stops between batches.
    """
    by_text: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        by_text.setdefault(window.text, []).append(number)
    used, report, done = sorted(by_text), reporter(progress, "windows"), 0
    sums: dict[tuple[Side, Site], Tensor] = {}
    norms: dict[tuple[Side, Site], Tensor] = {}
    for side in models:
        read = texts if side == "finetuned" or base is None else base

        def of_batch(batch: Batch, side: Side = side) -> tuple[list[int], dict[Site, Any]]:
            check(cancel)
            acts = run(sides, batch.texts, side=side, reads=tuple(sites), logits=False,
                       pad_side="right").acts  # fmt: skip
            rows = [(row, n) for row, i in enumerate(batch.order) for n in by_text[used[i]]]
            chosen = [(row, windows[n]) for row, n in rows]
            return [n for _, n in rows], {site: _means(h, chosen) for site, h in acts.items()}

        asked = [read[i] for i in used]
        for batch, (rows, means) in each_batch(sides, asked, max_tokens, of_batch, what="windows"):
            share = weights[:, rows]
            for site, (mean, norm) in means.items():
                key = side, site
                sums[key] = sums.get(key, 0.0) + share @ mean
                norms[key] = norms.get(key, 0.0) + share @ norm
            done += len(batch.texts)
            report(done, len(used) * len(models), f"{side}, {done} texts")
    return WindowMeans(sums, norms)


def _means(
    h: Float[Tensor, "row token d_model"], windows: Sequence[tuple[int, Window]]
) -> tuple[Float[Tensor, "window d_model"], Float[Tensor, " window"]]:
    """Mean activation and mean norm of each window, in float64 on the CPU."""
    places = [(row, t, n) for n, (row, w) in enumerate(windows) for t in range(w.first, w.stop)]
    row, token, owner = torch.tensor(places).T
    values = h[row.to(h.device), token.to(h.device)].cpu().double()
    size = torch.bincount(owner, minlength=len(windows)).double()
    total = torch.zeros(len(windows), h.shape[-1], dtype=torch.float64)
    total.index_add_(0, owner, values)
    norm = torch.zeros(len(windows), dtype=torch.float64).index_add_(0, owner, values.norm(dim=-1))
    return total / size[:, None], norm / size
