"""Labelled sentences of reasoning: read from annotations or by a cue, and found as tokens.

An annotation repeats the reasoning with marks, ``["label"] text ["end-section"]``, and annotators
are careless: white space differs, sentences are dropped or changed, ends are forgotten. Sections
are therefore placed in the original by characters, in order, each occurrence used once; what has no
place is counted.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pandas as pd

from modeldiff.errors import MaskError
from modeldiff.masks import CharSpan
from modeldiff.stats import bootstrap_mean
from modeldiff.tokens import Text

END = "end-section"
LABELS = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)
"""Labels of the public annotations."""
CUE = r"wait|hmm"
"""What opens a sentence that takes something back."""
_TAG = re.compile(r'\[\s*"([^"\[\]\n]{1,64})"\s*\]')
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|\n|$)", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """A piece of an annotation.

    Args:
        label: What the annotator called it.
        text: What stands between the marks, stripped.
    """

    label: str
    text: str


@dataclass(frozen=True)
class Annotation:
    """What an annotation holds, in order.

    Args:
        sections: The pieces; equal ones stay apart.
        n_unclosed: Sections without an end of their own: the next mark, or the text's end, ended
            them.
        n_stray: Ends that close nothing.
        n_empty: Sections without text, which are left out.
        unknown: Names in marks that are no labels; they were read as text.
    """

    sections: tuple[Section, ...]
    n_unclosed: int
    n_stray: int
    n_empty: int
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placed:
    """Sections found in the original text.

    Args:
        spans: Label and characters of every section that was found, in order; none overlap.
        missing: Sections that were not.
    """

    spans: tuple[tuple[str, CharSpan], ...]
    missing: tuple[Section, ...]


@dataclass(frozen=True)
class Sentence:
    """Tokens of a labelled sentence.

    Args:
        text: Which of the texts it is in.
        first: Its first token.
        stop: One after its last.
        label: What it does.
    """

    text: int
    first: int
    stop: int
    label: str


def read_annotation(annotated: str, labels: Collection[str] | None = LABELS) -> Annotation:
    """Read ``["label"] text ["end-section"]``; other brackets are text.

    Args:
        annotated: The annotator's answer.
        labels: The known ones; a mark with another name is text, and is named in ``unknown``.
            None takes every name as a label.

    Raises:
        MaskError: If there is no mark at all.

    Example:
        >>> read = read_annotation('["deduction"] so x[0] = 2. ["end-section"]')
        >>> read.sections, read.n_unclosed
        ((Section(label='deduction', text='so x[0] = 2.'),), 0)
    """
    known = [m for m in _TAG.finditer(annotated) if _is_mark(m.group(1), labels)]
    if not any(m.group(1) != END for m in known):
        raise MaskError(
            f"no mark in {annotated[:80]!r}: an annotation is written "
            '["label"] text ["end-section"], with one of the labels '
            f"{', '.join(labels) if labels else '(any)'}."
        )
    sections, unclosed, stray, empty = [], 0, 0, 0
    ends = [*(m.start() for m in known[1:]), len(annotated)]
    names = [*(m.group(1) for m in known[1:]), ""]
    for i, (mark, stop, following) in enumerate(zip(known, ends, names, strict=True)):
        name = mark.group(1)
        if name == END:
            stray += i == 0 or known[i - 1].group(1) == END
            continue
        text = annotated[mark.end() : stop].strip()
        unclosed += following != END
        empty += not text
        if text:
            sections.append(Section(name, text))
    others = (m.group(1) for m in _TAG.finditer(annotated))
    unknown = tuple(dict.fromkeys(name for name in others if not _is_mark(name, labels)))
    return Annotation(tuple(sections), unclosed, stray, empty, unknown)


def _is_mark(name: str, labels: Collection[str] | None) -> bool:
    return name == END or labels is None or name in labels


def place(original: str, sections: Sequence[Section], *, least: float = 0.5) -> Placed:
    """Find sections in the text that was annotated, whatever its white space.

    They are placed in order and do not overlap, so that of a sentence that stands there twice each
    section gets its own; as many characters as possible are placed. A section does not begin or end
    inside a word.

    Args:
        original: The reasoning as the model wrote it.
        sections: In the order of the annotation.
        least: Share of the sections that must be found.

    Raises:
        MaskError: If fewer are found: the annotation is of another text.

    Example:
        >>> place("So.  Wait. So.", [Section("a", "So."), Section("b", "So.")]).spans
        (('a', (0, 3)), ('b', (11, 14)))
    """
    kept = [i for i, each in enumerate(original) if not each.isspace()]
    chosen = _longest_chain(_occurrences(original, kept, sections))
    missing = tuple(each for i, each in enumerate(sections) if i not in chosen)
    if len(chosen) < max(1, least * len(sections)):
        raise MaskError(
            f"{len(chosen)} of {len(sections)} sections are in the text, e.g. not "
            f"{missing[0].text[:60] if missing else ''!r}: this annotation is of another text. "
            "Give the text it was made of, or lower least=."
        )
    spans = tuple(
        (sections[i].label, (kept[start], kept[stop - 1] + 1))
        for i, (start, stop) in sorted(chosen.items())
    )
    return Placed(spans, missing)


def _occurrences(
    original: str, kept: Sequence[int], sections: Sequence[Section]
) -> list[list[CharSpan]]:
    """Every place of each section, in characters that are not white space."""
    compact, found = "".join(original[i] for i in kept), []
    for section in sections:
        wanted = re.escape("".join(section.text.split()))
        places = [m.span(1) for m in re.finditer(f"(?=({wanted}))", compact)] if wanted else []
        found.append([(a, b) for a, b in places if _whole(original, kept[a], kept[b - 1] + 1)])
    return found


def _whole(text: str, start: int, stop: int) -> bool:
    """Whether a span neither begins nor ends inside a word."""
    cuts = [at for at in (start, stop) if 0 < at < len(text)]
    return not any(text[at - 1].isalnum() and text[at].isalnum() for at in cuts)


def _longest_chain(places: Sequence[Sequence[CharSpan]]) -> dict[int, CharSpan]:
    """One place for as many characters as possible, in order and without overlap."""
    front: list[tuple[int, int, int]] = [(0, 0, -1)]  # end, characters placed, entry; both rise
    entries: list[tuple[int, CharSpan, int]] = []  # section, its place, entry before it
    for section, several in enumerate(places):
        new = []
        for start, stop in several:
            _, placed, before = front[bisect_right(front, (start, math.inf, 0)) - 1]
            entries.append((section, (start, stop), before))
            new.append((stop, placed + stop - start, len(entries) - 1))
        front = _best(front, new)
    chosen, at = {}, front[-1][2]
    while at >= 0:
        section, span, at = entries[at]
        chosen[section] = span
    return chosen


def _best(
    front: list[tuple[int, int, int]], new: list[tuple[int, int, int]]
) -> list[tuple[int, int, int]]:
    """Entries that no other one with an end as early has placed more than."""
    kept: list[tuple[int, int, int]] = []
    for each in sorted([*front, *new], key=lambda entry: (entry[0], -entry[1], entry[2])):
        if not kept or each[1] > kept[-1][1]:
            kept.append(each)
    return kept


def token_sentences(
    text: Text, number: int, spans: Sequence[tuple[str, CharSpan]], original: str | None = None
) -> list[Sentence]:
    """Turn labelled characters into tokens.

    Args:
        text: The rendered text.
        number: Its place in the list of texts.
        spans: Labels and characters.
        original: What the characters count in: the reasoning, which the response begins with or
            contains. None if they count in ``text.text``.

    Raises:
        MaskError: If the original is not in the response, or a span holds no token.
    """
    shift = 0
    if original is not None:
        start = text.offsets[text.n_prompt][0] if text.n_prompt < text.n_tokens else len(text.text)
        shift = text.text.find(original.strip(), start) - (len(original) - len(original.lstrip()))
        if text.text.find(original.strip(), start) < 0:
            raise MaskError(
                f"the response of text {number} does not contain {original.strip()[:60]!r}: render "
                "the text from the reasoning that was annotated."
            )
    moved = [(start + shift, stop + shift) for _, (start, stop) in spans]
    found = []
    for (label, span), tokens in zip(spans, _tokens_of(text, moved), strict=True):
        if tokens is None:
            raise MaskError(f"characters {span[0]} to {span[1]} of text {number} hold no token.")
        found.append(Sentence(number, *tokens, label))
    return found


def _tokens_of(text: Text, spans: Sequence[CharSpan]) -> list[tuple[int, int] | None]:
    """Tokens that share a character with each span; spaces that a token begins with do not."""
    starts = []
    for first, end in text.offsets:
        lead = end - first - len(text.text[first:end].lstrip())
        starts.append(first + lead if first + lead < end else first)
    ends, found = [end for _, end in text.offsets], []
    for start, stop in spans:
        tokens = bisect_right(ends, start), bisect_left(starts, stop)
        found.append(tokens if tokens[0] < tokens[1] else None)
    return found


def cue_sentences(
    texts: Sequence[Text], cue: str = CUE, *, label: str = "backtracking", other: str = "other"
) -> tuple[Sentence, ...]:
    """Cut responses into sentences, and label those that open with a cue.

    Args:
        texts: Rendered, with responses.
        cue: Regular expression, matched at the start of a sentence without regard to case, as a
            whole word.
        label: Of the sentences that open with it.
        other: Of all others.
    """
    opens, found = re.compile(rf"(?:{cue})\b", re.IGNORECASE), list[Sentence]()
    for number, text in enumerate(texts):
        told = [i for i in range(text.n_prompt, text.n_tokens) if not text.special[i]]
        if not told:
            continue
        start, stop = text.offsets[told[0]][0], text.offsets[told[-1]][1]
        said = [m for m in _SENTENCE.finditer(text.text, start, stop) if m.group().strip()]
        places = _tokens_of(text, [match.span() for match in said])
        found += [
            Sentence(number, *tokens, label if opens.match(match.group()) else other)
            for match, tokens in zip(said, places, strict=True)
            if tokens is not None
        ]
    return tuple(found)


def sentences_after(
    texts: Sequence[Text], sentences: Sequence[Sentence], pattern: str
) -> tuple[Sentence, ...]:
    """Keep sentences right after a match of a pattern, white space aside.

    What comes before a sentence depends on much beside its label; sentences that follow the same
    kind of sentence can be compared.

    Args:
        texts: The texts.
        sentences: Of them.
        pattern: Regular expression that what comes before must end with.
    """
    before, kept = re.compile(rf"(?:{pattern})\s*\Z"), []
    for each in sentences:
        text = texts[each.text]
        start = text.offsets[each.first][0]
        line = text.text[max(0, start - 400) : start]
        if before.search(line):
            kept.append(each)
    return tuple(kept)


def label_fractions(
    sentences: Sequence[Sentence], labels: Sequence[str] | None = None, *, seed: int = 0
) -> pd.DataFrame:
    """Share of the labelled tokens that each label has, with intervals over texts.

    Args:
        sentences: Of several texts.
        labels: Which; those that occur by default.
        seed: Of the bootstrap.

    Returns:
        One row a label: label, n_sentences, n_tokens, fraction (of all labelled tokens), mean (of
        the texts' own fractions), low, high (95 % of that mean).

    Raises:
        MaskError: If there are no sentences.
    """
    if not sentences:
        raise MaskError("no sentences: there is nothing to take shares of.")
    table = pd.DataFrame([(s.text, s.label, s.stop - s.first) for s in sentences],
                         columns=["text", "label", "n"])  # fmt: skip
    by_text = table.pivot_table(index="text", columns="label", values="n", aggfunc="sum")
    by_text = by_text.fillna(0.0)
    rows = []
    for label in labels or sorted(by_text.columns):
        tokens = by_text[label] if label in by_text else 0.0 * by_text.sum(axis=1)
        share = bootstrap_mean((tokens / by_text.sum(axis=1)).to_numpy(float), seed=seed)
        rows.append(
            {
                "label": label,
                "n_sentences": int((table["label"] == label).sum()),
                "n_tokens": int(tokens.sum()),
                "fraction": float(tokens.sum() / table["n"].sum()),
                "mean": share.estimate,
                "low": share.low,
                "high": share.high,
            }
        )
    return pd.DataFrame(rows)


def label_by_token(
    sentences: Sequence[Sentence], texts: Sequence[Text], nothing: str = "none"
) -> pd.DataFrame:
    """Label every token of every response, one annotator's table for `agreement.agreement`.

    Returns:
        One row a token of a response: prompt_index and prompt (which text), sample (position), text
        (the token's), label, exhibits (True: every token has a label, if only ``nothing``).
    """
    rows = {
        (number, position): nothing
        for number, text in enumerate(texts)
        for position in range(text.n_prompt, text.n_tokens)
    }
    for each in sentences:
        rows.update({(each.text, i): each.label for i in range(each.first, each.stop)})
    pieces = [text.pieces for text in texts]
    return pd.DataFrame(
        {
            "prompt_index": number,
            "prompt": f"text {number}",
            "sample": position,
            "text": pieces[number][position],
            "label": label,
            "exhibits": True,
        }
        for (number, position), label in rows.items()
    )
