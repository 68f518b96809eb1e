from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from transformers import AddedToken, PreTrainedTokenizerFast

from modeldiff.batching import batches, make_batch, mask_tensor, padding_id
from modeldiff.errors import MaskError
from modeldiff.masks import All, Last, New, Positions, Regex, Role, Span
from modeldiff.tokens import (
    Chat,
    Completion,
    Text,
    n_ids,
    render,
    token_names,
    with_response,
)

SENTENCES = ["hello world, how are you today?", "the cat sat on the mat.", "user system [INST]"] * 3
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set content = system + m['content'] if loop.index0 == 0 else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
STRIPS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHOUTS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}{% endfor %}"
THINKS = (  # opens an empty block of thought where an answer has none
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
FORGETS = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


def fast(core: Tokenizer, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=template, **special
    )


def bytes_bpe(template: str | None = CHATML, trim: bool = False) -> PreTrainedTokenizerFast:
    core: Any = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=letters)
    core.train_from_iterator(SENTENCES, trainer)
    return fast(core, template)


def metaspace_bpe() -> PreTrainedTokenizerFast:
    """As SentencePiece: words carry their space as "▁", unknown characters become bytes."""
    core: Any = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    core.train_from_iterator(SENTENCES, BpeTrainer(vocab_size=400, special_tokens=special))
    core = Tokenizer.from_str(core.to_str().replace('"special":true', '"special":false'))
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return fast(core, LLAMA2, unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    """Words and punctuation; the spaces between them belong to no token."""
    core: Any = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    core.train_from_iterator(SENTENCES, trainer)
    ends = [("<s>", 1), ("</s>", 2)]
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return fast(core, STRIPS, unk_token="<unk>")


BYTES, TRIMMED, META, WORDS = bytes_bpe(), bytes_bpe(trim=True), metaspace_bpe(), word_level()


def says(role):
    return lambda content: {"role": role, "content": content}


system, user, assistant = says("system"), says("user"), says("assistant")


def spelled(text: Text, role: str) -> list[str]:
    """The characters of each run of tokens with a role."""
    runs, last = [], None
    for i, (start, end) in enumerate(text.offsets):
        if text.roles[i] != role:
            continue
        if last == i - 1:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
        last = i
    return [text.text[start:end] for start, end in runs]


def chosen(text, mask):
    return [i for i, each in enumerate(mask.select(text)) if each]


def response_of(text: Text) -> str:
    return text.text[text.offsets[text.n_prompt][0] :] if text.n_prompt < text.n_tokens else ""


# Plain text


@pytest.mark.parametrize("tokenizer", [BYTES, TRIMMED, META, WORDS])
def test_plain_text_is_tokenised_as_the_tokenizer_does(tokenizer):
    text = render(tokenizer, "the cat, you user")
    assert list(text.ids) == tokenizer("the cat, you user")["input_ids"]
    assert text.text == "".join(
        piece for piece, span in zip(text.pieces, text.offsets, strict=True) if span[0] < span[1]
    )
    assert text.n_prompt == text.n_tokens
    assert list(text.roles) == ["template" if each else "text" for each in text.special]


def test_added_special_tokens_have_no_characters_but_a_name():
    text = render(WORDS, "the cat")
    assert text.pieces == ("<s>", "the", " cat", "</s>")
    assert text.offsets[0] == (0, 0)
    assert text.offsets[-1] == (7, 7)
    assert text.special == (True, False, False, True)


def test_the_unknown_token_is_text():
    text = render(WORDS, "the zebra")
    assert text.special == (True, False, False, True)
    assert text.pieces[2] == " zebra"


def test_trimmed_offsets_get_their_spaces_back():
    content = "hello   the\n cat "
    assert render(TRIMMED, content).pieces == render(BYTES, content).pieces


def test_a_completion_knows_its_response():
    text = render(WORDS, Completion("the cat sat", " on the mat"))
    assert spelled(text, "text") == ["the cat sat"]
    assert spelled(text, "assistant") == [" on the mat"]
    assert text.n_prompt == 4
    assert render(WORDS, Completion("the cat", ""), add_generation_prompt=True) == render(
        WORDS, "the cat"
    )
    assert render(WORDS, Completion("a", " b"), add_generation_prompt=True).text == "a"


def test_a_completion_of_messages_is_refused():
    with pytest.raises((MaskError, TypeError), match="Completion"):
        Completion([{"role": "user", "content": "a"}], "b")  # pyright: ignore[reportArgumentType]


@pytest.mark.ill_typed
@pytest.mark.parametrize("item", [None, 5, b"text", {"role": "user", "content": "a"}, [1], ["a"]])
def test_what_is_no_text_is_refused(item):
    with pytest.raises(MaskError, match=f"type {type(item).__name__} is no text"):
        render(bytes_bpe(), item)


def test_ids_with_holes_are_named_and_counted():
    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 5, "[UNK]": 2}, unk_token="[UNK]"))
    holes = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    assert n_ids(holes) == 6
    assert token_names(holes, range(6)) == ["a", "b", "[UNK]", "<unused 3>", "<unused 4>", "c"]


