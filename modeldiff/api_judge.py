"""`ApiScorer`: a judge behind any OpenAI-compatible address.

Requests run a few at a time in a thread of their own, so that this works in a notebook too. What
is answered is kept at once; a call that failed or was cancelled goes on from there. The key is read
from the environment when a request is signed and is held nowhere.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any, Protocol
from urllib.parse import urlsplit

from modeldiff._files import digest
from modeldiff._progress import Progress, Report, reporter
from modeldiff.api_replies import read_reply
from modeldiff.errors import Cancelled, RemoteError, SetupError
from modeldiff.score_prompts import OFF_MENU
from modeldiff.scorers import MALFORMED, MINIMUM_MASS, Score

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_RETRIED = (0, 408, 409, 425, 429)
_POLL_S = 0.05


class Records(Protocol):
    """What keeps scores between calls, such as `modeldiff.cache.Cache`."""

    def get(self, kind: str, depends_on: Any) -> Any | None:
        """Return a record, or None."""
        ...

    def put(self, kind: str, depends_on: Any, value: Any) -> None:
        """Keep a record."""
        ...


class _Memory:
    """Records that live as long as their scorer."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    def get(self, kind: str, depends_on: Any) -> Any | None:
        return self._kept.get(digest(kind, depends_on))

    def put(self, kind: str, depends_on: Any, value: Any) -> None:
        self._kept[digest(kind, depends_on)] = value


