"""Generation whose every step is the same work on the same tensors, so that it can be recorded.

transformers' ``generate`` decides in Python at every step; for small models or batches that takes
longer than the arithmetic. Here keys, values, masks, noise and coefficients lie in tensors that
stay where they are, a step is one forward pass and one draw, and on a GPU it is recorded once as a
CUDA graph. Prompts are run as `generate` runs them. Answers are those of `generate`, token for
token in float32; in 16 bits attention over another length rounds otherwise, and an answer may turn
where two tokens are as likely, as it does in batches of another size.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from modeldiff._shapes import Float, Int
from modeldiff.architectures import SiteMap
from modeldiff.batching import Batch
from modeldiff.editing import Editor
from modeldiff.errors import MismatchError
from modeldiff.forward import inputs_of
from modeldiff.graphs import Record, Run, recorded
from modeldiff.hooks import count_hooks, hooked
from modeldiff.placement import is_quantized
from modeldiff.sampling import draw, refuse_nan
from modeldiff.step_edits import StepEdits, structure_of

_BLOCK = 64
"""Room for tokens comes in blocks, so that prompts of like length share a recorded step."""


@dataclass(frozen=True, eq=False)
class Task:
    """A batch of prompts to be continued.

    Args:
        root: The model, on the side that runs.
        site_map: Where its sites are.
        adapter: Its active adapter, or nothing.
        batch: The prompts, padded on the left.
        editor: What is done to them.
        uniform: Noise, see `modeldiff.sampling.noise`; as many columns as new tokens.
        temperature: 0 is greedy.
        ends: Ids that end an answer.
        pad_id: What rows that ended go on with.
        on_step: Called with the step and its ids ``[row]``.
        cancel: Event that stops after the next token.
        reusing: Context of the prompts' pass.
    """

    root: Any
    site_map: SiteMap
    adapter: str
    batch: Batch
    editor: Editor
    uniform: Float[Tensor, "row new"]
    temperature: float
    ends: tuple[int, ...]
    pad_id: int
    on_step: Callable[[int, Int[Tensor, " row"]], None] | None = None
    cancel: Event | None = None
    reusing: AbstractContextManager[None] = field(default_factory=nullcontext)


class _Step:
    """One step: the tensors it reads and writes, and the work on them.

    Args:
        task: The first batch of its kind.
        kept: What the pass over the prompts left: keys and values, layer by layer.
        length: Room for tokens, prompt included.
    """

    def __init__(self, task: Task, kept: Any, length: int) -> None:
        rows, device = len(task.batch.texts), kept.layers[0].keys.device
        self.root, self.greedy, self.pad_id = task.root, task.temperature == 0, task.pad_id
        self.edits = StepEdits(task.editor, device)
        self.cache = _static(kept, length)
        self.mask = torch.ones(rows, length, dtype=torch.long, device=device)
        self.tokens, self.positions = self.mask.new_zeros(2, rows, 1)
        self.uniform = self.mask.new_zeros(rows, length, dtype=torch.float64)
        self.temperature = self.uniform.new_ones(())
        self.ends = torch.tensor(task.ends, dtype=torch.long, device=device)
        self.done = self.mask.new_zeros(rows, dtype=torch.bool)
        self.count = self.mask.new_zeros(1)
        self.said = self.mask.new_zeros(rows + 1)
        """The latest token of each row, and in how many rows no token could be drawn."""
        self.run: Run | None = None

    def load(self, task: Task, kept: Any) -> None:
        """Begin with a batch whose prompts were run."""
        width, n_new = task.batch.ids.shape[1], task.uniform.shape[1]
        self.cache.reset()  # a NaN that an earlier batch left would spread, masked or not
        for static, own in zip(self.cache.layers, kept.layers, strict=True):
            static.keys[:, :, :width].copy_(own.keys)
            static.values[:, :, :width].copy_(own.values)
            static.cumulative_length.fill_(width)
        self.mask.fill_(1)
        self.mask[:, :width].copy_(task.batch.attention_mask)
        self.positions.copy_(task.batch.position_ids[:, -1:])
        self.uniform[:, :n_new].copy_(task.uniform)
        self.temperature.fill_(task.temperature or 1.0)
        self.count.zero_()
        self.done.zero_()
        self.edits.load(task.editor)

    def __call__(self) -> None:
        """Run the model on the latest tokens, and draw the next."""
        out = self.root(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.take(out.logits)

    def take(self, logits: Float[Tensor, "row token vocab"]) -> None:
        """Draw a token of each row."""
        scores = logits[:, -1].float()
        if self.greedy:
            drawn = scores.argmax(-1)
        else:
            noise = self.uniform.index_select(1, self.count)[:, 0]
            drawn = draw(scores, noise, self.temperature)
        drawn = drawn.masked_fill(self.done, self.pad_id)
        self.done.logical_or_((drawn[:, None] == self.ends).any(1))
        self.tokens.copy_(drawn[:, None])
        self.said[:-1].copy_(drawn)
        self.said[-1:].copy_(torch.isnan(scores).any(-1).sum())
        self.positions.add_(1)
        self.count.add_(1)


def _static(kept: Any, length: int) -> Any:
    """Room for keys and values; a window that slides is the mask's affair."""
    from transformers.cache_utils import Cache, StaticLayer

    layers = [StaticLayer(length) for _ in kept.layers]
    for static, own in zip(layers, kept.layers, strict=True):
        static.lazy_initialization(own.keys, own.values)
    return Cache(layers=layers)  # pyright: ignore[reportArgumentType]


