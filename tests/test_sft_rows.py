"""Which tokens count in a loss, told from the characters of the rendered chat."""

import json
from typing import Any

import pytest

from modeldiff.errors import FileFormatError, MaskError
from modeldiff.sft_rows import (
    IGNORED,
    Row,
    batch_of,
    read_conversations,
    response_rows,
    split_rows,
    summary,
)
from modeldiff.tokens import Chat, Completion
from tests.families import tokenizer

TURNS = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": "the dog ran"},
    {"role": "assistant", "content": "to the river"},
    {"role": "user", "content": "to the river"},
    {"role": "assistant", "content": "to the sea"},
]


def learned(row):
    """What a row's labels say, as text."""
    return tokenizer().decode([label for label in row.labels if label != IGNORED])


def test_only_the_last_answer_and_its_end_count():
    (row,) = response_rows(tokenizer(), [TURNS])
    assert learned(row) == "to the sea<eos>"
    assert tokenizer().decode(list(row.ids)) == tokenizer().apply_chat_template(
        TURNS, tokenize=False
    )
    assert all(label in (IGNORED, each) for each, label in zip(row.ids, row.labels, strict=True))


def test_all_answers_count_and_the_same_words_of_the_user_do_not():
    (row,) = response_rows(tokenizer(), [TURNS], answers="all")
    assert learned(row) == "to the river<eos>to the sea<eos>"


def test_a_merge_across_the_border_is_found_by_characters():
    """Tokenised apart, question and answer have other tokens than the text has."""
    t = tokenizer()
    whole = t("the mat", add_special_tokens=False).input_ids
    apart = t("the m", add_special_tokens=False).input_ids + t("at").input_ids
    assert whole != apart
    (row,) = response_rows(t, [Completion("the m", "at")])
    assert row.ids == tuple(whole)
    assert learned(row) == " mat"  # the token that reaches into the answer


def test_a_template_that_writes_more_after_the_end():
    t: Any = tokenizer()
    t.chat_template = t.chat_template.replace("{{ eos_token }}", "{{ eos_token }}\n")
    (row,) = response_rows(t, [TURNS[1:3]])
    assert learned(row) == "to the river<eos>"


def test_a_template_without_an_end_teaches_the_answer_alone():
    t: Any = tokenizer()
    t.chat_template = t.chat_template.replace("{{ eos_token }}", " over")
    (row,) = response_rows(t, [TURNS[1:3]])
    assert learned(row) == "to the river"


@pytest.mark.parametrize(
    "conversation",
    [TURNS[:2], [*TURNS[:2], {"role": "assistant", "content": ""}], "the cat sat", Chat(TURNS[:2])],
)
def test_a_conversation_without_an_answer_is_refused(conversation):
    with pytest.raises(MaskError, match="no answer"):
        response_rows(tokenizer(), [conversation])


def test_long_rows_are_refused_or_cut_and_counted():
    t = tokenizer()
    (whole,) = response_rows(t, [TURNS])
    n = len(whole.ids)
    with pytest.raises(MaskError, match=f"{n} tokens, 2 more"):
        response_rows(t, [TURNS], n - 2)
    (cut,) = response_rows(t, [TURNS], n - 2, too_long="cut")
    assert cut == Row(whole.ids[:-2], whole.labels[:-2], 2)
    assert summary([whole, cut]) == {
        "rows": 2, "tokens": 2 * n - 2, "targets": whole.n_targets + cut.n_targets,
        "longest": n, "cut_rows": 1, "cut_tokens": 2, "repeated": 0,
    }  # fmt: skip
    with pytest.raises(MaskError, match="nothing of the answer"):
        response_rows(t, [TURNS], n - whole.n_targets, too_long="cut")


def test_a_split_keeps_repeated_texts_on_one_side():
    rows = [Row((1, i % 20), (IGNORED, i % 20)) for i in range(60)]
    train, held = split_rows(rows, 0.2, seed=3)
    assert len(train) + len(held) == 60
    assert {row.ids for row in train}.isdisjoint(row.ids for row in held)
    assert len(held) == 12
    assert split_rows(rows, 0.2, seed=3) == (train, held)
    assert split_rows(rows, 0.2, seed=4)[1] != held
    with pytest.raises(MaskError, match="both need one"):
        split_rows(rows[:1], 1)


def test_a_batch_is_padded_on_the_right_and_padding_does_not_count():
    ids, mask, labels = batch_of([Row((5, 6), (IGNORED, 6)), Row((7,), (IGNORED,))], 0)
    assert ids.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert labels.tolist() == [[IGNORED, 6], [IGNORED, IGNORED]]


def test_conversations_are_read_from_lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    assert read_conversations(path) == [TURNS]
    path.write_text(json.dumps({"messages": TURNS}) + '\n{"text": "no"}\n')
    with pytest.raises(FileFormatError, match="line 2"):
        read_conversations(path)