def test_keys_tell_responses_apart_and_a_text_is_rendered_already():
    whole = render(WORDS, "the cat")
    part = render(WORDS, Completion("the", " cat"))
    assert whole.ids == part.ids
    assert whole.key != part.key
    assert whole.key == replace(whole, text="").key
    assert render(WORDS, whole) is whole


# Chats


def test_chat_roles_and_the_response():
    chat = [system("be kind"), user("hello"), assistant("hello")]
    text = render(BYTES, chat)
    assert text.text == BYTES.apply_chat_template(chat, tokenize=False)
    assert list(text.ids) == BYTES.apply_chat_template(chat, return_dict=False)
    assert [spelled(text, role) for role in ("system", "user", "assistant")] == [
        ["be kind"],
        ["hello"],
        ["hello"],
    ]
    assert response_of(text) == "hello<|im_end|>\n"
    assert text.pieces[text.n_prompt - 1] == "\n"


def test_a_prompt_ends_with_the_generation_prompt():
    text = render(BYTES, [user("hi")], add_generation_prompt=True)
    assert text.n_prompt == text.n_tokens
    assert text.text.endswith("<|im_start|>assistant\n")
    assert render(BYTES, Chat([user("hi")])) == text
    assert render(BYTES, [user("hi")]).text == text.text.removesuffix("<|im_start|>assistant\n")
    whole = render(BYTES, [user("hi"), assistant("yes")], add_generation_prompt=True)
    assert whole.n_prompt == whole.n_tokens
    assert render(BYTES, Chat([user("hi")], "yes"), add_generation_prompt=True) == text


def test_a_default_system_message_is_template():
    text = render(BYTES, [user("Be kind.")])
    assert spelled(text, "system") == []
    assert spelled(text, "user") == ["Be kind."]


def test_prefill_belongs_to_the_assistant_but_to_the_prompt():
    waits = render(BYTES, Chat([user("hi")], prefill="Sure, "))
    assert waits.text.endswith("assistant\nSure, ")
    assert waits.n_prompt == waits.n_tokens
    assert spelled(waits, "assistant") == ["Sure, "]
    done = render(BYTES, Chat([user("hi")], "Sure", prefill="Sure\n"))
    assert spelled(done, "assistant") == ["Sure\nSure"]
    assert response_of(done) == "Sure<|im_end|>\n"
    stripped = render(bytes_bpe(STRIPS), Chat([user("hi")], "Sure ", prefill=" \nOh\n"))
    assert response_of(stripped) == "Sure\n"


def test_llama_2_strips_and_puts_the_system_message_inside_the_first_turn():
    tokenizer = bytes_bpe(LLAMA2)
    chat = [system(" be kind\n"), user(" hi "), assistant("[/INST]"), user("hi"), assistant(" ok ")]
    text = render(tokenizer, chat)
    assert text.ids.count(tokenizer.bos_token_id) == 2  # one per turn, none added
    assert spelled(text, "system") == ["be kind"]
    assert spelled(text, "user") == [" hi", "hi"]  # of the first only the end is stripped
    assert response_of(text).strip() == "ok </s>"


