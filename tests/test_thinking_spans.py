"""Annotations and cues: every labelled sentence is found where it stands, or counted as lost."""

import random
from typing import Any

import pytest

from modeldiff.agreement import agreement
from modeldiff.errors import MaskError
from modeldiff.organisms.planted import tiny_llama
from modeldiff.thinking_spans import (
    Section,
    Sentence,
    cue_sentences,
    label_by_token,
    label_fractions,
    place,
    read_annotation,
    sentences_after,
    token_sentences,
)
from modeldiff.tokens import Chat, Completion, render

WORDS = ("so", "we", "try", "wait", "that", "x", "gives", "two", "hmm", "then")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_llama(0, n_layers=1)[1]


def marked(label, text):
    return f'["{label}"] {text} ["end-section"]'


def test_brackets_inside_a_section_are_text():
    text = 'so d["key"] = [x[0], ["deduction_"], [1]] and it holds.'
    found = read_annotation("Sure!\n" + marked("deduction", text))
    assert found.sections == (Section("deduction", text),)
    assert (found.n_unclosed, found.n_stray, found.n_empty) == (0, 0, 0)
    assert set(found.unknown) == {"key", "deduction_"}


def test_missing_ends_strays_and_empty_sections_are_counted():
    written = (
        '["deduction"] One. ["backtracking"] Wait. ["end-section"] ["end-section"] '
        '["deduction"] ["end-section"] ["backtracking"] Hmm.'
    )
    found = read_annotation(written)
    assert [each.text for each in found.sections] == ["One.", "Wait.", "Hmm."]
    assert (found.n_unclosed, found.n_stray, found.n_empty) == (2, 1, 1)


def test_what_has_no_marks_is_no_annotation():
    for wrong in ("Wait, no.", '["end-section"]', '["daydreaming"] La. ["end-section"]'):
        with pytest.raises(MaskError, match="no mark"):
            read_annotation(wrong)
    assert read_annotation(marked("daydreaming", "La."), labels=None).sections[0].text == "La."


def test_a_sentence_that_stands_there_twice_gives_two_spans():
    chain = "Wait, no. It is two. Wait, no. It is three."
    said = ["Wait, no.", "It is two.", "Wait, no.", "It is three."]
    found = place(chain, [Section("a", each) for each in said])
    assert [chain[slice(*span)] for _, span in found.spans] == said
    starts = [span[0] for _, span in found.spans]
    assert starts == sorted(set(starts))
    thrice = place(chain, [Section("a", "Wait, no.")] * 3)
    assert len(thrice.spans) == 2
    assert len(thrice.missing) == 1


def test_a_changed_sentence_is_lost_alone():
    chain = "So. One is odd. So. Two is even. So."
    sections = [Section("a", t) for t in ("So.", "One is very odd.", "Two  is\neven.", "So.")]
    found = place(chain, sections)
    assert [chain[slice(*span)] for _, span in found.spans] == ["So.", "Two is even.", "So."]
    assert found.missing == (sections[1],)
    assert found.spans[-1][1] == (33, 36)


def test_sections_are_not_found_inside_words_or_in_another_text():
    assert place("The waiter: wait.", [Section("a", "wait")]).spans == (("a", (12, 16)),)
    with pytest.raises(MaskError, match="of another text"):
        place("The waiter came.", [Section("a", "wait")])
    with pytest.raises(MaskError, match="1 of 3"):
        place("One. Two.", [Section("a", t) for t in ("One.", "Three.", "Four.")])


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_annotated_is_found_where_it_was(seed):
    """Against the truth: annotations of chains full of repeats, with white space changed."""
    rng = random.Random(seed)
    said = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) + "." for _ in range(30)]
    chain, truth = "", []
    for each in said:
        chain += rng.choice([" ", "\n", "\n\n", "  "])
        truth.append((len(chain), len(chain) + len(each)))
        chain += each
    loose = [rng.choice(["\n", "  ", " "]).join(each.split()) for each in said]
    annotated = "\n".join(marked("deduction", each) for each in loose)
    found = place(chain, read_annotation(annotated).sections)
    assert [span for _, span in found.spans] == truth
    dropped = [each for each in loose if rng.random() < 0.7]
    part = place(chain, [Section("a", each) for each in dropped])
    assert part.missing == ()
    assert [chain[slice(*s)].split() for _, s in part.spans] == [each.split() for each in dropped]


def test_characters_become_tokens(tokenizer):
    chain = "  It is two. Wait, no."
    asked = [{"role": "user", "content": "Wait, no. What is it?"}]
    for item in (Completion("Wait, no. ", chain), Chat(asked, chain)):
        text = render(tokenizer, item)
        spans = place(chain, [Section("b", "Wait, no.")]).spans
        (found,) = token_sentences(text, 3, spans, original=chain)
        assert (found.text, found.label) == (3, "b")
        assert "".join(text.pieces[found.first : found.stop]) == "Wait, no."
        assert found.first > text.n_prompt
    with pytest.raises(MaskError, match="does not contain"):
        token_sentences(text, 0, spans, original="It is five. Wait, no.")


def test_sentences_that_open_with_a_cue_are_labelled(tokenizer):
    item = Completion(
        "Wait. Go on.", " It is 2.5. The waiter waits.\nWAIT, no! Hmm... so. Waiting."
    )
    text = render(tokenizer, item)
    found = cue_sentences([text])
    said = ["".join(text.pieces[s.first : s.stop]).strip() for s in found]
    assert said == ["It is 2.5.", "The waiter waits.", "WAIT, no!", "Hmm...", "so.", "Waiting."]
    assert [s.label for s in found] == ["other"] * 2 + ["backtracking"] * 2 + ["other"] * 2
    after = sentences_after([text], found, r"waits\.|Hmm\.+")
    assert [said[found.index(s)] for s in after] == ["WAIT, no!", "so."]


def test_shares_are_of_tokens_and_intervals_over_texts(tokenizer):
    sentences = [
        Sentence(0, 2, 4, "a"), Sentence(0, 4, 12, "b"), Sentence(1, 1, 11, "a"),
    ]  # fmt: skip
    table: Any = label_fractions(sentences).set_index("label")
    assert table.loc["a", ["n_sentences", "n_tokens", "fraction"]].tolist() == [2, 12, 0.6]
    assert table.loc["a", "mean"] == pytest.approx((0.2 + 1.0) / 2)
    assert table.loc["b", "low"] == 0.0
    assert label_fractions(sentences, ["c"])["fraction"].tolist() == [0.0]
    with pytest.raises(MaskError):
        label_fractions([])


def test_two_annotators_are_compared_token_by_token(tokenizer):
    texts = [render(tokenizer, Completion("ab", f"cdefg{i}")) for i in range(3)]
    start, sentences = texts[0].n_prompt, [Sentence(i, 4, 6, "x") for i in range(3)]
    first = label_by_token(sentences, texts)
    assert first["sample"].tolist() == [*range(start, start + 6)] * 3
    assert first["label"].tolist() == ["x" if 4 <= i < 6 else "none" for i in first["sample"]]
    assert agreement(first, first, on="label").kappa.estimate == 1.0
    found = agreement(first, label_by_token([*sentences[:2], Sentence(2, 4, 5, "x")], texts),
                      on="label")  # fmt: skip
    assert found.observed == pytest.approx(17 / 18)
    assert found.confusion.loc["x", "none"] == 1
