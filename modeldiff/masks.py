"""Which tokens of a text an edit touches or a capture keeps.

A mask is plain data: it holds no tensor and no tokenizer, so that it travels inside a plan to a
server and into a report. It meets the tokens only in `Mask.select`. Masks combine with ``&``,
``|`` and ``~``.

Example:
    >>> parse_mask("assistant") & ~Regex(r"[0-9]+")
    And(parts=(Role(name='assistant'), Not(part=Regex(pattern='[0-9]+'))))
"""

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

from modeldiff.errors import MaskError

ROLES = ("system", "developer", "user", "assistant", "tool", "template", "text")
CharSpan = tuple[int, int]
"""Half-open range of characters."""


@runtime_checkable
class Readable(Protocol):
    """What a mask reads of a text; `modeldiff.tokens.Text` is one."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Token ids."""
        ...

    @property
    def text(self) -> str:
        """The characters that the tokens stand for."""
        ...

    @property
    def offsets(self) -> tuple[CharSpan, ...]:
        """Characters of each token."""
        ...

    @property
    def roles(self) -> tuple[str, ...]:
        """Role of each token."""
        ...

    @property
    def n_prompt(self) -> int:
        """Tokens before the response."""
        ...


class Mask(ABC):
    """Base of every mask; not to be made itself."""

    @property
    @abstractmethod
    def on_new(self) -> bool:
        """Whether tokens generated after the known text are selected."""

    @abstractmethod
    def select(self, text: Readable) -> list[bool]:
        """Say for each token of a text whether it is selected."""

    def to_json(self) -> dict[str, Any]:
        """Write the mask as JSON-able values; `mask_from_json` reads them back.

        Example:
            >>> (~Role("user")).to_json()
            {'mask': 'not', 'part': {'mask': 'role', 'name': 'user'}}
        """
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}  # pyright: ignore[reportArgumentType]
        return {"mask": type(self).__name__.lower(), **values}

    def __and__(self, other: "Mask") -> "And":
        return And((self, other))

    def __or__(self, other: "Mask") -> "Or":
        return Or((self, other))

    def __invert__(self) -> "Not":
        return Not(self)


@dataclass(frozen=True)
class All(Mask):
    """Every token, known or generated."""

    @property
    def on_new(self) -> bool:
        """Generated tokens are selected."""
        return True

    def select(self, text: Readable) -> list[bool]:
        """Select every token."""
        return [True] * len(text.ids)


@dataclass(frozen=True)
class Role(Mask):
    """Tokens of one role.

    Args:
        name: One of `ROLES`. ``template`` is what the chat template writes around the messages,
            ``text`` is text that is no chat. The response is ``assistant`` in both cases.

    Raises:
        MaskError: If the role is unknown.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in ROLES:
            raise MaskError(f"unknown role {self.name!r}.{_did_you_mean(self.name, ROLES)}")

    @property
    def on_new(self) -> bool:
        """Generated tokens are the assistant's."""
        return self.name == "assistant"

    def select(self, text: Readable) -> list[bool]:
        """Select the tokens that have the role."""
        return [role == self.name for role in text.roles]


@dataclass(frozen=True)
class Prompt(Mask):
    """Tokens of the prompt, template included."""

    @property
    def on_new(self) -> bool:
        """Generated tokens are no prompt."""
        return False

    def select(self, text: Readable) -> list[bool]:
        """Select the first ``n_prompt`` tokens."""
        return [i < text.n_prompt for i in range(len(text.ids))]


@dataclass(frozen=True)
class New(Mask):
    """Tokens of the response: known (with the template's tokens after them) and generated."""

    @property
    def on_new(self) -> bool:
        """Generated tokens are selected."""
        return True

    def select(self, text: Readable) -> list[bool]:
        """Select everything after the first ``n_prompt`` tokens."""
        return [i >= text.n_prompt for i in range(len(text.ids))]


@dataclass(frozen=True)
class Last(Mask):
    """The last token of the prompt: the one whose output is the first token of the response."""

    @property
    def on_new(self) -> bool:
        """Generated tokens are no prompt."""
        return False

    def select(self, text: Readable) -> list[bool]:
        """Select one token, or none if the prompt is empty."""
        return [i == text.n_prompt - 1 for i in range(len(text.ids))]


