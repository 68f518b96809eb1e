"""`JobRunner`: one worker thread; the latest job of a key wins; cancelling between two tokens.

Callbacks of widgets return at once: they submit a job. A job runs in the worker thread, tells of
its progress with `Job.report`, and hands `Job.cancel` on to modeldiff's ``cancel=``.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from modeldiff._progress import watched
from modeldiff.errors import Cancelled

Status = Literal["queued", "running", "done", "cancelled", "failed"]
Work = Callable[["Job"], Any]
_STATES = {"left": "no longer waited for; the server goes on with it, and asking again finds it"}
_EVERY = 0.05  # seconds between two reports that are shown
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One piece of work.

    Args:
        key: What it is about; a newer job of the same key takes its place.
        label: What it is called in the job bar.
        cancel: Set to stop it; pass it on as ``cancel=``.
        status: Where it stands.
        fraction: How far it is, 0 to 1.
        message: What it is doing.
        result: What its function returned.
        error: One line, and the traceback; None unless it failed.
        seconds: How long it ran.
        remote: Where its job on a server stands, of a remote pair; empty without one.
    """

    key: str
    label: str
    cancel: threading.Event = field(default_factory=threading.Event)
    status: Status = "queued"
    fraction: float = 0.0
    message: str = ""
    result: Any = None
    error: tuple[str, str] | None = None
    seconds: float = 0.0
    remote: str = ""
    _steps: tuple[int, int] = field(default=(0, 0), repr=False)
    _asked: int = field(default=0, repr=False)
    _tell: Callable[["Job"], None] = field(default=lambda job: None, repr=False)
    _told: float = field(default=0.0, repr=False)

    def report(self, fraction: float, message: str = "") -> None:
        """Say how far it is; shown at most 20 times a second.

        Raises:
            Cancelled: If the job was cancelled.
        """
        if self.cancel.is_set():
            raise Cancelled(f"{self.label} was cancelled.")
        self.fraction, self.message = min(max(float(fraction), 0.0), 1.0), message
        now = time.monotonic()
        if now - self._told >= _EVERY:
            self._told = now
            self._tell(self)

    def progress(self, done: int, total: int, message: str) -> None:
        """The same as modeldiff's ``progress=`` wants it: hand on ``progress=job.progress``."""
        self._steps = done, total
        self.report(done / max(total, 1), message)

    def tell(self, state: str) -> None:
        """Say where a job on a server stands, see `modeldiff._progress.Watcher`; shown at once."""
        self._asked += state in ("sending", "kept")
        if state == "kept":
            return
        done, total = self._steps
        number = f"job {self._asked}"
        if self._asked <= total and self._asked == done + 1:
            number += f" of {total}"
        elif done < total:
            number = f"step {done + 1} of {total}, {number}"
        self.remote = f"{number}: {_STATES.get(state, state)}"
        self._tell(self)

    @property
    def finished(self) -> bool:
        """Whether it will not run any more."""
        return self.status in ("done", "cancelled", "failed")


@dataclass(frozen=True, eq=False)
class _Task:
    job: Job
    work: Work
    on_done: Callable[[Job], None] | None


