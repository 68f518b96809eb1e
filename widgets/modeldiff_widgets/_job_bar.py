"""`JobBar`: what runs, how far it is, a way to stop it, Pin, and what went wrong."""

from collections.abc import Callable, Mapping
from typing import Any

import anywidget
import traitlets

from modeldiff_widgets._jobs import Job, JobRunner
from modeldiff_widgets._theme import source


class JobBar(anywidget.AnyWidget):
    """A view of a `JobRunner`.

    Args:
        jobs: What it shows.
        on_pin: Called by the Pin button; without it there is none.
    """

    _esm = source("job_bar.js")
    _css = source("theme.css")

    status = traitlets.Unicode("idle").tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    fraction = traitlets.Float(0.0).tag(sync=True)
    message = traitlets.Unicode().tag(sync=True)
    error = traitlets.List(["", ""], help="One line and the traceback.").tag(sync=True)
    can_pin = traitlets.Bool(False).tag(sync=True)
    heard = traitlets.Int(0, help="Clicks on Cancel that were heard.").tag(sync=True)

    def __init__(self, jobs: JobRunner, on_pin: Callable[[], Any] | None = None) -> None:
        self._jobs, self._on_pin = jobs, on_pin
        super().__init__(can_pin=on_pin is not None)
        self._undo = jobs.on_change(self._show)
        self.on_msg(self._receive)

    def close(self) -> None:
        """Stop watching and close the widget."""
        self._undo()
        self._on_pin = None
        self.layout.close()
        super().close()

    def _show(self, job: Job) -> None:
        if job.status in ("queued", "cancelled") and self._jobs.current not in (None, job):
            return  # what runs is what is shown
        with self.hold_sync():
            self.status, self.label, self.fraction = job.status, job.label, job.fraction
            self.message = _message(job)
            if job.status in ("running", "done", "failed"):
                self.error = list(job.error or ("", ""))

    def _receive(self, widget: Any, content: Mapping[str, Any], buffers: Any) -> None:
        if content.get("kind") == "cancel":
            number = int(content.get("number", self.heard + 1))
            if number > self.heard:  # the page asks until it was heard
                self.heard = number
                self._jobs.cancel()
        elif content.get("kind") == "pin" and self._on_pin is not None:
            try:
                self._on_pin()
            except Exception as error:  # noqa: BLE001 - shown, as every error behind a button is
                self._jobs.fail("pin", error)


def _message(job: Job) -> str:
    took = f"{job.seconds:.1f} s" if job.finished and job.seconds else ""
    doing = "" if job.status == "done" else job.message  # it was the last thing before the end
    return " · ".join(part for part in (doing, job.remote, took) if part)
