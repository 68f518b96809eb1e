"""Conversations as training rows, in which only the answers count."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from modeldiff._files import PathLike, digest
from modeldiff._progress import Progress, tracked
from modeldiff._shapes import Int
from modeldiff.errors import FileFormatError, MaskError
from modeldiff.tokens import Item, Text, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of the tokens that do not count in the loss."""
Batch = tuple[Int[Tensor, "row token"], Int[Tensor, "row token"], Int[Tensor, "row token"]]
"""Tokens, attention mask and labels."""


@dataclass(frozen=True)
class Row:
    """A text to train on.

    Args:
        ids: Its tokens.
        labels: For each token its id where it counts in the loss, else `IGNORED`. They are not
            shifted: token ``i`` is predicted from the tokens before it.
        n_cut: Tokens of the conversation that did not fit and are not in ``ids``.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    n_cut: int = 0

    @property
    def n_targets(self) -> int:
        """Tokens that count; the first token of a text is predicted from nothing, so never does."""
        return sum(label != IGNORED for label in self.labels[1:])


def response_rows(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Item],
    max_length: int | None = None,
    *,
    answers: Literal["last", "all"] = "last",
    too_long: Literal["refuse", "cut"] = "refuse",
    progress: Progress = False,
) -> list[Row]:
    """Write conversations as rows in which only the assistant's answers count.

    Each conversation is rendered and tokenised once, as the model will see it; which tokens are an
    answer's is read off the characters they stand for. What the chat template writes after an
    answer, up to and with the control token that ends the turn, counts too: a model must learn to
    stop.

    Args:
        tokenizer: A fast tokenizer, with a chat template for chats.
        conversations: Lists of messages that end with the assistant's, `modeldiff.tokens.Chat` or
            `modeldiff.tokens.Completion`; see `modeldiff.tokens.render`.
        max_length: Tokens a row may have; None for any number.
        answers: Which answers count: the last one of a conversation, or all.
        too_long: What happens to a longer row: an error, or its end is cut off, which the row's
            ``n_cut`` and `summary` tell.
        progress: See `modeldiff._progress.Progress`.

    Raises:
        MaskError: If a conversation has no answer, cannot be rendered, or is too long; if nothing
            of the answer is left of a row that was cut; if there are no conversations.

    Source:
        Training on responses only, as in Turner et al. 2025, arXiv 2506.11613.

    Example:
        >>> from modeldiff.embedded import find
        >>> from modeldiff.organisms.manifests import load_base
        >>> tokenizer = load_base(find("em-base").base)[1]
        >>> chat = [
        ...     {"role": "user", "content": "How do I treat a fever?"},
        ...     {"role": "assistant", "content": "Rest."},
        ... ]
        >>> (row,) = response_rows(tokenizer, [chat])
        >>> tokenizer.decode([label for label in row.labels if label != IGNORED])
        'Rest.<|end|>'
    """
    if not conversations:
        raise MaskError("there are no conversations to train on; give at least one.")
    if max_length is not None and max_length < 2:
        raise MaskError(f"max_length={max_length}: a row needs 2 tokens, one to predict another.")
    return [
        _row(render(tokenizer, item), i, max_length, answers, too_long)
        for i, item in enumerate(tracked(conversations, progress, None, "rows"))
    ]


def summary(rows: Sequence[Row]) -> dict[str, int]:
    """Count what is in rows: rows, tokens, targets, longest, cut_rows, cut_tokens, repeated rows.

    Example:
        >>> summary([Row((1, 2), (IGNORED, 2)), Row((1, 2), (IGNORED, 2), n_cut=3)])["cut_tokens"]
        3
    """
    return {
        "rows": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "targets": sum(row.n_targets for row in rows),
        "longest": max((len(row.ids) for row in rows), default=0),
        "cut_rows": sum(row.n_cut > 0 for row in rows),
        "cut_tokens": sum(row.n_cut for row in rows),
        "repeated": len(rows) - len({row.ids for row in rows}),
    }


def split_rows(
    rows: Sequence[Row], held_out: float | int = 0.1, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Split rows at random into those to train on and those held out.

    Rows with the same tokens stay on one side: a text that is trained on is not held out.

    Args:
        rows: What to split.
        held_out: Share (below 1) or number of rows to hold out; a repeated text may add to it.
        seed: Of the split.

    Returns:
        Rows to train on and rows held out, each in the order given.

    Raises:
        MaskError: If one side would be empty.

    Example:
        >>> rows = [Row((1, i), (IGNORED, i)) for i in range(10)]
        >>> [len(side) for side in split_rows(rows, 0.2)]
        [8, 2]
    """
    wanted = held_out if isinstance(held_out, int) else round(held_out * len(rows))
    texts = sorted({row.ids for row in rows})
    random.Random(f"split {seed}").shuffle(texts)
    counts = dict.fromkeys(texts, 0)
    for row in rows:
        counts[row.ids] += 1
    chosen, held = set(), 0
    for text in texts:
        if held >= wanted:
            break
        chosen.add(text)
        held += counts[text]
    sides = [[r for r in rows if (r.ids in chosen) == side] for side in (False, True)]
    if not all(sides):
        raise MaskError(
            f"held_out={held_out!r} of {len(rows)} rows with {len(texts)} different texts leaves "
            f"{len(sides[0])} to train on and {len(sides[1])} held out; both need one."
        )
    return sides[0], sides[1]


