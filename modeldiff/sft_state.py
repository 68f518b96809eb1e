"""The state from which a fine-tuning goes on: what is trained, and the optimizer's moments."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modeldiff.dictionaries.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from modeldiff.errors import FileFormatError
from modeldiff.sft_files import Record

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def write_state(
    out: Path,
    run: str,
    start: str,
    step: int,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    records: Sequence[Record],
    before: Mapping[str, Tensor],
) -> None:
    """Save a run's state in ``<out>/state``, whole or not at all.

    Args:
        out: Folder of the run.
        run: What tells it from another run.
        start: Hash of the weights that it began with.
        step: Optimizer steps done.
        trained: Parameters by name.
        optimizer: Of them, an Adam.
        records: Of the steps so far.
        before: Weights at an earlier measurement, where they are needed.
    """
    tensors = {f"weights.{name}": each for name, each in trained.items()}
    for name, each in trained.items():
        state = optimizer.state.get(each, {})
        tensors |= {f"adam.{name}.{key}": value for key, value in state.items()}
    tensors |= {f"before.{name}": each for name, each in before.items()}
    write_checkpoint(out / "state", Checkpoint(run, start, step, tensors, list(records)))


def read_state(
    out: Path,
    run: str,
    start: str,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Checkpoint | None:
    """Read what `write_state` wrote and put it into the parameters and the optimizer.

    Returns:
        The state; None if there is none, and nothing was changed.

    Raises:
        FileFormatError: If the folder holds another run, or is damaged; nothing was changed.
    """
    stored = read_checkpoint(out / "state")
    if stored is None:
        return None
    if (stored.run, stored.start) != (run, start):
        raise FileFormatError(
            f"{str(out)!r} holds {stored.step} steps of another run: another plan, base, rows, "
            "context or loss to stop at. Nothing was changed; give another folder, or delete "
            "it to train from the beginning."
        )
    weights, moments = stored.part("weights"), stored.part("adam")
    with torch.no_grad():
        for name, each in trained.items():
            each.copy_(weights[name])
    for name, each in trained.items():
        known = [key for key in _MOMENTS if f"{name}.{key}" in moments]
        state = {key: moments[f"{name}.{key}"] for key in known}
        if state:
            moved = {key: v if key == "step" else v.to(each) for key, v in state.items()}
            optimizer.state[each] = moved
    return stored
