"""What the ablated layers did during a training: that each fired, and how much it removed."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from modeldiff.caft_modes import Ablated, along
from modeldiff.errors import InterventionError
from modeldiff.hooks import first, put

_FLUSH = 1024  # entries kept as tensors before they are read, which waits for the device


@dataclass(frozen=True, eq=False)
class Stack:
    """The decoder layers of a model, whatever it is wrapped in.

    Args:
        parent: The module that runs the layers.
        layers: By number.
    """

    parent: nn.Module
    layers: tuple[nn.Module, ...]


class CaftMonitor:
    """The hooks of one `modeldiff.caft.caft` block, and what they saw.

    A training step is a step of an optimizer that holds weights of the model; where no such
    optimizer is seen, every forward pass with gradient. Only forward passes with gradient are
    recorded, and what a backward pass recomputes (gradient checkpointing) is not counted again.

    Args:
        stack: Where to hook.
        ablated: What to do at each layer.
        probe: Runs the model once.
    """

    def __init__(self, stack: Stack, ablated: dict[int, Ablated], probe: Callable[[], Any]) -> None:
        self.step = 0
        self.ablated = ablated
        self._stack, self._probe = stack, probe
        self._passes = 0
        self._fired: Counter[int] = Counter()
        self._seen: Counter[int] = Counter()
        self._training: bool | None = None
        self._probing = False
        self._waiting: list[tuple[int, int, int, Tensor]] = []
        self._rows: list[tuple[int, int, int, float, float]] = []
        self._mine: dict[int, bool] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at which something is done."""
        return tuple(self.ablated)

    def frame(self) -> pd.DataFrame:
        """Norms by training step and layer.

        Returns:
            One row a step and layer: step, layer, projected_norm (mean over tokens of the length
            of the component along the directions, before it is changed), resid_norm (of the whole
            activation), n_tokens (padding included: a layer does not know it).

        Raises:
            InterventionError: If an activation was not finite.
        """
        self._flush()
        columns = ["pass", "step", "layer", "n_tokens", "projected_norm", "resid_norm"]
        found = pd.DataFrame([(number, *row) for number, row in self._numbered()], columns=columns)
        norms = ["projected_norm", "resid_norm"]
        found = found.astype(dict.fromkeys(columns, int) | dict.fromkeys(norms, float))
        if not self.step:  # no optimizer was seen
            found["step"] = found["pass"]
        broken = found[~np.isfinite(found[norms]).all(axis=1)]
        if len(broken):
            step, layer = broken.iloc[0][["step", "layer"]].astype(int)
            raise InterventionError(
                f"activations after layer {layer} were not finite at step {step}: nothing can be "
                "ablated in them. Lower the learning rate, or train in bfloat16 or float32."
            )
        found[norms] = found[norms].mul(found["n_tokens"], axis=0)
        sums = found.groupby(["step", "layer"], as_index=False)[[*norms, "n_tokens"]].sum()
        sums[norms] = sums[norms].div(sums["n_tokens"], axis=0)
        return sums

    def verify(self) -> None:
        """Run one token without gradient; random state and train or eval mode are as before.

        Raises:
            InterventionError: If a layer does not fire, has another width, or its activations are
                not finite.
        """
        if not self.ablated:
            return
        before, self._seen, self._probing = self._seen, Counter(), True
        waiting, self._waiting = self._waiting, []
        try:
            with torch.no_grad():
                self._probe()
            silent = [layer for layer in self.layers if not self._seen[layer]]
            norms = [float(each.isfinite().all()) for *_, each in self._waiting]
        finally:
            self._seen, self._probing, self._waiting = before, False, waiting
        if silent:
            raise InterventionError(
                f"layers {silent} did not fire in a forward pass of the model: what is trained "
                "would not be ablated there. Were its layers exchanged, or is it a copy that runs?"
            )
        if not all(norms):
            raise InterventionError("activations are not finite in a forward pass of one token.")

    def check_fired(self) -> None:
        """Verify that every layer fired in every forward pass that was trained on.

        Raises:
            InterventionError: If one did not, or an activation was not finite.
        """
        silent = {n: self._fired[n] for n in self.layers if self._fired[n] < self._passes}
        if silent:
            counts = ", ".join(f"layer {n} in {times}" for n, times in silent.items())
            raise InterventionError(
                f"of {self._passes} forward passes that were trained on, {counts} fired: the model "
                "was not ablated as asked. Were hooks removed, or layers exchanged?"
            )
        self.frame()

    def _numbered(self) -> Iterator[tuple[int, tuple[int, int, int, float, float]]]:
        """Number the recorded forward passes, layer by layer."""
        times: Counter[int] = Counter()
        for row in self._rows:
            yield times[row[1]], row
            times[row[1]] += 1

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hook the layers inside the block; the hooks are gone after it."""
        handles: list[RemovableHandle] = []
        try:
            if self.ablated:
                parent = self._stack.parent
                handles.append(parent.register_forward_pre_hook(self._begin))
                handles.append(parent.register_forward_hook(self._end))
                handles.append(register_optimizer_step_post_hook(self._stepped))
            for layer, ablated in self.ablated.items():
                hook = self._hook(layer, ablated)
                handles.append(self._stack.layers[layer].register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, ablated: Ablated) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = first(output)
            new = ablated(h)
            if not _recomputing():
                self._record(layer, ablated, h)
            return put(output, new)

        return hook

    def _record(self, layer: int, ablated: Ablated, h: Tensor) -> None:
        self._seen[layer] += 1
        counts = torch.is_grad_enabled() if self._training is None else self._training
        if not (counts or self._probing):
            return
        with torch.no_grad():
            rows = h.detach().flatten(0, -2).float()
            parts = along(rows, ablated.on(h.device)[0]).norm(dim=-1), rows.norm(dim=-1)
            self._waiting.append((self.step, layer, len(rows), torch.stack(parts).mean(1)))
        if not self._probing:
            self._fired[layer] += 1
            if len(self._waiting) >= _FLUSH:
                self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        by_device: dict[torch.device, list[tuple[int, int, int, Tensor]]] = {}
        for entry in waiting:
            by_device.setdefault(entry[3].device, []).append(entry)
        for several in by_device.values():
            norms = torch.stack([entry[3] for entry in several]).tolist()
            for (step, layer, n, _), (projected, whole) in zip(several, norms, strict=True):
                self._rows.append((step, layer, n, projected, whole))

    def _begin(self, *_: Any) -> None:
        if not _recomputing():
            self._training = torch.is_grad_enabled()

    def _end(self, *_: Any) -> None:
        if not _recomputing():
            self._passes += bool(self._training)
            self._training = None

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in self._mine:
            own = {id(parameter) for parameter in self._stack.parent.parameters()}
            held = (id(p) for group in optimizer.param_groups for p in group["params"])
            self._mine[id(optimizer)] = any(parameter in own for parameter in held)
        self.step += self._mine[id(optimizer)]


def _recomputing() -> bool:
    """Whether a backward pass is under way in this thread: forwards inside it are repetitions."""
    return torch._C._current_graph_task_id() != -1