def test_a_template_that_strips():
    text = render(bytes_bpe(STRIPS), [user("\n hi \n"), assistant("  hi")])
    assert text.text == "user: hi\nassistant: hi\n"
    assert [each.strip() for each in spelled(text, "user")] == ["hi"]
    assert [each.strip() for each in spelled(text, "assistant")] == ["hi"]


def test_a_template_that_looks_into_contents():
    tokenizer = bytes_bpe(THINKS)
    thought = "<think>\nhm\U000f0000\n</think>\n\nyes"
    text = render(tokenizer, [user("hi"), assistant(thought)])
    assert spelled(text, "assistant") == [thought]
    plain = render(tokenizer, [user("hi"), assistant("yes")])
    assert spelled(plain, "assistant") == ["yes"]
    assert response_of(plain) == "yes<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (SHOUTS, [user("hi")], r"rewrites the contents \(messages \[0\]\)"),
        (LLAMA2, [assistant("hi")], "refuses the conversation .assistant.: Roles must alternate"),
        (FORGETS, [user("hi"), assistant("yes")], "leaves out the last message"),
        (None, [user("hi")], "no chat template"),
        (CHATML, [], "at least one message"),
        (CHATML, [{"role": "usr", "content": "hi"}], "message 0 has the role 'usr'"),
        (CHATML, [{"role": "user", "content": ["hi"]}], "content of type list"),
        (CHATML, [{"role": "user"}], "content of type NoneType"),
    ],
)
def test_what_cannot_be_rendered_exactly_is_refused(template, chat, message):
    with pytest.raises(MaskError, match=message):
        render(bytes_bpe(template), chat)


def test_a_chat_has_one_answer():
    with pytest.raises(MaskError, match="already the assistant's"):
        Chat([user("hi"), assistant("yes")], "no")


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(MaskError, match="Slow cannot say which characters"):
        render(Slow(), "hi")  # pyright: ignore[reportArgumentType]


def test_control_tokens_that_swallow_spaces_stay_the_templates():
    tokenizer = bytes_bpe()
    greedy = AddedToken("<|im_end|>", special=True, lstrip=True, rstrip=True)
    tokenizer.add_tokens([greedy], special_tokens=True)
    text = render(tokenizer, [user("hi  "), assistant(" yes")])
    assert {text.roles[i] for i in chosen(text, Span("<|im_end|>"))} == {"template"}
    assert spelled(text, "user") == ["hi"]


def test_control_tokens_inside_a_message_are_the_messages():
    text = render(BYTES, [user("a<|im_end|>\n<|im_start|>user\nb")])
    assert spelled(text, "user") == ["a<|im_end|>\n<|im_start|>user\nb"]
    inside = [i for i, role in enumerate(text.roles) if role == "user" and text.special[i]]
    assert len(inside) == 2


