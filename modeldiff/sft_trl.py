"""The same rows and plan through TRL's trainer, for what it brings: callbacks, its own settings."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from modeldiff._files import PathLike, digest
from modeldiff._progress import Progress, Report, check, reporter
from modeldiff.batching import padding_id
from modeldiff.dictionaries.checkpoints import tensors_digest
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
from modeldiff.sft_files import (
    Record,
    content,
    note,
    record,
    require_finite,
    weights_key,
    write_model,
)
from modeldiff.sft_plans import SFTPlan, adapted
from modeldiff.sft_rows import Row, rows_key
from modeldiff.sft_state import read_state, write_state

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
    and rates, so that its losses are those of the plain loop up to rounding. A stopped run goes on
    from its last state, to the bit as if it had not been stopped; the trainer's own checkpoints,
    which are pickles, are neither written nor read.

    Args:
        base: See `modeldiff.sft.finetune`.
        tokenizer: The base's.
        rows: What to train on.
        plan: How; without ``keep``.
        out: Folder for the state from which a stopped run goes on (``state``), the series of
            models and the last one.
        held_out: Rows to measure, outside of ``around``.
        around: Makes the context of the training steps.
        stop_at_loss: Stop at the first held-out loss that is not above this.
        progress: See `modeldiff._progress.Progress`.
        cancel: Stops between steps when set.
        **settings: For TRL's ``SFTConfig``, beyond what the plan and the result need.

    Raises:
        SetupError: If TRL is not installed, for a plan with ``keep``, or for a setting that the
            plan makes.
        FileFormatError: If ``out`` holds another run, or is damaged.
        TrainingError: If a loss or gradient is not finite.
        Cancelled: If the event is set; its ``partial`` is the `FineTuned` so far.
    """
    trl = _trl()
    check_given(rows, plan, held_out, (), around, stop_at_loss)
    first = "" if out is None else weights_key(base)
    model = adapted(base, plan)
    total = plan.total(len(rows))
    watch = _Watch(model, tokenizer, plan, total, out, held_out, around, stop_at_loss,
                   reporter(progress, "fine-tuning"), cancel)  # fmt: skip
    if out is not None:
        told = [content(around), stop_at_loss, content(settings)]
        watch.resume(["trl", plan.run, rows_key(rows), rows_key(held_out), told], first)
    watch.evaluate()
    with ExitStack() as stack:
        stack.enter_context(seeded(plan.seed))
        stack.enter_context(_put_back(model))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = _trainer(trl, watch, rows, folder, settings)
        trainer.add_callback(_callback(watch))
        stack.enter_context(watch.contexts)
        if not watch.stopped and watch.step < total:
            trainer.train()
    model.zero_grad()
    model.eval()
    watch.keep()
    if watch.step >= total or watch.reached:
        watch.finish()
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
        self.step, self.first, self.saved_at = 0, 0, -1
        self.records: list[Record] = [record(0)]
        self.contexts, self.monitor = ExitStack(), None
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer_of(self.trained.values(), plan)
        self.run, self.start = "", ""

    def resume(self, run: Sequence[Any], weights: str) -> None:
        """Go on from the folder's state, if there is one.

        Raises:
            FileFormatError: If it is another run's, or is damaged.
        """
        assert self.out is not None
        self.run, self.start = digest(*run), digest(weights, tensors_digest(self.trained))
        stored = read_state(self.out, self.run, self.start, self.trained, self.optimizer)
        if stored is not None:
            self.step = self.saved_at = stored.step
            self.records = [dict(each) for each in stored.logs]

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
        """Measure the held-out loss, if it is due and not known."""
        due = self.step % self.plan.evaluate_every == 0 or self.step == self.total
        if self.held_out and due and self.records[-1]["held_out_loss"] is None:
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
        if self.step % self.plan.save_every == 0:
            note(self.records, self.monitor, self.first)
            self.keep()

    def keep(self) -> None:
        """Save the state, if there is a folder and something new."""
        if self.out is None or self.saved_at == self.step:
            return
        write_state(self.out, self.run, self.start, self.step, self.trained, self.optimizer,
                    self.records, {})  # fmt: skip
        self.saved_at = self.step

    def finish(self) -> None:
        """Save the last model, unless a run that was done had saved it."""
        if self.out is not None and not (self.out / "model").is_dir():
            self.write("model")

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
    trl: Any, watch: _Watch, rows: Sequence[Row], folder: str, settings: dict[str, Any]
) -> Any:
    """TRL's trainer for the steps that are left."""
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PrinterCallback, ProgressCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model, plan, total, first = watch.model, watch.plan, watch.total, watch.step
    own = _settings(model, plan, max(1, total - first), folder)
    if clash := sorted(own.keys() & settings.keys()):
        raise SetupError(f"{', '.join(clash)}: the plan says that; change it there.")
    steps = range(min(first, total - 1), total)
    drawn = [rows[i] for step in steps for i in plan.drawn(len(rows), step)]
    data = Dataset.from_dict(
        {"input_ids": [row.ids for row in drawn], "labels": [row.labels for row in drawn]}
    )
    peak = plan.learning_rate
    rates = LambdaLR(watch.optimizer, lambda n: plan.rate(min(first + n, total - 1), total) / peak)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**own, **settings),
        train_dataset=data,
        processing_class=watch.tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=padding_id(watch.tokenizer)),
        optimizers=(watch.optimizer, rates),
    )
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    return trainer


def _settings(model: Any, plan: SFTPlan, steps: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": steps,
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

    done, steps = watch.step, ExitStack()

    class Watching(TrainerCallback):
        """Hands what the trainer logs to the watch, and its decision back."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Enter the context of the training steps."""
            watch.enter()

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Draw what is random in a step, such as dropout, by the step alone."""
            key = digest("step", watch.plan.seed, watch.step)
            steps.enter_context(seeded(int(key, 16) % 2**63))

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Put the generators back."""
            steps.close()

        def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            """Take note of a step."""
            logs = rest.get("logs") or {}
            if "loss" in logs and done + state.global_step == watch.step + 1:
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
