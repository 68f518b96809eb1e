"""Texts as tokens: rendered once, with the role of every token known, and padded into batches.

A text is tokenised exactly once, here. Everything later (capture, edits, display) reads the
same `Text`, and generated tokens are appended by id, never by decoding and tokenising again.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from modeldiff._files import digest
from modeldiff._shapes import Int
from modeldiff.errors import MaskError
from modeldiff.masks import ROLES, CharSpan
from modeldiff.masks import selected as selected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers takes a second to import

Messages = Sequence[Mapping[str, Any]]
_Content = tuple[int, int, int]  # message, and where its content begins and ends
_Owner = tuple[str, int, int]  # role, and the characters that have it
_REPLACEMENT = "\ufffd"
_SIZES: "WeakKeyDictionary[Any, tuple[int, int]]" = WeakKeyDictionary()
_CONTEXT = 6  # ids that are decoded along so that a decoder sees no start of text


@dataclass(frozen=True)
class Text:
    """A text and its tokens.

    Args:
        ids: Token ids, special tokens included.
        text: What was rendered: a plain text as it was given, a chat as its template wrote it.
        offsets: Characters of each token in ``text``, half-open. A space before a word belongs
            to the word's token, as do characters that the tokenizer dropped before it. Tokens
            of one character that was split share it; special tokens that the tokenizer added
            have an empty span.
        roles: Role of each token, see `modeldiff.masks.ROLES`.
        special: Whether each token is a control token (the unknown token is not one).
        n_prompt: The first ``n_prompt`` tokens are the prompt, the others the response.
        labels: What to display for tokens without characters of their own, else "".
    """

    ids: tuple[int, ...]
    text: str
    offsets: tuple[CharSpan, ...]
    roles: tuple[str, ...]
    special: tuple[bool, ...]
    n_prompt: int
    labels: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens, prompt and response."""
        return len(self.ids)

    @property
    def pieces(self) -> tuple[str, ...]:
        """What to display for each token: its characters, or a name such as ``<0xE2>``."""
        pairs = zip(self.labels, self.offsets, strict=True)
        return tuple(label or self.text[slice(*span)] for label, span in pairs)

    @property
    def key(self) -> str:
        """Hash of the ids and of where the response begins."""
        return digest(list(self.ids), self.n_prompt)


@dataclass(frozen=True)
class Chat:
    """A conversation that waits for an answer, or has one.

    Args:
        messages: Mappings with "role" and "content".
        response: The assistant's answer, if it is known.
        prefill: How the answer begins, as part of the prompt.

    Raises:
        MaskError: If the last message is the assistant's and there is a response or a prefill.
    """

    messages: Messages
    response: str | None = None
    prefill: str = ""

    def __post_init__(self) -> None:
        if _answered(self.messages) and (self.response is not None or self.prefill):
            raise MaskError(
                "Chat: the last message is already the assistant's, so there is no place for a "
                "response or a prefill. Take that message out, or give neither."
            )


@dataclass(frozen=True)
class Completion:
    """Plain text whose end is the response."""

    prompt: str
    response: str

    def __post_init__(self) -> None:
        """Refuse what is no text.

        Raises:
            MaskError: If it is a list of messages, say.
        """
        for name, value in (("prompt", self.prompt), ("response", self.response)):
            if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise MaskError(
                    f"the {name} of a Completion is a {type(value).__name__}; it must be a text. "
                    "For messages use Chat(messages, response)."
                )


Item = str | Chat | Completion | Messages | Text