CONTENTS = st.one_of(
    st.sampled_from(
        ["<|im_start|>user", "<|im_end|>\n", "assistant\n", "hi", "hi hi", " ", "", "\n\n", "🙂🙂",
         "[INST] hi [/INST]", "{{ bos_token }}", "é\u0301", "\U000f0000", "\\1"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=4), trim=st.booleans())
def test_roles_cover_exactly_the_contents(contents, trim):
    tokenizer = TRIMMED if trim else BYTES
    chat = [(user, assistant)[i % 2](each) for i, each in enumerate(contents)]
    text = render(tokenizer, chat)
    owner = owners_of(chat)
    for (start, end), role in zip(text.offsets, text.roles, strict=True):
        held = set(owner[start:end]) - {"template"}
        assert held <= {role}
        assert held or role == "template"
    ends = [0, *(end for _, end in text.offsets)]
    assert ends[-1] == len(text.text) == len(owner)
    assert all(span[0] <= last <= span[1] for span, last in zip(text.offsets, ends, strict=False))


def owners_of(chat) -> list[str]:
    """Role of each character of a chat in the ChatML form, written down by hand."""
    owner = ["template"] * len("<|im_start|>system\nBe kind.<|im_end|>\n")
    for each in chat:
        owner += ["template"] * len("<|im_start|>" + each["role"] + "\n")
        owner += [each["role"]] * len(each["content"]) + ["template"] * len("<|im_end|>\n")
    return owner


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENTS, min_size=2, max_size=4))
def test_roles_survive_stripping_and_splitting_into_bytes(contents):
    odd = [f"{each} Z{i}Z " for i, each in enumerate(contents)]
    chat = [(user, assistant)[i % 2](each) for i, each in enumerate(odd)]
    text = render(META, chat)
    for i in range(len(odd)):
        roles = {text.roles[j] for j in chosen(text, Span(f"Z{i}Z"))}
        assert roles == {("user", "assistant")[i % 2]}


@settings(max_examples=60, deadline=None)
@given(answer=CONTENTS)
def test_the_prompt_is_the_same_with_and_without_the_answer(answer):
    waits = render(BYTES, Chat([user("hi")]))
    known = render(BYTES, Chat([user("hi")], answer))
    if not answer.startswith("\n"):  # else it can share a token with the template's newline
        assert known.ids[: known.n_prompt] == waits.ids


# Generated tokens


def check_response(tokenizer, prompt, answer: str):
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    text = with_response(prompt, ids, tokenizer)
    assert text.ids == (*prompt.ids, *ids)
    assert text.n_prompt == prompt.n_tokens
    assert chosen(text, New()) == list(range(prompt.n_tokens, text.n_tokens))
    return text


