"""A Ray cluster: connecting to one, and having its workers do jobs that survive their deaths."""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from types import TracebackType
from typing import Any

from modeldiff._progress import check
from modeldiff.errors import ModelDiffError, SetupError

ATTEMPTS = 4
"""How often a job is tried that takes its worker down with it."""
STARTS = 4
"""How often a cluster of this machine is started whose processes do not come up in time."""
_ANSWERS = 10.0  # seconds that an address has to answer
_TICK = 0.5  # seconds between two looks at the cancel event


@contextmanager
def connected(address: str = "auto") -> Iterator[Any]:
    """Connect to a Ray cluster, and leave it afterwards; yields the module ``ray``.

    A connection that is already there is used and stays.

    Args:
        address: ``"auto"`` for the cluster of this machine or of ``RAY_ADDRESS``, or one that is
            started here for the time if there is none; ``"local"`` always starts one; else
            the address of a cluster.

    Raises:
        SetupError: If Ray is not installed, or no cluster is at the address.
    """
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as stack:
        try:
            _connect(ray, address, stack)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SetupError(
                f"no Ray cluster answers at {address!r} ({error}). Start one with 'ray start "
                "--head', or give auto to have one on this machine."
            ) from error
        stack.callback(ray.shutdown)
        yield ray


def _connect(ray: Any, address: str, stack: ExitStack) -> None:
    if address == "auto" and (named := os.environ.get("RAY_ADDRESS")):
        address = named
    if address == "auto":
        try:
            ray.init(address="auto", log_to_driver=False)
            return
        except ConnectionError:
            address = "local"
    if address == "local":
        stack.enter_context(_quick_to_import())
        _start(ray)
    else:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False)


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens, for which Ray waits ten minutes and then exits.

    Raises:
        ConnectionError: If so.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=_ANSWERS).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(str(error)) from error


def _start(ray: Any) -> None:
    """Start a cluster of this machine; again, if its processes do not come up in time.

    Ray gives its helpers 15 seconds for their imports and itself 30, which no setting changes. On
    a machine that is busy that is too little; the next time the files are in memory.
    """
    late = _Late()
    for _ in range(STARTS):
        with late:
            ray.init(address="local", log_to_driver=False, include_dashboard=False)
            return
        ray.shutdown()
    raise SetupError(
        f"Ray's processes did not start in {STARTS} tries (the last time: {late.error}). Is the "
        "machine busy, or its memory full? /tmp/ray/session_latest/logs/raylet.err says more. "
        "Without --cluster the same command runs in this process."
    )


class _Late:
    """Takes the error with which Ray says that it was too slow: `Exception` itself, no kind."""

    error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error
        return kind is Exception


@contextmanager
def _quick_to_import() -> Iterator[None]:
    """Halve the start of every process of a cluster that is started meanwhile.

    Ray imports jsonschema, and that, where it is installed, a package that builds a grammar of
    addresses at import, for 1.5 seconds of CPU. Nothing here checks addresses against a schema.
    """
    before = os.environ.get("PYTHONPATH")
    with TemporaryDirectory() as folder:
        (Path(folder) / "rfc3987_syntax.py").write_text("raise ImportError('not in Ray')\n")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, before)))
        try:
            yield
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise SetupError(
            "--cluster needs Ray: pip install 'modeldiff-lab[cluster]'. Without --cluster the "
            "same command runs in this process."
        ) from error
    return ray


def n_workers(ray: Any, wanted: int | None = None, gpus: int = 1) -> int:
    """How many workers to hire: as many as wanted, else as the GPUs suffice for, else two.

    Args:
        ray: The module, connected.
        wanted: If it is said.
        gpus: What each takes.

    Raises:
        SetupError: If less than one is wanted, or one would take more than there are.
    """
    have = int(ray.cluster_resources().get("GPU", 0))
    if min(gpus, 1 if wanted is None else wanted) < 1 or 0 < have < gpus:
        raise SetupError(
            f"{wanted or 'some'} workers of {gpus} GPUs each, on a cluster that has {have}: give "
            "1 or more of both, and no more than there are."
        )
    return wanted or have // gpus or 2


def resources(ray: Any, gpus: int = 1) -> dict[str, float]:
    """What one worker reserves: GPUs where the cluster has any, else a CPU core."""
    return {"num_gpus": gpus} if ray.cluster_resources().get("GPU", 0) else {"num_cpus": 1}


@dataclass(frozen=True)
class Job:
    """Something to be done, whose doing twice changes nothing.

    Args:
        name: For messages.
        method: Of the worker.
        arguments: Made when the job is begun, so that waiting jobs take no memory.
    """

    name: str
    method: str
    arguments: Callable[[], tuple[Any, ...]]


def done_by(
    ray: Any,
    hire: Callable[[], Any],
    idle: list[Any],
    jobs: Iterator[Job],
    n: int,
    cancel: Event | None = None,
) -> Iterator[tuple[Job, Any]]:
    """Have workers do jobs, one at a time each; yield each job and its result when it is done.

    If a worker dies (killed, out of memory, its machine gone), another one is hired, and the job
    is given out again. A job that raises ends it all with its error.

    Args:
        ray: The module, connected.
        hire: Starts a worker.
        idle: Workers that wait for jobs; those that live afterwards are left in it.
        jobs: In the order in which they are begun.
        n: Workers.
        cancel: Stops the work; what runs is left.

    Raises:
        Cancelled: If the event is set.
        SetupError: If a job's workers died again and again.
    """
    busy: dict[Any, tuple[Any, Job]] = {}
    again, deaths = deque[Job](), dict[str, int]()
    try:
        while True:
            while len(busy) < n and (job := again.popleft() if again else next(jobs, None)):
                worker = idle.pop() if idle else hire()
                busy[getattr(worker, job.method).remote(*job.arguments())] = worker, job
            if not busy:
                return
            check(cancel)
            for reference in ray.wait(list(busy), timeout=_TICK)[0]:
                worker, job = busy.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise _cause(error) from error
                except ray.exceptions.RayError as error:
                    deaths[job.name] = deaths.get(job.name, 0) + 1
                    if deaths[job.name] == ATTEMPTS:
                        raise SetupError(
                            f"{ATTEMPTS} workers died over {job.name}, the last of them: {error}. "
                            "Is there memory enough? What is finished is kept."
                        ) from error
                    ray.kill(worker)
                    again.append(job)
                    time.sleep(_TICK * (deaths[job.name] - 1))
                else:
                    idle.append(worker)
                    yield job, result
    finally:
        for worker, _ in busy.values():
            ray.kill(worker)


def _cause(error: Any) -> BaseException:
    """What a worker raised, as far as it is ours; else Ray's account of it."""
    return error.cause if isinstance(error.cause, ModelDiffError | OSError) else error
