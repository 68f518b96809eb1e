"""Reading rows of activations fast: batched gather, whole blocks, and shuffling by blocks.

Single rows of a file that is not in memory cost a disk access each. Shuffled batches are therefore
drawn from a pool: whole blocks of consecutive rows in random order fill the pool, and batches are
random rows of it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeldiff._files import digest
from modeldiff._shapes import Float, Int
from modeldiff.dictionaries.sources import Rows, epoch_order
from modeldiff.errors import FileFormatError, MismatchError

BLOCK = 512
"""Rows that are read together for shuffling."""
POOL = 1 << 15
"""Rows in the pool, at least; a fill ends with a whole block."""


def shuffled(
    counts: Sequence[int] | np.ndarray,
    read: Callable[[Sequence[int]], Rows],
    batch_size: int,
    *,
    pool_rows: int,
    seed: int,
    start: int,
    first_in_turn: bool = False,
) -> Iterator[Rows]:
    """Draw batches without end from units (blocks, texts) that are read whole.

    Which rows a batch holds depends on the arguments alone, so that ``start`` can begin anywhere;
    only the fill of the pool that is needed first is read. Every epoch holds every row once, but
    for the last ones that make no full batch.

    Args:
        counts: Rows of each unit.
        read: Reads units, one after the other; may reuse the memory of what it read before.
        batch_size: Rows of a batch.
        pool_rows: Rows in the pool, at least.
        seed: Of the order.
        start: Number of the first batch.
        first_in_turn: Units of the first epoch fill the pool in their order, for units that are
            still being written.

    Raises:
        MismatchError: If there are fewer rows than one batch has.
    """
    sizes = np.asarray(counts)
    each_epoch = int(sizes.sum()) // batch_size
    if each_epoch < 1 or start < 0:
        raise MismatchError(
            f"batch {start} of {batch_size} rows from {int(sizes.sum())}: give a smaller "
            "batch_size, or more texts."
        )
    first_epoch, first = divmod(start, each_epoch)
    for epoch in count(first_epoch):
        skip = first * batch_size if epoch == first_epoch else 0
        in_turn = first_in_turn and epoch == 0
        order = np.arange(len(sizes)) if in_turn else epoch_order(len(sizes), seed, epoch).numpy()
        pools = _epoch(order, sizes, read, pool_rows, (seed, epoch), skip)
        yield from (rows for rows in rebatched(pools, batch_size) if len(rows) == batch_size)


def _epoch(
    order: np.ndarray,
    sizes: np.ndarray,
    read: Callable[[Sequence[int]], Rows],
    pool_rows: int,
    state: tuple[int, int],
    skip: int,
) -> Iterator[tuple[Rows, Int[Tensor, " chosen"]]]:
    """Fills of the pool, each with the order in which its rows are to be taken."""
    for number, units in enumerate(fills(order, sizes, pool_rows)):
        size = int(sizes[units].sum())
        if skip < size:
            inside = epoch_order(size, int(digest("pool", *state), 16), number)
            yield read(units.tolist()), inside[skip:]
        skip = max(0, skip - size)


def rebatched(
    pools: Iterable[tuple[Rows, Int[Tensor, " _chosen"]]], batch_size: int
) -> Iterator[Rows]:
    """Take rows of pool after pool, in the order given; the last batch may be short.

    Rows are copied, and a pool is done with before the next one is asked for.
    """
    parts: list[Rows] = []
    need = batch_size
    for pool, order in pools:
        done = 0
        while done < len(order):
            parts.append(_taken(pool, order[done : done + need]))
            done, need = done + len(parts[-1]), need - len(parts[-1])
            if need == 0:
                yield _joined(parts)
                parts, need = [], batch_size
    if parts:
        yield _joined(parts)


def _taken(pool: Rows, index: Int[Tensor, " chosen"]) -> Rows:
    acts = pool.acts.index_select(0, index.to(pool.acts.device))  # indexing is six times slower
    return Rows(acts, pool.token_id[index], pool.document[index], pool.position[index])


def fills(order: np.ndarray, sizes: np.ndarray, pool_rows: int) -> list[np.ndarray]:
    """Cut units into consecutive groups, each closed once it has ``pool_rows`` rows."""
    ends = np.cumsum(sizes[order])
    cuts, done = [], 0
    while done + pool_rows < ends[-1]:
        cuts.append(int(np.searchsorted(ends, done + pool_rows)) + 1)
        done = int(ends[cuts[-1] - 1])
    return [group for group in np.split(order, cuts) if len(group)]


def _joined(parts: Sequence[Rows]) -> Rows:
    """Rows of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        torch.cat([part.acts for part in parts]),
        torch.cat([part.token_id for part in parts]),
        torch.cat([part.document for part in parts]),
        torch.cat([part.position for part in parts]),
    )


