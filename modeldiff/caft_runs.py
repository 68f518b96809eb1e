"""Compare ways of fine-tuning: every arm and seed from a fresh base, stopped at the same loss.

Stopping all arms at the same held-out loss in the domain is what makes them comparable: a model
that has learned less also generalises less, with or without an ablation.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._files import PathLike, atomic_write, digest
from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.batch_size import fitted
from modeldiff.batching import padding_id
from modeldiff.behaviours import Behaviour, judge_answers
from modeldiff.caft import decoder_stack
from modeldiff.caft_arms import Arm
from modeldiff.caft_results import BASE, CaftResult, Cell, Hooks, cell_from_json, read_json
from modeldiff.directions import Direction
from modeldiff.embedded import find
from modeldiff.errors import Cancelled, MismatchError, SetupError
from modeldiff.hooks import first
from modeldiff.models import ModelPair
from modeldiff.sft import Around, FineTuned, finetune, mean_loss
from modeldiff.sft_files import content, weights_key, without_bars
from modeldiff.sft_plans import SFTPlan
from modeldiff.sft_rows import IGNORED, Row, batch_of, rows_key
from modeldiff.stats import auroc

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loader = Callable[[], Any]
"""Makes a fresh base: nothing that was trained before may be left in it."""
_CELL_VERSION, _CONTROLS = 1, 5


def run_arms(
    base: "PathLike | Loader",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    held_out: Sequence[Row],
    arms: Sequence[Arm],
    plan: SFTPlan,
    behaviours: "Mapping[str, Behaviour] | Sequence[Behaviour]",
    *,
    stop_at_loss: float | None = None,
    exact: bool = False,
    seeds: Sequence[int] = (0, 1),
    n: int = 1,
    kept: Sequence[Row] = (),
    watched: Sequence[Direction] = (),
    out: PathLike | None = None,
    max_rows: int = 256,
    on_cell: Callable[[Cell], None] | None = None,
    progress: Progress = False,
    cancel: Event | None = None,
) -> CaftResult:
    """Train every arm with every seed, and measure what became of it.

    Each training starts from a fresh base and stops at the first measurement at which the held-out
    loss is not above ``stop_at_loss``, hooks off; an arm that never gets there is trained to the
    end of the plan, and the result says so. Arms that are trained alike (plain and post-hoc) are
    trained once. The base itself is measured beside them, as the arm "base".

    Args:
        base: Hub id or path of the base, "organism:NAME" for the base of an embedded organism, or
            a function that loads a fresh one.
        tokenizer: The base's.
        rows: What to train on.
        held_out: Rows of the same domain on which the loss is measured.
        arms: What to compare, see `modeldiff.caft_arms.standard_arms`.
        plan: How each is trained; its seed is replaced. ``evaluate_every`` says how close to the
            loss the arms can be stopped.
        behaviours: What is asked of the models, by name; the first one counts (off-domain).
        stop_at_loss: Held-out loss at which all are stopped; None for the whole plan.
        exact: Stop at that loss to a thousandth, between two measurements; see
            `modeldiff.sft.finetune`. Behaviour can change much in the one step that crosses it.
        seeds: Of training and answers. All arms share a seed's noise.
        n: Answers to each prompt.
        kept: Rows outside the domain, for arms with ``keep``.
        watched: Directions whose use at other layers is looked for; default those of the arm
            "caft", or of the first arm that has any.
        out: Folder: one JSON file a cell, and the trained models. Cells that are there are not
            made again; a training that was stopped goes on.
        max_rows: Answers that are generated at once.
        on_cell: Called with each finished cell.
        progress: See `modeldiff._progress.Progress`.
        cancel: Stops between training steps or generated tokens when set.

    Returns:
        Everything that was measured.

    Raises:
        SetupError: If arms share a name, an arm needs rows that are missing, or the base cannot be
            found.
        Cancelled: If the event is set; ``partial`` holds the finished cells' `CaftResult`.
        TrainingError: If a training leaves the numbers.
        JudgeError: If a judge scored no answer.

    Source:
        Casademunt et al. 2025, arXiv 2507.16795; that arms are compared at equal loss is ours.
    """
    asked = _named(behaviours)
    _check(arms, asked, kept, seeds, held_out, stop_at_loss)
    job = _Job(
        _loader(base, plan), tokenizer, rows, held_out, plan, asked, stop_at_loss, exact, n, kept,
        tuple(watched) or _chosen(arms), None if out is None else Path(out), max_rows, cancel,
    )  # fmt: skip
    report, done = reporter(progress, "arms"), list[Cell]()
    meanings = {name: each.meaning for name, each in asked.items()}
    order = [BASE, *(arm.name for arm in arms)]
    total = 1 + len(arms) * len(seeds)
    try:
        for cell in _cells(job, arms, seeds, lambda text: report(len(done), total, text)):
            done.append(cell)
            report(len(done), total, f"{cell.arm}, seed {cell.seed}")
            if on_cell is not None:
                on_cell(cell)
            check(cancel)
    except Cancelled as stopped:
        raise Cancelled(str(stopped), _result(done, order, meanings, stop_at_loss)) from stopped
    return _result(done, order, meanings, stop_at_loss)


def direction_use(
    base: Float[Tensor, "text layer d_model"],
    tuned: Float[Tensor, "text layer d_model"],
    directions: Sequence[Direction],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """How well projections on directions tell a fine-tune from its base, at every layer.

    A direction that was ablated at some layers may be used at others. Beside the directions stand
    random ones: any fine-tune moves activations a little along any direction.

    Args:
        base: Mean activations of each text in the base, see `mean_activations`.
        tuned: The same texts in the fine-tune.
        directions: What is looked for.
        seed: Of the random directions.

    Returns:
        One row a direction and layer: direction, own_layer, layer, control (whether random), auroc
        (of fine-tune above base, over texts) with its 95 % interval (low, high), gap (mean
        difference of the projections), share (of the squared length of the mean difference of
        activations that lies along the direction; 1 / d_model by chance).

    Raises:
        MismatchError: If shapes differ.
    """
    if base.shape != tuned.shape:
        raise MismatchError(f"{tuple(base.shape)} and {tuple(tuned.shape)}: give the same texts.")
    generator = torch.Generator().manual_seed(seed)
    own = directions[0].site.layer if directions else 0
    random = torch.randn(_CONTROLS, base.shape[-1], generator=generator)
    vectors = [(d.name, d.site.layer, d.unit.float(), False) for d in directions]
    if directions:
        vectors += [(f"random {i}", own, v / v.norm(), True) for i, v in enumerate(random)]
    found = []
    for name, at, vector, control in vectors:
        for layer in range(base.shape[1]):
            before, after = base[:, layer] @ vector, tuned[:, layer] @ vector
            told, whole = auroc(after, before), (tuned[:, layer] - base[:, layer]).mean(0)
            gap = float(whole @ vector)
            found.append({
                "direction": name, "own_layer": at, "layer": layer, "control": control,
                "auroc": told.estimate, "low": told.low, "high": told.high,
                "gap": gap, "share": gap**2 / max(float(whole @ whole), 1e-30),
            })  # fmt: skip
    return found


@torch.no_grad()
def mean_activations(
    model: Any, rows: Sequence[Row], pad_id: int, batch: int = 8
) -> Float[Tensor, "text layer d_model"]:
    """Mean residual stream after every layer over the tokens that count, text by text; float32.

    Args:
        model: A causal language model; left in evaluation mode.
        rows: Texts.
        pad_id: Token to pad with.
        batch: Rows of one forward.
    """
    model.eval()
    layers = decoder_stack(model).layers

    def means(some: list[Row]) -> Tensor:
        device = next(model.parameters()).device
        ids, mask, labels = (x.to(device) for x in batch_of(some, pad_id))
        counted = (labels != IGNORED).float()
        weights = counted / counted.sum(1, keepdim=True)
        seen: dict[int, Tensor] = {}
        handles = [
            each.register_forward_hook(_averaging(seen, i, weights))
            for i, each in enumerate(layers)
        ]
        try:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([seen[i] for i in range(len(layers))], 1).cpu()

    parts = fitted(model, rows, means, what="layer means", width=lambda row: len(row.ids),
                   max_rows=batch)  # fmt: skip
    return torch.cat([part for _, part in parts])


@dataclass(frozen=True, eq=False)
class _Job:
    """What all cells share."""

    load: Loader
    tokenizer: Any
    rows: Sequence[Row]
    held_out: Sequence[Row]
    plan: SFTPlan
    behaviours: Mapping[str, Behaviour]
    stop: float | None
    exact: bool
    n: int
    kept: Sequence[Row]
    watched: tuple[Direction, ...]
    out: Path | None
    max_rows: int
    cancel: Event | None

    @property
    def pad(self) -> int:
        """Token to pad with."""
        return padding_id(self.tokenizer)

    def plan_of(self, arm: Arm, seed: int) -> SFTPlan:
        """The plan of one training."""
        return replace(self.plan, seed=seed, keep=arm.keep)

    @property
    def stopping(self) -> Any:
        """Where trainings stop, as part of a key."""
        return [self.stop, "exact"] if self.exact else self.stop

    def key(self, base: str, training: Any, arm: Arm | None, seed: int) -> str:
        """Hash of everything that a cell depends on."""
        rows = [rows_key(each) for each in (self.rows, self.held_out, self.kept)]
        asked = [[name, each.content_key] for name, each in self.behaviours.items()]
        plan = {**self.plan.run, "seed": seed}
        hooks = None if arm is None else [content(arm.hooks), arm.post_hoc]
        return digest(
            _CELL_VERSION, base, training, hooks, plan, rows, asked, self.stopping, self.n,
            content(self.watched),
        )  # fmt: skip


def _cells(
    job: _Job, arms: Sequence[Arm], seeds: Sequence[int], say: Callable[[str], None]
) -> Iterator[Cell]:
    """Every cell, from its file or made; arms that are trained alike one after the other."""
    model = job.load()
    base = weights_key(model)
    before = mean_activations(model, job.held_out, job.pad, job.plan.batch)
    key = job.key(base, None, None, seeds[0])
    say(BASE)
    yield _stored(job, BASE, seeds[0], key) or _kept(job, _base_cell(job, model, seeds[0], key))
    del model
    trainings: dict[str, list[Arm]] = {}
    for arm in arms:
        trainings.setdefault(digest(arm.training), []).append(arm)
    for seed in seeds:
        for training, several in trainings.items():
            found: FineTuned | None = None  # let go of the last one before the next is loaded
            for arm in several:
                key = job.key(base, training, arm, seed)
                stored = _stored(job, arm.name, seed, key)
                if stored is None:
                    found = found or _trained(job, arm, seed, base, training, say)
                    say(f"{arm.name}, seed {seed}: asking")
                    stored = _kept(job, _cell(job, arm, seed, key, found, before))
                yield stored


def _trained(
    job: _Job, arm: Arm, seed: int, base: str, training: str, say: Callable[[str], None]
) -> FineTuned:
    plan = job.plan_of(arm, seed)
    rows = [rows_key(each) for each in (job.rows, job.held_out, job.kept if arm.keep else ())]
    key = digest(base, training, plan.run, rows, job.stopping)

    def report(done: int, total: int, message: str) -> None:
        say(f"{arm.name}, seed {seed}: step {done} of {total}, {message}")

    return finetune(
        job.load(), job.tokenizer, job.rows, plan,
        out=None if job.out is None else job.out / "trainings" / key,
        held_out=job.held_out, kept=job.kept if arm.keep else (), around=arm.around,
        stop_at_loss=job.stop, exact=job.exact, progress=report, cancel=job.cancel,
    )  # fmt: skip


def _base_cell(job: _Job, model: Any, seed: int, key: str) -> Cell:
    loss = _loss(job, model, None)
    answers = tuple(_answers(job, model, None, "off", seed))
    return Cell(BASE, seed, key, "off", 0, None, loss, loss, None, "", answers=answers)


def _cell(job: _Job, arm: Arm, seed: int, key: str, found: FineTuned, before: Tensor) -> Cell:
    """Measure a trained model, with its directions ablated and without."""
    model = found.model
    after = mean_activations(model, job.held_out, job.pad, job.plan.batch)
    answers = _answers(job, model, None, "off", seed)
    if arm.hooks is not None:
        answers += _answers(job, model, arm.hooks, "on", seed)
    return Cell(
        arm=arm.name,
        seed=seed,
        key=key,
        deployed="on" if arm.post_hoc else "off",
        steps=found.steps,
        reached=found.reached,
        held_out_loss=found.held_out_loss,
        best_loss=found.best_loss,
        hooked_loss=None if arm.hooks is None else _loss(job, model, arm.hooks),
        path="" if found.path is None else str(found.path),
        history=tuple(_records(found.history[["step", "loss", "held_out_loss"]])),
        norms=tuple(_records(found.norms)),
        answers=tuple(answers),
        use=tuple(direction_use(before, after, job.watched)),
    )


def _loss(job: _Job, model: Any, hooks: Around | None) -> float:
    with torch.no_grad(), hooks(model) if hooks else nullcontext():
        return mean_loss(
            model, job.held_out, job.pad, batch=job.plan.batch, precision=job.plan.precision
        )


def _answers(
    job: _Job, model: Any, hooks: Around | None, named: Hooks, seed: int
) -> list[dict[str, Any]]:
    tuned = None if hasattr(model, "peft_config") else model
    pair = ModelPair.of(model, tuned, job.tokenizer, allow_identical=True)
    found: list[dict[str, Any]] = []
    for name, behaviour in job.behaviours.items():
        with hooks(model) if hooks else nullcontext():
            generated = pair.generate(
                [prompt.render() for prompt in behaviour.prompts], models=("finetuned",), n=job.n,
                seed=seed, temperature=behaviour.temperature, max_rows=job.max_rows,
                max_new_tokens=behaviour.max_new_tokens, cancel=job.cancel,
            )  # fmt: skip
        table = judge_answers(behaviour, generated).drop(columns=["side", "edit"])
        questions = table.get("question_id", table["prompt"])
        found += _records(table.assign(behaviour=name, hooks=named, question_id=questions))
    return found


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON-able values; what is missing is None."""
    return json.loads(frame.to_json(orient="records", double_precision=15))