def render(tokenizer: Tokenizer, item: Item, *, add_generation_prompt: bool = False) -> Text:
    """Write an item as the model will see it, tokenise it once and find every token's role.

    A token belongs to a message if it holds at least one character of its content, else to the
    template (the spaces that some control tokens swallow do not count). The response begins
    with the first token that reaches into it. What the tokenizer reads as a control token is
    one also inside a message, as far as the model can see: a user who types ``<|im_end|>`` ends
    the turn. Such tokens keep the role of the message.

    Args:
        tokenizer: A fast tokenizer, with a chat template for chats.
        item: A Text, which is returned as it is, or one of

            * a string: plain text, all of it prompt (role ``text``), and the special tokens
              that the tokenizer adds (role ``template``);
            * a `Completion`: as a string, the end of it being the response (``assistant``);
            * a list of messages: if the last one is the assistant's, its content and what the
              template writes after it are the response, else all of it is the prompt;
            * a `Chat`: with a response as a list that ends with it; without one the prompt for
              one, that is with the generation prompt and the prefill.
        add_generation_prompt: Render what to generate from, all of it prompt: end chats with
            the generation prompt, leave out the response of a `Chat` or a `Completion`.

    Raises:
        MaskError: If the tokenizer gives no offsets or lacks a chat template, a message is
            malformed, or the template refuses the chat or rewrites contents beyond stripping.
    """
    if isinstance(item, Text):
        return item
    if isinstance(item, str):
        item = Completion(item, "")
    if isinstance(item, Completion):
        cut = len(item.prompt)
        text = item.prompt if add_generation_prompt else item.prompt + item.response
        owners = [("text", 0, cut), ("assistant", cut, len(text))]
        return _tokenise(tokenizer, text, owners, cut, True)
    if not isinstance(item, Chat):
        _check_messages_given(item)
        return _chat(tokenizer, item, "", add_generation_prompt)
    if item.response is None or add_generation_prompt:
        open_ended = add_generation_prompt or not _answered(item.messages)
        return _chat(tokenizer, item.messages, item.prefill, open_ended)
    answer = {"role": "assistant", "content": item.prefill + item.response}
    return _chat(tokenizer, [*item.messages, answer], item.prefill, False)


def with_response(
    text: Text, ids: Sequence[int] | Int[Tensor, " token"], tokenizer: Tokenizer
) -> Text:
    """Append generated ids as they are, all at once; nothing is tokenised again.

    Args:
        text: The prompt, or a text whose response goes on.
        ids: What was generated. Control tokens among them get the role ``template``, as they
            have in a rendered chat; all others ``assistant``.
        tokenizer: The tokenizer of ``text``.
    """
    new, control = tuple(int(each) for each in ids), _special_ids(tokenizer)
    written, spans = _decode_each(tokenizer, text, new)
    special = tuple(each in control for each in new)
    return Text(
        ids=text.ids + new,
        text=written,
        offsets=text.offsets + tuple(spans),
        roles=text.roles + tuple("template" if each else "assistant" for each in special),
        special=text.special + special,
        n_prompt=text.n_prompt,
        labels=text.labels + _labels(tokenizer, new, spans),
    )


def _answered(messages: Messages) -> bool:
    return bool(messages) and messages[-1].get("role") == "assistant"


def _chat(tokenizer: Tokenizer, messages: Messages, prefill: str, generation: bool) -> Text:
    """Render messages; ``prefill`` follows a generation prompt, or begins the last message."""
    _check_messages(tokenizer, messages)
    text, contents = _locate(tokenizer, messages, generation)
    owners = [(str(messages[i]["role"]), start, end) for i, start, end in contents]
    if generation:
        owners.append(("assistant", len(text), len(text) + len(prefill)))
        text += prefill
    if generation or not _answered(messages):
        return _tokenise(tokenizer, text, owners, len(text), False)
    last, start, end = contents[-1] if contents else (None, 0, 0)
    if last != len(messages) - 1:
        raise MaskError(
            "the chat template leaves out the last message, the response. Use another template."
        )
    stripped = str(messages[-1]["content"]).index(text[start:end])
    cut = min(start + max(0, len(prefill) - stripped), end)
    return _tokenise(tokenizer, text, owners, cut, False)


def _check_messages_given(item: Any) -> None:
    several = isinstance(item, Sequence) and not isinstance(item, bytes)
    if not several or not all(isinstance(each, Mapping) for each in item):
        hint = " For one chat give a list that holds its list of messages: [[{...}, ...]]."
        raise MaskError(
            f"an item of type {type(item).__name__} is no text; needed are a str, a Text, a "
            "Completion, a Chat, or a list of messages (mappings with 'role' and 'content')."
            f"{hint if isinstance(item, Mapping) else ''}"
        )