@dataclass(frozen=True)
class Positions(Mask):
    """Tokens by number.

    Args:
        indices: Positions from 0; negative ones count from the end of the known text.

    Raises:
        MaskError: If there are none, or one is not an integer.
    """

    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", tuple(self.indices))
        if not self.indices or not all(type(each) is int for each in self.indices):
            raise MaskError(
                f"Positions({self.indices!r}): at least one position is needed, and integers "
                "only, e.g. Positions((0, -1))."
            )

    @property
    def on_new(self) -> bool:
        """Positions are those of the known text."""
        return False

    def select(self, text: Readable) -> list[bool]:
        """Select the tokens at the positions.

        Raises:
            MaskError: If the text is too short for one of them.
        """
        n = len(text.ids)
        outside = [each for each in self.indices if not -n <= each < n]
        if outside:
            raise MaskError(
                f"Positions: {outside} lie outside a text of {n} tokens. Leave the text out, "
                "or select by role, regular expression or span."
            )
        wanted = {each % n for each in self.indices}
        return [i in wanted for i in range(n)]


@dataclass(frozen=True)
class Regex(Mask):
    """Tokens that overlap a match of a regular expression in the text as rendered.

    The space that many tokenizers put at the front of a word's token does not count: a match
    that ends with a space does not reach into the next word. Empty matches select nothing.

    Args:
        pattern: For Python's `re`; flags go inside, e.g. ``(?i)wait``.

    Raises:
        MaskError: If the pattern cannot be compiled.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise MaskError(
                f"{self.pattern!r} is not a regular expression: {error}. Use Span for literal text."
            ) from error

    @property
    def on_new(self) -> bool:
        """Only the known text is searched."""
        return False

    def token_spans(self, text: Readable) -> list[tuple[int, int]]:
        """Give the range of tokens (first, one after the last) of every match, in order."""
        return _token_spans(text, [m.span() for m in re.finditer(self.pattern, text.text)])

    def select(self, text: Readable) -> list[bool]:
        """Select the tokens of every match."""
        return _inside(text, self.token_spans(text))


@dataclass(frozen=True)
class Span(Mask):
    """Tokens that overlap a literal text, wherever it occurs in the text as rendered.

    Leading spaces of tokens count as for `Regex`. Occurrences do not overlap each other.

    Args:
        text: What to look for.
        occurrence: Which one, from 0, or from -1 backwards; all of them by default.

    Raises:
        MaskError: If the text is empty.

    Example:
        >>> Span("Wait.", occurrence=1).to_json()
        {'mask': 'span', 'text': 'Wait.', 'occurrence': 1}
    """

    text: str
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if not self.text:
            raise MaskError("Span(''): an empty text is everywhere; give the text to look for.")

    @property
    def on_new(self) -> bool:
        """Only the known text is searched."""
        return False

    def token_spans(self, text: Readable) -> list[tuple[int, int]]:
        """Give the range of tokens (first, one after the last) of every occurrence, in order.

        Repeated sentences stay apart, even where they touch.
        """
        spans = [m.span() for m in re.finditer(re.escape(self.text), text.text)]
        n = self.occurrence
        if n is not None:
            spans = [spans[n]] if -len(spans) <= n < len(spans) else []
        return _token_spans(text, spans)

    def select(self, text: Readable) -> list[bool]:
        """Select the tokens of every occurrence that is wanted."""
        return _inside(text, self.token_spans(text))


@dataclass(frozen=True)
class Not(Mask):
    """Tokens that another mask leaves out."""

    part: Mask

    @property
    def on_new(self) -> bool:
        """The opposite of the part's."""
        return not self.part.on_new

    def select(self, text: Readable) -> list[bool]:
        """Select what the part does not."""
        return [not each for each in self.part.select(text)]


@dataclass(frozen=True)
class And(Mask):
    """Tokens that all of several masks select.

    Raises:
        MaskError: If there are none.
    """

    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        _some(self.parts, "And")

    @property
    def on_new(self) -> bool:
        """Whether all parts do."""
        return all(part.on_new for part in self.parts)

    def select(self, text: Readable) -> list[bool]:
        """Select what all parts do."""
        return [all(each) for each in zip(*(p.select(text) for p in self.parts), strict=True)]


