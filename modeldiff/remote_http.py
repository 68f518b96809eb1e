"""Requests to a server: again where that may help, in parts where it breaks, ended at once.

A request runs in a thread of its own, so that nobody has to wait for a server that hangs: a
cancelled call leaves the thread alone, which ends with its request.
"""

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from threading import Event, Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from modeldiff import remote_errors
from modeldiff.errors import Cancelled, RemoteError

_AGAIN = (408, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request is worth another try."""
_LOOK = 0.05  # seconds between two looks at whether somebody cancelled
_STEP = 1 << 16  # bytes of a download that count as a step forward

T = TypeVar("T")


def check_address(host: str) -> None:
    """Refuse what is no server's address.

    Raises:
        RemoteError: Without repeating a password.
    """
    try:
        parts = urlsplit(host)
        named, _ = parts.hostname, parts.port
    except ValueError:
        parts, named = urlsplit(""), None
    secret = parts.username is not None or parts.password is not None
    plain = host.isascii() and host.isprintable() and " " not in host
    if (
        parts.scheme not in ("http", "https")
        or not named
        or secret
        or not plain
        or parts.query
        or parts.fragment
    ):
        shown = "an address with a password" if "@" in host else repr(host)
        raise RemoteError(
            f"remote={shown}: write True for NDIF, or an address that begins with http:// or "
            "https:// and is a host, a port and a path at most. The key comes from NDIF_API_KEY."
        )


def is_this_machine(host: str) -> bool:
    """Whether an address is of this machine, which no proxy stands before."""
    named = urlsplit(host).hostname or ""
    try:
        return ipaddress.ip_address(named).is_loopback
    except ValueError:
        return named == "localhost" or named.endswith(".localhost")


@dataclass(frozen=True, eq=False)
class Line:
    """The way to a server.

    Args:
        host: Its address.
        tries: How often a request is sent before it counts as failed.
        pause: Seconds before the second try; doubled each time, 30 at most, unless the server
            names another time (``Retry-After``).
        seconds: How long one answer may take.
        cancels: Events that end a wait.
        longest: Seconds after which a server that says when to come back is not waited for.
    """

    host: str
    tries: int
    pause: float
    seconds: float
    cancels: tuple[Event, ...] = ()
    longest: float = 600.0

    def asked(
        self, method: str, where: str, refusal: Callable[[int, bytes], RemoteError], **options: Any
    ) -> httpx.Response:
        """Send one request to the server, again where that may help; 404 is an answer too.

        Raises:
            RemoteError: If it was refused, or could not be sent.
            Cancelled: If an event is set.
        """
        url = self.host + where

        def send() -> httpx.Response:
            return httpx.request(
                method, url, timeout=self.seconds, trust_env=not is_this_machine(url), **options
            )

        pause, error = self.pause, RemoteError("tries must be at least 1.")
        for attempt in range(1, self.tries + 1):
            after = None
            try:
                answer = self._through(send)
                if answer.is_success or answer.status_code == 404:
                    return answer
                if answer.is_redirect:
                    raise remote_errors.moved(self.host, answer.headers.get("location", ""))
                error = refusal(answer.status_code, answer.content)
                if answer.status_code not in _AGAIN:
                    raise error
                after = _retry_after(answer)
            except httpx.TransportError as cause:
                error = remote_errors.unreachable(self.host, cause, attempt)
            if after is not None and after > self.longest:
                raise remote_errors.come_back(self.host, after)
            if attempt < self.tries:
                self.wait(max(pause, after or 0.0))
                pause = min(30.0, pause * 2)
        raise error

    def fetched(self, url: str) -> bytes:
        """Download a result from wherever it lies; a part that arrived is not fetched again.

        Raises:
            RemoteError: If it could not be had.
            Cancelled: If an event is set.
        """
        part, left, pause = _Part(), self.tries, self.pause
        while True:
            before, why = len(part.content), ""
            try:
                status = self._through(lambda: _more(url, part, self.seconds))
                if status is None:
                    return bytes(part.content)
                why = f"status {status}"
                if status not in _AGAIN:
                    raise remote_errors.result_gone(self.host, status)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as cause:
                raise RemoteError(f"{self.host} named no address to fetch from.") from cause
            except (httpx.TransportError, httpx.TooManyRedirects) as cause:
                why = type(cause).__name__
            forward = len(part.content) - before >= _STEP
            left, pause = (self.tries, self.pause) if forward else (left - 1, pause)
            if left < 1:
                raise remote_errors.no_result(self.host, why)
            self.wait(pause)
            pause = min(30.0, pause * 2)

    def wait(self, seconds: float) -> None:
        """Sleep, unless somebody cancels.

        Raises:
            Cancelled: If an event is set.
        """
        if len(self.cancels) == 1:
            self.cancels[0].wait(seconds)
        else:
            ends = time.monotonic() + seconds
            while (left := ends - time.monotonic()) > 0 and not self._is_cancelled():
                time.sleep(min(left, _LOOK) if self.cancels else left)
        self.check()

    def check(self) -> None:
        """Stop if somebody cancelled.

        Raises:
            Cancelled: If an event is set.
        """
        if self._is_cancelled():
            raise Cancelled("stopped waiting for the server; what it finished before is kept.")

    def _is_cancelled(self) -> bool:
        return any(event.is_set() for event in self.cancels)

    def _through(self, send: Callable[[], T]) -> T:
        """Run a request so that a cancelled call need not wait for its end."""
        self.check()
        if not self.cancels:
            return send()
        found: list[T] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                found.append(send())
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                failed.append(error)

        thread = Thread(target=work, name="modeldiff-request", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK)
            self.check()
        if failed:
            raise failed[0]
        if not found:
            raise RemoteError(f"a request to {self.host} ended without an answer.")
        return found[0]


@dataclass(eq=False)
class _Part:
    """What arrived of a download, and the name of the version that it is of."""

    content: bytearray = field(default_factory=bytearray)
    version: str = ""


def _more(url: str, part: _Part, seconds: float) -> int | None:
    """Fetch the rest of a download, or all of it; the status if that was refused."""
    headers, have = {"accept-encoding": "identity"}, len(part.content)
    if have and part.version:
        headers |= {"range": f"bytes={have}-", "if-range": part.version}
    options: dict[str, Any] = {"timeout": seconds, "trust_env": not is_this_machine(url)}
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, **options) as answer:
        begins = answer.headers.get("content-range", "").startswith(f"bytes {have}-")
        if not answer.is_success or (answer.status_code == 206 and not begins):
            part.content.clear()
            part.version = ""
            return 503 if answer.status_code in (206, 416) else answer.status_code
        if answer.status_code != 206:
            part.content.clear()
            part.version = _version(answer)
        for chunk in answer.iter_bytes():
            part.content += chunk
    return None


def _version(answer: httpx.Response) -> str:
    """What names this version of a file; nothing if parts of it cannot be asked for."""
    tag = answer.headers.get("etag", "")
    in_parts = answer.headers.get("accept-ranges") != "none"
    encoded = answer.headers.get("content-encoding", "identity") != "identity"
    return tag if tag.startswith('"') and in_parts and not encoded else ""


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the server wants to be left alone; dates are by its own clock."""
    said = answer.headers.get("retry-after", "")
    if said.strip().isdigit():
        return float(said)
    try:
        then = parsedate_to_datetime(said)
        now = parsedate_to_datetime(answer.headers.get("date", ""))
        return max(0.0, (then - now).total_seconds())
    except (ValueError, TypeError):
        return None
