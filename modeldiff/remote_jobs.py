"""Sending one job to a server and waiting for it: retries, progress, cancelling, a store.

Jobs are submitted over HTTP and asked after, not streamed over a websocket: a broken connection
then costs a question and not the job. Results of finished jobs are kept by the content of what was
asked, so a call that failed half-way goes on where it stopped when it is repeated; a job that was
sent and not waited for is asked after again, not sent again.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import httpx

from modeldiff import remote_errors
from modeldiff._files import PathLike, digest
from modeldiff._progress import check, watcher
from modeldiff._version import __version__
from modeldiff.errors import Cancelled, RemoteError
from modeldiff.remote_http import Line, check_address, is_this_machine
from modeldiff.remote_kept import content_key, forget_job, keep, kept, note_job, noted_job

Pack = Callable[[], Any]
"""Makes a `modeldiff.tracing.Packed`; not called if the result is kept already."""
Status = Callable[[str], None]
"""Called with the job's status whenever it changes: RECEIVED, QUEUED, RUNNING, COMPLETED ..."""
Log = Callable[[str], None]
"""Called with what a job printed last; lines in between may be missing."""

_OFTEN, _SELDOM = 0.25, 2.0
"""Seconds between two questions after a job, once it takes its time; often where logs are read."""


@dataclass(frozen=True)
class Server:
    """Where jobs go, and with how much patience. It holds no key.

    Args:
        host: Its address; None is the one that nnsight is configured for (NDIF).
        job_seconds: How long a job may take, waiting in line included.
        request_seconds: How long one answer may take.
        tries: How often a request is sent before it counts as failed.
        pause: Seconds before the second try; doubled each time, 30 at most.
        keep: Folder for results of finished jobs; default ``MODELDIFF_CACHE``, or a temporary one
            that goes with this process. Jobs under way are noted there too.
        status: Called with each new status of a job.
    """

    host: str | None = None
    job_seconds: float = 3600.0
    request_seconds: float = 60.0
    tries: int = 5
    pause: float = 0.5
    keep: PathLike | None = None
    status: Status | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, remote: "bool | str | Server") -> "Server":
        """Read ``remote=``: True for NDIF, an address, or a Server.

        Raises:
            RemoteError: If it is no address of a server.
        """
        if isinstance(remote, Server):
            server = remote
        else:
            server = cls(None if remote is True else str(remote))
        if server.host is not None:
            check_address(server.host)
        return server

    @property
    def address(self) -> str:
        """Its address, also where nnsight's configuration names it."""
        from modeldiff import tracing

        return tracing.host_of(self.host or True)

    @property
    def folder(self) -> Path:
        """Where results of finished jobs lie."""
        where = self.keep or os.environ.get("MODELDIFF_CACHE")
        return Path(where) / "jobs" if where else _own_folder()


@functools.cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="modeldiff-jobs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def run_job(
    server: Server, asked: Any, pack: Pack, cancel: Event | None = None, log: Log | None = None
) -> dict[str, Any]:
    """Run a job, or read its result if it was finished before.

    A job of the same content that is under way since an earlier call is waited for.

    Args:
        server: Where.
        asked: Everything that the result depends on: tensors and builtins, nested.
        pack: Makes the job.
        cancel: Event that ends the wait at once; the server goes on with the job.
        log: Told what the job printed last, if the server passes it on; see `Log`.

    Returns:
        Tensors and builtins by name.

    Raises:
        RemoteError: If the server refused or failed, or could not be reached.
        Cancelled: If the event, or that of `modeldiff._progress.watched`, is set.
    """
    watching = watcher()
    tell = watching.tell if watching is not None else lambda said: None
    check(cancel)
    path = server.folder / f"{digest(__version__, server.address, content_key(asked))}.safetensors"
    found = kept(path)
    if found is not None:
        tell("kept")
        return found
    tell("sending")
    cancels = (cancel, watching.cancel) if watching is not None else (cancel,)
    unique = {id(each): each for each in cancels if each is not None}
    job = _Job(server, tuple(unique.values()), path.with_suffix(".job"), tell, log)
    try:
        found = job.run(pack)
    except Cancelled:
        tell("left")
        raise
    keep(path, found)
    forget_job(job.note)
    return found


class _Gone(Exception):
    """A job that was sent by an earlier call cannot be waited for any more."""


