"""A direction for each behaviour of a reasoning model, from labelled sentences of its chains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Literal

import pandas as pd

from modeldiff._progress import Progress
from modeldiff.backtracking import Found, Ids, Window, base_texts, group_directions
from modeldiff.directions import Direction, cosine_table
from modeldiff.errors import DirectionError, MaskError
from modeldiff.forward import as_texts
from modeldiff.interventions import Side
from modeldiff.models import ModelPair
from modeldiff.sites import Site, parse_sites
from modeldiff.thinking_spans import Sentence

Scale = Literal["raw", "overall"]


@dataclass(frozen=True, eq=False)
class LabelDirections:
    """Directions of the labels of some chains, site by site.

    Args:
        directions: By label, side and site.
        overall: Length of the mean activation over the chains, by side and site.
        n_spans: Sentences of each label.
        n_texts: Chains.
    """

    directions: Mapping[str, Mapping[Side, Mapping[Site, Direction]]]
    overall: Mapping[tuple[Side, Site], float]
    n_spans: Mapping[str, int]
    n_texts: int

    def of(self, label: str, side: Side = "finetuned") -> dict[int, Direction]:
        """Directions of one label by layer.

        Raises:
            DirectionError: If the label has none, or the side was not asked for.
        """
        by_side = self.directions.get(label, {})
        if side not in by_side:
            known = ", ".join(f"{name} ({', '.join(s)})" for name, s in self.directions.items())
            raise DirectionError(f"no direction of {label!r} in {side}; there are {known}.")
        return {site.layer: direction for site, direction in by_side[side].items()}

    def table(self) -> pd.DataFrame:
        """One row a label, side and site.

        Columns: label, side, site, n_spans, scale, relative (scale over the overall mean's
        length), split_half, text_null (of the fine-tune's: cosine with the base's).
        """
        return pd.DataFrame(
            {
                "label": label,
                "side": side,
                "site": str(site),
                "n_spans": self.n_spans[label],
                "scale": direction.scale,
                "relative": direction.scale / self.overall[side, site],
                "split_half": direction.split_half,
                "text_null": direction.text_null,
            }
            for label, by_side in self.directions.items()
            for side, by_site in by_side.items()
            for site, direction in by_site.items()
        )

    def cosines(self, site: "str | Site", side: Side = "finetuned") -> pd.DataFrame:
        """Cosines of the labels with one another at a site."""
        at = Site.parse(site)
        return cosine_table(
            by_side[side][at].renamed(label) for label, by_side in self.directions.items()
        )


def span_window(sentence: Sentence, longest: int = 10) -> Window:
    """Tokens of a sentence that count: from the one before it to its tenth, but not its last.

    The token before is in it on purpose: it is where the sentence is decided on.

    Example:
        >>> span_window(Sentence(0, 5, 40, "a")), span_window(Sentence(0, 5, 6, "a"))
        (Window(text=0, first=4, stop=15), Window(text=0, first=4, stop=5))
    """
    start = max(0, sentence.first - 1)
    stop = min(sentence.stop - 1, sentence.first + longest)
    return Window(sentence.text, start, max(start + 1, stop))


def label_directions(
    pair: ModelPair,
    items: Sequence[Any],
    sentences: Sequence[Sentence],
    at: "str | Site | Sequence[str | Site]",
    *,
    labels: Sequence[str] | None = None,
    longest: int = 10,
    scale: Scale = "raw",
    models: Sequence[Side] = ("finetuned",),
    table: Mapping[Ids, Ids] | None = None,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> LabelDirections:
    """Mean over the sentences of each label minus the mean over the chains.

    Each sentence counts once, with the tokens of `span_window`; each chain counts once, from its
    first labelled token to its last.

    Args:
        pair: The pair.
        items: Chains, rendered or to be rendered.
        sentences: Of these texts, with labels.
        at: Sites, such as every layer's.
        labels: Which; all that occur by default.
        longest: Tokens of a sentence that count.
        scale: "raw" keeps the length of the difference; "overall" gives every direction the
            length of the chains' mean, as published, by which coefficient 1 is large in late
            layers.
        models: Sides; with the base's too the fine-tune's directions get their text null.
        table: See `modeldiff.backtracking.for_base`; what the base reads instead.
        seed: Of the split into halves, by chain.
        max_tokens: Of a batch.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If there are no sentences.
        DirectionError: If a label has no sentence, or too few tokens.
        Cancelled: If the event is set.

    Source:
        Venhoff et al. 2025, 2506.18167.
    """
    sites, texts = parse_sites(at), as_texts(pair.sides, items)
    spans, chains = _windows(sentences, longest)
    counts = {each.label: 0 for each in sorted(sentences, key=lambda s: s.label)}
    for each in sentences:
        counts[each.label] += 1
    groups = {
        label: [i for i, each in enumerate(sentences) if each.label == label]
        for label in (counts if labels is None else labels)
    }
    found, lengths = group_directions(
        pair, texts, [*spans, *chains], groups, range(len(spans), len(spans) + len(chains)), sites,
        base=base_texts(pair.sides, texts, table)[0], what="sentences", models=models, seed=seed,
        max_tokens=max_tokens, progress=progress, cancel=cancel,
    )  # fmt: skip
    if scale == "overall":
        scaled: Found = {
            label: {
                side: {s: _rescaled(d, lengths[side, s]) for s, d in by_site.items()}
                for side, by_site in by_side.items()
            }
            for label, by_side in found.items()
        }
        found = scaled
    return LabelDirections(found, lengths, {k: counts.get(k, 0) for k in groups}, len(chains))


def _windows(sentences: Sequence[Sentence], longest: int) -> tuple[list[Window], list[Window]]:
    """Windows of the sentences, and of the chains that they are in."""
    if not sentences:
        raise MaskError("no sentences: label the chains first, see thinking_spans.")
    ends: dict[int, tuple[int, int]] = {}
    for each in sentences:
        first, stop = ends.get(each.text, (each.first, each.stop))
        ends[each.text] = min(first, each.first), max(stop, each.stop)
    chains = [Window(text, *span) for text, span in sorted(ends.items())]
    return [span_window(each, longest) for each in sentences], chains


def _rescaled(direction: Direction, length: float) -> Direction:
    note = f"length {direction.scale:.4g} set to that of the overall mean"
    return replace(direction, scale=length, notes=(*direction.notes, note))