def _stored(job: _Job, arm: str, seed: int, key: str) -> Cell | None:
    if job.out is None:
        return None
    path = job.out / "cells" / f"{key}.json"
    return replace(cell_from_json(read_json(path)), arm=arm, seed=seed) if path.is_file() else None


def _kept(job: _Job, cell: Cell) -> Cell:
    if job.out is not None:
        with atomic_write(job.out / "cells" / f"{cell.key}.json") as temporary:
            temporary.write_text(json.dumps(cell.to_json()), encoding="utf-8")
    return cell


def _averaging(seen: dict[int, Tensor], layer: int, weights: Tensor) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        seen[layer] = (first(output).float() * weights[..., None]).sum(1)

    return hook


def _result(
    cells: Sequence[Cell], order: Sequence[str], meanings: Mapping[str, str], target: float | None
) -> CaftResult:
    ordered = sorted(cells, key=lambda cell: (order.index(cell.arm), cell.seed))
    return CaftResult(tuple(ordered), meanings, target)


def _named(
    behaviours: "Mapping[str, Behaviour] | Sequence[Behaviour]",
) -> dict[str, Behaviour]:
    if isinstance(behaviours, Mapping):
        return dict(behaviours)
    return {each.name: each for each in behaviours}


def _chosen(arms: Sequence[Arm]) -> tuple[Direction, ...]:
    """Directions of the arm "caft", or of the first that has any."""
    several = [arm for arm in arms if arm.directions]
    named = [arm for arm in several if arm.name == "caft"]
    return next((arm.directions for arm in [*named, *several]), ())


