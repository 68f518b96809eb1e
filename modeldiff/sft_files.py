"""What a fine-tuning writes down: its steps, its models, and what tells one run from another."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modeldiff._files import digest
from modeldiff.errors import SetupError, TrainingError

Record = dict[str, Any]
"""A step of a training, see `modeldiff.sft.FineTuned`; what was not measured is None."""
COLUMNS = ("step", "loss", "held_out_loss", "lr", "grad_norm", "divergence")


@contextmanager
def without_bars() -> Iterator[None]:
    """Show none of the progress bars of transformers inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; put it in the place of ``path`` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".saving-"))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(model: Any, tokenizer: Any, path: Path, records: Sequence[Record] = ()) -> None:
    """Save an adapter or a whole model, its tokenizer and the log, as Hugging Face's trainer does.

    Args:
        model: PEFT's wrapper, of which the adapter is saved, or a whole model.
        tokenizer: Its tokenizer.
        path: Folder; replaced if it exists.
        records: With step, loss, lr and grad_norm.
    """
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with whole_folder(path) as folder, without_bars():
        model.save_pretrained(str(folder), **options)
        tokenizer.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's: an empty form
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes for the owner alone
        named = (("step", "step"), ("loss", "loss"), ("lr", "learning_rate"))
        wanted = (*named, ("grad_norm", "grad_norm"))
        log = [
            {theirs: record[ours] for ours, theirs in wanted}
            for record in records
            if record.get("loss") is not None
        ]
        state = json.dumps({"log_history": log})
        (folder / "trainer_state.json").write_text(state, encoding="utf-8")


def record(step: int, **values: float | None) -> Record:
    """A step's line of the history; what is not given was not measured."""
    return dict.fromkeys(COLUMNS) | {"step": step, **values}


def note(records: list[Record], monitor: Any, first: int) -> None:
    """Put what the monitor of a `modeldiff.caft.caft` saw beside the steps that it saw.

    Args:
        records: Of all steps so far.
        monitor: What the context yielded; one without a ``frame`` is passed over.
        first: Steps that were done when the context was entered.
    """
    if not hasattr(monitor, "frame"):
        return
    for step, several in monitor.frame().groupby("step"):
        columns = several[["layer", "projected_norm", "resid_norm"]]
        # the monitor calls a step by the number of those before it
        records[first + int(step) + 1]["norms"] = columns.values.tolist()


def require_finite(value: float, what: str, step: int) -> None:
    """Stop a training that has left the numbers.

    Raises:
        TrainingError: If the value is NaN or infinite.
    """
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} is {value} at step {step}. Lower the learning rate; if it is so from the "
            "first step, look at the rows and the base."
        )


def weights_key(model: nn.Module) -> str:
    """Hash of all weights, at memory speed; any single change of a value shows.

    Sums of the numbers' bits as integers, which no order of summation and no number of threads
    changes.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = weights_key(layer)
        >>> _ = layer.weight.data[0, 0].add_(1.0)
        >>> weights_key(layer) == before
        False
    """
    return digest([
        [name, list(each.shape), str(each.dtype), _bits(each.detach())]
        for name, each in sorted(model.state_dict().items())
    ])  # fmt: skip


def _bits(tensor: Tensor) -> int:
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.contiguous().flatten()
    if flat.is_complex() or not flat.numel():
        return 0
    return int(flat.view(sizes[flat.element_size()]).sum(dtype=torch.int64))


def content(value: Any) -> Any:
    """Write what a function is called with as JSON-able values, so that two runs can be compared.

    Tensors, dataclasses such as directions, functions by name, and ``functools.partial`` of them.

    Raises:
        SetupError: If a value cannot be told from another one, such as a lambda.

    Example:
        >>> content(partial(sorted, reverse=True))
        ['builtins.sorted', [], {'reverse': True}]
    """
    if isinstance(value, partial):
        return [content(value.func), content(value.args), content(value.keywords)]
    if isinstance(value, Tensor):
        plain = value.detach().cpu().float().contiguous()
        return digest(list(plain.shape), plain.numpy().tobytes())
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(content(getattr(value, f.name)) for f in fields(value))]
    if isinstance(value, Mapping):
        return {str(key): content(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [content(each) for each in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    name = getattr(value, "__qualname__", "<unnamed>")
    if "<" in name:
        raise SetupError(
            f"{value!r} cannot be recognised when a run is resumed. Give a function of a module "
            "with its arguments, such as functools.partial(caft, directions=[...]), or leave out= "
            "away."
        )
    return f"{value.__module__}.{name}"
