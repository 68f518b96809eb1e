"""The prompt as it is written: a chat, turn by turn, with a prefill; or a plain text."""

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as W

from modeldiff_widgets import _theme
from modeldiff_widgets._panel import Panel, close_tree

ROLES = ("system", "user", "assistant")
OnChange = Callable[[], None]


class Turn:
    """Role and text of one message, with a button that removes it."""

    def __init__(self, message: dict[str, Any], changed: OnChange, remove: OnChange) -> None:
        role = str(message.get("role", "user"))
        self.role = W.Dropdown(options=tuple(dict.fromkeys((*ROLES, role))), value=role)
        self.role.tooltip = "role"
        self.role.layout.width = "7.2rem"
        self.text = W.Textarea(str(message.get("content", "")), rows=2, continuous_update=False)
        self.text.placeholder = "what is said"
        self.text.tooltip = "message"
        self.text.layout.width = "auto"
        self.text.add_class("mdw-grow")
        self.away = _theme.button("Remove", tooltip="remove this message")
        self.away.on_click(lambda clicked: remove())
        for control in (self.role, self.text):
            control.observe(lambda change: changed(), names="value")
        self.box = _theme.row(self.role, self.text, self.away)

    @property
    def message(self) -> dict[str, str]:
        """What is written."""
        return {"role": str(self.role.value), "content": str(self.text.value)}


class Composer:
    """Controls for the state's prompt; ``box`` holds them. Both follow each other.

    Args:
        panel: Whose state it is, and who closes the controls.
    """

    def __init__(self, panel: Panel) -> None:
        self._panel, self._state = panel, panel.state
        self._turns: list[Turn] = []
        self._last: list[dict[str, str]] = []  # a chat that plain text took the place of
        self.format = W.ToggleButtons(options=[("Chat", True), ("Plain text", False)])
        self.format.style.button_width = "5.6rem"
        self.format.value = bool(self._state.messages)
        self.plain = W.Textarea(rows=3, continuous_update=False, placeholder="a text to continue")
        self.prefill = W.Text(continuous_update=False, placeholder="nothing")
        self.more = _theme.button("Add message", icon="plus")
        self._list = _theme.column()
        self._chat = _theme.column(
            self._list,
            _theme.row(
                self.more, _theme.field("The answer begins with (prefill)", self.prefill, grow=True)
            ),
        )
        self._text = _theme.field("Text", self.plain)
        self.box = _theme.column(_theme.field("Prompt", self.format), self._chat, self._text)
        panel.bind(self.plain, "prompt")
        panel.bind(self.prefill, "prefill")
        panel.link(self.format, "value", self._switch)
        panel.link(self._state, "messages", lambda messages: self._read())
        panel.on(self.more, self.add)
        panel.undo(lambda: close_tree([turn.box for turn in self._turns]))
        self._read()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat as it is written."""
        return [turn.message for turn in self._turns]

    def add(self, role: str = "", content: str = "") -> None:
        """Append a message; without a role that which comes next, a system message first of all."""
        self._state.messages = [*self.messages, {"role": role or self._next(), "content": content}]

    def remove(self, index: int) -> None:
        """Take a message out; the last one stays."""
        kept = [each for i, each in enumerate(self.messages) if i != index]
        self._state.messages = kept or [{"role": "user", "content": ""}]

    def _next(self) -> str:
        return "assistant" if self.messages and self.messages[-1]["role"] == "user" else "user"

    def _switch(self, chat: bool) -> None:
        if chat == bool(self._state.messages):
            return
        if chat:
            self._state.messages = self._last or [{"role": "user", "content": self._state.prompt}]
            return
        self._last = self.messages
        if not self._state.prompt:
            self._state.prompt = next((m["content"] for m in self._last if m["role"] == "user"), "")
        self._state.messages = []

    def _read(self) -> None:
        """Show the state's messages; nothing is made again if they are shown already."""
        messages = list(self._state.messages)
        chat = bool(messages)
        self.format.value = chat
        self._chat.layout.display = "" if chat else "none"
        self._text.layout.display = "none" if chat else ""
        if chat and messages != self.messages:
            self._make(messages)

    def _make(self, messages: Sequence[dict[str, Any]]) -> None:
        old = self._turns
        self._turns = [
            Turn(each, self._write, lambda i=i: self.remove(i)) for i, each in enumerate(messages)
        ]
        self._list.children = tuple(turn.box for turn in self._turns)
        for turn in self._turns:
            turn.away.disabled = len(self._turns) == 1
        close_tree([turn.box for turn in old])

    def _write(self) -> None:
        if self.messages != list(self._state.messages):
            self._state.messages = self.messages
