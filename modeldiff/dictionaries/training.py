"""Training a dictionary: one function for every architecture, resumable to the bit."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from threading import Event
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from modeldiff._files import PathLike, digest
from modeldiff._progress import Progress, reporter
from modeldiff._shapes import Bool, Float, Int
from modeldiff._version import __version__
from modeldiff.dictionaries.checkpoints import (
    Checkpoint,
    read_checkpoint,
    tensors_digest,
    write_checkpoint,
)
from modeldiff.dictionaries.configs import DictionaryConfig, Normaliser, TrainConfig
from modeldiff.dictionaries.losses import StepResult, constrain_gradients, loss, require_finite
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Rows, Source, checked
from modeldiff.errors import Cancelled, FileFormatError, MismatchError, TrainingError

__all__ = ["PlainStep", "TrainConfig", "TrainLog", "Trained", "train"]
_NOT_THE_RUN = ("log_every", "checkpoint_every", "fast")  # do not change what is computed


@dataclass(frozen=True)
class TrainLog:
    """One line of a training's log, of one batch.

    Args:
        step: Steps done.
        loss: What was made small.
        mse: Mean squared error of a coordinate of normalised rows.
        fve: For each model, the share of the batch's variance that is explained.
        l0: Mean latents that fired on a row.
        dead: Share of the latents that have not fired for long.
        lr: Learning rate.
        seconds: Since this call of `train` began.
    """

    step: int
    loss: float
    mse: float
    fve: tuple[float, ...]
    l0: float
    dead: float
    lr: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Trained:
    """A dictionary as far as it is trained, and the log of it."""

    dictionary: Dictionary
    logs: tuple[TrainLog, ...]


@runtime_checkable
class Stepper(Protocol):
    """One optimizer step after the other, on a dictionary's own weights."""

    def step(
        self,
        x_norm: Float[Tensor, "row model d_model"],
        k: float,
        lr: float,
        dead: Bool[Tensor, " latent"] | None = None,
    ) -> StepResult:
        """Take a step on normalised rows."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, but for the weights."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        ...

    def close(self) -> None:
        """Leave the dictionary's weights as everyone else expects them."""
        ...


class PlainStep:
    """The step as it is written down: dense, by autograd; the reference of the fused ones."""

    def __init__(self, dictionary: Dictionary, config: TrainConfig) -> None:
        self.dictionary, self.config, self.done = dictionary, config, 0
        self.trained = {
            name: each for name, each in dictionary.named_parameters() if each.requires_grad
        }
        self.adam = torch.optim.Adam(
            self.trained.values(), lr=0.0, betas=config.betas, eps=config.eps, fused=True
        )

    def step(
        self,
        x_norm: Float[Tensor, "row model d_model"],
        k: float,
        lr: float,
        dead: Bool[Tensor, " latent"] | None = None,
    ) -> StepResult:
        """Take a step on normalised rows.

        Args:
            x_norm: The batch.
            k: Mean latents a row.
            lr: Learning rate.
            dead: Latents that have not fired for long.
        """
        with torch.autocast(x_norm.device.type, torch.bfloat16, enabled=self.config.bf16):
            ramp = self.config.ramp(self.done)
            now = loss(self.dictionary, x_norm, self.config, k=k, ramp=ramp, dead=dead)
        self.adam.zero_grad()
        now.total.backward()
        self.update(lr)
        return now.result()

    def update(
        self, lr: float, norm_of: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    ) -> None:
        """Take Adam's step by the gradients that there are, clipped.

        Args:
            lr: Learning rate.
            norm_of: Norm of named gradients, if they are a part of others.

        Raises:
            TrainingError: If the gradient is not finite; nothing was changed then.
        """
        constrain_gradients(self.dictionary)
        grads = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        norm = (norm_of or _norm)(grads)
        require_finite(norm)
        torch.nn.utils.clip_grads_with_norm_(self.trained.values(), self.config.clip, norm)
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        if self.dictionary.config.activation == "jumprelu":
            self.dictionary.threshold.data.clamp_min_(0.0)
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """Moments of Adam by the names of the weights, and the number of steps."""
        kept = {"done": torch.tensor(self.done)}
        for name, each in self.trained.items():
            kept |= {f"{name}.{key}": value for key, value in self.adam.state[each].items()}
        return kept

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self.done = int(state["done"])
        for name, each in self.trained.items():
            self.adam.state[each] = {
                key.removeprefix(f"{name}."): value.to(each.device)
                for key, value in state.items()
                if key.startswith(f"{name}.")
            }

    def close(self) -> None:
        """Free the gradients."""
        self.adam.zero_grad()


