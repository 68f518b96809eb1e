"""Inspect tasks on the cells of a pair: base, fine-tuned, and either with an edit.

`evaluate` runs a task once a cell and returns Inspect's own logs, which its viewer opens and
`modeldiff.inspect_compare.compare` holds against each other. Needs the extra ``inspect``.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from threading import Event
from typing import TYPE_CHECKING, Any

from modeldiff._files import PathLike
from modeldiff.errors import Cancelled, MismatchError, ModelDiffError, SetupError
from modeldiff.forward import as_texts
from modeldiff.inspect_requests import (
    MAX_TOKENS,
    Request,
    Seeds,
    check_settings,
    inspect,
    item_of,
    output_of,
)
from modeldiff.interventions import Cell, grid
from modeldiff.models import ModelPair
from modeldiff.tokens import Item, Text

if TYPE_CHECKING:
    from inspect_ai import Task
    from inspect_ai.log import EvalLog
    from inspect_ai.model import Model

PROVIDER = "modeldiff"
_GATHER_S = 0.01
"""Requests of other samples that come within this time share a batch."""


@dataclass(eq=False)
class CellRunner:
    """Answers requests with one cell of a pair, many in one batch.

    Args:
        pair: The pair.
        cell: Side and edit.
        max_rows: Rows of a batch.
        cancel: Event that stops at the next token.
    """

    pair: ModelPair
    cell: Cell
    max_rows: int = 64
    cancel: Event | None = None
    waiting: list[Request] = field(default_factory=list)
    failed: ModelDiffError | None = None
    """The first error, which Inspect writes down but does not raise."""
    batches: list[int] = field(default_factory=list)
    """Requests of each batch so far."""

    @property
    def name(self) -> str:
        """Side, and the edit's name if there is one."""
        edit = "" if self.cell.name == "none" else f"/{self.cell.name}"
        return f"{self.cell.side}{edit}"

    def render(self, item: Item) -> Text:
        """Write a chat as the model sees it, ready for the answer."""
        return as_texts(self.pair.sides, [item], reply=True)[0]

    def take(self, first: Request) -> list[Request]:
        """Take out of those that wait the ones that can share a batch with a request."""
        fits = [each for each in self.waiting if each.settings == first.settings]
        batch = [first, *(each for each in fits if each is not first)][: self.max_rows]
        self.waiting[:] = [each for each in self.waiting if each not in batch]
        return batch

    def answer(self, batch: Sequence[Request]) -> None:
        """Answer requests that share their settings; the same text is asked once."""
        distinct = {each.text.ids: each.text for each in batch}
        first = batch[0]
        try:
            found = self.pair.generate(
                list(distinct.values()), cells=[self.cell], n=first.n, seed=first.seed,
                temperature=first.temperature, max_new_tokens=first.max_tokens,
                max_rows=self.max_rows, cancel=self.cancel,
            )  # fmt: skip
        except ModelDiffError as error:
            self.failed = self.failed or error
            for each in batch:
                each.error = error
            return
        self.batches.append(len(batch))
        place = {ids: i for i, ids in enumerate(distinct)}
        for each in batch:
            at = place[each.text.ids] * each.n
            each.answers = found.answers[at : at + each.n]


def models(
    pair: ModelPair,
    cells: Sequence[Cell] | None = None,
    *,
    max_rows: int = 64,
    cancel: Event | None = None,
) -> "list[Model]":
    """Inspect models over the cells of a pair, for ``inspect_ai.eval(task, model=...)``.

    Their names are ``modeldiff/<side>`` and ``modeldiff/<side>/<edit>``. Temperature (default 1),
    max_tokens, seed, stop_seqs and num_choices are honoured; other settings of sampling, tools and
    images are refused. Sampling uses common random numbers: a sample's answer in one epoch has the
    same noise in every cell and does not depend on what runs beside it; samples of equal input
    get equal answers within an epoch.

    Args:
        pair: The pair; its lock is held while a batch runs.
        cells: Which cells, see `modeldiff.interventions.grid`; default both sides without an edit.
        max_rows: Rows of a batch.
        cancel: Event that stops at the next token.

    Raises:
        SetupError: If Inspect is not installed.
        MismatchError: If two cells have the same name.
    """
    return [_model(runner) for runner in _runners(pair, cells, max_rows, cancel)]


