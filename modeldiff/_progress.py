"""Progress and cancelling of long work: one small protocol, tqdm only on request."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

from modeldiff.errors import Cancelled

Report = Callable[[int, int, str], None]
"""Called with (done, total, message); `total` may grow while the work goes on."""
Progress = bool | Report
"""True shows a tqdm bar, a callable is called, False is silent."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Watcher:
    """Who wants to know of jobs on servers, whatever call they belong to.

    Args:
        tell: Called with where a job stands: "sending" or "kept" when it begins, then the server's
            status in small letters, "left" if nobody waits for it any more.
        cancel: Event that ends every wait, beside the ``cancel=`` of the call itself.
    """

    tell: Callable[[str], None]
    cancel: Event | None = None


_WATCHER: ContextVar[Watcher | None] = ContextVar("modeldiff-watcher", default=None)


@contextmanager
def watched(tell: Callable[[str], None], cancel: Event | None = None) -> Iterator[None]:
    """Have jobs on servers told of, and their waits ended, for the calls inside the block.

    Args:
        tell: See `Watcher`.
        cancel: See `Watcher`.
    """
    token = _WATCHER.set(Watcher(tell, cancel))
    try:
        yield
    finally:
        _WATCHER.reset(token)


def watcher() -> Watcher | None:
    """Who watches, if anybody does."""
    return _WATCHER.get()


def check(cancel: Event | None, partial: Any = None) -> None:
    """Raise `Cancelled` if the event is set.

    Raises:
        Cancelled: With ``partial`` as its attribute: what is finished.
    """
    if cancel is not None and cancel.is_set():
        raise Cancelled("cancelled; what is finished is in the attribute `partial`.", partial)


def reporter(progress: Progress, name: str) -> Report:
    """Turn a ``progress=`` argument into a function to report to."""
    if callable(progress):
        return progress
    if not progress:
        return lambda done, total, message: None
    from tqdm.auto import tqdm

    bar = tqdm(desc=name, leave=False)

    def report(done: int, total: int, message: str) -> None:
        bar.total = total
        bar.n = done
        bar.set_postfix_str(message, refresh=False)
        bar.refresh()
        if done >= total:
            bar.close()

    return report


def tracked(items: Sequence[T], progress: Progress, cancel: Event | None, name: str) -> Iterator[T]:
    """Iterate, reporting after each item and stopping between items when cancelled.

    Raises:
        Cancelled: If the event is set before an item.
    """
    report = reporter(progress, name)
    for index, item in enumerate(items):
        check(cancel)
        yield item
        report(index + 1, len(items), name)