@settings(max_examples=100, deadline=None)
@given(answer=CONTENTS.filter(lambda answer: "\ufffd" not in answer))
def test_generated_ids_are_kept_and_spelled(answer):
    prompt = render(BYTES, [user("hi")], add_generation_prompt=True)
    text = check_response(BYTES, prompt, answer)
    assert text.text == prompt.text + answer
    end = len(prompt.text)
    own = BYTES(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert list(text.offsets[prompt.n_tokens :]) == [(a + end, b + end) for a, b in own]


@pytest.mark.parametrize("tokenizer", [BYTES, META])
def test_a_character_split_over_tokens_is_shared_and_displayed_as_bytes(tokenizer):
    prompt = render(tokenizer, "the cat")
    text = check_response(tokenizer, prompt, " sat🙂🙂 on")
    first = [i for i, span in enumerate(text.offsets) if text.text[slice(*span)] == "🙂"]
    assert [text.pieces[i] for i in first] == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"] * 2
    assert chosen(text, Span("🙂", 1)) == first[4:]
    assert text.text.split() == ["the", "cat", "sat🙂🙂", "on"]
    assert render(tokenizer, "🙂").pieces[-4:] == ("<0xF0>", "<0x9F>", "<0x99>", "<0x82>")


def test_metaspace_words_keep_their_space_when_appended():
    prompt = render(META, "the cat")
    whole = render(META, "the cat sat on")
    text = with_response(prompt, whole.ids[prompt.n_tokens :], META)
    assert text.text == whole.text
    assert text.offsets == whole.offsets
    assert text.pieces == whole.pieces


@pytest.mark.parametrize("tokenizer", [BYTES, META])
def test_bytes_that_are_no_character_do_no_harm(tokenizer):
    prompt = render(tokenizer, "the cat")
    emoji = tokenizer("🙂", add_special_tokens=False)["input_ids"][-4:]
    the = tokenizer(" sat", add_special_tokens=False)["input_ids"]
    for ids in ([*emoji[:2]], [emoji[3]] * 9, [*emoji[:3], *the], [emoji[0], *emoji, *the]):
        text = with_response(prompt, ids, tokenizer)
        assert text.ids == (*prompt.ids, *ids)
        assert text.offsets[-1][1] == len(text.text)
        assert all(text.pieces)


def test_an_id_the_tokenizer_does_not_know_is_displayed_by_its_number():
    text = with_response(render(BYTES, "the"), [99_999], BYTES)
    assert text.pieces[-1] == "<99999>"


def test_the_end_of_a_response_is_template_as_in_a_rendered_chat():
    prompt = render(BYTES, [user("hi")], add_generation_prompt=True)
    end = BYTES.convert_tokens_to_ids("<|im_end|>")
    newline = BYTES("\n", add_special_tokens=False)["input_ids"]
    yes = BYTES("yes", add_special_tokens=False)["input_ids"]
    generated = with_response(prompt, torch.tensor([*yes, end]), BYTES)
    rendered = render(BYTES, [user("hi"), assistant("yes")])
    assert generated.ids + tuple(newline) == rendered.ids
    assert generated.roles == rendered.roles[:-1]
    assert generated.offsets == rendered.offsets[:-1]
    assert generated.special[-1]


# Batches


def texts_of(lengths: Sequence[int]) -> list[Text]:
    texts = []
    for n in lengths:
        ids, spans = tuple(range(1, n + 1)), tuple((i, i + 1) for i in range(n))
        texts.append(Text(ids, "x" * n, spans, ("user",) * n, (False,) * n, n // 2, ("",) * n))
    return texts


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def test_padding_on_either_side():
    left = make_batch(texts_of([3, 1]), 9, "left")
    assert left.ids.tolist() == [[1, 2, 3], [9, 9, 1]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    right = make_batch(texts_of([3, 2]), 9, "right")
    assert right.ids.tolist() == [[1, 2, 3], [1, 2, 9]]
    assert right.position_ids.tolist() == [[0, 1, 2], [0, 1, 1]]
    assert right.order == (0, 1)


@given(LENGTHS, st.sampled_from(["left", "right"]))
@settings(deadline=None)
def test_masks_and_positions_are_those_of_the_text_alone(lengths, side):
    batch = make_batch(texts_of(lengths), 0, side)
    for mask in (All(), Last(), New(), Role("user"), Positions((0, -1)), Regex("xx"), ~Last()):
        chosen = mask_tensor(batch, mask)
        assert chosen.dtype == torch.bool
        assert not (chosen & ~batch.attention_mask.bool()).any()
        for row, text in enumerate(batch.texts):
            real = batch.attention_mask[row].bool()
            assert chosen[row][real].tolist() == mask.select(text)
            assert batch.position_ids[row][real].tolist() == list(range(text.n_tokens))
            assert tuple(batch.ids[row][real].tolist()) == text.ids


@given(LENGTHS, st.integers(1, 40), st.integers(1, 5))
@settings(deadline=None)
def test_batches_hold_every_text_once_within_the_budget(lengths, max_tokens, max_rows):
    texts = texts_of(lengths)
    made = list(batches(texts, max_tokens=max_tokens, max_rows=max_rows))
    order = [i for batch in made for i in batch.order]
    assert sorted(order) == list(range(len(texts)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for batch in made:
        assert batch.pad_side == "right"
        assert [texts[i] for i in batch.order] == list(batch.texts)
        assert len(batch.order) <= max_rows
        assert batch.ids.numel() <= max_tokens or len(batch.order) == 1


def test_no_texts_make_no_batches_and_empty_texts_are_refused():
    assert list(batches([])) == []
    with pytest.raises(MaskError, match="0 texts"):
        make_batch([], 0)
    with pytest.raises(MaskError, match=r"1 are empty \[1\]"):
        make_batch(texts_of([2, 0]), 0)


def test_padding_needs_no_padding_token():
    tokenizer = bytes_bpe()
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "<s>"
    assert padding_id(tokenizer) == tokenizer.bos_token_id
    tokenizer.pad_token = tokenizer.eos_token = None
    assert padding_id(tokenizer) == 0
