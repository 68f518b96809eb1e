"""What Inspect asks of a model and what it gets back, in this package's terms."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from modeldiff._files import digest
from modeldiff.errors import MismatchError, ModelDiffError, SetupError
from modeldiff.generation import Answer
from modeldiff.tokens import Chat, Item, Text

MAX_TOKENS = 256
"""Where answers are cut if nobody says."""

_MAPPED = frozenset({"temperature", "max_tokens", "seed", "stop_seqs", "num_choices"})
_FOR_INSPECT = frozenset(
    {
        "max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections",
        "adaptive_connections", "system_message", "parallel_tool_calls", "internal_tools",
        "max_tool_output", "cache_prompt", "reasoning_history", "fail_on_refusal",
    }
)  # fmt: skip
"""Settings that Inspect itself acts on, or that say nothing where there are no tools.

Its cache is not among them: it goes by a model's name, and so would mix up pairs.
"""

_OFF = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "best_of": 1, "top_p": 1.0}
"""Values that ask for nothing."""


def inspect(module: str = "") -> ModuleType:
    """Import a module of Inspect.

    Raises:
        SetupError: If Inspect is not installed.
    """
    try:
        return import_module(f"inspect_ai{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "inspect_ai":
            raise
        raise SetupError("Inspect is missing: pip install modeldiff-lab[inspect]") from None


@dataclass(eq=False)
class Request:
    """One call of a model, and its answers once they are there.

    Args:
        text: What is asked, rendered.
        n: Answers wanted.
        seed: Of their noise.
        temperature: At which they are sampled.
        max_tokens: Where they are cut.
    """

    text: Text
    n: int
    seed: int
    temperature: float
    max_tokens: int
    answers: tuple[Answer, ...] = ()
    error: ModelDiffError | None = None

    @property
    def settings(self) -> tuple[Any, ...]:
        """What requests must share to be answered in one batch."""
        return self.n, self.seed, self.temperature, self.max_tokens

    @property
    def done(self) -> bool:
        """Whether there are answers, or there will be none."""
        return bool(self.answers) or self.error is not None


class Seeds:
    """Gives each call a seed that depends on what is asked, never on when.

    The first call with a text in a sample's first epoch gets the seed as it is; later epochs, and
    repeats of the same text within a sample, get others.
    """

    def __init__(self) -> None:
        self._asked: Counter[tuple[str, str]] = Counter()

    def next(self, seed: int, text: str) -> int:
        """Return the seed of a call by the sample that is active in Inspect, if one is."""
        sample = inspect(".log._samples").sample_active()
        key = (str(sample.id) if sample else "", text)
        repeat, epoch = self._asked[key], sample.epoch if sample else 1
        self._asked[key] += 1
        return seed if (epoch, repeat) == (1, 0) else int(digest(seed, epoch, repeat)[:12], 16)


def check_settings(config: Any, tools: Sequence[Any]) -> None:
    """Refuse what would silently not be done.

    Raises:
        MismatchError: Naming all settings of generation that cannot be honoured, or the tools.
    """
    asked = config.model_dump(exclude_none=True).items()
    changing = {name for name, value in asked if value is not False and value != _OFF.get(name)}
    wrong = sorted(changing - _MAPPED - _FOR_INSPECT)
    if wrong:
        raise MismatchError(
            f"a model of a pair cannot do {', '.join(wrong)}; it does "
            f"{', '.join(sorted(_MAPPED))}. Take the others out of the task's config."
        )
    if tools:
        raise MismatchError(
            f"a model of a pair calls no tools; the task offers {len(tools)}. Use a solver without."
        )


def item_of(messages: Sequence[Any], templated: bool) -> Item:
    """Turn Inspect's messages into a chat; a last message of the assistant begins the answer.

    Args:
        messages: Inspect's chat messages.
        templated: Whether the tokenizer has a chat template. Without, one user's message is plain
            text, and anything else is refused.

    Raises:
        MismatchError: If a message holds more than text, calls a tool or is a tool's.
    """
    for message in messages:
        parts = message.content if isinstance(message.content, list) else []
        kinds = {part.type for part in parts} - {"text"}
        if message.role == "tool" or getattr(message, "tool_calls", None) or kinds:
            raise MismatchError(
                f"a model of a pair reads text alone; got a message of {message.role!r} with "
                f"{', '.join(sorted(kinds)) or 'a tool call'}."
            )
    chat = [{"role": message.role, "content": message.text} for message in messages]
    if not templated:
        if [each["role"] for each in chat] != ["user"]:
            raise MismatchError(
                "the tokenizer has no chat template, so only one user's message can be asked, as "
                f"plain text; got {[each['role'] for each in chat]}. Set tokenizer.chat_template."
            )
        return chat[0]["content"]
    if chat and chat[-1]["role"] == "assistant":
        return Chat(chat[:-1], prefill=chat[-1]["content"])
    return chat


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut a text before the first of some strings; say whether one was there.

    Example:
        >>> cut_at("yes. No; why", ["; ", ". "])
        ('yes', True)
    """
    at = min((text.index(stop) for stop in stops if stop and stop in text), default=None)
    return (text, False) if at is None else (text[:at], True)


def output_of(request: Request, model: str, stops: Sequence[str]) -> Any:
    """Answers as Inspect's output, with the tokens that were read and generated."""
    api, choices = inspect(".model"), []
    for answer in request.answers:
        text, stopped = cut_at(answer.text, stops)
        message = api.ChatMessageAssistant(content=text, model=model, source="generate")
        reason = "stop" if stopped or answer.finished else "max_tokens"
        choices.append(api.ChatCompletionChoice(message=message, stop_reason=reason))
    read, written = request.text.n_tokens, sum(len(answer.ids) for answer in request.answers)
    usage = api.ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
    return api.ModelOutput(model=model, choices=choices, usage=usage)
