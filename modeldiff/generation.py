"""Generating a grid of {base, fine-tuned} x {none, edits}, side by side, with shared noise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._files import digest
from modeldiff._progress import Progress, check, reporter
from modeldiff.batch_size import fitted
from modeldiff.batching import Batch, make_batch, padding_id
from modeldiff.editing import Editor, Group, Silent, check_fired
from modeldiff.errors import Cancelled, InterventionError, MaskError, MismatchError
from modeldiff.forward import Engine, as_texts, device_of, inputs_of, sources, traced
from modeldiff.hooks import hooked
from modeldiff.interventions import Cell, Edit, Plan, Replace, Side, grid
from modeldiff.loading import SIDES, Sides, lock_of
from modeldiff.masks import parse_mask
from modeldiff.prefill import Prefill
from modeldiff.sampling import Sampler, Stopper, noise
from modeldiff.static_decoding import StaticDecoder, Task
from modeldiff.tokens import Text


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Args:
        prompt: Index of the prompt.
        sample: Index of the sample.
        side: "base" or "finetuned".
        edit: Name of the edit.
        ids: Generated ids; the end token, if it came, is the last.
        text: Decoded without special tokens; the prompt is not in it.
        finished: False if the answer was cut at ``max_new_tokens``.
    """

    prompt: int
    sample: int
    side: Side
    edit: str
    ids: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True, eq=False)
class Generations:
    """Answers of a grid, ordered by cell, prompt and sample.

    Args:
        prompts: What was asked, rendered.
        answers: One for each cell, prompt and sample.
        seed: Seed of the shared noise.
        temperature: Sampling temperature.
    """

    prompts: tuple[Text, ...]
    answers: tuple[Answer, ...]
    seed: int
    temperature: float

    def __len__(self) -> int:
        return len(self.answers)

    def of(self, side: Side, edit: str = "none") -> tuple[Answer, ...]:
        """Answers of one cell, ordered by prompt and sample.

        Raises:
            KeyError: If the grid has no such cell.
        """
        found = tuple(a for a in self.answers if (a.side, a.edit) == (side, edit))
        if not found:
            cells = sorted({(a.side, a.edit) for a in self.answers})
            raise KeyError(f"no cell {(side, edit)}; the grid has {cells}")
        return found

    def table(self) -> pd.DataFrame:
        """One row an answer: prompt, sample, side, edit, text, n_tokens, finished."""
        return pd.DataFrame(
            {
                "prompt": [self.prompts[a.prompt].text for a in self.answers],
                "prompt_index": [a.prompt for a in self.answers],
                "sample": [a.sample for a in self.answers],
                "side": [a.side for a in self.answers],
                "edit": [a.edit for a in self.answers],
                "text": [a.text for a in self.answers],
                "n_tokens": [len(a.ids) for a in self.answers],
                "finished": [a.finished for a in self.answers],
            }
        )


@dataclass(frozen=True)
class Row:
    """Which answer a streamed token belongs to."""

    cell: int
    prompt: int
    sample: int


OnStep = Callable[[list[tuple[Row, int]]], None]


@dataclass(frozen=True, eq=False)
class _Job:
    """Settings that every batch of one call shares."""

    sides: Sides
    texts: tuple[Text, ...]
    noise_index: tuple[int, ...]
    cells: tuple[Cell, ...]
    n: int
    seed: int
    temperature: float
    max_new_tokens: int
    ends: list[int]
    on_step: OnStep | None
    cancel: Event | None
    engine: Engine
    prefill: Prefill | None
    decoder: StaticDecoder | None
    told: dict[Row, int] = field(default_factory=dict)
    """Tokens that `on_step` got of each row: a batch that begins again does not repeat them."""


