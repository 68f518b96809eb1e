"""The texts behind stored activations, as flat arrays: what each row's token, text and place are.

The arrays lie in four files and can be mapped instead of read, so that neither writing nor reading
them takes memory that grows with the corpus.
"""

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from modeldiff._shapes import Int
from modeldiff.errors import FileFormatError, MaskError
from modeldiff.loading import Sides
from modeldiff.masks import ROLES, Mask
from modeldiff.tokens import Text, render, selected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILES: dict[str, str] = {
    "token_ids.bin": "<i4",
    "roles.bin": "|u1",
    "rows.bin": "<i8",
    "documents.bin": "<i8",
}
"""File of each array, and its type."""
_COLUMNS = 5  # of documents.bin: first token, tokens, tokens of the prompt, first row, rows


@dataclass(frozen=True)
class StoredText:
    """One text of a corpus, with what was kept of it.

    Args:
        ids: All its tokens, also those that were not kept.
        roles: Role of each token.
        n_prompt: How many of them are the prompt.
        kept: Positions of the tokens that have a row.
        first_row: The row of the first of them.
    """

    ids: tuple[int, ...]
    roles: tuple[str, ...]
    n_prompt: int
    kept: tuple[int, ...]
    first_row: int

    @property
    def text(self) -> Text:
        """A text for running models: ids alone, without characters."""
        n = len(self.ids)
        return Text(
            ids=self.ids, text="", offsets=((0, 0),) * n, roles=self.roles, special=(False,) * n,
            n_prompt=self.n_prompt, labels=("",) * n,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised texts and the tokens that are kept of them, one row each, in reading order.

    Args:
        token_ids: Tokens of all texts one after the other, ``[token]``.
        roles: Role of each, an index into `modeldiff.masks.ROLES`.
        rows: Which of these tokens each row is, rising.
        documents: For each text its first token, its tokens, those of its prompt, its first row
            and its rows, ``[document, 5]``.
        key: Hash of all this.
    """

    token_ids: np.ndarray
    roles: np.ndarray
    rows: np.ndarray
    documents: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def n_rows(self) -> int:
        """Kept tokens."""
        return len(self.rows)

    @cached_property
    def counts(self) -> np.ndarray:
        """Rows of each text."""
        return np.ascontiguousarray(self.documents[:, 4])

    @cached_property
    def _first_tokens(self) -> np.ndarray:
        return np.ascontiguousarray(self.documents[:, 0])

    def document(self, number: int) -> StoredText:
        """One text."""
        start, n, n_prompt, first_row, n_rows = map(int, self.documents[number])
        kept = self.rows[first_row : first_row + n_rows] - start
        return StoredText(
            ids=tuple(self.token_ids[start : start + n].tolist()),
            roles=tuple(ROLES[each] for each in self.roles[start : start + n].tolist()),
            n_prompt=n_prompt,
            kept=tuple(kept.tolist()),
            first_row=first_row,
        )

    def origins(
        self, rows: "np.ndarray | slice"
    ) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Token id, document and position of some rows."""
        places = np.asarray(self.rows[rows])
        document = np.searchsorted(self._first_tokens, places, side="right") - 1
        position = places - self._first_tokens[document]
        ids = np.asarray(self.token_ids[places], dtype=np.int64)
        return torch.from_numpy(ids), torch.from_numpy(document), torch.from_numpy(position)


def write_texts(
    tokenizer: "PreTrainedTokenizerFast",
    items: Iterable[Any],
    mask: Mask,
    skip_first: int,
    streams: Sequence[io.BufferedIOBase],
) -> str:
    """Render items one by one into the four files; return the hash of what was written.

    Texts of which nothing is kept are written too, so that documents count as the items do.
    An empty text is a document without tokens.

    Args:
        tokenizer: Renders.
        items: Texts, chats, completions; read once.
        mask: Tokens to keep.
        skip_first: Positions dropped at the start of each text.
        streams: Open for writing, in the order of `FILES`.

    Raises:
        MaskError: If no token of any text is kept.
    """
    sha, n_tokens, n_rows, n_texts = hashlib.sha256(), 0, 0, 0
    for item in items:
        text = render(tokenizer, item)
        kept = [i for i, each in enumerate(selected(text, mask, skip_first)) if each]
        parts = (
            list(text.ids),
            [ROLES.index(role) for role in text.roles],
            [n_tokens + i for i in kept],
            [n_tokens, text.n_tokens, text.n_prompt, n_rows, len(kept)],
        )
        for stream, values, kind in zip(streams, parts, FILES.values(), strict=True):
            raw = np.asarray(values, dtype=kind).tobytes()
            sha.update(raw)
            stream.write(raw)
        n_tokens, n_rows, n_texts = n_tokens + text.n_tokens, n_rows + len(kept), n_texts + 1
    if not n_rows:
        raise MaskError(
            f"the mask {mask!r} with skip_first={skip_first} keeps no token of {n_texts} texts. "
            "Roles exist in chats only, 'new' only where there is a response."
        )
    return sha.hexdigest()[:16]


def corpus_in_memory(sides: Sides, items: Iterable[Any], mask: Mask, skip_first: int) -> Corpus:
    """Render items into arrays.

    Raises:
        MaskError: If no token is kept.
    """
    streams = [io.BytesIO() for _ in FILES]
    key = write_texts(sides.tokenizer, items, mask, skip_first, streams)
    arrays = [
        np.frombuffer(stream.getvalue(), kind)
        for stream, kind in zip(streams, FILES.values(), strict=True)
    ]
    return _corpus(arrays, key)


def corpus_in_files(folder: Path, key: str, sizes: dict[str, int]) -> Corpus:
    """Map the files of a corpus.

    Raises:
        FileFormatError: If a file is missing, or is not as long as it should be.
    """
    arrays = []
    for name, kind in FILES.items():
        path = folder / name
        n_bytes = path.stat().st_size if path.is_file() else -1
        if n_bytes != sizes.get(name):
            raise FileFormatError(
                f"{str(path)!r} is {'missing' if n_bytes < 0 else f'{n_bytes} bytes long'}; "
                f"{sizes.get(name)} bytes are needed. Harvest again with the same arguments: what "
                "is missing is made."
            )
        empty = np.empty(0, kind)
        arrays.append(np.memmap(path, kind, mode="r") if n_bytes else empty)
    return _corpus(arrays, key)


def _corpus(arrays: list[np.ndarray], key: str) -> Corpus:
    token_ids, roles, rows, documents = arrays
    return Corpus(token_ids, roles, rows, documents.reshape(-1, _COLUMNS), key)