@dataclass(frozen=True, eq=False)
class ApiScorer:
    """Scores prompts by a model behind an OpenAI-compatible ``/chat/completions``.

    With the 20 likeliest first tokens in the reply the score is their mean weighted by
    probability; else, and where the first token is but a digit of a number, the number that was
    said counts. What is no number is unscored; a reply that cannot be read is "malformed", and is
    asked again by the next call.

    Args:
        model: Name of the model, as the server knows it.
        base_url: Address that ``/chat/completions`` comes after, e.g. "https://host/v1".
        key_variable: Environment variable with the key; None sends none, as local servers allow.
        cache: Where scores are kept, by model, address, prompt and parameters; default in memory.
        words: What may be said instead of a number.
        minimum_mass: See `modeldiff.scorers.weighted`.
        parameters: More fields of the request; None takes a field out. They are kept in the cache.
        max_connections: Requests under way at once, at most.
        requests_per_minute: Pace at which requests begin, retries too; None sets none.
        max_attempts: Requests for one prompt, at most, when the server is busy or fails.
        timeout_s: Seconds a request may take.
        first_wait_s: Wait before the second attempt; it doubles with each, with jitter. A
            ``Retry-After`` of the server is heeded where it is longer.
        longest_wait_s: A server that asks for a longer wait than this is given up.
        progress: Where to report, score by score; called from another thread.
        cancel: Event that stops at once.

    Raises:
        SetupError: If the address holds a name, key or query, or would send a key in plain text.

    Source:
        The logprob-weighted judge of arXiv 2506.11613.

    Example:
        >>> from modeldiff.scorers import ScoreJudge
        >>> judge = ScoreJudge("em", ApiScorer("m", "https://host/v1"))
        >>> behaviour = replace(behaviour, judge=judge)  # doctest: +SKIP
    """

    model: str
    base_url: str
    key_variable: str | None = "OPENAI_API_KEY"
    cache: Records | None = None
    words: tuple[str, ...] = OFF_MENU
    minimum_mass: float = MINIMUM_MASS
    parameters: Mapping[str, Any] = field(default_factory=dict)
    max_connections: int = 8
    requests_per_minute: float | None = None
    max_attempts: int = 6
    timeout_s: float = 60.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 120.0
    progress: Progress = False
    cancel: Event | None = None
    tally: Counter[str] = field(default_factory=Counter, init=False)
    """Counts over all calls: prompts "asked", "cached", "malformed"; "requests", "retries"."""
    _memory: Records = field(default_factory=_Memory, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SetupError(
                "base_url is no http(s) address; give what comes before /chat/completions, e.g. "
                "'https://host/v1'."
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise SetupError(
                "base_url holds a user, password, query or fragment, which would be kept in the "
                "cache. Give the bare address, and the key in an environment variable."
            )
        if parts.scheme == "http" and self.key_variable and parts.hostname not in _LOOPBACK:
            raise SetupError(
                f"http://{parts.hostname} would get the key in plain text. Use https://, or "
                "key_variable=None for a server that wants no key."
            )
        counts = (self.max_connections, self.max_attempts, self.requests_per_minute or 1)
        if min(counts) <= 0 or self.timeout_s <= 0:
            raise SetupError(
                "max_connections, max_attempts, requests_per_minute and timeout_s must be positive."
            )

    @property
    def name(self) -> str:
        """Model, host and a hash of the settings."""
        return f"{self.model}@{urlsplit(self.base_url).hostname}-{digest(self._key(''))[:8]}"

    def __call__(self, prompts: Sequence[str]) -> list[Score]:
        """Score prompts; those that were scored before are not sent.

        Raises:
            SetupError: If there is no key, or the server refuses it (at once, without retries).
            RemoteError: If the server does not know the model, refuses the request, or fails
                ``max_attempts`` times. What was answered until then is kept.
            Cancelled: If the event is set; ``partial`` holds the scores in order, None for those
                that are missing.
        """
        distinct = list(dict.fromkeys(prompts))
        found = {prompt: kept for prompt in distinct if (kept := self._kept(prompt))}
        self.tally.update(asked=len(distinct), cached=len(found))
        missing = [prompt for prompt in distinct if prompt not in found]
        if missing:
            _check_key(self.key_variable)
            self._in_a_thread(missing, found)
        if len(found) < len(distinct):
            partial = [found.get(prompt) for prompt in prompts]
            raise Cancelled("cancelled; the scores so far are in `partial` and kept.", partial)
        return [found[prompt] for prompt in prompts]

    def _in_a_thread(self, missing: list[str], found: dict[str, Score]) -> None:
        report, stop = reporter(self.progress, "score"), Event()
        with ThreadPoolExecutor(1, thread_name_prefix="api-scorer") as pool:
            work = pool.submit(lambda: asyncio.run(self._ask_all(missing, found, report, stop)))
            try:
                work.result()
            finally:
                stop.set()  # also when the waiting itself is interrupted from the keyboard

    async def _ask_all(
        self, missing: list[str], found: dict[str, Score], report: Report, stop: Event
    ) -> None:
        import httpx

        slots, pace = asyncio.Semaphore(self.max_connections), _Pace(self.requests_per_minute)
        auth, total = _signed(self.key_variable), len(missing) + len(found)
        async with httpx.AsyncClient(timeout=self.timeout_s, auth=auth) as client:

            async def one(prompt: str) -> None:
                found[prompt] = await self._ask(client, slots, pace, prompt)
                report(len(found), total, f"{len(found)} scores")

            tasks = [asyncio.create_task(one(prompt)) for prompt in missing]
            try:
                await self._until_done(tasks, stop)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_done(self, tasks: Sequence[asyncio.Task[None]], stop: Event) -> None:
        """Wait for all; return early if cancelled, raise what the first to fail raised."""
        pending = set(tasks)
        while pending and not stop.is_set() and not (self.cancel and self.cancel.is_set()):
            done, pending = await asyncio.wait(
                pending, timeout=_POLL_S, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()

    async def _ask(
        self, client: Any, slots: asyncio.Semaphore, pace: "_Pace", prompt: str
    ) -> Score:
        body, reply, sent = self._body(prompt), _Reply(0, "", None), 0
        while sent < self.max_attempts:
            async with slots:
                await pace.turn()
                self.tally.update(requests=1, retries=int(sent > 0))
                sent += 1
                reply = await self._post(client, body)
            if reply.status == 200:
                return self._scored(prompt, reply.text)
            self._raise_if_final(reply)
            asked_for = reply.retry_after or 0.0
            if asked_for > self.longest_wait_s:
                break
            pace.hold(asked_for)
            if sent < self.max_attempts:
                wait = min(self.first_wait_s * 2 ** (sent - 1), self.longest_wait_s)
                await asyncio.sleep(max(wait * random.uniform(0.5, 1.0), asked_for))
        raise RemoteError(
            f"{self._where} failed {sent} times for one prompt; last: {reply.describe()}. "
            "What was answered is kept: call again to go on, with fewer max_connections or a lower "
            "requests_per_minute if it was too busy."
        )

    async def _post(self, client: Any, body: Mapping[str, Any]) -> "_Reply":
        """Send a request; a failed connection is a reply of status 0."""
        import httpx

        try:
            got = await client.post(f"{self.base_url.rstrip('/')}/chat/completions", json=body)
        except httpx.RequestError as error:
            return _Reply(0, type(error).__name__, None)
        text = _without_key(got.text, self.key_variable)
        return _Reply(got.status_code, text, _seconds(got.headers.get("retry-after")))

    def _raise_if_final(self, reply: "_Reply") -> None:
        """Raise for replies that another attempt would not change."""
        if reply.status in (401, 403):
            raise SetupError(
                f"{self._where} refused the key ({reply.describe()}). Put one that may use "
                f"{self.model!r} into the environment variable {self.key_variable}."
            )
        if reply.status == 404:
            raise RemoteError(
                f"{self._where} is not there or has no such model ({reply.describe()}). Check "
                "model and base_url, which ends before /chat/completions."
            )
        retried = reply.status in _RETRIED or reply.status >= 500
        if not retried or "insufficient_quota" in reply.text:
            raise RemoteError(f"{self._where} refused the request: {reply.describe()}.")

    def _scored(self, prompt: str, text: str) -> Score:
        score = read_reply(text, self.words, self.minimum_mass)
        if score.label == MALFORMED:
            self.tally.update(malformed=1)
        else:
            record = {"value": score.value, "label": score.label, "mass": score.mass}
            self._records.put("api-scores", self._key(prompt), record)
        return score

    def _kept(self, prompt: str) -> Score | None:
        record = self._records.get("api-scores", self._key(prompt))
        return None if record is None else Score(**record)

    @property
    def _records(self) -> Records:
        return self._memory if self.cache is None else self.cache

    @property
    def _where(self) -> str:
        return f"{self.model!r} at {self.base_url}"

    def _key(self, prompt: str) -> dict[str, Any]:
        """All that a score depends on; not the key."""
        rule = {"words": list(self.words), "minimum_mass": float(self.minimum_mass)}
        return {"url": self.base_url.rstrip("/"), "body": self._body(prompt), **rule}

    def _body(self, prompt: str) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 8,
            "temperature": 0,
            "seed": 0,
            "logprobs": True,
            "top_logprobs": 20,
            **self.parameters,
        }
        return {name: value for name, value in body.items() if value is not None}


@dataclass(frozen=True)
class _Reply:
    """What came back; holds nothing of the request, whose headers have the key."""

    status: int
    text: str
    retry_after: float | None

    def describe(self) -> str:
        if not self.status:
            return f"no reply, {self.text}"
        try:
            message = json.loads(self.text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = self.text
        return f"status {self.status}, {str(message)[:200]!r}"


class _Pace:
    """At most so many requests a minute, and none while the server asks to wait."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        while (wait := self._next - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self._next = time.monotonic() + self._gap

    def hold(self, seconds: float) -> None:
        self._next = max(self._next, time.monotonic() + seconds)


def _check_key(variable: str | None) -> None:
    if variable is None:
        return
    if not os.environ.get(variable):
        raise SetupError(
            f"no key: the environment variable {variable} is empty. Set it before starting Python "
            "(never in a notebook), or pass key_variable=None for a server that wants none."
        )
    if not _plain(variable):
        raise SetupError(f"{variable} holds spaces, line ends or other signs that no key has.")


def _plain(variable: str) -> bool:
    """Whether a key can stand in a header; the key stays in this function's frame."""
    key = os.environ[variable]
    return key.isascii() and key.isprintable() and " " not in key


def _signed(variable: str | None) -> Any:
    """Return what signs a request, reading the key at that moment; None without a key."""
    if variable is None:
        return None

    def sign(request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {os.environ.get(variable, '')}"
        return request

    return sign


def _without_key(text: str, variable: str | None) -> str:
    """Text of a reply in which a server may have repeated the key."""
    key = os.environ.get(variable, "") if variable else ""
    return text.replace(key, "[key]") if key else text


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, which is a number or a date."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    except ValueError:
        return None
