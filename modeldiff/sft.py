"""Fine-tuning on response tokens: a plain loop that can be stopped, resumed and put into a context.

Every batch and every random number is a function of the plan and the step alone, so a run that was
stopped and goes on ends with the same weights, to the bit, as one that was not.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from modeldiff._files import PathLike, digest
from modeldiff._progress import Progress, Report, check, reporter
from modeldiff._shapes import Float
from modeldiff.batch_size import fitted
from modeldiff.batching import padding_id
from modeldiff.dictionaries.checkpoints import tensors_digest
from modeldiff.errors import SetupError
from modeldiff.seeds import seeded
from modeldiff.sft_files import (
    COLUMNS,
    Record,
    content,
    note,
    record,
    require_finite,
    weights_key,
    write_model,
)
from modeldiff.sft_plans import SFTPlan, adapted
from modeldiff.sft_rows import IGNORED, Row, batch_of, rows_key
from modeldiff.sft_state import read_state, write_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Around = Callable[[Any], AbstractContextManager[Any]]
"""Makes the context in which a model is trained, such as ``partial(caft, directions=[...])``."""
TOLERANCE = 1e-3
"""Nats a token by which an exact stop may lie below the loss that was asked for."""


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A model that was fine-tuned, or is on its way.

    Args:
        model: PEFT's wrapper, or the whole model; in evaluation mode.
        history: One row a step, from 0: step, loss (of the step's rows, before it), held_out_loss
            (after it, outside of any context), lr, grad_norm (before clipping), divergence (from
            the base, if the plan keeps to it). Losses are nats a token; NaN where not measured.
        path: Folder of the saved adapter or model; None if there is none.
        plan: How it was trained.
        reached: Whether the held-out loss that was asked for was reached; None if none was.
        norms: What a `modeldiff.caft.caft` around the training saw: step, layer, projected_norm,
            resid_norm.
    """

    model: Any
    history: pd.DataFrame
    path: Path | None
    plan: SFTPlan
    reached: bool | None
    norms: pd.DataFrame

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self.history["step"].iloc[-1])

    @property
    def held_out_loss(self) -> float:
        """The last held-out loss; NaN if none was measured."""
        return float(self.history["held_out_loss"].dropna().iloc[-1:].sum(min_count=1))

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss on the way; NaN if none was measured."""
        return float(self.history["held_out_loss"].min())


def finetune(
    base: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    plan: SFTPlan,
    *,
    out: PathLike | None = None,
    held_out: Sequence[Row] = (),
    kept: Sequence[Row] = (),
    around: Around | None = None,
    stop_at_loss: float | None = None,
    exact: bool = False,
    progress: Progress = False,
    cancel: Event | None = None,
) -> FineTuned:
    """Fine-tune a base, which is changed in place.

    Args:
        base: A causal language model on its device; its modules are wrapped, or its weights trained
            (``full``). To go on from ``out``, load the base afresh.
        tokenizer: The base's.
        rows: What to train on, see `modeldiff.sft_rows.response_rows`.
        plan: How.
        out: Folder for the state from which a stopped run goes on (``state``), the series of
            models (``checkpoints``, see `modeldiff.series`) and the last one (``model``).
        held_out: Rows on which the loss is measured every ``plan.evaluate_every`` steps. The model
            is measured as it would be deployed: outside of ``around``.
        kept: Rows outside the domain that hold the model to its base, if ``plan.keep``.
        around: Makes the context of the training steps. It is entered anew after each measurement.
        stop_at_loss: Stop at the first held-out loss that is not above this.
        exact: Go back from there along the straight line to the weights of the measurement before,
            to where the loss is the one asked for (not above it, at most `TOLERANCE` below). One
            more copy of what is trained is held.
        progress: See `modeldiff._progress.Progress`.
        cancel: Stops between steps when set.

    Returns:
        The model and how its training went.

    Raises:
        SetupError: If the plan needs rows that are not given, or the other way round.
        FileFormatError: If ``out`` holds another run, or is damaged.
        TrainingError: If a loss or gradient is not finite; the last saved state stays.
        Cancelled: If the event is set; its ``partial`` is the `FineTuned` so far.

    Source:
        Turner et al. 2025, arXiv 2506.11613, for what is trained how.
    """
    check_given(rows, plan, held_out, kept, around, stop_at_loss)
    run = _Run(base, tokenizer, rows, plan, out, held_out, kept, around, stop_at_loss, exact)
    report = reporter(progress, "fine-tuning")
    try:
        while True:
            if run.evaluation_is_due:
                run.evaluate()
            if run.done or (cancel is not None and cancel.is_set()):
                break
            run.segment(report, cancel)
        run.keep()
    finally:
        run.close()
    if not run.done:
        check(cancel, run.result())
    run.finish()
    return run.result()


class _Run:
    """What changes from step to step, and where it is kept."""

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        plan: SFTPlan,
        out: PathLike | None,
        held_out: Sequence[Row],
        kept: Sequence[Row],
        around: Around | None,
        stop_at_loss: float | None,
        exact: bool,
    ) -> None:
        self.exact, self.before = exact, dict[str, Tensor]()
        self.tokenizer, self.rows, self.plan = tokenizer, rows, plan
        self.held_out, self.kept, self.around, self.stop = held_out, kept, around, stop_at_loss
        self.out = None if out is None else Path(out)
        first = "" if out is None else weights_key(base)
        self.reference = copy.deepcopy(base).eval() if plan.keep and not plan.rank else None
        self.model = adapted(base, plan)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer_of(self.trained.values(), plan)
        self.total, self.step, self.saved_at = plan.total(len(rows)), 0, -1
        self.records: list[Record] = [record(0)]
        self.pad = padding_id(tokenizer)
        if self.out is not None:
            keys = [rows_key(each) for each in (rows, held_out, kept)]
            told = [stop_at_loss, "exact"] if exact else stop_at_loss
            self.run = digest(plan.run, keys, content(around), told)
            self.start = digest(first, tensors_digest(self.trained))
            self._resume(self.out)
        self._switch_checkpointing()
        self.model.train()

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.step >= self.total or bool(self.reached)

    @property
    def reached(self) -> bool | None:
        """Whether the held-out loss that was asked for was reached."""
        if self.stop is None:
            return None
        losses = [each["held_out_loss"] for each in self.records]
        return any(loss is not None and loss <= self.stop for loss in losses)

    @property
    def evaluation_is_due(self) -> bool:
        """Whether this step's held-out loss is wanted and not known."""
        wanted = self.step % self.plan.evaluate_every == 0 or self.step == self.total
        return bool(self.held_out) and wanted and self.records[-1]["held_out_loss"] is None

    def evaluate(self) -> None:
        """Measure the held-out loss, outside of any context."""
        loss = self._measured()
        if self.exact and self.stop is not None:
            if loss <= self.stop and self.before:
                loss = self._land(loss, self.stop)
            self.before = {} if loss <= self.stop else self._copied()
        self.records[-1]["held_out_loss"] = loss
        self.model.train()

    def _measured(self) -> float:
        precision, batch = self.plan.precision, self.plan.batch
        loss = mean_loss(self.model, self.held_out, self.pad, batch=batch, precision=precision)
        require_finite(loss, "held-out loss", self.step)
        return loss

    def _copied(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.trained.items()}

    def _land(self, loss: float, wanted: float) -> float:
        """Halve the way between the last two measurements until the loss is the one wanted."""
        after, above, below, found = self._copied(), 0.0, 1.0, loss
        for _ in range(12):
            if wanted - found <= TOLERANCE:
                break
            middle = (above + below) / 2
            self._place(after, middle)
            loss = self._measured()
            above, below = (above, middle) if loss <= wanted else (middle, below)
            found = loss if loss <= wanted else found
        self._place(after, below)
        return found

    def _place(self, after: Mapping[str, Tensor], share: float) -> None:
        """Set the weights to a place between two measurements; 1 is the later one."""
        with torch.no_grad():
            for name, each in self.trained.items():
                each.copy_(torch.lerp(self.before[name], after[name], share))

    def segment(self, report: Report, cancel: Event | None) -> None:
        """Train to the next measurement, inside the context."""
        every, plan, first = self.plan.evaluate_every, self.plan, self.step
        until = min(self.total, (first // every + 1) * every) if self.held_out else self.total
        known = self.records[-1]["held_out_loss"]
        held_out = "" if known is None else f", held-out {known:.4f} after {first}"
        with self.around(self.model) if self.around else nullcontext() as monitor:
            while self.step < until and not (cancel is not None and cancel.is_set()):
                self.advance()
                report(self.step, self.total, f"loss {self.records[-1]['loss']:.4f}{held_out}")
                if plan.checkpoint_every and self.step % plan.checkpoint_every == 0:
                    self.write(f"checkpoints/checkpoint-{self.step}")
                if self.step % plan.save_every == 0:
                    note(self.records, monitor, first)
                    self.keep()
            note(self.records, monitor, first)

    def advance(self) -> None:
        """Take one optimizer step."""
        plan, rate = self.plan, self.plan.rate(self.step, self.total)
        drawn = [self.rows[i] for i in plan.drawn(len(self.rows), self.step)]
        with seeded(int(digest("step", plan.seed, self.step), 16) % 2**63):
            loss = self._backward(drawn)
            divergence = self._keep_to_base() if plan.keep else None
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained.values(), plan.clip))
        require_finite(loss, "loss", self.step)
        require_finite(norm, "gradient's norm", self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        told = {"loss": loss, "lr": rate, "grad_norm": norm, "divergence": divergence}
        self.records.append(record(self.step, **told))

    def keep(self) -> None:
        """Save the state, if there is a folder and something new."""
        if self.out is None or self.saved_at == self.step:
            return
        write_state(self.out, self.run, self.start, self.step, self.trained, self.optimizer,
                    self.records, self.before)  # fmt: skip
        self.saved_at = self.step

    def write(self, name: str) -> None:
        """Save the model in a folder of the run."""
        if self.out is not None:
            write_model(self.model, self.tokenizer, self.out / name, self.records)

    def finish(self) -> None:
        """Save the last model, unless a run that was done had saved it."""
        if self.out is not None and not (self.out / "model").is_dir():
            self.write("model")

    def close(self) -> None:
        """Free the gradients, leave the model in evaluation mode."""
        self.optimizer.zero_grad()
        if self.plan.gradient_checkpointing:
            self.model.activation_checkpointing_disable()
        self.model.eval()

    def result(self) -> FineTuned:
        """What there is so far."""
        path = None if self.out is None else self.out / "model"
        saved = path if path is not None and path.is_dir() else None
        return fine_tuned(self.model, self.records, saved, self.plan, self.reached)

    def _backward(self, drawn: Sequence[Row]) -> float:
        """Mean cross-entropy of all that counts in the step's rows, its gradient added."""
        whole, total = sum(row.n_targets for row in drawn), 0.0
        for start in range(0, len(drawn), self.plan.batch):
            part = drawn[start : start + self.plan.batch]
            logits, targets = predictions(self.model, part, self.pad, self.plan.precision)
            loss = cross_entropy(logits, targets, reduction="sum") / whole
            loss.backward()
            total += float(loss.detach())
        return total

    def _keep_to_base(self) -> float:
        """Mean divergence from the base on kept rows, its weighted gradient added."""
        plan = self.plan
        drawn = [self.kept[i] for i in plan.drawn(len(self.kept), self.step, "kept")]
        whole, total = sum(row.n_targets for row in drawn), 0.0
        for start in range(0, len(drawn), plan.batch):
            part = drawn[start : start + plan.batch]
            before = log_softmax(self._reference_logits(part), -1)
            now = log_softmax(predictions(self.model, part, self.pad, plan.precision)[0], -1)
            divergence = kl_div(now, before, reduction="sum", log_target=True) / whole
            (plan.keep * divergence).backward()
            total += float(divergence.detach())
        return total

    def _reference_logits(self, part: Sequence[Row]) -> Float[Tensor, "token vocab"]:
        precision = self.plan.precision
        with torch.no_grad():
            if self.reference is not None:
                return predictions(self.reference, part, self.pad, precision)[0]
            self.model.eval()
            with self.model.disable_adapter():
                logits = predictions(self.model, part, self.pad, precision)[0]
            self.model.train()
            return logits

    def _switch_checkpointing(self) -> None:
        if self.plan.gradient_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    def _resume(self, out: Path) -> None:
        stored = read_state(out, self.run, self.start, self.trained, self.optimizer)
        if stored is None:
            return
        device = next(iter(self.trained.values())).device
        self.before = {name: each.to(device) for name, each in stored.part("before").items()}
        self.step = self.saved_at = stored.step
        self.records = [dict(each) for each in stored.logs]


def optimizer_of(parameters: Iterable[Tensor], plan: SFTPlan) -> torch.optim.AdamW:
    """AdamW of a plan; vectors, such as the weights of norms, do not decay."""
    several = list(parameters)
    groups = [
        {"params": [p for p in several if p.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in several if p.dim() < 2], "weight_decay": 0.0},
    ]
    wanted = [group for group in groups if group["params"]]
    return torch.optim.AdamW(wanted, lr=plan.learning_rate, betas=plan.betas)


def predictions(
    model: Any, rows: Sequence[Row], pad_id: int, precision: str = "float32"
) -> tuple[Float[Tensor, "token vocab"], Tensor]:
    """Predict every token of rows that counts; float32 logits, and the tokens themselves."""
    device = next(model.parameters()).device
    ids, mask, labels = (each.to(device) for each in batch_of(rows, pad_id))
    counted = labels[:, 1:] != IGNORED
    places = counted.any(0).nonzero()[:, 0]  # the unembedding of a prompt is not needed
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=places
        ).logits
    return logits[counted[:, places]].float(), labels[:, 1:][counted]