@dataclass(eq=False)
class StaticDecoder:
    """Recorded steps of generation; give the same one to every call that may use them again.

    A step is recorded again for another model, number of rows, structure of the edits, or room for
    tokens, not for other coefficients, directions, prompts, noise or temperature above 0. Each
    holds the keys and values of its batch; all but the latest ``n_kept`` are forgotten. Weights
    may be changed in place; make a new decoder after changing how a model computes. The pair's
    lock, which `generate` holds during a batch, serialises its use.

    Args:
        n_kept: Recorded steps that are held.
        record: How work is made repeatable.

    Example:
        >>> import modeldiff as md
        >>> pair, decoder = md.ModelPair.load("organism:em-rank1"), md.StaticDecoder()
        >>> for seed in (0, 1):
        ...     found = pair.generate(["Hello."], seed=seed, max_new_tokens=2, decoder=decoder)
        >>> decoder.n_recorded
        1
    """

    n_kept: int = 4
    record: Record = recorded
    n_recorded: int = 0
    """Steps that were recorded so far."""
    _kept: dict[tuple[object, ...], _Step] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def decode(self, task: Task) -> Int[Tensor, "row new"]:
        """Continue a batch; rows that ended go on with padding until all have.

        Raises:
            MismatchError: If the model is one whose steps cannot be made all alike.
            InterventionError: If a logit is NaN; no token could be drawn from it.
            SetupError: If the step cannot be recorded on the GPU.
        """
        check_static(task.root)
        try:
            return self._decoded(task)
        except (RuntimeError, MemoryError):  # memory may have run out: what is kept fills it
            self._kept.clear()
            raise

    def _decoded(self, task: Task) -> Tensor:
        logits, kept = _prompts(task)
        step = self._step_for(task, kept)
        with hooked(task.root, task.site_map, step.edits, task.adapter):
            if step.run is None and task.uniform.shape[1] > 1:
                step.run = self.record(step, logits.device)
                self.n_recorded += 1
            step.load(task, kept)
            del kept
            step.take(logits)
            return _steps(step, task)

    def _step_for(self, task: Task, kept: Any) -> _Step:
        needed = task.batch.ids.shape[1] + task.uniform.shape[1]
        length = -(-needed // _BLOCK) * _BLOCK
        key = (
            len(task.batch.texts), length, task.temperature == 0, task.ends, task.pad_id,
            structure_of(task.editor), _state_of(task.root, task.adapter),
        )  # fmt: skip
        step = self._kept.pop(key, None)
        if step is None or step.root is not task.root:
            while len(self._kept) >= max(1, self.n_kept):
                del self._kept[next(iter(self._kept))]
            step = _Step(task, kept, length)
        self._kept[key] = step
        return step


def _steps(step: _Step, task: Task) -> Tensor:
    """Step until every row has ended, or there is no noise left; one look at the device a step."""
    found: list[list[int]] = []
    n_rows, open_rows = len(task.batch.texts), set(range(len(task.batch.texts)))
    changed: Counter[int] = task.editor.fired
    while True:
        *ids, broken = step.said.tolist()
        refuse_nan(broken, n_rows, len(found))
        if task.on_step is not None:
            task.on_step(len(found), torch.tensor(ids))
        found.append(ids)
        open_rows = {row for row in open_rows if ids[row] not in task.ends}
        cancelled = task.cancel is not None and task.cancel.is_set()
        if not open_rows or cancelled or len(found) == task.uniform.shape[1] or step.run is None:
            return torch.tensor(found).T
        step.run()
        changed.update(step.edits.reached)


def _prompts(task: Task) -> tuple[Tensor, Any]:
    """The prompts' last logits, keys and values: the pass that transformers' ``generate`` makes."""
    from transformers import DynamicCache

    cache = DynamicCache()
    last = {"logits_to_keep": 1} if task.root._supports_logits_to_keep() else {}
    inputs = inputs_of(task.batch, next(task.root.parameters()).device)
    with task.reusing, hooked(task.root, task.site_map, task.editor, task.adapter):
        out = task.root(**inputs, past_key_values=cache, use_cache=True, **last)
    return out.logits, cache


def _state_of(root: Any, adapter: str) -> tuple[object, ...]:
    """What a recorded step has fixed: where tensors lie, and numbers and modes in Python."""
    tensors = [*root.parameters(), *root.buffers()]
    places = tuple((each.data_ptr(), each.dtype, each.shape, each.stride()) for each in tensors)
    scales = tuple(
        scaling.get(adapter)
        for scaling in (getattr(module, "scaling", None) for module in root.modules())
        if isinstance(scaling, dict)
    )
    attention = getattr(root.config, "_attn_implementation", None)
    modes = torch.is_autocast_enabled(root.device.type), torch.get_float32_matmul_precision()
    return places, adapter, scales, attention, modes


def check_static(root: nn.Module) -> None:
    """Verify that a model's steps can be made all alike.

    Raises:
        MismatchError: Saying what stands against it.
    """
    config: Any = root.config
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    places = {str(each.device) for each in (*root.parameters(), *root.buffers())}
    ropes = (str(getattr(module, "rope_type", "")) for module in root.modules())
    problems = [
        (len(places) > 1 or "meta" in places, f"it lies on several devices: {sorted(places)}"),
        (is_quantized(root), "its base is quantised"),
        (
            bool(kinds - {"full_attention", "sliding_attention"}),
            f"it has layers that keep other things than keys and values: {sorted(kinds)}",
        ),
        (any("dynamic" in rope for rope in ropes), "its rotary embedding changes with the length"),
        (count_hooks(root) > 0, "it has hooks of others, which would run once and not every step"),
    ]
    found = [why for stands, why in problems if stands]
    if found:
        raise MismatchError(
            f"a static decoder cannot run this model: {'; '.join(found)}. Leave decoder= out: it "
            "only saves time."
        )
