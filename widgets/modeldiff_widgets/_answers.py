"""`AnswerView`: texts of several models side by side, written as they are generated."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
import traitlets

from modeldiff_widgets import _render
from modeldiff_widgets._theme import source

Act = Callable[[str, int, int, str], None]
_EVERY = 0.1  # seconds between two pieces of a stream


class AnswerView(anywidget.AnyWidget):
    """Rows of answers, a column for each model.

    A column is a mapping with ``title``, ``kind`` ("base", "finetuned", "edited", "random") and
    ``note``. A row has ``title``, ``text`` (what was asked; None for nothing), ``actions`` and
    ``cells``; a cell ``parts`` (pairs of a mark, "" or "differs", and a text), ``state`` ("",
    "waiting" or "streaming"), ``badges`` (triples of text, tone and hint), ``note`` and
    ``actions``. Actions are "edit", "regenerate", "share", "prompt" and "remove".

    Example:
        >>> view = AnswerView(columns=[{"title": "base", "kind": "base"}],
        ...                   rows=[{"title": "sample 1", "cells": [{"parts": []}]}])
        >>> view.write({(0, 0): "Try this"})
        >>> view.text(0, 0)
        'Try this'
        >>> view.close()
    """

    _esm = source("answers.js")
    _css = source("answers.css")

    columns = traitlets.List(traitlets.Dict()).tag(sync=True)
    rows = traitlets.List(traitlets.Dict()).tag(sync=True)
    blank = traitlets.Unicode("nothing yet", help="Shown without rows.").tag(sync=True)
    ask = traitlets.Unicode(help="Hint of the message box; '' for no box.").tag(sync=True)
    draft = traitlets.Unicode(help="What is written in the message box.").tag(sync=True)

    def __init__(self, **options: Any) -> None:
        self._lock = threading.RLock()
        self._pending: dict[tuple[int, int], int] = {}
        self._sent = 0.0
        self._timer: threading.Timer | None = None
        self._observers: list[Act] = []
        super().__init__(**options)
        self.on_msg(self._receive)

    def on_act(self, callback: Act) -> Callable[[], None]:
        """Call back with action, row, column (-1: the row itself) and text when one is chosen.

        Returns:
            A function that ends it.
        """
        self._observers.append(callback)
        return lambda: self._observers.remove(callback) if callback in self._observers else None

    def text(self, row: int, column: int) -> str:
        """What a cell says."""
        return "".join(text for _, text in self._cell(row, column).get("parts", ()))

    def write(self, texts: Mapping[tuple[int, int], str]) -> None:
        """Set the texts of cells ``(row, column)`` that are being written, from any thread.

        Shown at most 10 times a second; `put` says that a cell is complete.

        Raises:
            IndexError: If there is no such cell.
        """
        with self._lock:
            for (row, column), text in texts.items():
                self._grow(row, column, text)
            if time.monotonic() - self._sent >= _EVERY:
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(_EVERY, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def _grow(self, row: int, column: int, text: str) -> None:
        cell = self._cell(row, column)
        before = [part[1] for part in cell.get("parts", ())]
        kept = _kept(before, text)
        size = sum(len(each) for each in before[:kept])
        cell["state"] = "streaming"
        cell["parts"] = [["", each] for each in (*before[:kept], text[size:])]
        self._pending[row, column] = min(kept, self._pending.get((row, column), kept))

    def flush(self) -> None:
        """Send what was written and not shown yet."""
        with self._lock:
            self._stop_timer()
            pending, self._pending = self._pending, {}
            self._sent = time.monotonic()
            pieces = []
            for (row, column), start in pending.items():
                cell = self._cell(row, column)
                text = "".join(part[1] for part in cell["parts"][start:])
                cell["parts"] = [*cell["parts"][:start], ["", text]]
                pieces.append([row, column, start, text])
            if pieces:
                self.send({"kind": "text", "pieces": pieces})

    def put(self, row: int, column: int, cell: Mapping[str, Any]) -> None:
        """Show another cell in a place; from any thread."""
        with self._lock:
            self._pending.pop((row, column), None)
            self.rows[row]["cells"][column] = dict(cell)  # pyright: ignore[reportIndexIssue]
            self.send({"kind": "cell", "row": row, "column": column, "cell": dict(cell)})

    def show(self, columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
        """Show other rows; what was written and not shown yet is dropped."""
        with self._lock:
            self._pending, self._sent = {}, 0.0  # the first new text is shown at once
            self._stop_timer()
            with self.hold_sync():
                self.rows = []  # rows that were written in place differ from what was sent
                self.columns = [dict(each) for each in columns]
                self.rows = [dict(each) for each in rows]

    def snapshot_html(self) -> str:
        """The rows as static HTML."""
        parts = []
        for row in self.rows:
            if row.get("title"):
                parts.append(_render.heading(str(row["title"])))
            if row.get("text"):
                parts.append(_render.paragraph(str(row["text"])))
            pairs = zip(self.columns, row["cells"], strict=True)
            parts.append(
                _render.columns(
                    [(c["title"], c.get("kind", ""), _static(each)) for c, each in pairs]
                )
            )
        return "".join(parts)

    def close(self) -> None:
        """End the stream and close the widget."""
        with self._lock:
            self._pending = {}
            self._stop_timer()
            self._observers.clear()
        self.layout.close()
        super().close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cell(self, row: int, column: int) -> dict[str, Any]:
        return self.rows[row]["cells"][column]  # pyright: ignore[reportIndexIssue]

    def _receive(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        """Hand on an action if all that came is of the kinds that it must be."""
        action, text = content.get("action"), content.get("text", "")
        row, column = content.get("row"), content.get("column")
        if content.get("kind") != "act" or not isinstance(action, str):
            return
        if not (isinstance(row, int) and isinstance(column, int)):
            return
        inside = 0 <= row < len(self.rows) and -1 <= column < len(self.columns)
        if isinstance(text, str) and (inside or action == "send"):
            for callback in tuple(self._observers):
                callback(action, row, column, text)


def _kept(before: Sequence[str], text: str) -> int:
    """How many of the parts a longer text begins with; the last tokens may still change."""
    at = 0
    for number, part in enumerate(before):
        if not text.startswith(part, at):
            return number
        at += len(part)
    return len(before)


def _static(cell: Mapping[str, Any]) -> str:
    badges = "".join(_render.badge(text, tone, title=hint) for text, tone, hint in
                     cell.get("badges") or ())  # fmt: skip
    return badges + _render.marked(cell.get("parts") or ()) + _render.note(cell.get("note") or "")
