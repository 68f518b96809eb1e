"""Where a dictionary's rows come from: the protocol, and rows that are in memory."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from modeldiff._shapes import Float, Int
from modeldiff.errors import MismatchError

_HASHED_AT_ONCE = 1 << 14  # rows


@dataclass(frozen=True, eq=False)
class Rows:
    """Activations of all models at some tokens, raw, and where each token is from.

    Args:
        acts: One row a token; base first, then fine-tuned.
        token_id: Id of the token; 0 where it is not known.
        document: Number of its text; 0 where it is not known.
        position: Its place in the text; 0 where it is not known.
    """

    acts: Float[Tensor, "row model d_model"]
    token_id: Int[Tensor, " row"]
    document: Int[Tensor, " row"]
    position: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.acts)


@runtime_checkable
class Source(Protocol):
    """Rows that can be read in order, or shuffled without end."""

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        ...

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        ...

    @property
    def key(self) -> str:
        """Hash of the content."""
        ...

    def shuffled(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """Batches without end, every epoch in a new order, full ones only.

        The same seed gives the same batches. With ``start`` they begin at that batch, exactly
        as if the earlier ones had been drawn.
        """
        ...

    def in_order(self, batch_size: int) -> Iterator[Rows]:
        """Every row once; the last batch may be short."""
        ...


@dataclass(frozen=True, eq=False)
class TensorRows:
    """A source of rows that are in memory; they are not copied.

    Args:
        acts: Activations, raw.
        token_id: Ids of the tokens, if known.
        document: Numbers of their texts, if known.
        position: Places in the texts, if known.

    Raises:
        MismatchError: If the activations have no axis of models, or the lists another length.

    Example:
        >>> source = TensorRows(torch.randn(10, 2, 3))
        >>> [len(rows) for rows in source.in_order(4)], source.n_rows
        ([4, 4, 2], 10)
    """

    acts: Float[Tensor, "row model d_model"]
    token_id: Int[Tensor, " row"] | None = None
    document: Int[Tensor, " row"] | None = None
    position: Int[Tensor, " row"] | None = None

    def __post_init__(self) -> None:
        if self.acts.dim() != 3:
            raise MismatchError(
                f"rows of shape {tuple(self.acts.shape)}; they must be (row, model, d_model). "
                "rows_source(base, finetuned) puts two matrices together."
            )
        for name in ("token_id", "document", "position"):
            given = getattr(self, name)
            if given is not None and given.shape != self.acts.shape[:1]:
                raise MismatchError(
                    f"{name} has shape {tuple(given.shape)} for {len(self.acts)} rows."
                )

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.acts.shape[2]

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return len(self.acts)

    @property
    def key(self) -> str:
        """Hash of the content: activations and where they are from; taken once."""
        return self._key

    @cached_property
    def _key(self) -> str:
        sha = hashlib.sha256(repr((tuple(self.acts.shape), str(self.acts.dtype))).encode())
        for each in (self.acts, self.token_id, self.document, self.position):
            sha.update(b"none" if each is None else b"some")
            for block in () if each is None else each.split(_HASHED_AT_ONCE):
                raw = block.detach().cpu().contiguous().flatten().view(torch.uint8)
                sha.update(raw.numpy().tobytes())
        return sha.hexdigest()[:16]

    def shuffled(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Rows]:
        """Batches without end, every epoch in a new order; see `Source.shuffled`.

        Raises:
            MismatchError: If there are fewer rows than one batch has.
        """
        each_epoch = self.n_rows // batch_size
        if not each_epoch:
            raise MismatchError(
                f"batches of {batch_size} rows from {self.n_rows}: give a smaller batch_size, or "
                "more rows."
            )
        epoch, first = divmod(start, each_epoch)
        while True:
            order = epoch_order(self.n_rows, seed, epoch)
            for batch in range(first, each_epoch):
                yield self._rows(order[batch * batch_size : (batch + 1) * batch_size])
            epoch, first = epoch + 1, 0

    def in_order(self, batch_size: int) -> Iterator[Rows]:
        """Every row once; the last batch may be short."""
        for start in range(0, self.n_rows, batch_size):
            yield self._rows(slice(start, start + batch_size))

    def _rows(self, which: Int[Tensor, " chosen"] | slice) -> Rows:
        acts = self.acts[which]
        none = torch.zeros(len(acts), dtype=torch.long)
        ids = (
            none if each is None else each[which]
            for each in (self.token_id, self.document, self.position)
        )
        return Rows(acts, *ids)


def checked(source: Source) -> Source:
    """The same source, if it is one.

    Raises:
        MismatchError: If it is not: a store, say, or a tensor.
    """
    if not hasattr(source, "in_order"):
        raise MismatchError(
            f"{type(source).__name__} is no source of rows: take store.source(site), or "
            "rows_source(base, finetuned) of tensors."
        )
    return source


def rows_source(*sides: Float[Tensor, "row *model d_model"]) -> TensorRows:
    """Make a source of one tensor of paired rows, or of one matrix for each model.

    Raises:
        MismatchError: If the matrices have different shapes.

    Example:
        >>> rows_source(torch.zeros(5, 3), torch.ones(5, 3)).acts.shape
        torch.Size([5, 2, 3])
    """
    if len(sides) == 1:
        return TensorRows(sides[0])
    if len({side.shape for side in sides}) != 1:
        shapes = ", ".join(str(tuple(side.shape)) for side in sides)
        raise MismatchError(f"matrices of {shapes or 'no model'}; all must have one shape.")
    return TensorRows(torch.stack(sides, 1))


def epoch_order(n: int, seed: int, epoch: int) -> Int[Tensor, " n"]:
    """The order of n things in one epoch: a function of its arguments alone."""
    state = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7], "little")
    return torch.randperm(n, generator=torch.Generator().manual_seed(state))