def evaluate(
    task: "Task",
    pair: ModelPair,
    cells: Sequence[Cell] | None = None,
    log_dir: PathLike = "logs",
    *,
    temperature: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    max_rows: int = 64,
    display: str = "none",
    cancel: Event | None = None,
) -> "list[EvalLog]":
    """Run an Inspect task on the cells of a pair.

    Args:
        task: Any task whose solver needs no tools.
        pair: The pair.
        cells: As for `models`; e.g. ``grid({"ablate": Ablate([direction])})``.
        log_dir: Folder of the logs; ``inspect view`` opens it.
        temperature: Overrides the task's; 1 if neither says, 0 is greedy.
        max_tokens: Overrides the task's; `modeldiff.inspect_requests.MAX_TOKENS` if neither says.
        seed: Overrides the task's; 0 if neither says.
        epochs: Answers to each sample; overrides the task's.
        limit: Only the first so many samples.
        max_rows: Samples that run at once, and rows of a batch.
        display: Inspect's display: "none", "plain", "rich", "full" ...
        cancel: Event that stops at the next token.

    Returns:
        A log a cell, in the order of the cells, as Inspect wrote them.

    Raises:
        SetupError: If Inspect is not installed, or a run ended otherwise than in success.
        ModelDiffError: What a model raised, such as `MismatchError` for a setting or a message
            that it cannot honour.
        Cancelled: If the event is set; ``partial`` holds the logs so far.

    Example:
        >>> evaluate(task, pair, grid({"ablate": edit}), "logs/em")  # doctest: +SKIP
    """
    several = _runners(pair, cells, max_rows, cancel)
    wanted = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    settings = {name: value for name, value in wanted.items() if value is not None}
    logs: list[Any] = []
    for runner in several:
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled; the logs of the finished cells are in `partial`.", logs)
        run = partial(
            inspect().eval, task, model=_model(runner), log_dir=str(log_dir), epochs=epochs,
            limit=limit, display=display, max_connections=max_rows, max_samples=max_rows,
            log_model_api=False, log_realtime=False, ctl_server=False,
            metadata=_described(runner), **settings,
        )  # fmt: skip
        logs += _outside_of_loops(run)
        _raise_if_failed(logs, runner)
    return logs


def _outside_of_loops(work: "Callable[[], list[EvalLog]]") -> "list[EvalLog]":
    """Do the work here, or in a thread of its own where an event loop is running already."""
    if not _in_a_loop():  # asked apart: what fails in an except block blames the block's error
        return work()
    with ThreadPoolExecutor(1, thread_name_prefix="inspect") as pool:
        return pool.submit(work).result()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _raise_if_failed(logs: list[Any], runner: CellRunner) -> None:
    if isinstance(runner.failed, Cancelled):
        raise Cancelled("cancelled; the logs so far are in `partial`.", logs)
    if runner.failed is not None:
        raise runner.failed
    if logs[-1].status != "success":
        error = getattr(logs[-1].error, "message", "no message")
        raise SetupError(
            f"the task ended with {logs[-1].status!r} on {runner.name}: {error}. Its log is "
            f"{logs[-1].location}; mend the task and run it again."
        )


def _runners(
    pair: ModelPair, cells: Sequence[Cell] | None, max_rows: int, cancel: Event | None
) -> list[CellRunner]:
    chosen = grid() if cells is None else tuple(cells)
    runners = [CellRunner(pair, cell, max_rows, cancel) for cell in chosen]
    names = [runner.name for runner in runners]
    if len(set(names)) < len(names) or not names:
        raise MismatchError(f"the cells are {names}: at least one, each with a name of its own.")
    return runners


def _described(runner: CellRunner) -> dict[str, Any]:
    """What is written into the log: content hashes, no path of this machine."""
    return {
        "side": runner.cell.side,
        "edit": runner.cell.name,
        "plan": runner.cell.plan.describe(),
        "digests": runner.pair.digests,
    }


def _model(runner: CellRunner) -> "Model":
    api = _provider()(model_name=runner.name, runner=runner)
    generate_config = inspect(".model").GenerateConfig()
    return inspect(".model").Model(api, generate_config, _described(runner))


@cache
def _provider() -> Any:
    """Make and register the provider: a class of Inspect's, so it is made when first needed."""
    api, anyio = inspect(".model"), import_module("anyio")

    class PairAPI(api.ModelAPI):
        """Answers with one cell of a pair."""

        def __init__(self, model_name: str, runner: CellRunner | None = None, **_: Any) -> None:
            super().__init__(model_name)
            if runner is None:
                raise SetupError(
                    "a model of a pair is made by modeldiff.inspect_bridge.models(pair), not by "
                    "name: it runs on the pair that is in memory."
                )
            self.runner, self.turn, self.seeds = runner, anyio.Lock(), Seeds()

        async def generate(
            self, input: Sequence[Any], tools: Sequence[Any], tool_choice: Any, config: Any
        ) -> Any:
            try:
                request = self._request(input, tools, config)
            except ModelDiffError as error:
                self.runner.failed = self.runner.failed or error
                raise
            await self._answered(request)
            if request.error is not None:
                raise request.error
            return output_of(request, self.model_name, config.stop_seqs or ())

        def _request(self, input: Sequence[Any], tools: Sequence[Any], config: Any) -> Request:
            check_settings(config, tools)
            templated = self.runner.pair.tokenizer.chat_template is not None
            text = self.runner.render(item_of(input, templated))
            n = config.num_choices or 1
            temperature = 1.0 if config.temperature is None else float(config.temperature)
            seed = self.seeds.next(config.seed or 0, text.key)
            return Request(text, n, seed, temperature, config.max_tokens or MAX_TOKENS)

        async def _answered(self, request: Request) -> None:
            """Wait for a turn; whoever has it answers all that wait and fit together."""
            waiting = self.runner.waiting
            waiting.append(request)
            try:
                await anyio.sleep(_GATHER_S)
                async with self.turn:
                    if not request.done:
                        batch = self.runner.take(request)
                        await anyio.to_thread.run_sync(self.runner.answer, batch)
            finally:
                if request in waiting:  # it was cancelled before its turn
                    waiting.remove(request)

        def max_tokens(self) -> int | None:
            return MAX_TOKENS

        def max_connections(self) -> int:
            return self.runner.max_rows

    return api.modelapi(name=PROVIDER)(PairAPI)
