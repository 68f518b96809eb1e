import json
import pickle
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeldiff.errors import MaskError
from modeldiff.masks import (
    All,
    And,
    Last,
    Mask,
    New,
    Not,
    Or,
    Positions,
    Prompt,
    Regex,
    Role,
    Span,
    mask_from_json,
    parse_mask,
    selected,
)


@dataclass(frozen=True)
class Words:
    """A text whose tokens are words with the space before them."""

    ids: tuple[int, ...]
    text: str
    offsets: tuple[tuple[int, int], ...]
    roles: tuple[str, ...]
    n_prompt: int


def words(pieces, roles=None, n_prompt=None):
    text, offsets = "", []
    for piece in pieces:
        offsets.append((len(text), len(text) + len(piece)))
        text += piece
    n = len(pieces)
    return Words(
        tuple(range(n)),
        text,
        tuple(offsets),
        tuple(roles or ["text"] * n),
        n if n_prompt is None else n_prompt,
    )


CHAT = words(
    ["<s>", "be", " kind", "<u>", "hi", "<a>", "well", " hi", "<e>"],
    ["template", "system", "system", "template", "user", "template", "assistant", "assistant",
     "template"],
    n_prompt=6,
)  # fmt: skip


def chosen(mask, text=CHAT):
    return [i for i, each in enumerate(mask.select(text)) if each]


SIMPLE = st.sampled_from(
    [All(), Prompt(), New(), Last(), Role("user"), Role("assistant"), Positions((0, -1)),
     Regex("h.?"), Span("hi", 1)]
)  # fmt: skip
SEVERAL = st.lists(SIMPLE, min_size=1, max_size=3).map(tuple)
MASKS = st.one_of(SIMPLE, SIMPLE.map(Not), SEVERAL.map(And), SEVERAL.map(Or)).flatmap(
    lambda inner: st.sampled_from([inner, ~inner, inner & Role("user"), Last() | inner])
)


@pytest.mark.parametrize(
    ("mask", "tokens", "on_new"),
    [
        (All(), list(range(9)), True),
        (Prompt(), [0, 1, 2, 3, 4, 5], False),
        (New(), [6, 7, 8], True),
        (Last(), [5], False),
        (Role("system"), [1, 2], False),
        (Role("user"), [4], False),
        (Role("assistant"), [6, 7], True),
        (Role("template"), [0, 3, 5, 8], False),
        (Positions((1, -1)), [1, 8], False),
        (Regex("h[a-z]"), [4, 7], False),
        (Span("hi"), [4, 7], False),
        (Span("hi", 0), [4], False),
        (Span("hi", -1), [7], False),
        (Span("hi", 2), [], False),
        (Span("hi", -3), [], False),
        (~Role("user"), [0, 1, 2, 3, 5, 6, 7, 8], True),
        (New() & Span("hi"), [7], False),
        (Last() | Role("assistant"), [5, 6, 7], True),
    ],
)
def test_a_mask_selects_its_tokens(mask, tokens, on_new):
    assert chosen(mask) == tokens
    assert mask.on_new is on_new


def test_last_of_an_empty_prompt_is_nothing():
    assert chosen(Last(), words(["a", "b"], n_prompt=0)) == []


@given(MASKS)
def test_masks_travel(mask):
    there = json.loads(json.dumps(mask.to_json()))
    assert mask_from_json(there) == mask
    assert pickle.loads(pickle.dumps(mask)) == mask  # noqa: S301
    assert hash(mask_from_json(there)) == hash(mask)


@given(MASKS, MASKS)
def test_combinations_obey_de_morgan(a, b):
    left, right = ~(a & b), ~a | ~b
    assert left.select(CHAT) == right.select(CHAT)
    assert left.on_new == right.on_new
    assert (~~a).select(CHAT) == a.select(CHAT)


def test_repeated_sentences_are_distinct_spans_even_where_they_touch():
    text = words(["Wait", ".", "Wait", ".", " No", ".", " Wait", "."])
    assert Span("Wait.").token_spans(text) == [(0, 2), (2, 4), (6, 8)]
    assert Regex(r"Wait\.").token_spans(text) == [(0, 2), (2, 4), (6, 8)]
    assert chosen(Span("Wait.", occurrence=1), text) == [2, 3]


def test_a_match_that_ends_in_a_space_stops_before_the_next_word():
    text = words(["I", " lie", ".", " Never", "\n\n", "a"])
    assert chosen(Span("lie. "), text) == [1, 2]
    assert chosen(Regex(r"\s"), text) == [4]


def test_a_match_inside_a_token_selects_all_of_it_and_an_empty_match_nothing():
    text = words(["unkind", "ness", "<s>"])
    assert chosen(Regex("kindn"), text) == [0, 1]
    assert chosen(Regex("x*"), text) == []


def test_tokens_that_share_a_character_are_selected_together_and_empty_tokens_never():
    shared = Words((0, 1, 2, 3), "a🙂", ((0, 0), (0, 1), (1, 2), (1, 2)), ("text",) * 4, 4)
    assert chosen(Span("🙂"), shared) == [2, 3]
    assert chosen(Span("a"), shared) == [1]


def test_positions_outside_the_text_are_refused():
    with pytest.raises(MaskError, match=r"\[9\] lie outside a text of 9 tokens"):
        Positions((0, 9)).select(CHAT)


@given(SIMPLE, st.integers(0, 12))
def test_selected_leaves_out_the_first_tokens_and_no_others(mask, skip):
    kept = selected(CHAT, mask, skip_first=skip)
    assert [i for i, each in enumerate(kept) if each] == [i for i in chosen(mask) if i >= skip]


def test_names():
    assert parse_mask("all") == All()
    assert parse_mask("response") == parse_mask("new") == New()
    assert parse_mask("template") == Role("template")
    assert parse_mask(Span("x")) == Span("x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_mask("asistant"), "Did you mean 'assistant'"),
        (lambda: parse_mask("everything"), "'everything' names no tokens. Known: all"),
        (lambda: Role("usr"), "Did you mean 'user'"),
        (lambda: Positions(()), "at least one position"),
        (lambda: Positions((True,)), "integers only"),
        (lambda: Regex("("), "is not a regular expression"),
        (lambda: Span(""), "empty text"),
        (lambda: And(()), "combines nothing"),
        (lambda: Or(()), "combines nothing"),
    ],
)
def test_a_mask_that_cannot_work_is_refused_at_once(make, message):
    with pytest.raises(MaskError, match=message):
        make()


@pytest.mark.parametrize(
    "data",
    [
        None,
        "all",
        {},
        {"mask": "everything"},
        {"mask": "role"},
        {"mask": "role", "name": 3},
        {"mask": "all", "extra": 1},
        {"mask": "positions", "indices": "12"},
        {"mask": "positions", "indices": [True]},
        {"mask": "not", "part": {"mask": "role", "name": "nobody"}},
        {"mask": "and", "parts": {"mask": "all"}},
        {"mask": "span", "text": "a", "occurrence": True},
        {"mask": ["all"]},
    ],
)
def test_what_is_no_mask_is_refused(data):
    with pytest.raises(MaskError):
        mask_from_json(data)


def test_the_base_class_is_no_mask():
    with pytest.raises(TypeError):
        Mask()  # pyright: ignore[reportAbstractUsage]