class JobRunner:
    """One worker thread and its queue.

    Example:
        >>> runner = JobRunner()
        >>> job = runner.submit(lambda job: 1 + 1, key="sum")
        >>> runner.wait(10), job.result
        (True, 2)
        >>> runner.close()
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[_Task] = deque()
        self._running: Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._observers: list[Callable[[Job], None]] = []

    def submit(
        self,
        work: Work,
        *,
        key: str,
        on_done: Callable[[Job], None] | None = None,
        preempt: bool = True,
        label: str = "",
    ) -> Job:
        """Queue work; an older job of the same key that waits is dropped.

        Args:
            work: Called in the worker thread with its `Job`.
            key: What it is about.
            on_done: Called in the worker thread with the job once it is done, unless a newer job
                of the same key waits by then. Not called if it failed or was cancelled.
            preempt: Also cancel a job of the same key that runs.
            label: Shown in the job bar; default the key.

        Raises:
            RuntimeError: If the runner is closed.
        """
        job = Job(key, label or key, _tell=self._notify)
        with self._changed:
            if self._closed:
                raise RuntimeError("this workbench is closed; open a new one.")
            dropped = [task.job for task in self._queue if task.job.key == key]
            self._queue = deque(task for task in self._queue if task.job.key != key)
            if preempt and self._running is not None and self._running.key == key:
                self._running.cancel.set()
            self._queue.append(_Task(job, work, on_done))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="modeldiff-jobs", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        for old in dropped:
            self._end(old, "cancelled")
        self._notify(job)
        return job

    def on_change(self, callback: Callable[[Job], None]) -> Callable[[], None]:
        """Call back with a job whenever it changes, in whatever thread changed it.

        Returns:
            A function that ends it.
        """
        self._observers.append(callback)
        return lambda: self._observers.remove(callback) if callback in self._observers else None

    def fail(self, label: str, error: BaseException) -> None:
        """Show an error that happened outside a job, such as in a button's callback."""
        job = Job(label, label)
        job.error = _error_text(error)
        self._end(job, "failed")

    @property
    def current(self) -> Job | None:
        """The job that runs."""
        return self._running

    @property
    def n_waiting(self) -> int:
        """How many jobs wait."""
        return len(self._queue)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs or waits; False if that took longer than ``timeout`` seconds.

        Raises:
            RuntimeError: If a job waits for itself.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a job cannot wait for the queue that it is part of.")
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._running, timeout)

    def cancel(self, key: str | None = None) -> None:
        """Stop what runs and drop what waits; of one key, or all."""
        with self._changed:
            dropped = [task.job for task in self._queue if key in (None, task.job.key)]
            self._queue = deque(t for t in self._queue if t.job not in dropped)
            if self._running is not None and key in (None, self._running.key):
                self._running.cancel.set()
            self._changed.notify_all()
        for job in dropped:
            self._end(job, "cancelled")

    def close(self, timeout: float = 10.0) -> None:
        """Cancel everything and end the thread; a second call does nothing."""
        with self._changed:
            self._closed = True
        self.cancel()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        self._observers.clear()

    def _serve(self) -> None:
        while (task := self._next()) is not None:
            self._run(task)
            with self._changed:
                self._running = None
                self._changed.notify_all()
            del task  # what a job holds is free as soon as it is done

    def _next(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return None
            task = self._queue.popleft()
            self._running = task.job
            task.job.status = "running"
            return task

    def _run(self, task: _Task) -> None:
        job, start = task.job, time.monotonic()
        self._notify(job)
        status: Status = "done"
        try:
            with watched(job.tell, job.cancel):
                job.result = task.work(job)
            job.seconds = time.monotonic() - start
            if task.on_done is not None and not self._superseded(job):
                task.on_done(job)
        except Cancelled:
            status = "cancelled"
        except BaseException as error:  # noqa: BLE001 - any error of a job is shown, and the
            status = "failed"  # thread lives on, also after KeyboardInterrupt and SystemExit
            job.error = _error_text(error)
        job.seconds = time.monotonic() - start
        self._end(job, status)

    def _superseded(self, job: Job) -> bool:
        with self._changed:
            return any(task.job.key == job.key for task in self._queue)

    def _end(self, job: Job, status: Status) -> None:
        job.status = status
        if status == "done":
            job.fraction = 1.0
        if status != "cancelled":
            job.remote = ""
        self._notify(job)

    def _notify(self, job: Job) -> None:
        for callback in tuple(self._observers):
            try:
                callback(job)
            except Exception:  # noqa: BLE001 - a broken view must not end the worker
                _log.exception("a view of the jobs failed")


def _error_text(error: BaseException) -> tuple[str, str]:
    line = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {line}", "".join(traceback.format_exception(error))