def _norm(grads: Mapping[str, Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(grads.values())


class Alone:
    """How a run is divided among processes: not at all. See `modeldiff.distributed_training`."""

    about: tuple[Any, ...] = ()
    """What of the division changes what a checkpoint holds."""

    def part(self, rows: Float[Tensor, "row models d_model"]) -> Float[Tensor, "part models d"]:
        """This process's share of a batch."""
        return rows

    def whole(self, config: DictionaryConfig) -> DictionaryConfig:
        """Of the whole dictionary, of which this process trains one like this."""
        return config

    def mean(self, each: Tensor) -> Tensor:
        """Mean over the processes."""
        return each

    def stops(self, wanted: bool) -> bool:
        """Whether any process wants to stop."""
        return wanted

    def stepper(self, dictionary: Dictionary, config: TrainConfig, fast: bool) -> Stepper:
        """What takes the steps."""
        return _stepper(dictionary, config, fast)

    def read(self, folder: PathLike) -> Checkpoint | None:
        """Read the run's checkpoint."""
        return read_checkpoint(folder)

    def write(self, folder: PathLike, checkpoint: Checkpoint) -> None:
        """Write the run's checkpoint."""
        write_checkpoint(folder, checkpoint)


def train(
    dictionary: Dictionary,
    source: Source,
    config: TrainConfig,
    *,
    on_log: Callable[[TrainLog], None] | None = None,
    folder: PathLike | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
    split: Alone | None = None,
) -> Trained:
    """Train a dictionary, in place.

    A dictionary whose normaliser is the identity gets one fitted to the first rows; any other is
    kept. The order of the rows is a function of the seed alone, so a run that was stopped and
    goes on from its folder ends with the same weights, to the bit, as one that was not.

    Args:
        dictionary: What is trained, on the device where it is.
        source: Paired rows.
        config: How.
        on_log: Called every ``config.log_every`` steps and after the last.
        folder: Of the checkpoint. If it holds one of this very run, the run goes on from it.
        progress: See `modeldiff._progress.Progress`.
        cancel: Stops between steps when set; a checkpoint is written if there is a folder.
        split: How the run is divided among processes;
            `modeldiff.distributed_training.train_distributed` gives it.

    Returns:
        The same dictionary, and all logs of the run.

    Raises:
        MismatchError: If the rows or the configuration do not fit the dictionary.
        FileFormatError: If the folder's checkpoint is of another run, or damaged.
        TrainingError: If a gradient or the loss is not finite; the weights stay what they were
            before that step, and so does the last checkpoint.
        Cancelled: If the event is set; its ``partial`` is the `Trained` so far.

    Example:
        >>> from modeldiff.dictionaries.models import crosscoder
        >>> from modeldiff.dictionaries.sources import TensorRows
        >>> rows = TensorRows(torch.randn(256, 2, 4))
        >>> found = train(crosscoder(4, 16, k=2), rows, TrainConfig(steps=20, batch_size=64))
        >>> found.logs[-1].step, found.logs[-1].l0
        (20, 2.0)
    """
    split = split or Alone()
    run = _Run(dictionary, source, config, folder, split)
    report, began = reporter(progress, "training"), time.monotonic()
    batches = source.shuffled(config.batch_size, seed=config.seed, start=run.step)
    try:
        while run.step < config.steps and not split.stops(cancel is not None and cancel.is_set()):
            x = dictionary.normalised(split.part(next(batches).acts))
            seen, rate = run.advance(x)
            if run.step % config.log_every == 0 or run.step == config.steps:
                run.logs.append(run.log(seen, x, rate, time.monotonic() - began))
                report(run.step, config.steps, f"loss {run.logs[-1].loss:.4f}")
                if on_log is not None:
                    on_log(run.logs[-1])
            if config.checkpoint_every and run.step % config.checkpoint_every == 0:
                run.keep()
        run.keep()
    finally:
        run.stepper.close()
    if run.step < config.steps:
        raise Cancelled("cancelled; what is finished is in the attribute `partial`.", run.trained())
    return run.trained()


class _Run:
    """What changes from step to step, and where it is kept."""

    def __init__(
        self,
        dictionary: Dictionary,
        source: Source,
        config: TrainConfig,
        folder: PathLike | None,
        split: Alone,
    ) -> None:
        _check_fit(dictionary, source, config)
        self.dictionary, self.config, self.folder = dictionary, config, folder
        self.split, self.whole = split, split.whole(dictionary.config)
        self.source_key, self.step, self.logs = source.key, 0, list[TrainLog]()
        self.kept_at = -1
        self.seen: StepResult | None = None
        self.unfired: Int[Tensor, " latent"] = torch.zeros(
            dictionary.config.n_latents, dtype=torch.long, device=dictionary.device
        )
        fast = _is_fast(dictionary, config, self.whole)
        told = {name: each for name, each in asdict(config).items() if name not in _NOT_THE_RUN}
        self.run = digest(asdict(dictionary.config), told, fast, self.source_key, *split.about)
        self.start = tensors_digest(dictionary.state_dict())
        stored = None if folder is None else split.read(folder)
        if stored is not None:
            self._check_same(stored)
            dictionary.load_state_dict(stored.part("weights"))
        elif dictionary.normaliser.is_identity and config.normaliser_rows:
            dictionary.set_normaliser(_fitted(dictionary, source, config))
        self.stepper = split.stepper(dictionary, config, fast)
        if stored is not None:
            self._resume(stored)

    def advance(self, x: Float[Tensor, "row model d_model"]) -> tuple[StepResult, float]:
        """Take one step; what it saw, and its learning rate."""
        c, step = self.config, self.step
        rate = c.rate(step, self.whole.n_latents)
        dead = self.unfired >= c.rows_to_die
        seen = self.stepper.step(x, c.k_at(step, self.whole.k), rate, dead)
        self.unfired = torch.where(seen.fired, 0, self.unfired + c.batch_size)
        if self.dictionary.config.activation == "batch_topk" and step >= c.threshold_from:
            threshold = self.dictionary.threshold
            share = 0.0 if step == c.threshold_from else c.threshold_keeps
            threshold.mul_(share).add_((1 - share) * seen.lowest)
        self.step, self.seen = self.step + 1, seen
        return seen, rate

    def log(
        self, seen: StepResult, x: Float[Tensor, "row model d_model"], rate: float, seconds: float
    ) -> TrainLog:
        """Turn what a step saw into a line of the log."""
        self._require_finite(seen)
        variance = self.split.mean((x - self.split.mean(x.mean(0))).square().mean((0, 2)))
        dead = self.split.mean((self.unfired >= self.config.rows_to_die).double().mean())
        return TrainLog(
            step=self.step,
            loss=float(seen.loss),
            mse=float(seen.mse.mean()),
            fve=tuple((1 - seen.mse / variance).tolist()),
            l0=float(seen.l0),
            dead=float(dead),
            lr=rate,
            seconds=seconds,
        )

    def keep(self) -> None:
        """Write a checkpoint, if there is a folder and something new."""
        if self.folder is None or self.kept_at == self.step:
            return
        if self.seen is not None:
            self._require_finite(self.seen)
        tensors = {f"weights.{name}": each for name, each in self.dictionary.state_dict().items()}
        tensors |= {f"stepper.{name}": each for name, each in self.stepper.state().items()}
        tensors["unfired.rows"] = self.unfired
        logs = [asdict(each) for each in self.logs]
        self.split.write(self.folder, Checkpoint(self.run, self.start, self.step, tensors, logs))
        self.kept_at = self.step

    def trained(self) -> Trained:
        """What there is so far; the dictionary's provenance tells where it is from."""
        self.dictionary.provenance["training"] = {
            **asdict(self.config),
            "steps_done": self.step,
            "source": self.source_key,
            "start": self.start,
            "versions": {"modeldiff": __version__, "torch": str(torch.__version__)},
        }
        return Trained(self.dictionary, tuple(self.logs))

    def _require_finite(self, seen: StepResult) -> None:
        if not math.isfinite(float(seen.loss)):
            raise TrainingError(
                f"the loss is {float(seen.loss)} at step {self.step}. Are all rows finite? If "
                "they are, lower the learning rate."
            )

    def _check_same(self, stored: Checkpoint) -> None:
        known: dict[str, Any] = self.dictionary.provenance.get("training", {})
        if stored.run != self.run or stored.start not in (self.start, known.get("start")):
            raise FileFormatError(
                f"{str(self.folder)!r} holds {stored.step} steps of another run: other sizes, "
                "settings, rows or first weights. Nothing was changed; give another folder, or "
                "delete its checkpoint to train from the beginning."
            )

    def _resume(self, stored: Checkpoint) -> None:
        self.stepper.load(stored.part("stepper"))
        self.unfired = stored.tensors["unfired.rows"].to(self.dictionary.device)
        self.step = self.kept_at = stored.step
        self.start = stored.start
        self.logs = [TrainLog(**{**each, "fve": tuple(each["fve"])}) for each in stored.logs]


def _check_fit(dictionary: Dictionary, source: Source, config: TrainConfig) -> None:
    c = dictionary.config
    if checked(source).d_model != c.d_model:
        raise MismatchError(
            f"rows of width {source.d_model}, a dictionary of width {c.d_model}: give the rows "
            "of the site the dictionary is for."
        )
    if config.delta and c.n_models != 2:
        raise MismatchError("delta is for crosscoders of two models; give delta=0.")
    if config.k_start is not None and not 1 <= config.k_start <= c.n_latents:
        raise MismatchError(f"k_start={config.k_start} of {c.n_latents} latents.")


def _fitted(dictionary: Dictionary, source: Source, config: TrainConfig) -> Normaliser:
    needed = min(config.normaliser_rows, source.n_rows)
    batches: islice[Rows] = islice(
        source.shuffled(config.batch_size, seed=config.seed),
        max(1, needed // config.batch_size),
    )
    return Normaliser.fit(dictionary.view(rows.acts) for rows in batches)


def _is_fast(dictionary: Dictionary, config: TrainConfig, whole: DictionaryConfig) -> bool:
    if config.fast == "off":
        return False
    from modeldiff.dictionaries import fast

    able = fast.available(dictionary, config, whole)
    if config.fast == "on" and not able:
        raise MismatchError(
            f"fast='on', but there is no fused step for {dictionary}. Give fast='auto'."
        )
    return able


def _stepper(dictionary: Dictionary, config: TrainConfig, fast: bool) -> Stepper:
    if not fast:
        return PlainStep(dictionary, config)
    from modeldiff.dictionaries.fast import FastStep

    return FastStep(dictionary, config)