@dataclass(frozen=True)
class Or(Mask):
    """Tokens that at least one of several masks selects.

    Raises:
        MaskError: If there are none.
    """

    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        _some(self.parts, "Or")

    @property
    def on_new(self) -> bool:
        """Whether any part does."""
        return any(part.on_new for part in self.parts)

    def select(self, text: Readable) -> list[bool]:
        """Select what any part does."""
        return [any(each) for each in zip(*(p.select(text) for p in self.parts), strict=True)]


_NAMED: dict[str, Mask] = {
    "all": All(),
    "prompt": Prompt(),
    "new": New(),
    "response": New(),
    "last": Last(),
    **{role: Role(role) for role in ROLES},
}
_KINDS = {
    kind.__name__.lower(): kind
    for kind in (All, Role, Prompt, New, Last, Positions, Regex, Span, Not, And, Or)
}


def parse_mask(where: str | Mask) -> Mask:
    """Read ``"all"``, ``"prompt"``, ``"new"`` (or ``"response"``), ``"last"`` or a role.

    A mask is returned as it is.

    Raises:
        MaskError: If the name is unknown.

    Example:
        >>> parse_mask("response"), parse_mask("user")
        (New(), Role(name='user'))
    """
    if isinstance(where, Mask):
        return where
    if where not in _NAMED:
        raise MaskError(
            f"{where!r} names no tokens.{_did_you_mean(where, _NAMED)} For anything else there "
            "are Positions, Regex and Span."
        )
    return _NAMED[where]


def mask_from_json(data: Any) -> Mask:
    """Read what `Mask.to_json` wrote.

    Raises:
        MaskError: If the data is not a mask, or has other fields than its kind of mask.

    Example:
        >>> mask_from_json({"mask": "positions", "indices": [0, -1]})
        Positions(indices=(0, -1))
    """
    values = dict(data) if isinstance(data, dict) else {}
    kind = _KINDS.get(str(values.pop("mask", "")))
    if kind is None:
        raise MaskError(f"{data!r} is not a mask; 'mask' must be one of {', '.join(_KINDS)}.")
    known = {field.name: field.type for field in fields(kind)}
    if set(values) != set(known):
        raise MaskError(
            f"a mask of kind {data['mask']!r} has the fields {sorted(known)}, got {sorted(values)}."
        )
    read = {name: _unplain(name, known[name], value) for name, value in values.items()}
    return kind(**read)


def selected(text: Readable, mask: Mask | str, skip_first: int = 1) -> list[bool]:
    """Select tokens, but none of the first ``skip_first``.

    The first token has activations of enormous norm in most models, whether or not it is a BOS
    token; it would dominate means, norms and principal components.

    Raises:
        MaskError: If the mask is unknown, or cannot be applied to the text.
    """
    chosen = parse_mask(mask).select(text)
    return [each and i >= skip_first for i, each in enumerate(chosen)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mask):
        return value.to_json()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _unplain(name: str, wanted: Any, value: Any) -> Any:
    if wanted is Mask:
        return mask_from_json(value)
    if wanted in (str, int | None):
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise MaskError(f"{name!r} of a mask must be {wanted}, got {value!r}.")
        return value
    if not isinstance(value, list | tuple):
        raise MaskError(f"{name!r} of a mask must be a list, got {value!r}.")
    if wanted == tuple[Mask, ...]:
        return tuple(mask_from_json(each) for each in value)
    return tuple(value)


def _some(parts: Sequence[Mask], name: str) -> None:
    if not parts:
        raise MaskError(f"{name}(()) combines nothing; give at least one mask.")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(known)}."


def _token_spans(text: Readable, spans: Iterable[CharSpan]) -> list[tuple[int, int]]:
    """Ranges of tokens that share a character with each span; spans that meet none fall out."""
    words = [_without_lead(text.text, *offset) for offset in text.offsets]
    ends = [end for _, end in words]
    found = []
    for start, end in spans:
        first = stop = bisect_right(ends, start)
        while stop < len(words) and words[stop][0] < end:
            stop += 1
        if first < stop and start < end:
            found.append((first, stop))
    return found


def _without_lead(text: str, start: int, end: int) -> CharSpan:
    lead = end - start - len(text[start:end].lstrip())
    return (start + lead, end) if start + lead < end else (start, end)


def _inside(text: Readable, spans: Iterable[tuple[int, int]]) -> list[bool]:
    wanted = {i for first, stop in spans for i in range(first, stop)}
    return [i in wanted for i in range(len(text.ids))]
