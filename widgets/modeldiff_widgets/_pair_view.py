"""`PairView`: tokens of one to four columns, coloured by a value each; click, hover, keyboard."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anywidget
import traitlets

from modeldiff_widgets import _render
from modeldiff_widgets._theme import source

Select = Callable[[int, int], None]
METRICS = {
    "kl_ft_base": ("KL", "KL(fine-tuned ‖ base), nats"),
    "kl_base_ft": ("KL base‖ft", "KL(base ‖ fine-tuned), nats"),
    "js": ("JS", "Jensen-Shannon divergence, nats"),
    "delta_logprob": ("Δ log p", "log p fine-tuned − log p base of the token, nats"),
    "rank_move": ("rank move", "rank in base − rank in fine-tuned"),
    "entropy_change": ("Δ entropy", "entropy fine-tuned − base, nats"),
    "entropy_base": ("entropy base", "entropy of the base's prediction, nats"),
    "entropy_ft": ("entropy ft", "entropy of the fine-tune's prediction, nats"),
    "projection": ("projection", "projection on the direction, residual-stream units"),
    "lora": ("LoRA", "scalar of the adapter, before B"),
    "latent": ("latent", "activation of the latent"),
}
"""Short and long names of the usual values of a token."""
_EVERY = 0.1  # seconds between two pieces of a stream
_PER_TOKEN = ("marks", "notes")
_NAMED = ("values", "top")


def _plain(column: Mapping[str, Any]) -> dict[str, Any]:
    """A column as it is kept: lists of its own, numbers that JSON knows."""
    known = {"title", "subtitle", "kind", "badges", "streaming", "tokens", *_PER_TOKEN, *_NAMED}
    unknown = set(column) - known
    if unknown:
        raise ValueError(f"a column of PairView has {sorted(known)}, not {sorted(unknown)}.")
    kept = {"title": "", "kind": "", "streaming": False, **column}
    kept["tokens"] = [str(token) for token in column.get("tokens", ())]
    for name in _PER_TOKEN:
        kept[name] = [str(each) for each in column.get(name) or ()]
    kept["values"] = {m: [_number(v) for v in vs] for m, vs in (column.get("values") or {}).items()}
    kept["top"] = {s: [_tops(top) for top in tops] for s, tops in (column.get("top") or {}).items()}
    return kept


def _number(value: Any) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.5g}")


def _tops(top: Sequence[Sequence[Any]] | None) -> list[list[Any]]:
    return [[str(token), _number(p)] for token, p in top or ()]


class PairView(anywidget.AnyWidget):
    """Token heat side by side.

    A column is a mapping with ``title`` and ``tokens``, and optionally ``kind`` ("base",
    "finetuned", "edited", "random": its colour), ``subtitle``, ``badges`` (texts), ``values``
    (a number or None a token, by metric), ``top`` (by "base" and "finetuned": for each token the
    most likely ``(token, probability)``), ``marks`` (for each token "", "affected", "predicted",
    "added", "removed" or "muted"), ``notes`` (a line a token, shown on hover) and ``streaming``.

    Args:
        columns: One to four of them.

    Example:
        >>> column = {"title": "base", "tokens": ["a", " b"], "values": {"js": [0.0, 0.4]}}
        >>> view = PairView([column], metric="js", scale=0.5)
        >>> view.append(0, [" c"])
        >>> view.columns[0]["tokens"]
        ['a', ' b', ' c']
        >>> view.close()
    """

    _esm = source("pair_view.js")
    _css = source("theme.css")

    columns = traitlets.List(traitlets.Dict(), maxlen=4).tag(sync=True)
    metric = traitlets.Unicode("kl_ft_base").tag(sync=True)
    scale = traitlets.Float(0.0, help="Value of full colour; 0 takes the largest.").tag(sync=True)
    selected = traitlets.List(traitlets.Int(), help="Column and index, or empty.").tag(sync=True)
    linked = traitlets.Bool(False, help="Hover marks the same index elsewhere.").tag(sync=True)
    details = traitlets.Bool(True, help="Show the selected token's values below.").tag(sync=True)
    labels = traitlets.Dict(help="Short and long name of each metric.").tag(sync=True)
    height = traitlets.Unicode("22rem", help="Largest height of a column.").tag(sync=True)
    blank = traitlets.Unicode("nothing yet", help="Shown without tokens.").tag(sync=True)

    def __init__(self, columns: Sequence[Mapping[str, Any]] = (), **options: Any) -> None:
        self._lock = threading.RLock()
        self._pending: dict[int, dict[str, Any]] = {}
        self._sent = 0.0
        self._timer: threading.Timer | None = None
        self._observers: list[Select] = []
        labels = {**METRICS, **options.pop("labels", {})}
        super().__init__(
            columns=columns, labels={n: list(pair) for n, pair in labels.items()}, **options
        )
        self.on_msg(self._receive)

    @traitlets.validate("columns")
    def _valid_columns(self, proposal: Any) -> list[dict[str, Any]]:
        return [_plain(column) for column in proposal["value"]]

    @traitlets.validate("height")
    def _valid_height(self, proposal: Any) -> str:
        if any(character in proposal["value"] for character in ";{}"):
            raise traitlets.TraitError("height is one CSS length, such as '22rem'.")
        return proposal["value"]

    def name(self, metric: str, short: str, long: str = "") -> None:
        """Say what a metric of your own is called."""
        self.labels = {**self.labels, metric: [short, long or short]}

    def on_select(self, callback: Select) -> Callable[[], None]:
        """Call back with column and index whenever a token is clicked or chosen by key.

        Returns:
            A function that ends it.
        """
        self._observers.append(callback)
        return lambda: self._observers.remove(callback) if callback in self._observers else None

    def append(
        self,
        column: int,
        tokens: Sequence[str],
        *,
        values: Mapping[str, Sequence[Any]] | None = None,
        top: Mapping[str, Sequence[Any]] | None = None,
        marks: Sequence[str] | None = None,
        notes: Sequence[str] | None = None,
    ) -> None:
        """Add tokens to a column that is being written; shown at most 10 times a second.

        From any thread. `finish` shows what is left and takes the caret away.

        Raises:
            IndexError: If there is no such column.
        """
        extra = {"values": values, "top": top, "marks": marks, "notes": notes}
        piece = _plain({"tokens": tokens, **{k: v for k, v in extra.items() if v is not None}})
        with self._lock:
            mine = self._column(column)
            mine["streaming"] = True
            start = len(mine["tokens"])
            waiting = self._pending.setdefault(
                column, {"start": start, "tokens": [], "marks": [], "notes": [], "values": {},
                         "top": {}}
            )  # fmt: skip
            for target in (mine, waiting):
                _extend(target, piece)
            if time.monotonic() - self._sent >= _EVERY:
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(_EVERY, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def finish(self, column: int | None = None) -> None:
        """Show what is left of a stream, or of all of them, and say that it is complete."""
        with self._lock:
            chosen = range(len(self.columns)) if column is None else (column,)
            for each in chosen:
                mine = self._column(each)
                if mine["streaming"]:
                    mine["streaming"] = False
                    size = len(mine["tokens"])
                    self._pending.setdefault(each, {"start": size, "tokens": []})
            self.flush()

    def flush(self) -> None:
        """Send what was appended and not shown yet."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            pending, self._pending = self._pending, {}
            self._sent = time.monotonic()
            for column, piece in pending.items():
                piece = {key: value for key, value in piece.items() if value or key in _NEEDED}
                streaming = self.columns[column]["streaming"]
                self.send({"kind": "append", "column": column, "streaming": streaming, **piece})

    def set_columns(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Show other columns; what was appended and not shown yet is dropped."""
        with self._lock:
            self._pending = {}
            self.flush()
            self.selected = []
            self.columns = columns  # pyright: ignore[reportAttributeAccessIssue]

    def snapshot_html(self) -> str:
        """The columns as static HTML."""
        name = self.labels.get(self.metric, [self.metric])[0]
        full = self.scale or max(
            (abs(v) for c in self.columns for v in c["values"].get(self.metric, ()) if v), default=0
        )
        blocks = [
            (c["title"], c["kind"],
             _render.heat(c["tokens"], c["values"].get(self.metric, ()), full, name=name))
            for c in self.columns
        ]  # fmt: skip
        return _render.columns(blocks)

    def close(self) -> None:
        """End the stream and close the widget."""
        with self._lock:
            self._pending = {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._observers.clear()
        self.layout.close()
        super().close()

    def _column(self, index: int) -> dict[str, Any]:
        return self.columns[index]  # pyright: ignore[reportReturnType] - dicts, see _plain

    def _receive(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        if content.get("kind") != "select":
            return
        column, index = content.get("column"), content.get("index")
        if not (isinstance(column, int) and 0 <= column < len(self.columns)):
            return
        if not (isinstance(index, int) and 0 <= index < len(self.columns[column]["tokens"])):
            return
        self.selected = [column, index]
        for callback in tuple(self._observers):
            callback(column, index)


_NEEDED = {"start", "tokens"}


def _extend(target: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Append a piece in place: traitlets must not see it, it is sent on its own."""
    before = len(target["tokens"])
    target["tokens"] += piece["tokens"]
    for name in _PER_TOKEN:
        _fill(target.setdefault(name, []), before, piece[name], "")
    for name in _NAMED:
        for key, more in piece[name].items():
            _fill(target.setdefault(name, {}).setdefault(key, []), before, more,
                  None if name == "values" else [])  # fmt: skip


def _fill(kept: list[Any], size: int, more: Sequence[Any], blank: Any) -> None:
    if more:
        kept += [blank] * (size - len(kept))
        kept += more
