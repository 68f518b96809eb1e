"""Where a training run is kept so that it goes on, bit for bit, after it was stopped."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeldiff._files import PathLike
from modeldiff.dictionaries.files import write_tensors
from modeldiff.errors import FileFormatError

FILE = "checkpoint.safetensors"
_FORMAT, _VERSION = "modeldiff.dictionaries.checkpoint", "1"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run as it is between two steps.

    Args:
        run: Hash of what is trained, how, and on which rows.
        start: Hash of the weights the run began with.
        step: Steps done; also the number of the next batch.
        tensors: Weights, state of the optimizer, and what else changes from step to step.
        logs: Records of the logs so far.
    """

    run: str
    start: str
    step: int
    tensors: Mapping[str, Tensor]
    logs: Sequence[Mapping[str, Any]]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, e.g. ``weights``, without its name."""
        return {
            key.removeprefix(f"{name}."): each
            for key, each in self.tensors.items()
            if key.startswith(f"{name}.")
        }


def write_checkpoint(folder: PathLike, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in place of the folder's last one: whole or not at all.

    Raises:
        StoreError: If the disk is full or refuses; the last one is kept.
    """
    about = {
        "format": _FORMAT,
        "version": _VERSION,
        "run": checkpoint.run,
        "start": checkpoint.start,
        "step": str(checkpoint.step),
        "logs": json.dumps(list(checkpoint.logs)),
    }
    write_tensors(Path(folder) / FILE, checkpoint.tensors, about)


def read_checkpoint(folder: PathLike) -> Checkpoint | None:
    """Read a folder's checkpoint; None if it has none.

    Raises:
        FileFormatError: If the file is cut short, damaged, or of another kind or version.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            about = stream.metadata() or {}
            if (about.get("format"), about.get("version")) != (_FORMAT, _VERSION):
                raise FileFormatError(
                    f"{str(path)!r} is not a checkpoint of version {_VERSION} of a dictionary's "
                    "training. Nothing was read; give another folder."
                )
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        logs = json.loads(about["logs"])
        return Checkpoint(about["run"], about["start"], int(about["step"]), tensors, logs)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"{str(path)!r} is not a readable checkpoint ({error}). It may be cut short or "
            "damaged; nothing was read. Delete it to train from the beginning."
        ) from error


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors into 16 hex digits."""
    sha = hashlib.sha256()
    for name, each in sorted(tensors.items()):
        sha.update(f"{name} {tuple(each.shape)} {each.dtype} ".encode())
        sha.update(each.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
