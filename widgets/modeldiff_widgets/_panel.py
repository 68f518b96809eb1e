"""`Panel`: what every panel of the workbench is; each also stands alone in a cell."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

import ipywidgets as W
import traitlets

from modeldiff.errors import ModelDiffError
from modeldiff.models import ModelPair
from modeldiff_widgets import _render
from modeldiff_widgets._code_view import CodeView
from modeldiff_widgets._job_bar import JobBar
from modeldiff_widgets._jobs import Job, JobRunner, Work
from modeldiff_widgets._state import AuditState
from modeldiff_widgets._theme import column


class Panel:
    """One view of a pair. Subclasses write `build`, `code` and `snapshot_html`.

    Callbacks only touch the state or `submit` a job; a job writes to views (`PairView`, labels,
    figures), never to controls. Everything made is closed by `close`.

    Args:
        pair: The pair.
        state: Shared settings; its own if None.
        jobs: The runner of a workbench; None makes one, with a job bar.

    Example:
        >>> class Hello(Panel):
        ...     title = "Hello"
        ...     def build(self): return W.Label("hello")
        ...     def code(self): return "pair"
        >>> with Hello(None) as panel:
        ...     panel.root.children[-1].code
        'pair'
    """

    title: ClassVar[str] = "Panel"

    def __init__(
        self, pair: ModelPair, state: AuditState | None = None, jobs: JobRunner | None = None
    ) -> None:
        self.pair = pair
        self.state = AuditState() if state is None else state
        self._alone = jobs is None
        self.jobs = JobRunner() if jobs is None else jobs
        self.pins: list[str] = []
        self._undo: list[Callable[[], None]] = []
        self._owned: list[W.Widget] = []
        self._slot: Any = None
        self._listing = CodeView()
        self.body = self.build()
        self.root = self._framed()
        self._watch()

    def build(self) -> W.Widget:
        """Make the controls and views; called once, by the constructor."""
        raise NotImplementedError

    def code(self) -> str:
        """Python that reproduces what is shown, with ``pair`` in scope."""
        raise NotImplementedError

    def snapshot_html(self) -> str:
        """What is shown, as static HTML made by `modeldiff_widgets._render`."""
        return _render.section(self.title, (), code=self.shown_code())

    # -- for subclasses

    def link(self, source: traitlets.HasTraits, trait: str, callback: Callable[[Any], Any]) -> None:
        """Call back with the new value of a trait; undone by `close`."""
        guarded = self._guarded(lambda change: callback(change["new"]))
        source.observe(guarded, names=trait)
        self.undo(lambda: source.unobserve(guarded, names=trait))

    def bind(self, control: Any, trait: str, *, name: str = "value") -> None:
        """Keep a control and a setting of the state equal; the state's value wins at first."""
        tied = traitlets.link((self.state, trait), (control, name))
        self.undo(tied.unlink)

    def on(self, button: Any, callback: Callable[[], Any]) -> None:
        """Call back when a button is clicked; undone by `close`."""
        guarded = self._guarded(lambda clicked: callback())
        button.on_click(guarded)
        self.undo(lambda: button.on_click(guarded, remove=True))

    def listen(self, subscribe: Callable[..., Callable[[], None]], callback: Any) -> None:
        """Subscribe, as in ``listen(view.on_select, callback)``; undone by `close`."""
        self.undo(subscribe(self._guarded(callback)))

    def jslink(self, source: tuple[W.Widget, str], target: tuple[W.Widget, str]) -> None:
        """Keep two widgets equal in the browser, without the kernel; undone by `close`."""
        self.own(W.jslink(source, target))

    def own(self, widget: Any) -> Any:
        """Close this too; for widgets that are not always part of the tree. Returns it."""
        self._owned.append(widget)
        return widget

    def undo(self, action: Callable[[], None]) -> None:
        """Do this when the panel is closed."""
        self._undo.append(action)

    def submit(
        self,
        work: Work,
        *,
        key: str = "",
        on_done: Callable[[Job], None] | None = None,
        label: str = "",
        preempt: bool = True,
    ) -> Job:
        """Run work in the worker thread; see `JobRunner.submit`. The key's default is the title."""

        def done(job: Job) -> None:
            if on_done is not None:
                on_done(job)
            self.refresh_code()

        return self.jobs.submit(
            work, key=f"{self.title}/{key}" if key else self.title, on_done=done,
            preempt=preempt, label=label or self.title.lower(),
        )  # fmt: skip

    def refresh_code(self) -> None:
        """Write the code again, if it is unfolded."""
        if self._listing.unfolded:
            self._listing.code = self.shown_code()

    def shown_code(self) -> str:
        """What `code` says; if nothing can be said yet, why not, as a comment."""
        try:
            return self.code()
        except ModelDiffError as error:
            return "\n".join(f"# {line}" for line in str(error).splitlines())

    # -- life

    def pin(self) -> str:
        """Keep what is shown as static HTML below the panel; returns it."""
        html = self.snapshot_html()
        self.pins = [html, *self.pins]
        show_pins(self._slot, self.pins)
        return html

    def close(self) -> None:
        """Undo every link and close every widget; a second call does nothing."""
        if self._alone:
            self.jobs.close()
        for action in reversed(self._undo):
            action()
        self._undo.clear()
        close_tree([self.root, *self._owned])
        self._owned.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _ipython_display_(self) -> None:
        self._slot = display_with_slot(self.root, self.pins)

    def _framed(self) -> W.Box:
        parts = [JobBar(self.jobs, self.pin)] if self._alone else []
        return column(*parts, self.body, self._listing, classes=("mdw", "mdw-frame"))

    def _watch(self) -> None:
        self._listing.code = self.shown_code()
        self.link(self._listing, "unfolded", lambda opened: self.refresh_code())
        self.link(self.state, traitlets.All, lambda new: self.refresh_code())  # pyright: ignore

    def _guarded(self, callback: Callable[..., Any]) -> Callable[..., None]:
        def call(*what: Any) -> None:
            try:
                callback(*what)
            except Exception as error:  # noqa: BLE001 - the job bar shows it; a log nobody reads
                self.jobs.fail(self.title.lower(), error)

        return call


def close_tree(widgets: Iterable[W.Widget]) -> None:
    """Close widgets with all that hangs on them: children, layout and style."""
    seen: set[int] = set()
    waiting = list(widgets)
    while waiting:
        widget = waiting.pop()
        if id(widget) in seen:
            continue
        seen.add(id(widget))
        for name in widget.trait_names():
            if widget.trait_has_value(name):
                value = getattr(widget, name)
                several = value if isinstance(value, tuple | list) else (value,)
                waiting += [each for each in several if isinstance(each, W.Widget)]
        widget.close()


def display_with_slot(root: W.Widget, pins: list[str]) -> Any:
    """Show a widget and, below it, a place for pins that stays in the file as plain HTML."""
    from IPython.display import HTML, display

    display(root)
    return display(HTML(_pinned(pins)), display_id=True)


def show_pins(slot: Any, pins: list[str]) -> None:
    """Put pins into their place; without one, as in a script, there is nothing to do."""
    if slot is not None:
        from IPython.display import HTML

        slot.update(HTML(_pinned(pins)))


def _pinned(pins: list[str]) -> str:
    return _render.styled("".join(pins)) if pins else ""
