"""`Workbench`: all panels over one state, one worker and one job bar."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Self

import ipywidgets as W

from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.readers import read
from modeldiff.dictionaries.sources import Source
from modeldiff.models import ModelPair
from modeldiff.stores import ActivationStore
from modeldiff_widgets import _render
from modeldiff_widgets._job_bar import JobBar
from modeldiff_widgets._jobs import JobRunner
from modeldiff_widgets._panel import Panel, close_tree, display_with_slot, show_pins
from modeldiff_widgets._state import AuditState
from modeldiff_widgets._theme import column
from modeldiff_widgets.behaviour import Behaviour
from modeldiff_widgets.caft import Caft
from modeldiff_widgets.chat import Chat
from modeldiff_widgets.checkpoints import Checkpoints
from modeldiff_widgets.compare import Compare
from modeldiff_widgets.directions import Directions
from modeldiff_widgets.edits import Edits
from modeldiff_widgets.latents import Latents
from modeldiff_widgets.layer_map import LayerMap
from modeldiff_widgets.lens import Lens
from modeldiff_widgets.lora import LoraLab
from modeldiff_widgets.patch_map import PatchMap
from modeldiff_widgets.tokens import Tokens
from modeldiff_widgets.training import Training

PANELS: tuple[type[Panel], ...] = (
    Compare, Behaviour, Tokens, Edits, LayerMap, PatchMap, Directions, Lens, LoraLab, Checkpoints,
    Latents, Training, Chat, Caft,
)  # fmt: skip
"""What `Workbench` shows, in the order of its tabs."""


class Workbench:
    """The panels that an auditor works with, side by side over one pair.

    Args:
        pair: The pair.
        panels: Which panels; `PANELS` if None.
        state: Settings to begin with.
        dictionary: A dictionary, or where one lies in any layout that can be read: its latents
            are shown by the panel Latents. Later: ``wb.state.use_dictionary``.
        store: Activations to measure it on, or to train one: a store, or a source of rows.
            Later: ``wb.state.use_rows``.

    Raises:
        FileFormatError: If what lies there is no dictionary.
        SiteError: If the store lacks the dictionary's site.

    Example:
        >>> with Workbench(None, panels=()) as wb:
        ...     wb.jobs.wait(1)
        True
    """

    def __init__(
        self,
        pair: ModelPair,
        panels: Sequence[type[Panel]] | None = None,
        state: AuditState | None = None,
        *,
        dictionary: Dictionary | str | PathLike[str] | None = None,
        store: ActivationStore | Source | None = None,
    ) -> None:
        self.pair = pair
        self.state = AuditState() if state is None else state
        if isinstance(dictionary, Dictionary):
            self.state.use_dictionary(dictionary)
        elif dictionary is not None:
            self.state.use_dictionary(read(dictionary), str(dictionary))
        if store is not None:
            self.state.use_rows(store)
        self.jobs = JobRunner()
        self.pins: list[str] = []
        self._slot: Any = None
        kinds = PANELS if panels is None else panels
        self.panels: dict[str, Any] = {
            kind.title: kind(pair, self.state, self.jobs) for kind in kinds
        }
        self.bar = JobBar(self.jobs, self.pin)
        self.tabs = W.Tab(
            children=[panel.root for panel in self.panels.values()], titles=list(self.panels)
        )
        self.root = column(self.bar, self.tabs, classes=("mdw", "mdw-frame"))

    def show(self, title: str) -> Any:
        """Bring a panel to the front.

        Raises:
            KeyError: If there is none of that title.
        """
        self.tabs.selected_index = list(self.panels).index(self.panels[title].title)
        return self.panels[title]

    @property
    def current(self) -> Panel | None:
        """The panel in front."""
        index = self.tabs.selected_index
        several = list(self.panels.values())
        return several[index or 0] if several else None

    def pin(self) -> str:
        """Keep what the panel in front shows as static HTML; returns it.

        It stays in the notebook's file and needs no kernel.
        """
        html = "" if self.current is None else self.current.snapshot_html()
        self.pins = [html, *self.pins]
        show_pins(self._slot, self.pins)
        return html

    def snapshot_html(self) -> str:
        """Everything that all panels show, as one static page fragment."""
        return _render.styled("".join(panel.snapshot_html() for panel in self.panels.values()))

    def close(self) -> None:
        """Stop the worker and close every widget; a second call does nothing."""
        self.jobs.close()
        for panel in self.panels.values():
            panel.close()
        close_tree([self.root])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _ipython_display_(self) -> None:
        self._slot = display_with_slot(self.root, self.pins)

    def __repr__(self) -> str:
        return f"Workbench({self.pair!r}, panels={list(self.panels)})"
