"""Sending one job to a server and waiting for it: retries, progress, cancelling, a store.

Jobs are submitted over HTTP and asked after, not streamed over a websocket: a broken connection
then costs a question and not the job. Results of finished jobs are kept by the content of what was
asked, so a call that failed half-way goes on where it stopped when it is repeated.
"""

import atexit
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from modeldiff import remote_errors
from modeldiff._files import PathLike, atomic_write, digest
from modeldiff._progress import check
from modeldiff._version import __version__
from modeldiff.errors import RemoteError

Pack = Callable[[], Any]
"""Makes a `modeldiff.tracing.Packed`; not called if the result is kept already."""
Status = Callable[[str], None]
"""Called with the job's status whenever it changes: RECEIVED, QUEUED, RUNNING, COMPLETED ..."""

_AGAIN = (429, 500, 502, 503, 504)
"""HTTP statuses after which the same request is worth another try."""


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
            that goes with this process.
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
            RemoteError: If an address does not begin with http:// or https://.
        """
        if isinstance(remote, Server):
            server = remote
        else:
            server = cls(None if remote is True else str(remote))
        if server.host is not None and not server.host.startswith(("http://", "https://")):
            raise RemoteError(
                f"remote={server.host!r}: write True for NDIF, or an address that begins with "
                "http:// or https://."
            )
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


def run_job(server: Server, asked: Any, pack: Pack, cancel: Event | None = None) -> dict[str, Any]:
    """Run a job, or read its result if it was finished before.

    Args:
        server: Where.
        asked: Everything that the result depends on: tensors and builtins, nested.
        pack: Makes the job.
        cancel: Event that ends the wait; the server may still finish the job.

    Returns:
        Tensors and builtins by name.

    Raises:
        RemoteError: If the server refused or failed, or could not be reached.
        Cancelled: If the event is set.
    """
    check(cancel)
    key = digest(__version__, server.address, content_key(asked))
    path = server.folder / f"{key}.safetensors"
    found = _kept(path)
    if found is None:
        found = _Job(server, cancel).run(pack())
        _keep(path, found)
    return found


def content_key(value: Any) -> str:
    """Hash tensors and builtins, nested."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous()
        numbers = raw.flatten().view(torch.uint8).numpy().tobytes() if raw.numel() else b""
        return digest(str(raw.dtype), list(raw.shape), numbers)
    if isinstance(value, Mapping):
        return digest([[repr(k), content_key(v)] for k, v in value.items()])
    if isinstance(value, list | tuple):
        return digest([content_key(each) for each in value])
    return digest(repr(value))


class _Job:
    """One job on its way."""

    def __init__(self, server: Server, cancel: Event | None) -> None:
        self.server, self.cancel, self.host = server, cancel, server.address
        self.ends = time.monotonic() + server.job_seconds
        self.status = ""

    def run(self, packed: Any) -> dict[str, Any]:
        from modeldiff import tracing

        headers = _headers(self.host)
        _check_version(self.host, self.server.request_seconds)
        answer = self._asked("POST", "/request", packed.model_key, headers=headers,
                             data={"data": packed.metadata},
                             files={"blob": ("request", packed.blob)})  # fmt: skip
        job = _parsed(self.host, answer)["id"]
        return tracing.unpacked(self._awaited(str(job), packed.model_key, headers))

    def _awaited(self, job: str, model_key: str, headers: dict[str, str]) -> bytes:
        """Ask after a job until it is done; return its result's bytes."""
        pause = 0.02
        while True:
            where = f"/response/{job}"
            answer = self._asked("GET", where, model_key, headers=headers, unknown=True)
            found = {"status": "RECEIVED"} if answer is None else _parsed(self.host, answer)
            self._tell(str(found["status"]))
            if self.status == "ERROR":
                raise remote_errors.failed(self.host, str(found.get("description", "")))
            if self.status == "COMPLETED":
                return self._asked("GET", str(found.get("data")), model_key)
            if time.monotonic() > self.ends:
                raise remote_errors.too_slow(self.host, self.server.job_seconds, self.status)
            self._wait(pause)
            pause = min(2.0, pause * 1.5)

    def _tell(self, status: str) -> None:
        if status not in (self.status, "LOG"):
            self.status = status
            if self.server.status is not None:
                self.server.status(status)

    def _wait(self, seconds: float) -> None:
        if self.cancel is None:
            time.sleep(seconds)
        else:
            self.cancel.wait(seconds)
        check(self.cancel)

    def _asked(
        self, method: str, where: str, model_key: str, *, unknown: bool = False, **options: Any
    ) -> Any:
        """Send one request, again where that may help; its body, or None if 404 may be."""
        import httpx

        url = where if where.startswith(("http://", "https://")) else self.host + where
        pause, error = self.server.pause, RemoteError("tries must be at least 1.")
        for attempt in range(1, self.server.tries + 1):
            try:
                answer = httpx.request(method, url, timeout=self.server.request_seconds, **options)
                if answer.is_success:
                    return answer.content
                if unknown and answer.status_code == 404:
                    return None
                error = self._refusal(answer.status_code, answer.content, model_key)
                if answer.status_code not in _AGAIN:
                    raise error
            except httpx.TransportError as cause:
                error = remote_errors.unreachable(self.host, cause, attempt)
            except httpx.InvalidURL as cause:
                raise RemoteError(f"{self.host} named no address to fetch from.") from cause
            if attempt < self.server.tries:
                self._wait(pause)
                pause = min(30.0, pause * 2)
        raise error

    def _refusal(self, status: int, body: bytes, model_key: str) -> RemoteError:
        running = _running(self.host, self.server.request_seconds) if status == 404 else []
        return remote_errors.refused(self.host, status, body, model_key, running)


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
        RemoteError: If NDIF is asked without a key.
    """
    from modeldiff import tracing

    key, there = tracing.api_key(), urlsplit(host)
    if key is None and host == tracing.host_of(True) and there.scheme == "https":
        raise remote_errors.no_key(host)
    private = there.scheme == "https" or there.hostname in ("localhost", "127.0.0.1", "::1")
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
    import httpx

    try:
        answer = httpx.get(host + where, timeout=seconds)
        found = answer.json() if answer.is_success else {}
    except (httpx.TransportError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(path: Path, found: dict[str, Any]) -> None:
    """Write a result: tensors as they are, builtins as JSON in the header."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    shape = json.dumps(_taken_apart(found, tensors))
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"result": shape})


def _kept(path: Path) -> dict[str, Any] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _put_together(json.loads(file.metadata()["result"]), tensors)
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError):
        return None  # not there, or damaged: made again


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> list[Any]:
    """Tag values by kind, so that JSON gives back what it took."""
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().contiguous().clone()
        return ["tensor", str(len(tensors) - 1)]
    if isinstance(value, dict):
        return ["dict", [[k, _taken_apart(v, tensors)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return ["list", [_taken_apart(each, tensors) for each in value]]
    return ["plain", value]


def _put_together(tagged: list[Any], tensors: dict[str, Tensor]) -> Any:
    kind, value = tagged
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _put_together(v, tensors) for k, v in value}
    return [_put_together(each, tensors) for each in value] if kind == "list" else value