@dataclass(frozen=True, eq=False)
class SiteFiles:
    """The shards of one site.

    Args:
        paths: Files.
        ends: One after the last row of each.
        shape: Of one row: models, width.
        kind: Of the stored numbers.
    """

    paths: tuple[Path, ...]
    ends: np.ndarray
    shape: tuple[int, int]
    kind: np.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[0] * self.shape[1] * self.kind.itemsize

    def mapped(self, number: int) -> np.ndarray:
        """One shard, mapped.

        Raises:
            FileFormatError: If the file is shorter than it should be, or is gone.
        """
        start = int(self.ends[number - 1]) if number else 0
        shape = (int(self.ends[number]) - start, *self.shape)
        try:
            return np.memmap(self.paths[number], self.kind, mode="r", shape=shape)
        except (OSError, ValueError) as error:
            raise _broken(self.paths[number], error) from error

    def gather(self, rows: np.ndarray, shards: "dict[int, np.ndarray]") -> np.ndarray:
        """Rows by number, in the order asked for; ``shards`` keeps what was mapped."""
        owner = np.searchsorted(self.ends, rows, side="right")
        out = np.empty((len(rows), *self.shape), self.kind)
        for number in np.unique(owner).tolist():
            if number not in shards:
                shards[number] = self.mapped(number)
            start = int(self.ends[number - 1]) if number else 0
            mine = np.flatnonzero(owner == number)
            if len(mine) == len(rows):
                return np.take(shards[number], rows - start, axis=0)
            out[mine] = np.take(shards[number], rows[mine] - start, axis=0)
        return out

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Read consecutive rows into an array, from the files, whichever shards they lie in.

        Raises:
            FileFormatError: If a file is shorter than it should be, or is gone.
        """
        done = 0
        while start + done < stop:
            row = start + done
            number = int(np.searchsorted(self.ends, row, side="right"))
            first = int(self.ends[number - 1]) if number else 0
            n = min(stop, int(self.ends[number])) - row
            self._read_file(number, row - first, out[done : done + n])
            done += n

    def _read_file(self, number: int, row: int, out: np.ndarray) -> None:
        path, left = self.paths[number], out.data.cast("B")
        offset = row * self.row_bytes
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _broken(path, error) from error
        try:
            while left:
                n = os.preadv(handle, [left], offset)
                if n == 0:
                    raise _broken(path, f"it ends after {offset} bytes")
                left, offset = left[n:], offset + n
        finally:
            os.close(handle)


def as_tensor(stored: np.ndarray) -> Float[Tensor, "row model d_model"]:
    """Stored numbers as float32, or as bfloat16 if they are its bytes; not copied."""
    found = torch.from_numpy(stored)
    return found.view(torch.bfloat16) if stored.dtype.itemsize == 2 else found


def _broken(path: Path, why: object) -> FileFormatError:
    return FileFormatError(
        f"{str(path)!r} cannot be read ({why}). Harvest again with the same arguments: what is "
        "missing is made; verify() finds what else was changed."
    )