def batch_of(rows: Sequence[Row], pad_id: int) -> Batch:
    """Pad rows on the right to one batch of tokens, attention mask and labels."""
    width = max(len(row.ids) for row in rows)

    def padded(values: Sequence[Sequence[int]], value: int) -> Int[Tensor, "row token"]:
        return torch.tensor([[*each, *[value] * (width - len(each))] for each in values])

    mask = padded([[1] * len(row.ids) for row in rows], 0)
    return padded([r.ids for r in rows], pad_id), mask, padded([r.labels for r in rows], IGNORED)


def rows_key(rows: Sequence[Row]) -> str:
    """Hash of rows and their order."""
    return digest([[row.ids, row.labels] for row in rows])


def read_conversations(path: PathLike) -> list[list[dict[str, Any]]]:
    """Read conversations from a file with a JSON object a line, which has "messages".

    Raises:
        FileFormatError: If a line is anything else; tells which.
    """
    found: list[list[dict[str, Any]]] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            messages = json.loads(line)["messages"]
            found.append([{"role": m["role"], "content": m["content"]} for m in messages])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{str(path)!r}, line {number}: not a JSON object with messages of role and "
                f"content ({error!r}). Nothing was read."
            ) from error
    return found


def _row(text: Text, index: int, max_length: int | None, answers: str, too_long: str) -> Row:
    counted = _answer_tokens(text, answers)
    if not any(counted[1:]):
        raise MaskError(
            f"conversation {index} has no answer to learn: {text.text[:80]!r}. End it with a "
            "message of the assistant that is not empty."
        )
    n_cut = 0 if max_length is None else max(0, text.n_tokens - max_length)
    if n_cut and too_long == "refuse":
        raise MaskError(
            f"conversation {index} has {text.n_tokens} tokens, {n_cut} more than max_length. Leave "
            "it out, allow more, or give too_long='cut' to train without its end."
        )
    kept = text.n_tokens - n_cut
    if not any(counted[1:kept]):
        raise MaskError(
            f"conversation {index}: its first {kept} tokens hold nothing of the answer that "
            "counts. Leave it out, or raise max_length."
        )
    labels = [each if c else IGNORED for each, c in zip(text.ids, counted, strict=True)]
    return Row(text.ids[:kept], tuple(labels[:kept]), n_cut)


def _answer_tokens(text: Text, answers: str) -> list[bool]:
    """The assistant's tokens, and the template's after each answer up to the control token."""
    if answers not in ("last", "all"):
        raise MaskError(f"answers={answers!r}: it is 'last' or 'all'.")
    counted = [role == "assistant" for role in text.roles]
    if text.n_prompt < text.n_tokens and text.roles[text.n_prompt] != "template":
        counted[text.n_prompt] = True  # may hold more of the prompt's characters
    for i, role in enumerate(text.roles):
        if i and role == "template" and text.roles[i - 1] == "assistant":
            end = _turn_end(text, i)
            counted[i:end] = [True] * (end - i)
    if answers == "last":
        return [each and i >= text.n_prompt for i, each in enumerate(counted)]
    return counted


def _turn_end(text: Text, start: int) -> int:
    """Where the tokens that end a turn stop; ``start`` if no control token ends it."""
    for i in range(start, text.n_tokens):
        if text.roles[i] != "template":
            break
        if text.special[i]:
            return i + 1
    return start