class _Job:
    """One job on its way."""

    def __init__(
        self,
        server: Server,
        cancels: tuple[Event, ...],
        note: Path,
        tell: Callable[[str], None],
        log: Log | None,
    ) -> None:
        self.server, self.note, self.tell, self.log = server, note, tell, log
        self.host = server.address
        self.line = Line(
            self.host, server.tries, server.pause, server.request_seconds, cancels,
            longest=min(600.0, server.job_seconds),
        )  # fmt: skip
        self.ends = time.monotonic() + server.job_seconds
        self.status = ""

    def run(self, pack: Pack) -> dict[str, Any]:
        """Wait for the job, sending it first unless that was done before."""
        headers = _headers(self.host)
        _check_version(self.host, self.server.request_seconds)
        before = noted_job(self.note)
        if before is not None:
            try:
                return self._unpacked(self._awaited(before, "", headers, again=True))
            except _Gone:
                forget_job(self.note)
                self.status = ""
        packed = pack()
        job = self._sent(packed, headers)
        return self._unpacked(self._awaited(job, packed.model_key, headers))

    def _unpacked(self, content: bytes) -> dict[str, Any]:
        from modeldiff import tracing

        try:
            return tracing.unpacked(content)
        except RemoteError:
            forget_job(self.note)  # the same bytes would come again
            raise

    def _sent(self, packed: Any, headers: dict[str, str]) -> str:
        """Send a job; its name at the server."""
        answer = self._asked("POST", "/request", packed.model_key, headers=headers,
                             data={"data": packed.metadata},
                             files={"blob": ("request", packed.blob)})  # fmt: skip
        if answer.status_code == 404:
            raise self._refusal(packed.model_key)(404, answer.content)
        found = _parsed(self.host, answer.content)
        note_job(self.note, str(found["id"]))
        self._told(str(found["status"]), None)
        return str(found["id"])

    def _awaited(
        self, job: str, model_key: str, headers: dict[str, str], *, again: bool = False
    ) -> bytes:
        """Ask after a job until it is done; return its result's bytes.

        Raises:
            _Gone: If the job is of an earlier call and is unknown, failed, or has lost its result.
        """
        pause = 0.02
        while True:
            answer = self._asked("GET", f"/response/{job}", model_key, headers=headers)
            unknown = answer.status_code == 404
            if unknown and again:
                raise _Gone
            found = {"status": "RECEIVED"} if unknown else _parsed(self.host, answer.content)
            self._told(str(found["status"]), found.get("description"))
            if self.status == "ERROR":
                if again:
                    raise _Gone
                forget_job(self.note)
                raise remote_errors.failed(self.host, str(found.get("description", "")))
            if self.status == "COMPLETED":
                return self._fetched(found.get("data"), again)
            if time.monotonic() > self.ends:
                if again:
                    forget_job(self.note)  # it had its time twice: the next call sends it anew
                raise remote_errors.too_slow(self.host, self.server.job_seconds, self.status)
            self.line.wait(pause)
            pause = min(_SELDOM if self.log is None else _OFTEN, pause * 1.5)

    def _fetched(self, where: Any, again: bool) -> bytes:
        """Download what a finished job left; some servers name its size beside the address."""
        url = str(where[0] if isinstance(where, list) and where else where)
        try:
            return self.line.fetched(self.host + url if url.startswith("/") else url)
        except remote_errors.ResultGone:
            if again:
                raise _Gone from None
            raise

    def _told(self, status: str, description: Any) -> None:
        """Take note of a status; a log is none, but of a job that runs."""
        if status == "LOG":
            if self.log is not None:
                self.log(str(description))
            status = "RUNNING"
        if status != self.status:
            self.status = status
            self.tell(status.lower())
            if self.server.status is not None:
                self.server.status(status)

    def _asked(self, method: str, where: str, model_key: str, **options: Any) -> httpx.Response:
        return self.line.asked(method, where, self._refusal(model_key), **options)

    def _refusal(self, model_key: str) -> Callable[[int, bytes], RemoteError]:
        def refusal(status: int, body: bytes) -> RemoteError:
            running = _running(self.host, self.server.request_seconds) if status == 404 else []
            return remote_errors.refused(self.host, status, body, model_key, running)

        return refusal


def _parsed(host: str, body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
        return {"id": found["id"], **found, "status": found["status"]}
    except (ValueError, KeyError, TypeError) as error:
        raise RemoteError(
            f"{host} answered something that nnsight 0.8.1 does not: {body[:80]!r}. Is there an "
            "NDIF server at this address?"
        ) from error


def _headers(host: str) -> dict[str, str]:
    """What goes with each request; the key over https or to this machine alone.

    Raises:
        RemoteError: If NDIF is asked without a key, or with one that cannot be sent.
    """
    from modeldiff import tracing

    key, scheme = (tracing.api_key() or "").strip(), urlsplit(host).scheme
    if not key and host == tracing.host_of(True) and scheme == "https":
        raise remote_errors.no_key(host)
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise remote_errors.bad_key()
    private = scheme == "https" or is_this_machine(host)
    headers = {**tracing.versions(), "ndif-timestamp": repr(time.time())}
    return {**headers, "ndif-api-key": key} if key and private else headers


_CHECKED: set[str] = set()


def _check_version(host: str, seconds: float) -> None:
    """Refuse a server whose nnsight is another; one that does not say is tried.

    Raises:
        RemoteError: If it is.
    """
    from modeldiff import tracing

    if host in _CHECKED:
        return
    found = _got(host, "/env", seconds)
    there, here = found.get("packages", {}).get("nnsight"), tracing.versions()["nnsight-version"]
    if there and str(there).split(".")[:2] != here.split(".")[:2]:
        raise remote_errors.other_version(host, str(there), here)
    if found:
        _CHECKED.add(host)


def _running(host: str, seconds: float) -> list[str]:
    deployed = _got(host, "/status", seconds).get("deployments", {})
    return sorted({str(each.get("repo_id", name)) for name, each in deployed.items()})


def _got(host: str, where: str, seconds: float) -> dict[str, Any]:
    """A JSON object that is good to have; empty if there is none."""
    try:
        answer = httpx.get(host + where, timeout=seconds, trust_env=not is_this_machine(host))
        found = answer.json() if answer.is_success else {}
    except (httpx.TransportError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
