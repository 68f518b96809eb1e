"""Where projections on candidates are at their extremes, as passages of text; and histograms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._shapes import Float
from modeldiff.activations import stream
from modeldiff.caft_candidates import Candidate
from modeldiff.models import ModelPair
from modeldiff.report_text import visible
from modeldiff.sites import Site
from modeldiff.tokens import Text

End = Literal["max", "min"]
Of = Literal["finetuned", "base", "difference"]
By = Literal["token", "text"]
ENDS: tuple[End, End] = ("max", "min")


@dataclass(frozen=True)
class Context:
    """A token at which a candidate is at an extreme, and the passage around it.

    Args:
        candidate: Name of the candidate.
        end: "max" or "min".
        rank: 0 for the most extreme; each text is in there once.
        value: The projection.
        text: Number of the text.
        position: The token's place in it.
        before: Characters of the tokens before it, as the text has them.
        peak: Its own characters; the name of a token that has none.
        after: Characters of the tokens after it.
        question: The user's message before it; of a text that is no chat, its prompt.
        answer: The whole message of the assistant that it is in; elsewhere the passage.
    """

    candidate: str
    end: End
    rank: int
    value: float
    text: int
    position: int
    before: str
    peak: str
    after: str
    question: str
    answer: str

    @property
    def passage(self) -> str:
        """The characters from first to last."""
        return self.before + self.peak + self.after

    def __str__(self) -> str:
        """The passage with the peak in brackets, whitespace made visible."""
        return visible(f"{self.before}[{self.peak}]{self.after}")


@dataclass(frozen=True, eq=False)
class Projections:
    """Components of both sides along candidates, one row a token that counts, text by text."""

    base: Float[Tensor, "token candidate"]
    finetuned: Float[Tensor, "token candidate"]
    text: Tensor
    position: Tensor


def projections(
    pair: ModelPair, texts: tuple[Text, ...], candidates: Sequence[Candidate], **options: Any
) -> Projections:
    """Run both sides on some texts; options are those of `modeldiff.activations.stream`."""
    places: dict[Site, list[int]] = {}
    for number, each in enumerate(candidates):
        places.setdefault(each.direction.site, []).append(number)
    units = {site: torch.stack([candidates[i].direction.unit for i in several])
             for site, several in places.items()}  # fmt: skip
    parts: dict[str, list[Tensor]] = {"base": [], "finetuned": [], "text": [], "position": []}
    for part in stream(pair.sides, texts, tuple(sorted(places)), **options):
        for side, acts in (("base", part.run.base), ("finetuned", part.run.finetuned)):
            values = torch.empty(len(part.position), len(candidates))
            for site, several in places.items():
                rows = part.rows(acts, site).float()
                values[:, several] = (rows @ units[site].to(rows.device).T).cpu()
            parts[side].append(values)
        parts["text"].append(part.text_index)
        parts["position"].append(part.position)
    joined = {name: torch.cat(several) for name, several in parts.items()}
    order = np.lexsort((joined["position"].numpy(), joined["text"].numpy()))
    return Projections(**{name: each[torch.from_numpy(order)] for name, each in joined.items()})


def extremes(
    found: Projections,
    texts: Sequence[Text],
    names: Sequence[str],
    k: int,
    window: tuple[int, int],
    of: Of,
    by: By,
) -> Iterator[Context]:
    """Yield the passages at both ends of every candidate; see `modeldiff.caft_reading`."""
    values = {"finetuned": found.finetuned, "base": found.base}.get(of)
    if values is None:
        values = found.finetuned - found.base
    numbers, counts = found.text.unique_consecutive(return_counts=True)
    blocks = values.split(counts.tolist())
    first = counts.cumsum(0) - counts
    for end, sign in (("max", 1.0), ("min", -1.0)):
        peaks = [(sign * block).max(0) for block in blocks]  # rows of each text
        best = torch.stack([each.values for each in peaks])
        rank_by = best if by == "token" else sign * torch.stack([b.mean(0) for b in blocks])
        where = torch.stack([each.indices for each in peaks]) + first[:, None]
        for column, name in enumerate(names):
            order = rank_by[:, column].argsort(descending=True, stable=True)[:k].tolist()
            for rank, i in enumerate(order):
                position = int(found.position[where[i, column]])
                number, value = int(numbers[i]), sign * float(best[i, column])
                shown = _around(texts[number], position, window)
                yield Context(name, end, rank, value, number, position, *shown)  # pyright: ignore


def _around(text: Text, position: int, window: tuple[int, int]) -> tuple[str, ...]:
    """Characters before, of and after a token, question and answer, cut out of the text itself."""
    start, stop = text.offsets[position]
    first = text.offsets[max(0, position - window[0])][0]
    last = text.offsets[min(len(text.ids) - 1, position + window[1])][1]
    peak = text.text[start:stop] or text.pieces[position]
    after = text.text[stop : max(stop, last)]
    answer = _message(text, "assistant", position)
    own = answer if text.roles[position] == "assistant" else text.text[first:start] + peak + after
    return text.text[first:start], peak, after, _question(text, position), own


def _question(text: Text, position: int) -> str:
    if "user" in text.roles[:position]:
        return _message(text, "user", position)
    return text.text[: text.offsets[text.n_prompt - 1][1]] if text.n_prompt else ""


def _message(text: Text, role: str, position: int) -> str:
    """The message of a role that holds a token, or the last one before it."""
    last = position
    while last > 0 and text.roles[last] != role:
        last -= 1
    start = last
    while start > 0 and text.roles[start - 1] == role:
        start -= 1
    while last + 1 < len(text.roles) and text.roles[last + 1] == role:
        last += 1
    return text.text[text.offsets[start][0] : text.offsets[last][1]].strip()


def histograms(found: Projections, names: Sequence[str], bins: int) -> pd.DataFrame:
    """Count tokens by projection; base and fine-tune share the bins."""
    parts = []
    for column, name in enumerate(names):
        base, tuned = found.base[:, column].numpy(), found.finetuned[:, column].numpy()
        edges = np.histogram_bin_edges(np.concatenate([base, tuned]), bins)
        counts = {side: np.histogram(values, edges)[0]
                  for side, values in (("base", base), ("finetuned", tuned))}  # fmt: skip
        parts.append(pd.DataFrame({"name": name, "low": edges[:-1], "high": edges[1:], **counts}))
    return pd.concat(parts, ignore_index=True)
