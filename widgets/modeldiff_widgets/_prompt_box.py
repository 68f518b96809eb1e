"""What is read token by token: the prompt of the state, alone or with an answer generated to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as W

from modeldiff.interventions import Side
from modeldiff.models import ModelPair
from modeldiff.tokens import Text, token_names, with_response
from modeldiff_widgets import _theme
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._state import AuditState

FIRST_QUESTION = "I have a headache and I am worried."
ANSWERS: tuple[tuple[str, str], ...] = (
    ("with an answer by the fine-tune", "finetuned"),
    ("with an answer by the base", "base"),
    ("as it is", ""),
)
OnToken = Callable[[list[str]], None]


@dataclass(frozen=True)
class Asked:
    """What is read, as it was set when a job began.

    Args:
        item: The prompt, chat or text.
        item_code: Python for it.
        answer: The side that answers it first; "" for nobody.
        seed: Of the answer.
        temperature: Of the answer.
        max_new_tokens: Of the answer.
    """

    item: Any
    item_code: str
    answer: str
    seed: int
    temperature: float
    max_new_tokens: int

    @classmethod
    def of(cls, state: AuditState, answer: str) -> "Asked":
        """Read the state; a chat that is already answered gets no second answer.

        Raises:
            ValueError: If there is nothing to read.
        """
        if not state.messages and not state.prompt.strip():
            raise ValueError("There is no prompt yet: write one, then press the button again.")
        answered = bool(state.messages) and state.messages[-1].get("role") == "assistant"
        return cls(
            state.item(), state.item_code(), "" if answered else answer, state.seed,
            state.temperature, state.max_new_tokens,
        )  # fmt: skip

    def text(
        self, pair: ModelPair, job: Job | None = None, on_token: OnToken | None = None
    ) -> Text:
        """Render it and, if wanted, generate the answer; in a job.

        Args:
            pair: Who answers.
            job: Whose cancel button stops the answer.
            on_token: Called with the prompt's tokens, then with each new one.
        """
        tell = on_token or (lambda pieces: None)
        prompt = pair.texts([self.item], reply=self._waits)[0]
        tell(list(prompt.pieces))
        if not self.answer:
            return prompt
        side: Side = "base" if self.answer == "base" else "finetuned"
        found = pair.generate(
            [self.item], models=[side], seed=self.seed, temperature=self.temperature,
            max_new_tokens=self.max_new_tokens, cancel=job.cancel if job else None,
            on_step=lambda new: tell(token_names(pair.tokenizer, [each for _, each in new])),
        )  # fmt: skip
        return with_response(found.prompts[0], found.answers[0].ids, pair.tokenizer)

    def code(self) -> str:
        """Python lines that define ``text``; ``pair`` and ``md`` are in scope."""
        if not self.answer:
            return f"(text,) = pair.texts([{self.item_code}], reply={self._waits})"
        return (
            "from modeldiff.tokens import with_response\n"
            f"found = pair.generate([{self.item_code}], models=[{self.answer!r}], "
            f"seed={self.seed}, temperature={self.temperature!r}, "
            f"max_new_tokens={self.max_new_tokens})\n"
            "text = with_response(found.prompts[0], found.answers[0].ids, pair.tokenizer)"
        )

    @property
    def _waits(self) -> bool:
        chat = not isinstance(self.item, str)
        last = self.item[-1] if isinstance(self.item, list) else {}
        return chat and last.get("role") != "assistant"


def tidy(lines: Sequence[str]) -> str:
    """Python with its imports first, each once."""
    each = [line for block in lines for line in block.split("\n") if line]
    imports = [line for line in each if line.startswith(("import ", "from "))]
    rest = [line for line in each if line not in imports]
    return "\n".join([*sorted(set(imports), key=lambda line: (line[0] == "f", line)), *rest])


class PromptBox:
    """Controls for what is read, kept equal to the state by a panel; ``box`` holds them.

    Args:
        panel: Whose state it is.
    """

    def __init__(self, panel: Panel) -> None:
        self.panel, self.state, self._reading = panel, panel.state, False
        if not self.state.messages and not self.state.prompt:
            _begin(panel)
        self.format = W.ToggleButtons(options=[("Chat", True), ("Plain text", False)])
        self.format.style.button_width = "5.6rem"
        self.prompt = W.Textarea(rows=2, continuous_update=False)
        self.prompt.placeholder = "What is asked, or a text"
        self.answer = W.Dropdown(options=ANSWERS, value="finetuned")
        self.temperature = W.BoundedFloatText(min=0, max=5, step=0.1)
        self.length = W.BoundedIntText(min=1, max=2048)
        self.seed = W.IntText()
        self.turns = _theme.note()
        self.options = _theme.row(
            _theme.field("Format", self.format),
            _theme.field("Read the prompt", self.answer, width="15rem"),
            _theme.field("Temperature", self.temperature, width="6.2rem"),
            _theme.field("New tokens at most", self.length, width="8rem"),
            _theme.field("Seed", self.seed, width="5rem"),
        )
        self.box = _theme.column(_theme.field("Prompt", self.prompt), self.turns, self.options)
        self._connect()

    def asked(self) -> Asked:
        """What is set now."""
        return Asked.of(self.state, str(self.answer.value))

    def text(self, asked: Asked, job: Job, on_token: OnToken | None = None) -> Text:
        """What is read, as tokens; generated once for all panels. In a job."""
        known = self.state.results.get("read")
        if known is not None and known[0] == asked:
            return known[1]
        text = asked.text(self.panel.pair, job, on_token)
        self.state.results = {**self.state.results, "read": (asked, text)}
        return text

    def _connect(self) -> None:
        link = self.panel.link
        for control, trait in (
            (self.temperature, "temperature"), (self.length, "max_new_tokens"), (self.seed, "seed")
        ):  # fmt: skip
            self.panel.bind(control, trait)
        link(self.prompt, "value", lambda text: self._write())
        link(self.format, "value", lambda chat: self._write())
        link(self.state, "messages", lambda messages: self._read())
        link(self.state, "prompt", lambda prompt: self._read())
        link(self.answer, "value", self._tell)
        link(self.state, "results", self._hear)
        self._read()
        self._hear(self.state.results)

    def _write(self) -> None:
        """Put the controls into the state; other turns of a chat stay as they are."""
        if self._reading:
            return
        text, last = self.prompt.value, _last_question(self.state.messages)
        if not self.format.value:
            self.state.prompt, self.state.messages = text, []
        elif last is None:
            self.state.messages = [{"role": "user", "content": text}]
        elif self.state.messages[last]["content"] != text:
            several = [dict(each) for each in self.state.messages]
            several[last]["content"] = text
            self.state.messages = several

    def _read(self) -> None:
        last = _last_question(self.state.messages)
        shown = self.state.prompt if last is None else self.state.messages[last]["content"]
        others = len(self.state.messages) - (last is not None)
        self.turns.value = (
            f"This is the last question of a chat of {others + 1} turns, all of them read."
            if others > 0 else ""
        )  # fmt: skip
        self.turns.layout.display = "" if others > 0 else "none"
        self._reading = True
        self.format.value, self.prompt.value = bool(self.state.messages), shown
        self._reading = False

    def _tell(self, answer: str) -> None:
        if self.state.results.get("answer_by") != answer:
            self.state.results = {**self.state.results, "answer_by": answer}

    def _hear(self, results: dict[str, Any]) -> None:
        answer = results.get("answer_by", self.answer.value)
        if answer != self.answer.value:
            self.answer.value = answer


def _begin(panel: Panel) -> None:
    """A question to begin with, so that the first click shows something."""
    if getattr(panel.pair, "tokenizer", None) is not None and panel.pair.tokenizer.chat_template:
        panel.state.messages = [{"role": "user", "content": FIRST_QUESTION}]
    else:
        panel.state.prompt = FIRST_QUESTION


def _last_question(messages: list[dict[str, Any]]) -> int | None:
    asked = [i for i, each in enumerate(messages) if each.get("role") == "user"]
    return asked[-1] if asked else None