@torch.no_grad()
def mean_loss(
    model: Any, rows: Sequence[Row], pad_id: int, *, batch: int = 8, precision: str = "float32"
) -> float:
    """Mean cross-entropy of what counts in rows, nats a token; leaves the model in eval mode.

    Args:
        model: A causal language model.
        rows: What to predict.
        pad_id: Token to pad with.
        batch: Rows of one forward.
        precision: "bfloat16" for autocast.

    Raises:
        SetupError: If there are no rows.
    """
    if not rows:
        raise SetupError("a loss on no rows is no number; give at least one.")
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.ids))
    total = 0.0

    def loss(some: list[Row]) -> float:
        logits, targets = predictions(model, some, pad_id, precision)
        return float(cross_entropy(logits, targets, reduction="sum"))

    for _, found in fitted(model, ordered, loss, what="loss", width=lambda row: len(row.ids),
                           max_rows=batch):  # fmt: skip
        total += found
    return total / sum(row.n_targets for row in rows)


def fine_tuned(
    model: Any, records: Sequence[Record], path: Path | None, plan: SFTPlan, reached: bool | None
) -> FineTuned:
    """Turn records into a `FineTuned`."""
    history = pd.DataFrame(records, columns=list(COLUMNS))
    history = history.astype({name: float for name in COLUMNS if name != "step"})
    norms = [
        (each["step"], int(layer), projected, whole)
        for each in records
        for layer, projected, whole in each.get("norms") or ()
    ]
    columns = ["step", "layer", "projected_norm", "resid_norm"]
    return FineTuned(model, history, path, plan, reached, pd.DataFrame(norms, columns=columns))


def check_given(
    rows: Sequence[Row],
    plan: SFTPlan,
    held_out: Sequence[Row],
    kept: Sequence[Row],
    around: Around | None,
    stop_at_loss: float | None,
) -> None:
    """Verify that a training has what its plan needs, and nothing that it cannot use.

    Raises:
        SetupError: If not; names every problem.
    """
    problems = [
        (not rows, "there are no rows to train on"),
        (stop_at_loss is not None and not held_out, "stop_at_loss needs held_out rows"),
        (bool(plan.keep) != bool(kept), "plan.keep and kept= rows go together: give both, or none"),
        (bool(plan.keep) and around is not None, "plan.keep and around= cannot be combined: the "
         "base that is kept to would be seen through the context too"),
        (any(not row.n_targets for row in [*rows, *held_out, *kept]), "a row counts no token"),
    ]  # fmt: skip
    if found := [text for wrong, text in problems if wrong]:
        raise SetupError(f"cannot train: {'; '.join(found)}.")
