"""Which arms are run, and how: the controls of the panel CAFT."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import ipywidgets as W

from modeldiff.caft_candidates import Candidate
from modeldiff.caft_reading import Choice
from modeldiff.errors import SetupError
from modeldiff.sft_plans import Kind, SFTPlan, preset
from modeldiff_widgets import _theme
from modeldiff_widgets._caft_ask import ARMS, Comparison, Stop
from modeldiff_widgets._caft_data import Data, Texts
from modeldiff_widgets._edit_rows import layers_text, read_layers
from modeldiff_widgets._known_behaviours import KnownBehaviour

STOPS: tuple[tuple[str, Stop], ...] = (
    ("at the loss that caft ends with", "caft"), ("at the end of the plan", "plan"),
    ("at a held-out loss of", "loss"),
)  # fmt: skip
_TICKED = ("caft", "plain")


class RunForm:
    """Controls of a comparison.

    Args:
        data: Rows and base.
        n_layers: Of the model.
    """

    def __init__(self, data: Data, n_layers: int) -> None:
        self.data, self.n_layers = data, n_layers
        self.arms = {
            name: W.Checkbox(value=name in _TICKED, description=name, indent=False)
            for name in ARMS
            if name != "narrow KL" or data.has_kept
        }
        for each in self.arms.values():
            each.layout.width = "auto"
        self._plan_controls(data.plan)
        self._comparison_controls()
        self.folder = W.Text(value="caft", placeholder="nothing is kept", continuous_update=False)
        self.start = _theme.button("Run", primary=True, icon="play")
        self.start.disabled = bool(self.data.missing)
        self.stop = _theme.button("Stop and keep", icon="stop")
        self.stop.tooltip = "end now; finished arms stay, and Run goes on from the folder"
        self.stop.disabled = True
        self.offer_target()

    def _plan_controls(self, plan: SFTPlan) -> None:
        self.kind = W.Dropdown(options=get_args(Kind), value=plan.kind)
        self.layers = W.Text(value="" if plan.layers is None else layers_text(plan.layers),
                             placeholder="the kind's own", continuous_update=False)  # fmt: skip
        self.steps = W.BoundedIntText(value=plan.steps or 40, min=1, max=1 << 24)
        self.rate = W.Text(value=f"{plan.learning_rate:g}", continuous_update=False)
        self.every = W.BoundedIntText(value=plan.evaluate_every, min=1, max=1 << 20)

    def _comparison_controls(self) -> None:
        self.stop_at = W.Dropdown(options=STOPS)
        self.target = W.Text(placeholder="nats a token", continuous_update=False)
        self.n_seeds = W.BoundedIntText(value=1, min=1, max=100)
        self.seed = W.IntText()
        self.prompts = W.BoundedIntText(value=40, min=1, max=5000)
        self.samples = W.BoundedIntText(value=1, min=1, max=1000)

    def build(self) -> Sequence[W.Widget]:
        """Lay them out."""
        return (
            _theme.note(f"{self.data.about} {self.data.missing}".strip()),
            _theme.note("Arms to run:"), _theme.row(*self.arms.values()),
            _theme.row(
                _theme.field("What is trained", self.kind, width="8rem"),
                _theme.field("Its layers", self.layers, width="8rem"),
                _theme.field("Steps at most", self.steps, width="7rem"),
                _theme.field("Learning rate", self.rate, width="7rem"),
                _theme.field("Steps between held-out losses", self.every, width="12rem"),
            ),
            _theme.row(
                _theme.field("All arms stop", self.stop_at, width="16rem"),
                _theme.field("Held-out loss", self.target, width="8rem"),
                _theme.field("Seeds", self.n_seeds, width="5rem"),
                _theme.field("First seed", self.seed, width="6rem"),
                _theme.field("Prompts a behaviour", self.prompts, width="9rem"),
                _theme.field("Answers each", self.samples, width="7rem"),
            ),
            _theme.row(
                _theme.field("Folder for models and finished arms, to go on from", self.folder,
                             grow=True),
                self.start, self.stop,
            ),
        )  # fmt: skip

    def offer_target(self) -> None:
        """The loss is typed where it is asked for."""
        self.target.disabled = self.stop_at.value != "loss"

    def plan(self) -> SFTPlan:
        """How each arm is trained.

        Raises:
            SetupError: If a setting cannot be.
        """
        plan, kind = self.data.plan, str(self.kind.value)
        if kind != plan.kind:
            plan = preset(kind)  # pyright: ignore[reportArgumentType]
        layers = read_layers(self.layers.value, self.n_layers)
        return replace(
            plan, layers=None if layers is None or isinstance(layers, str) else tuple(layers),
            steps=self.steps.value, evaluate_every=self.every.value,
            learning_rate=_positive(self.rate.value, "learning rate"),
        )  # fmt: skip

    def comparison(
        self, found: tuple[Candidate, ...], choice: Choice, known: Sequence[KnownBehaviour],
        texts: Texts, directions_code: str,
    ) -> Comparison:  # fmt: skip
        """What is asked for.

        Raises:
            SetupError: If something is missing; names everything.
        """
        stop: Any = self.stop_at.value
        target = _positive(self.target.value, "held-out loss") if stop == "loss" else None
        first = self.seed.value
        return Comparison(
            data=self.data, found=found, choice=choice,
            arms=tuple(name for name, box in self.arms.items() if box.value), plan=self.plan(),
            behaviours=tuple(each.some(self.prompts.value) for each in known), stop=stop,
            target=target, seeds=tuple(range(first, first + self.n_seeds.value)),
            n=self.samples.value, folder=self.folder.value.strip(), texts=texts,
            directions_code=directions_code,
        )  # fmt: skip


def _positive(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise SetupError(f"{what} {text!r} is no number.") from error
    if not value > 0:
        raise SetupError(f"{what} {value} is not positive.")
    return value