def _check_messages(tokenizer: Tokenizer, messages: Messages) -> None:
    if tokenizer.chat_template is None:
        raise MaskError(
            "the tokenizer has no chat template, so a chat cannot be rendered. Set "
            "tokenizer.chat_template (a fine-tune usually carries one), or give plain text."
        )
    if not messages:
        raise MaskError("a chat needs at least one message, got none. Add the user's.")
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES[:-2] or not isinstance(content, str):
            raise MaskError(
                f"message {i} has the role {role!r} and a content of type "
                f"{type(content).__name__}; needed are one of {', '.join(ROLES[:-2])}, and str."
            )


def _locate(
    tokenizer: Tokenizer, messages: Messages, generation: bool
) -> tuple[str, list[_Content]]:
    """Render messages and find each content in the result, whatever the contents say.

    The template's own text is learned by rendering markers instead of the contents, or after
    them, for templates that look into contents.
    """
    rendered = _apply(tokenizer, messages, generation)
    contents = [str(message["content"]) for message in messages]
    taken, n = set(rendered).union(*contents), len(messages)
    markers = [c for c in map(chr, range(0xF0000, 0xF0000 + len(taken) + n)) if c not in taken][:n]
    for kept in ([""] * n, contents):
        columns = zip(messages, kept, markers, strict=True)
        probe = [{**message, "content": old + new} for message, old, new in columns]
        parts = re.split(f"([{''.join(markers)}])", _apply(tokenizer, probe, generation))
        owners = [markers.index(each) for each in parts[1::2]]
        own = [part.removesuffix(kept[i]) for i, part in zip(owners, parts[::2], strict=False)]
        found = _align(rendered, [*own, parts[-1]], owners, contents, 0)
        if found is not None:
            return rendered, found
    missing = [i for i, each in enumerate(contents) if each.strip() not in rendered]
    raise MaskError(
        f"the chat template rewrites the contents (messages {missing or 'unknown'}): what it "
        "writes is not its own text with the contents put in, so no token's role is certain. "
        "Set tokenizer.chat_template to one that inserts contents unchanged, remove what it "
        "rewrites (e.g. earlier reasoning), or give the rendered chat as a str or Completion."
    )


def _align(
    rendered: str, literals: Sequence[str], owners: Sequence[int], contents: Sequence[str], at: int
) -> list[_Content] | None:
    """Read the rendered text from ``at`` on as literal, content, literal ... to its end.

    Contents may be stripped; then more than one way can fit, and all are tried.
    """
    if not rendered.startswith(literals[0], at):
        return None
    start = at + len(literals[0])
    if not owners:
        return [] if start == len(rendered) else None
    for content in _variants(contents[owners[0]]):
        if rendered.startswith(content, start):
            end = start + len(content)
            rest = _align(rendered, literals[1:], owners[1:], contents, end)
            if rest is not None:
                return [(owners[0], start, end), *rest]
    return None


def _variants(content: str) -> list[str]:
    """A content as it is and in the ways in which templates strip it, without repeats."""
    ways = (str.strip, str.lstrip, str.rstrip)
    forms = [way(content) for way in ways] + [way(content, "\n") for way in ways]
    return list(dict.fromkeys([content, *forms]))


def _apply(tokenizer: Tokenizer, messages: Messages, generation: bool) -> str:
    from jinja2 import TemplateError

    plain = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=generation
        )
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise MaskError(
            f"the chat template refuses the conversation ({roles}): {error}. Change the order "
            "of the roles, or leave the system message out."
        ) from error
    return str(text)


def _tokenise(
    tokenizer: Tokenizer, text: str, owners: Sequence[_Owner], cut: int, add_special: bool
) -> Text:
    """Tokenise once; ``owners`` give the roles, the response begins at character ``cut``."""
    if not tokenizer.is_fast:
        raise MaskError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for; a fast "
            "tokenizer is needed (AutoTokenizer gives one if there is a tokenizer.json)."
        )
    encoded = tokenizer(
        text, add_special_tokens=add_special, return_offsets_mapping=True, verbose=False
    )
    ids = tuple(encoded["input_ids"])
    raw = [(start, end) for start, end in encoded["offset_mapping"]]
    spans, control = _without_gaps(raw), _special_ids(tokenizer)
    special = tuple(each in control for each in ids)
    own = [
        _stripped(text, *span) if is_special else given if given[0] < given[1] else span
        for given, span, is_special in zip(raw, spans, special, strict=True)
    ]
    n_prompt = next((i for i, (_, end) in enumerate(own) if end > cut), len(ids))
    roles, labels = _roles(text, own, owners), _labels(tokenizer, ids, spans)
    return Text(ids, text, spans, roles, special, n_prompt, labels)


