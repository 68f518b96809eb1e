"""The same rows and plan through TRL's trainer, for what it brings: callbacks, its own settings."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from modeldiff._files import PathLike
from modeldiff._progress import Progress, Report, check, reporter
from modeldiff.batching import padding_id
from modeldiff.errors import SetupError
from modeldiff.seeds import seeded
from modeldiff.sft import (
    Around,
    FineTuned,
    check_given,
    fine_tuned,
    mean_loss,
    optimizer_of,
)
from modeldiff.sft_files import Record, note, record, require_finite, write_model
from modeldiff.sft_plans import SFTPlan, adapted
from modeldiff.sft_rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def trl_finetune(
    base: Any,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    plan: SFTPlan,
    *,
    out: PathLike | None = None,
    held_out: Sequence[Row] = (),
    around: Around | None = None,
    stop_at_loss: float | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
    **settings: Any,
) -> FineTuned:
    """Fine-tune a base with TRL's ``SFTTrainer``, which changes the base in place.

    The trainer gets tokens and labels as they are, in the plan's order, with the plan's optimizer
    and rates, so that its losses are those of the plain loop up to rounding. It saves no state: a
    stopped run does not go on.

    Args:
        base: See `modeldiff.sft.finetune`.
        tokenizer: The base's.
        rows: What to train on.
        plan: How; without ``keep``.
        out: Folder for the series of models and the last one.
        held_out: Rows to measure, outside of ``around``.
        around: Makes the context of the training steps.
        stop_at_loss: Stop at the first held-out loss that is not above this.
        progress: See `modeldiff._progress.Progress`.
        cancel: Stops between steps when set.
        **settings: For TRL's ``SFTConfig``, beyond what the plan and the result need.

    Raises:
        SetupError: If TRL is not installed, for a plan with ``keep``, or for a setting that the
            plan makes.
        TrainingError: If a loss or gradient is not finite.
        Cancelled: If the event is set; its ``partial`` is the `FineTuned` so far.
    """
    trl = _trl()
    check_given(rows, plan, held_out, (), around, stop_at_loss)
    model = adapted(base, plan)
    total = plan.total(len(rows))
    watch = _Watch(model, tokenizer, plan, total, out, held_out, around, stop_at_loss,
                   reporter(progress, "fine-tuning"), cancel)  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(seeded(plan.seed))
        stack.enter_context(_put_back(model))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = _trainer(trl, model, tokenizer, rows, plan, total, folder, settings)
        trainer.add_callback(_callback(watch))
        stack.enter_context(watch.contexts)
        if not watch.stopped:
            trainer.train()
    model.zero_grad()
    model.eval()
    if not watch.stopped or watch.reached:
        watch.write("model")
    found = watch.result()
    if watch.step < total and not watch.reached:
        check(cancel, found)
    return found


class _Watch:
    """What is measured, saved and decided between the trainer's steps."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: SFTPlan,
        total: int,
        out: PathLike | None,
        held_out: Sequence[Row],
        around: Around | None,
        stop_at_loss: float | None,
        report: Report,
        cancel: Event | None,
    ) -> None:
        self.model, self.tokenizer, self.plan, self.total = model, tokenizer, plan, total
        self.out = None if out is None else Path(out)
        self.held_out, self.around, self.stop = held_out, around, stop_at_loss
        self.report, self.cancel = report, cancel
        self.step, self.first = 0, 0
        self.records: list[Record] = [record(0)]
        self.contexts, self.monitor = ExitStack(), None
        self.evaluate()

    @property
    def reached(self) -> bool | None:
        """Whether the held-out loss that was asked for was reached."""
        if self.stop is None:
            return None
        losses = (each["held_out_loss"] for each in self.records)
        return any(loss is not None and loss <= self.stop for loss in losses)

    @property
    def stopped(self) -> bool:
        """Whether no further step is wanted before the last."""
        return bool(self.reached) or (self.cancel is not None and self.cancel.is_set())

    def enter(self) -> None:
        """Enter the context of the training steps."""
        if self.around is not None:
            self.first = self.step
            self.monitor = self.contexts.enter_context(self.around(self.model))

    def leave(self) -> None:
        """Leave it."""
        note(self.records, self.monitor, self.first)
        self.monitor = None
        self.contexts.close()

    def evaluate(self) -> None:
        """Measure the held-out loss."""
        if self.held_out:
            pad, plan = padding_id(self.tokenizer), self.plan
            loss = mean_loss(
                self.model, self.held_out, pad, batch=plan.batch, precision=plan.precision
            )
            require_finite(loss, "held-out loss", self.step)
            self.records[-1]["held_out_loss"] = loss

    def stepped(self, loss: float, rate: float, norm: float) -> None:
        """Take note of a step; measure and save what is due after it."""
        require_finite(loss, "loss", self.step)
        require_finite(norm, "gradient's norm", self.step)
        self.step += 1
        self.records.append(record(self.step, loss=loss, lr=rate, grad_norm=norm))
        self.report(self.step, self.total, f"loss {loss:.4f}")
        if self.held_out and (self.step % self.plan.evaluate_every == 0 or self.step == self.total):
            self.leave()
            self.evaluate()
            if self.step < self.total and not self.stopped:
                self.enter()
        if self.plan.checkpoint_every and self.step % self.plan.checkpoint_every == 0:
            self.write(f"checkpoints/checkpoint-{self.step}")

    def write(self, name: str) -> None:
        """Save the model in a folder of the run."""
        if self.out is not None:
            write_model(self.model, self.tokenizer, self.out / name, self.records)

    def result(self) -> FineTuned:
        """What there is so far."""
        path = None if self.out is None else self.out / "model"
        saved = path if path is not None and path.is_dir() else None
        return fine_tuned(self.model, self.records, saved, self.plan, self.reached)


