"""What went wrong between here and a server, said so that one knows what to do."""

import json
from typing import Any

from modeldiff.errors import RemoteError

_FOREIGN = ("UnknownPersistentIdError", "has no attribute '_", "unpickl", "magic number")
"""Marks of a server whose nnsight, or whose model, is not what the request was made for."""


def no_key(host: str) -> RemoteError:
    """There is no key to send."""
    return RemoteError(
        f"{host} wants a key and there is none. Put it into the environment as NDIF_API_KEY, or "
        "run `nnsight login` once; this package keeps no keys."
    )


def bad_key() -> RemoteError:
    """There is a key, and no request can carry it."""
    return RemoteError(
        "the key in NDIF_API_KEY (or in nnsight's configuration) has spaces, line breaks or "
        "letters that no key has: copy it again."
    )


def refused(host: str, status: int, body: bytes, model_key: str, running: list[str]) -> RemoteError:
    """The server answered a request with an error status.

    Args:
        host: Its address.
        status: HTTP status.
        body: Its answer.
        model_key: What was asked for.
        running: Models that it does run.
    """
    said = _detail(body)
    if status in (401, 403):
        return RemoteError(
            f"{host} refused the key ({status}: {said}). The key is read from NDIF_API_KEY or from "
            "nnsight's own configuration, and is sent over https or to this machine only."
        )
    if status == 404:
        shown = ", ".join(running[:8]) or "nothing that it names"
        return RemoteError(
            f"{host} does not run {model_name(model_key)} (404: {said}). It runs {shown}. Ask for "
            "the model to be deployed, or load the pair here."
        )
    if status == 413:
        return RemoteError(f"the request is too large for {host}: fewer tokens a batch, please.")
    return RemoteError(f"{host} answered {status}: {said}.")


def _detail(body: bytes) -> str:
    """The explanation in a JSON body, or the start of whatever it is."""
    text = body.decode("utf-8", "replace")
    try:
        found: Any = json.loads(text)
    except ValueError:
        found = text
    said = found.get("detail", found) if isinstance(found, dict) else found
    return str(said).strip().rstrip(".")[:300] or "no explanation"


def model_name(model_key: str) -> str:
    """The repository (and revision) inside nnsight's key of a model."""
    try:
        named = json.loads(model_key.partition(":")[2])
    except ValueError:
        return model_key
    revision = f" at {named['revision']}" if named.get("revision") else ""
    return f"{named.get('repo_id', model_key)}{revision}"


def failed(host: str, description: str) -> RemoteError:
    """A job that the server took, and that ended with an error there."""
    lines = [line.strip() for line in description.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else "no explanation"
    hint = ""
    if any(mark in description for mark in _FOREIGN):
        hint = " This happens where the server runs another nnsight, or another model, than asked."
    if "out of memory" in description.lower():
        hint = " Use a smaller max_tokens (or max_rows)."
    return RemoteError(f"the job failed on {host}: {last[:500]}.{hint}")


def other_version(host: str, there: str, here: str) -> RemoteError:
    """A server whose nnsight does not speak this one's protocol."""
    return RemoteError(
        f"{host} runs nnsight {there}, this is {here}: jobs of one cannot be read by the other. "
        f"Use a server with nnsight {here}, or load the pair here."
    )


def unreachable(host: str, cause: Exception, tries: int) -> RemoteError:
    """No connection, or it broke every time."""
    return RemoteError(
        f"no answer from {host} in {tries} tries ({type(cause).__name__}). What was finished is "
        "kept: the same call goes on from there."
    )


def too_slow(host: str, seconds: float, status: str) -> RemoteError:
    """A job that did not end in time."""
    return RemoteError(
        f"the job on {host} did not end in {seconds:g} s; it was last {status}. What was finished "
        "is kept: try again later, or give more time with remote=Server(host, job_seconds=...)."
    )


def moved(host: str, where: str) -> RemoteError:
    """A server that sends one elsewhere; the key does not follow."""
    return RemoteError(
        f"{host} sends requests on to {where.partition('?')[0]!r}. The key goes to the address "
        "that you name alone: pass remote= the address that it is to go to."
    )


def come_back(host: str, seconds: float) -> RemoteError:
    """A server that has too much to do, and says for how long."""
    return RemoteError(
        f"{host} is busy and wants to be asked again in {seconds:.0f} s. What was finished is "
        "kept: the same call goes on from there."
    )


class ResultGone(RemoteError):
    """A job ended, and what it left is not there any more."""


def result_gone(host: str, status: int) -> ResultGone:
    """The place where a finished job's result should lie refuses it."""
    return ResultGone(
        f"a job on {host} is done, and its result is not where it should be ({status}). The same "
        "call looks again, and sends the job anew if it is gone."
    )


def no_result(host: str, why: str) -> RemoteError:
    """The result of a finished job cannot be downloaded."""
    return RemoteError(
        f"a job on {host} is done, and its result could not be downloaded ({why}). The same call "
        "downloads it, without sending the job again."
    )