def _without_gaps(raw: Sequence[CharSpan]) -> tuple[CharSpan, ...]:
    """Let every token begin where the last ends: some tokenizers trim spaces off the offsets."""
    cursor, spans = 0, []
    for start, end in raw:
        begin, cursor = cursor, max(cursor, end)
        spans.append((min(start, begin) if start < end else begin, cursor))
    return tuple(spans)


def _stripped(text: str, start: int, end: int) -> CharSpan:
    first = start + len(text[start:end]) - len(text[start:end].lstrip())
    return first, max(first, start + len(text[start:end].rstrip()))


def n_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id of a tokenizer, whose ids may have holes."""
    n = len(tokenizer)
    known = _SIZES.get(tokenizer)
    if known is None or known[0] != n:
        known = _SIZES[tokenizer] = n, 1 + max(tokenizer.get_vocab().values(), default=-1)
    return known[1]


def token_names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Name tokens of the vocabulary as text, one by one, with the space that they begin with.

    Tokens that are only part of a character keep the tokenizer's own name.
    """
    names = tokenizer.convert_ids_to_tokens(list(ids))
    raw = [name or f"<unused {each}>" for name, each in zip(names, ids, strict=True)]
    texts = tokenizer.batch_decode([[each] for each in ids])
    return [
        own.replace("▁", " ") if "▁" in own else own if _REPLACEMENT in text or not text else text
        for own, text in zip(raw, texts, strict=True)
    ]


def _roles(text: str, spans: Sequence[CharSpan], owners: Sequence[_Owner]) -> tuple[str, ...]:
    """Role of each token: the one that owns most of its characters, if any does."""
    by_character = [""] * len(text)
    for role, start, end in owners:
        by_character[start:end] = [role] * (end - start)
    held = [Counter(filter(None, by_character[start:end])) for start, end in spans]
    return tuple(each.most_common(1)[0][0] if each else "template" for each in held)


def _decode_each(
    tokenizer: Tokenizer, known: Text, ids: Sequence[int]
) -> tuple[str, list[CharSpan]]:
    """Decode ids one by one after a known text; give the whole text and each one's characters.

    A character that is not complete yet decodes to U+FFFD; the (at most four) tokens share it.
    """
    text, piece, spans = known.text, "", []
    context, group, done = list(known.ids[-_CONTEXT:]), [], 0
    for each in ids:
        group.append(each)
        piece = _decode(tokenizer, context + group)[len(_decode(tokenizer, context)) :]
        stable = len(piece.rstrip(_REPLACEMENT))
        waits = stable < len(piece) and len(group) < 4
        spans.append((len(text) + done, len(text) + (stable + 1 if waits else len(piece))))
        done = stable
        if not waits:
            text += piece
            context, group, done, piece = (context + group)[-_CONTEXT:], [], 0, ""
    if piece:
        text += piece
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _labels(tokenizer: Tokenizer, ids: Sequence[int], spans: Sequence[CharSpan]) -> tuple[str, ...]:
    """Names of the tokens that have no characters, or share theirs with a neighbour."""
    shared = {i for i in range(1, len(spans)) if spans[i][0] < spans[i - 1][1]}
    empty = {i for i, (start, end) in enumerate(spans) if start == end}
    wanted = shared | empty | {i - 1 for i in shared}
    return tuple(_label(tokenizer, each) if i in wanted else "" for i, each in enumerate(ids))


def _label(tokenizer: Tokenizer, token: int) -> str:
    """Name of a token; bytes are written out where the vocabulary stores them as letters."""
    name = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(name, str):
        return f"<{token}>"
    if name.startswith("<0x") or _REPLACEMENT not in _decode(tokenizer, [token]):
        return name
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    values = {letter: value for value, letter in bytes_to_unicode().items()}
    return "".join(f"<0x{values[each]:02X}>" if each in values else each for each in name)


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    added = tokenizer.added_tokens_decoder  # pyright: ignore[reportAttributeAccessIssue]
    known = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return {each for each in known if each != tokenizer.unk_token_id}