def _check(
    arms: Sequence[Arm],
    behaviours: Mapping[str, Behaviour],
    kept: Sequence[Row],
    seeds: Sequence[int],
    held_out: Sequence[Row],
    stop_at_loss: float | None,
) -> None:
    names = [BASE, *(arm.name for arm in arms)]
    twice = sorted({name for name in names if names.count(name) > 1})
    keeping = [arm.name for arm in arms if arm.keep and not kept]
    problems = [
        (not arms or not behaviours or not seeds, "arms, behaviours and seeds are needed"),
        (len(set(seeds)) < len(seeds), f"seeds {list(seeds)}: one of them occurs twice"),
        (bool(twice), f"several arms are called {', '.join(twice)}"),
        (bool(keeping), f"{', '.join(keeping)} needs kept= rows outside the domain"),
        (not held_out, "held_out rows are needed: arms are compared at the same loss on them"),
    ]
    if found := [text for wrong, text in problems if wrong]:
        raise SetupError(f"cannot compare: {'; '.join(found)}.")


def _loader(base: "PathLike | Loader", plan: SFTPlan) -> Loader:
    """A function that loads a fresh base; float32 on the CPU and where weights are trained."""
    if callable(base):
        return base
    name = str(base)
    path = find(name.removeprefix("organism:")).base if name.startswith("organism:") else base
    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if where == "cpu" or not plan.rank else "auto"

    def load() -> Any:
        from transformers import AutoModelForCausalLM

        with without_bars():
            model = AutoModelForCausalLM.from_pretrained(path, device_map=where, dtype=dtype)
        return model.eval()

    return load
