"""Training a dictionary with several processes, by rows or by latents.

By rows, every process has the whole dictionary and a share of each batch; gradients are averaged.
By latents, every process has a share of the latents and all rows: it encodes by itself, the
highest scores of all shares are found together, and the shares' reconstructions are added up. So
a dictionary may be larger than one GPU.

Both choose BatchTopK's latents of the whole batch, as one process does, and not each process of
its own rows: the threshold of inference is learnt from that choice, and a result that depends on
the number of processes could not be checked. Both take, up to rounding, the steps that one
process takes on the same batches; a run by rows may even go on with another number of processes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Event
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from modeldiff._files import PathLike, digest
from modeldiff._progress import Progress
from modeldiff._shapes import Bool, Float
from modeldiff.dictionaries.checkpoints import (
    Checkpoint,
    read_checkpoint,
    tensors_digest,
    write_checkpoint,
)
from modeldiff.dictionaries.configs import DictionaryConfig, TrainConfig
from modeldiff.dictionaries.losses import ALIKE, FLAT, Loss, StepResult, loss
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Source
from modeldiff.dictionaries.training import Alone, PlainStep, Stepper, Trained, TrainLog, train
from modeldiff.distributed import World, broadcast, read_part, write_part
from modeldiff.distributed_fast import DividedFastStep
from modeldiff.errors import MismatchError

By = Literal["rows", "latents"]
_TINY = 1e-12  # of a variance that is divided by
_CHOOSE = ("batch_topk", "topk")  # activations whose latents are chosen by rank
_LINEAR = ("relu", "gated")  # whose loss is a mean over rows, whoever has them


def train_distributed(
    dictionary: Dictionary,
    source: Source,
    config: TrainConfig,
    world: World,
    *,
    by: By = "rows",
    on_log: Callable[[TrainLog], None] | None = None,
    folder: PathLike | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Trained:
    """Train a dictionary with several processes; every one of them calls this.

    Args:
        dictionary: The whole one, the same in all processes. By rows it is trained in place, on
            the process's device. By latents each process trains its share there, and that of
            rank 0 ends with the whole one, where it was.
        source: The same rows in all processes.
        config: ``batch_size`` is of all processes together; ``fast`` as for one process.
        world: See `modeldiff.distributed.joined`.
        by: What is divided.
        on_log: Called in rank 0.
        folder: Of the checkpoint; by rows, rank 0 writes and reads it; by latents, all do.
        progress: Where rank 0 reports.
        cancel: Set in any process, it stops all of them after the same step.

    Returns:
        In rank 0 the whole dictionary, and in all the logs of the run.

    Raises:
        MismatchError: If the processes were given different things, or the division does not
            come out even, or the activation cannot be divided.
        FileFormatError, TrainingError, Cancelled: As `modeldiff.dictionaries.training.train`.
    """
    weights = tensors_digest(dictionary.state_dict())
    told = digest(asdict(dictionary.config), asdict(config), source.key, weights, by)
    world.agree("dictionary, configuration or rows", told)
    _check_divided(dictionary.config, config, world, by)
    split = ByRows(world) if by == "rows" else ByLatents(world, dictionary.config)
    mine = dictionary if by == "rows" else share_of(dictionary, world.rank, world.size)
    first = world.rank == 0
    made = train(
        mine.to(world.device),
        source,
        config,
        on_log=on_log if first else None,
        folder=folder,
        progress=progress if first else False,
        cancel=cancel,
        split=split,
    )
    if by == "rows":
        return made
    _put_together(dictionary, mine, world)
    dictionary.provenance["training"] = mine.provenance["training"]
    return Trained(dictionary, made.logs)


def _check_divided(c: DictionaryConfig, config: TrainConfig, world: World, by: By) -> None:
    known = _CHOOSE if by == "latents" or config.delta else (*_CHOOSE, *_LINEAR)
    if c.activation not in known:
        raise MismatchError(
            f"a {c.activation} dictionary{' with a delta loss' if config.delta else ''} cannot be "
            f"trained divided by {by}; {', '.join(known)} can. Train it in one process."
        )
    if c.groups and by == "latents":
        raise MismatchError("a dictionary with groups is divided by rows: give by='rows'.")
    n, what = (config.batch_size, "rows") if by == "rows" else (c.n_latents, "latents")
    if n % world.size:
        raise MismatchError(
            f"{n} {what} among {world.size} processes do not come out even; give a multiple."
        )


@dataclass(frozen=True)
class ByRows(Alone):
    """Every process has all latents and a share of the rows of each batch.

    Args:
        world: The processes.
    """

    world: World

    def part(self, rows: Float[Tensor, "row models d_model"]) -> Float[Tensor, "part models d"]:
        """Every so-many-th row of a batch."""
        return rows[self.world.rank :: self.world.size]

    def mean(self, each: Tensor) -> Tensor:
        """Mean over the processes."""
        return self.world.mean(each)

    def stops(self, wanted: bool) -> bool:
        """Whether any process wants to stop."""
        return self.world.any(wanted)

    def stepper(self, dictionary: Dictionary, config: TrainConfig, fast: bool) -> Stepper:
        """The fused step, or the plain one, divided."""
        return (DividedFastStep if fast else DividedStep)(dictionary, config, self)

    def read(self, folder: PathLike) -> Checkpoint | None:
        """What rank 0 finds in its folder, for all."""
        return broadcast(read_checkpoint(folder) if self.world.rank == 0 else None, self.world)

    def write(self, folder: PathLike, checkpoint: Checkpoint) -> None:
        """Write it in rank 0; all have the same."""
        if self.world.rank == 0:
            write_checkpoint(folder, checkpoint)

    # What a step needs to know of the division:

    @property
    def n_rows_of(self) -> int:
        """How many processes have rows of their own."""
        return self.world.size

    def over_rows(self, each: Tensor) -> Tensor:
        """A sum over this process's rows, as one over all rows."""
        return self.world.total(each)

    def over_latents(self, each: Tensor) -> Tensor:
        """A sum over this process's latents, as one over all; gradients pass."""
        return each

    def row_floor(self, values: Float[Tensor, "row some"], k: int) -> Float[Tensor, "row one"]:
        """The k-th largest value of each row."""
        return values.topk(min(k, values.shape[1]), dim=1).values[:, -1:]

    def settle(self, step: PlainStep, lr: float) -> None:
        """Average the gradients, and step."""
        for each in step.trained.values():
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        self.gather_gradients([p.grad for p in step.trained.values() if p.grad is not None])
        step.update(lr)

    def gather_gradients(self, grads: Sequence[Tensor]) -> None:
        """Put the mean of all processes into them."""
        self.world.average_(grads)

    def norm(self, grads: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Of named gradients, the same in all processes."""
        return torch.nn.utils.get_total_norm(grads.values())

    def seen(self, made: StepResult) -> StepResult:
        """What a step saw, of all rows."""
        world = self.world
        fired = world.highest(made.fired.to(torch.uint8)).bool()
        numbers = torch.cat((made.loss[None], made.l0[None], made.mse))
        loss, l0, *mse = world.mean(numbers).unbind()
        return StepResult(loss, torch.stack(mse), l0, _least(world, made.lowest), fired)


@dataclass(frozen=True)
class ByLatents(Alone):
    """Every process has all rows and a share of the latents.

    Args:
        world: The processes.
        config: Of the whole dictionary.
    """

    world: World
    config: DictionaryConfig

    @property
    def about(self) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A checkpoint is of one share."""
        return "latents", self.world.rank, self.world.size

    def whole(self, config: DictionaryConfig) -> DictionaryConfig:
        """Of the whole dictionary."""
        return self.config

    def mean(self, each: Tensor) -> Tensor:
        """Mean over the processes."""
        return self.world.mean(each)

    def stops(self, wanted: bool) -> bool:
        """Whether any process wants to stop."""
        return self.world.any(wanted)

    def stepper(self, dictionary: Dictionary, config: TrainConfig, fast: bool) -> Stepper:
        """The fused step, or the plain one, divided."""
        return (DividedFastStep if fast else DividedStep)(dictionary, config, self)

    def read(self, folder: PathLike) -> Checkpoint | None:
        """This share's part of the last checkpoint of which all parts are there."""
        return read_part(folder, self.world)

    def write(self, folder: PathLike, checkpoint: Checkpoint) -> None:
        """Write this share's part; the older one goes when all have written theirs."""
        write_part(folder, checkpoint, self.world)

    @property
    def n_rows_of(self) -> int:
        """All processes have the same rows."""
        return 1

    def over_rows(self, each: Tensor) -> Tensor:
        """All rows are here."""
        return each

    def over_latents(self, each: Tensor) -> Tensor:
        """A sum over this process's latents, as one over all; gradients pass."""
        made: Tensor = _Total.apply(each, self.world)  # pyright: ignore
        return made

    def row_floor(self, values: Float[Tensor, "row some"], k: int) -> Float[Tensor, "row one"]:
        """The k-th largest value of each row among all latents."""
        best = values.topk(min(k, values.shape[1]), dim=1).values
        padded = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-torch.inf)
        return torch.cat(self.world.gathered(padded), 1).topk(k, dim=1).values[:, -1:]

    def settle(self, step: PlainStep, lr: float) -> None:
        """Step, clipped by the norm of all shares."""
        step.update(lr, self.norm)

    def gather_gradients(self, grads: Sequence[Tensor]) -> None:
        """Each share's are its own."""

    def norm(self, grads: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """Of all shares' gradients; that of ``b_dec`` is in all, and counts once."""
        squares = {name: each.square().sum() for name, each in grads.items()}
        shared = squares.pop("b_dec")
        return (self.world.total(torch.stack(list(squares.values())).sum()) + shared).sqrt()

    def seen(self, made: StepResult) -> StepResult:
        """What a step saw, of all latents; which fired is of this share."""
        l0 = self.world.total(made.l0)
        return made._replace(l0=l0, lowest=_least(self.world, made.lowest))


class DividedStep:
    """`modeldiff.dictionaries.training.PlainStep`, of a share of the rows or of the latents."""

    def __init__(
        self, dictionary: Dictionary, config: TrainConfig, split: ByRows | ByLatents
    ) -> None:
        self.plain, self.split = PlainStep(dictionary, config), split

    def step(
        self,
        x_norm: Float[Tensor, "row model d_model"],
        k: float,
        lr: float,
        dead: Bool[Tensor, " latent"] | None = None,
    ) -> StepResult:
        """Take a step on normalised rows; see `PlainStep.step`."""
        plain = self.plain
        dictionary, config = plain.dictionary, plain.config
        with torch.autocast(x_norm.device.type, torch.bfloat16, enabled=config.bf16):
            if dictionary.config.activation in _LINEAR:
                now = loss(dictionary, x_norm, config, k=k, ramp=config.ramp(plain.done))
            else:
                now = divided_loss(dictionary, x_norm, config, k, dead, self.split)
        plain.adam.zero_grad()
        now.total.backward()
        self.split.settle(plain, lr)
        return self.split.seen(now.result())

    def state(self) -> dict[str, Tensor]:
        """Of the plain step."""
        return self.plain.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self.plain.load(state)

    def close(self) -> None:
        """Free the gradients."""
        self.plain.close()


def divided_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "row model d_model"],
    config: TrainConfig,
    k: float,
    dead: Bool[Tensor, " latent"] | None,
    split: ByRows | ByLatents,
) -> Loss:
    """`modeldiff.dictionaries.losses.loss` of ``batch_topk`` and ``topk``, divided.

    Its gradient, averaged over shares of rows, is that of all rows' loss; scores that are equal
    to the lowest one that is kept are all kept.

    Args:
        dictionary: The whole one, or a share of its latents.
        x: All rows, or a share of them, normalised.
        config: Weights of the terms.
        k: Mean latents a row.
        dead: Latents that have not fired for long.
        split: The division.
    """
    pre = dictionary.pre(x)
    values = pre.relu()
    scores = (values * dictionary.code_weight).detach()
    if dictionary.config.activation == "batch_topk":
        n_keep = round(k * len(x) * split.n_rows_of)
        lowest = split.world.kth_largest(scores, n_keep)
    else:
        lowest = split.row_floor(scores, round(k))
    latents = values * (scores >= lowest) * (scores > 0)
    error, total = x - dictionary.b_dec, torch.zeros((), device=x.device)
    start, ends = 0, dictionary.config.groups or (dictionary.config.n_latents,)
    for end in ends:
        flat = latents[:, start:end] @ dictionary.W_dec[start:end].flatten(1)
        error = error - split.over_latents(flat).unflatten(1, x.shape[1:])
        total, start = total + error.square().mean() / len(ends), end
    if config.delta:
        raw_error, raw = (each / dictionary.scale[:, None] for each in (error, x))
        left = (raw_error[:, 1] - raw_error[:, 0]).square().sum()
        least = ALIKE * raw.square().sum()
        total = total + config.delta * _share(left, raw[:, 1] - raw[:, 0], split, least)
    if config.aux and dead is not None:
        total = total + config.aux * _aux(dictionary, pre, error, dead, config, split)
    kept = torch.where(latents > 0, scores, torch.inf).amin().float()
    lowest = torch.where(kept.isinf(), 0.0, kept)
    return Loss(total, error.detach().square().mean((0, 2)), latents.detach(), lowest)