def generate(
    sides: Sides,
    prompts: Sequence[Any],
    *,
    do: "Edit | Plan | Mapping[str, Edit | Plan | None] | None" = None,
    models: Sequence[Side] = SIDES,
    cells: Sequence[Cell] | None = None,
    n: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    max_rows: int = 256,
    on_step: OnStep | None = None,
    cancel: Event | None = None,
    progress: Progress = False,
    engine: Engine = "hooks",
    prefill: Prefill | None = None,
    decoder: StaticDecoder | None = None,
) -> Generations:
    """Generate answers of every cell to every prompt.

    Rows of different cells run in the same batch; on an adapter pair rows of the base too, with
    the adapter silenced exactly on them. Sampling uses common random numbers: a prompt's sample
    has the same noise in every cell, and does not depend on the batch.

    Args:
        sides: The pair.
        prompts: Texts or chats; chats are rendered ready for the answer.
        do: An edit, or named edits; each gives cells beside the unedited ones.
        models: Which sides.
        cells: The cells themselves, instead of ``do`` and ``models``.
        n: Samples a prompt.
        seed: Seed of the noise.
        temperature: 0 is greedy.
        max_new_tokens: Where answers are cut.
        max_rows: Rows of a batch; where they do not fit in memory, they are halved.
        on_step: Called after each token with the rows that got one.
        cancel: Event that stops at the next token.
        progress: Where to report, batch by batch.
        engine: "hooks", or "nnsight" for the same numbers through nnsight.
        prefill: Work kept from call to call: layers below the first edit are not run again on
            prompts that were asked before. The answers are the same.
        decoder: Steps that are all alike, on a GPU recorded once as a CUDA graph, instead of
            transformers' ``generate``. The answers are the same but for rounding, see
            `modeldiff.static_decoding`.

    Raises:
        InterventionError: If an edit did not fire, or cannot act during generation.
        MaskError: If an answer could go beyond a model's learned positions.
        SetupError: If memory runs out on a single row.
        MismatchError: If the decoder cannot be used for this model, or beside this engine.
        Cancelled: If the event is set; ``partial`` holds the finished batches' `Generations`.
    """
    texts = as_texts(sides, prompts, reply=True)
    grid_cells = grid(do, models) if cells is None else tuple(cells)
    if max_new_tokens < 1:
        raise InterventionError(f"max_new_tokens={max_new_tokens}: an answer has at least 1.")
    sides.check_lengths([text.n_tokens for text in texts], max_new_tokens - 1)
    _check(sides, texts, grid_cells, n, temperature)
    if decoder is not None and (sides.kind == "remote" or engine != "hooks"):
        what = "a remote pair" if sides.kind == "remote" else f"engine={engine!r}"
        raise MismatchError(f"decoder= steps through a model here, with hooks; not for {what}.")
    job = _Job(
        sides, texts, _occurrences(texts, n), grid_cells, n, seed, temperature, max_new_tokens,
        end_ids(sides), on_step, cancel, engine, prefill, decoder,
    )  # fmt: skip
    report = reporter(progress, "generate")
    done: dict[Row, Answer] = {}
    silent: list[Silent] = []
    queues = _queues(job)
    n_rows, n_batches = sum(map(len, queues)), 0
    try:
        for rows, found in _in_batches(job, queues, max_rows, silent):
            done.update(found)
            n_batches += 1
            left = -(-(n_rows - len(done)) // len(rows))
            report(n_batches, n_batches + left, f"{len(done)} answers")
    except Cancelled as cancelled:
        raise Cancelled(str(cancelled), _result(job, done)) from None
    check_fired(silent)
    return _result(job, done)


def _result(job: _Job, done: dict[Row, Answer]) -> Generations:
    rows = sorted(done, key=lambda row: (row.cell, row.prompt, row.sample))
    return Generations(job.texts, tuple(done[r] for r in rows), job.seed, job.temperature)


def _check(
    sides: Sides, texts: tuple[Text, ...], cells: tuple[Cell, ...], n: int, temperature: float
) -> None:
    if not temperature >= 0:
        raise InterventionError(f"temperature {temperature}: it must be 0 (greedy) or positive.")
    if not texts or not cells or n < 1:
        raise MaskError(f"nothing to generate: {len(texts)} prompts, {len(cells)} cells, n={n}.")
    empty = [i for i, text in enumerate(texts) if text.n_tokens == 0]
    if empty:
        raise MaskError(f"prompts {empty} have no token; a model needs at least one to continue.")
    for cell in cells:
        for edit in cell.plan.edits:
            edit.sites(sides.shape(cell.side))
            if isinstance(edit, Replace) and not isinstance(edit.source, str):
                raise InterventionError(
                    f"{edit.describe()!r} copies a tensor, whose rows cannot be matched to prompts "
                    "and samples here. Name a side as its source, or use run()."
                )
            if isinstance(edit, Replace) and parse_mask(edit.where).on_new:
                raise InterventionError(
                    f"{edit.describe()!r}: generated tokens have no counterpart in the other run. "
                    "Use where='prompt'."
                )


def _occurrences(texts: tuple[Text, ...], n: int) -> tuple[int, ...]:
    """Give the k-th repeat of a prompt the samples after its earlier ones."""
    seen: dict[tuple[int, ...], int] = {}
    offsets = []
    for text in texts:
        offsets.append(seen.get(text.ids, 0) * n)
        seen[text.ids] = seen.get(text.ids, 0) + 1
    return tuple(offsets)


def _queues(job: _Job) -> list[list[Row]]:
    """Rows that can share batches, prompts of like length side by side."""
    order = sorted(range(len(job.texts)), key=lambda i: (job.texts[i].n_tokens, i))
    return [
        [Row(cell, prompt, sample) for prompt in order for cell in several
         for sample in range(job.n)]
        for several in _together(job)
    ]  # fmt: skip


def _in_batches(
    job: _Job, queues: list[list[Row]], max_rows: int, silent: list[Silent]
) -> Iterator[tuple[list[Row], dict[Row, Answer]]]:
    """Generate batch by batch, as large as memory allows; rows of a cell are side by side."""

    def work(rows: list[Row]) -> dict[Row, Answer]:
        check(job.cancel)
        return _generate_batch(job, sorted(rows, key=lambda row: row.cell), silent)

    def width(row: Row) -> int:
        return job.texts[row.prompt].n_tokens + job.max_new_tokens

    root = job.sides.roots[0]
    for rows in queues:
        yield from fitted(root, rows, work, what="generate", width=width, max_rows=max_rows)


def _together(job: _Job) -> list[list[int]]:
    """Cells that can share a batch: all of a pair with an adapter, each side's of two models."""
    if job.sides.adapter:
        return [list(range(len(job.cells)))]
    by_side = [[i for i, c in enumerate(job.cells) if c.side == side] for side in SIDES]
    return [cells for cells in by_side if cells]


def _generate_batch(job: _Job, rows: list[Row], silent: list[Silent]) -> dict[Row, Answer]:
    sides = job.sides
    batch = make_batch([job.texts[row.prompt] for row in rows], padding_id(sides.tokenizer), "left")
    present = {job.cells[row.cell].side for row in rows}
    side: Side = "finetuned" if "finetuned" in present else "base"
    groups = _groups(job, batch, rows, mixed=len(present) == 2)
    editor = Editor(batch, groups, lora=sides.lora if len(present) == 2 else ())
    new = _decode(job, rows, batch, editor, side)
    check(job.cancel)
    silent.append(editor.silent())
    return {row: _answer(job, row, ids) for row, ids in zip(rows, new.tolist(), strict=True)}


def _groups(job: _Job, batch: Batch, rows: list[Row], *, mixed: bool) -> tuple[Group, ...]:
    groups, start = [], 0
    for stop in range(1, len(rows) + 1):
        if stop < len(rows) and rows[stop].cell == rows[start].cell:
            continue
        cell = job.cells[rows[start].cell]
        others = sources(
            job.sides, batch.texts[start:stop], cell.plan, cell.side, engine=job.engine
        )
        width = batch.ids.shape[1]
        groups.append(
            Group(
                rows=(start, stop),
                plan=cell.plan,
                shape=job.sides.shape(cell.side),
                adapter_off=mixed and cell.side == "base",
                others={key: _padded(acts, width) for key, acts in others.items()},
                cell=rows[start].cell,
            )
        )
        start = stop
    return tuple(groups)


def _padded(acts: Tensor, width: int) -> Tensor:
    """Widen left-padded activations to a longer batch."""
    return torch.nn.functional.pad(acts, (0, 0, width - acts.shape[1], 0))


def _decode(job: _Job, rows: list[Row], batch: Batch, editor: Editor, side: Side) -> Tensor:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    uniform = torch.stack(
        [
            noise(
                job.seed,
                job.texts[row.prompt].ids,
                job.noise_index[row.prompt] + row.sample,
                job.max_new_tokens,
            )
            for row in rows
        ]
    )
    streamed = _streamed(job, rows) if job.on_step else None
    if job.sides.kind == "remote":
        from modeldiff.remote_generation import generated

        new = generated(
            job.sides, batch, editor, side, uniform, job.temperature, job.ends,
            on_step=streamed, cancel=job.cancel,
        )  # fmt: skip
        for step in range(new.shape[1] if streamed else 0):
            streamed(step, new[:, step])  # pyright: ignore[reportOptionalCall]
        return new
    if job.decoder is not None:
        with job.sides.on(side) as root:
            task = Task(
                root, job.sides.site_map, job.sides.adapter_of(side), batch, editor, uniform,
                job.temperature, tuple(job.ends), padding_id(job.sides.tokenizer), streamed,
                job.cancel, _reusing(job, root, batch, editor, side),
            )  # fmt: skip
            return job.decoder.decode(task)
    options: dict[str, Any] = {
        "generation_config": GenerationConfig(
            max_new_tokens=job.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=job.ends,
            pad_token_id=padding_id(job.sides.tokenizer),
        ),
        "logits_processor": LogitsProcessorList([Sampler(uniform, job.temperature, streamed)]),
    }
    if job.cancel is not None:
        options["stopping_criteria"] = StoppingCriteriaList([Stopper(job.cancel)])
    with torch.no_grad(), job.sides.on(side) as root, _without_defaults(root):
        ids = _execute(job, root, batch, editor, side, options)
    return ids[:, batch.ids.shape[1] :].cpu()


@contextmanager
def _without_defaults(root: Any) -> Iterator[None]:
    """Set a model's own generation settings aside: penalties and the like would be filled in."""
    from transformers import GenerationConfig

    own = root.generation_config
    root.generation_config = GenerationConfig()
    try:
        yield
    finally:
        root.generation_config = own


def _execute(
    job: _Job, root: Any, batch: Batch, editor: Editor, side: Side, options: dict[str, Any]
) -> Tensor:
    adapter = job.sides.adapter_of(side)
    inputs = inputs_of(batch, device_of(root))
    del inputs["position_ids"]  # generate() derives them from the mask, step by step
    if job.engine == "nnsight":
        from modeldiff import tracing

        program = editor.program(job.sides.site_map, adapter)
        found = tracing.generate(traced(job.sides, side), inputs, program, options)
        editor.fired.update(found["fired"])
        return found["ids"]
    reusing = _reusing(job, root, batch, editor, side)
    with reusing, hooked(root, job.sides.site_map, editor, adapter):
        return root.generate(**inputs, **options)


def _reusing(
    job: _Job, root: Any, batch: Batch, editor: Editor, side: Side
) -> AbstractContextManager[None]:
    if job.prefill is None:
        return nullcontext()
    n_layers = job.sides.shape(side).n_layers
    below = n_layers if editor.first_layer is None else editor.first_layer
    silenced = [group.rows for group in editor.groups if group.adapter_off]
    key = digest(
        side,
        job.sides.adapter_of(side),
        batch.ids.tolist(),
        batch.attention_mask.tolist(),
        silenced,
    )
    return job.prefill.used(root, job.sides.site_map, n_layers, key, below)


def _streamed(job: _Job, rows: list[Row]) -> Callable[[int, Tensor], None]:
    open_rows = set(range(len(rows)))

    def report(step: int, chosen: Tensor) -> None:
        ids = chosen.tolist()
        got = [(rows[i], ids[i]) for i in sorted(open_rows) if job.told.get(rows[i], 0) == step]
        job.told.update((row, step + 1) for row, _ in got)
        open_rows.difference_update({i for i in open_rows if ids[i] in job.ends})
        if job.on_step is not None and got:
            job.on_step(got)

    return report


def end_ids(sides: Sides) -> list[int]:
    """Token ids that end an answer: both sides' generation settings' and the tokenizer's."""
    ends: list[Any] = [sides.tokenizer.eos_token_id]
    for root in sides.roots:
        with lock_of(root):  # while it generates, another thread sets these settings aside
            configured = getattr(root.generation_config, "eos_token_id", None)
        ends += configured if isinstance(configured, list) else [configured]
    return sorted({each for each in ends if each is not None})


def _answer(job: _Job, row: Row, ids: list[int]) -> Answer:
    stop = next((i for i, token in enumerate(ids) if token in job.ends), None)
    kept = ids if stop is None else ids[: stop + 1]
    cell = job.cells[row.cell]
    text = job.sides.tokenizer.decode(kept, skip_special_tokens=True)
    return Answer(
        row.prompt, row.sample, cell.side, cell.name, tuple(kept), str(text), stop is not None
    )