def _trl() -> Any:
    try:
        import datasets  # noqa: F401
        import trl
    except ImportError as error:
        raise SetupError(
            f"TRL is not installed ({error}): pip install 'modeldiff-lab[train]'. "
            "modeldiff.sft.finetune does the same without it."
        ) from error
    return trl


def _trainer(
    trl: Any,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    plan: SFTPlan,
    total: int,
    folder: str,
    settings: dict[str, Any],
) -> Any:
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PrinterCallback, ProgressCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    own = _settings(model, plan, total, folder)
    if clash := sorted(own.keys() & settings.keys()):
        raise SetupError(f"{', '.join(clash)}: the plan says that; change it there.")
    drawn = [rows[i] for step in range(total) for i in plan.drawn(len(rows), step)]
    data = Dataset.from_dict(
        {"input_ids": [row.ids for row in drawn], "labels": [row.labels for row in drawn]}
    )
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad], plan)
    rates = LambdaLR(optimizer, lambda n: plan.rate(min(n, total - 1), total) / plan.learning_rate)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**own, **settings),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=padding_id(tokenizer)),
        optimizers=(optimizer, rates),
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _settings(model: Any, plan: SFTPlan, total: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": total,
        "per_device_train_batch_size": plan.batch,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": plan.learning_rate,
        "max_grad_norm": plan.clip,
        "bf16": plan.precision == "bfloat16",
        "activation_checkpointing": plan.gradient_checkpointing,
        "seed": plan.seed,
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _callback(watch: _Watch) -> Any:
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        """Hands what the trainer logs to the watch, and its decision back."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Enter the context of the training steps."""
            watch.enter()

        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Take note of a step."""
            logs = rest.get("logs") or {}
            if "loss" in logs and state.global_step == watch.step + 1:
                watch.stepped(logs["loss"], logs["learning_rate"], logs["grad_norm"])
            control.should_training_stop |= watch.stopped

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Leave the context."""
            watch.leave()

    return Watching()


@contextmanager
def _put_back(model: Any) -> Iterator[None]:
    """Undo what the trainer does beyond training: patched forwards, global random states."""
    parts = [model, model.get_base_model()] if hasattr(model, "peft_config") else [model]
    before = [dict(vars(each)) for each in parts]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  the trainer seeds it
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for each, known in zip(parts, before, strict=True):
            for name in ("forward", "_original_forward"):
                vars(each).pop(name, None)
                if name in known:
                    vars(each)[name] = known[name]