def _aux(
    dictionary: Dictionary,
    pre: Float[Tensor, "row latent"],
    error: Float[Tensor, "row model d_model"],
    dead: Bool[Tensor, " latent"],
    config: TrainConfig,
    split: ByRows | ByLatents,
) -> Float[Tensor, ""]:
    """`modeldiff.dictionaries.losses.aux_loss`, divided."""
    n_dead = dead.sum()
    if isinstance(split, ByLatents):
        n_dead = split.world.total(n_dead)
    if not int(n_dead):
        return pre.new_zeros(())
    which = dead.nonzero().squeeze(1)
    wanted = max(1, dictionary.config.d_model // 2) if config.k_aux is None else config.k_aux
    mine = pre[:, which]
    chosen = mine >= split.row_floor(mine.detach(), min(wanted, int(n_dead)))
    values = (mine + (mine.relu() - mine).detach()) * chosen
    explained = split.over_latents(values @ dictionary.W_dec[which].flatten(1))
    target = error.detach().flatten(1)
    left = (target - explained).square().sum()
    return _share(left, target, split, FLAT * target.square().sum())


def _share(
    left: Float[Tensor, ""],
    rows: Float[Tensor, "row width"],
    split: ByRows | ByLatents,
    least: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """What is left of the variation of all rows, such that the shares' mean is the whole's."""
    mean = split.over_rows(rows.sum(0)) / (len(rows) * split.n_rows_of)
    variation = split.over_rows((rows - mean).square().sum())
    variation = variation.maximum(split.over_rows(least)).clamp_min(_TINY)
    return left * split.n_rows_of / variation


def _least(world: World, lowest: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The least of the positive numbers of all processes; 0 if there is none."""
    low = -world.highest(-torch.where(lowest > 0, lowest, torch.inf))
    return torch.where(low.isinf(), 0.0, low)


class _Total(torch.autograd.Function):
    """Sum over the processes, all of which use it alike: the gradient of each part is its own."""

    @staticmethod
    def forward(ctx: Any, each: Tensor, world: World) -> Tensor:
        return world.total(each)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return gradient, None


def share_of(dictionary: Dictionary, rank: int, size: int) -> Dictionary:
    """Cut a process's latents out of a dictionary.

    Args:
        dictionary: With a number of latents that ``size`` divides.
        rank: Which share.
        size: Shares.

    Example:
        >>> from modeldiff.dictionaries.models import crosscoder
        >>> share_of(crosscoder(4, 16, k=2, n_tied=10), 1, 2).config.n_tied
        2
    """
    c, n = dictionary.config, dictionary.config.n_latents // size
    start, stop = rank * n, (rank + 1) * n
    own = [c.exclusive(model) for model in range(len(c.n_exclusive))]
    config = replace(
        c,
        n_latents=n,
        k=min(c.k, n),
        n_tied=min(max(0, c.n_tied - start), n),
        n_exclusive=tuple(len(range(max(start, r.start), min(stop, r.stop))) for r in own),
    )
    tensors = dict(dictionary.state_dict())
    for name, axis in _AXES.items():
        tensors[name] = tensors[name].narrow(axis, start, n)
    return Dictionary.of(config, tensors, dictionary.provenance)


_AXES = {"W_enc": 2, "b_enc": 0, "W_dec": 0}  # where the latents are


def _put_together(dictionary: Dictionary, mine: Dictionary, world: World) -> None:
    """Gather the shares into rank 0's dictionary."""
    whole = dictionary.state_dict()
    for name, each in mine.state_dict().items():
        each = each.cpu().contiguous()
        if name not in _AXES:
            whole[name].copy_(each)
            continue
        parts = [torch.empty_like(each) for _ in range(world.size)] if not world.rank else None
        dist.gather(each, parts)
        if parts is not None:
            whole[name].copy_(torch.cat(parts, _AXES[name]))
