"""What is kept of jobs on a server: results by the content of what was asked, jobs under way."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeldiff._files import atomic_write, digest


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


def keep(path: Path, found: dict[str, Any]) -> None:
    """Write a result: tensors as they are, builtins as JSON in the header."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    shape = json.dumps(_taken_apart(found, tensors))
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"result": shape})


def kept(path: Path) -> dict[str, Any] | None:
    """Read a result; None if there is none, or a damaged one, which is made again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return _put_together(json.loads(file.metadata()["result"]), tensors)
    except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError):
        return None


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


def note_job(path: Path, job: str) -> None:
    """Remember that a server has a job under way, so that it need not be sent again."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"job": job}), encoding="utf-8")


def noted_job(path: Path) -> str | None:
    """The job under way that was remembered, if any."""
    try:
        job = json.loads(path.read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return job if isinstance(job, str) and job else None


def forget_job(path: Path) -> None:
    """Remember it no longer."""
    path.unlink(missing_ok=True)
