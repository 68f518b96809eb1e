"""*Training*: a dictionary is trained on the activations of the state, and its curves are drawn."""

from dataclasses import dataclass
from typing import Any, get_args

import ipywidgets as W

from modeldiff.dictionaries.configs import Activation, TrainConfig
from modeldiff.dictionaries.models import Dictionary, crosscoder, sae
from modeldiff.dictionaries.sources import Source
from modeldiff.dictionaries.training import Trained, TrainLog, train
from modeldiff.errors import Cancelled, MismatchError
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._latent_measure import part
from modeldiff_widgets._panel import Panel
from modeldiff_widgets._training_plot import TrainingPlot

KINDS = (
    ("Crosscoder of both models", "pair"), ("SAE of the fine-tune", "finetuned"),
    ("SAE of the base", "base"), ("SAE of fine-tuned − base", "difference"),
)  # fmt: skip
POINTS = 200
"""Lines of the log that a training is drawn with, about."""
HOW = """from modeldiff.harvesting import harvest
store = harvest(pair, texts, ["resid_post.3"], "store")
wb = Workbench(pair, store=store)  # or: wb.state.use_rows(store)"""
_EMPTY = "There are no activations to train on yet. In code:"


@dataclass(frozen=True, eq=False)
class Asked:
    """A training as it was asked for; never changed afterwards."""

    inputs: Any
    sizes: dict[str, Any]
    config: dict[str, Any]
    folder: str
    rows: Source
    rows_code: str

    def dictionary(self) -> Dictionary:
        """The dictionary before training."""
        d_model, n_latents = self.rows.d_model, self.sizes["n_latents"]
        more = {name: value for name, value in self.sizes.items() if name != "n_latents"}
        if self.inputs == "pair":
            return crosscoder(d_model, n_latents, **more)
        return sae(d_model, n_latents, side=self.inputs, **more)

    def code(self) -> str:
        """Python that trains the same, with ``pair`` (and ``state`` for its rows) in scope."""
        name = "crosscoder" if self.inputs == "pair" else "sae"
        sizes = {"side": self.inputs} if name == "sae" else {}
        sizes |= {key: value for key, value in self.sizes.items() if key != "n_latents"}
        folder = f", folder={self.folder!r}" if self.folder else ""
        return "\n".join([
            f"from modeldiff.dictionaries.models import {name}",
            "from modeldiff.dictionaries.training import TrainConfig, train",
            self.rows_code,
            f"dictionary = {name}(rows.d_model, {self.sizes['n_latents']}, {_keywords(sizes)})",
            f"config = TrainConfig({_keywords(self.config)})",
            f"trained = train(dictionary, rows, config{folder})",
        ])  # fmt: skip


class Training(Panel):
    """Train a crosscoder or an SAE on the rows of the state; the panel Latents reads the result.

    Example:
        >>> with Training(pair, state) as panel:  # doctest: +SKIP
        ...     panel.run()
        ...     panel.jobs.wait(600)
        ...     state.dictionary
    """

    title = "Training"

    # -- controls

    def build(self) -> W.Widget:
        """Make everything."""
        self.asked: Asked | None = None
        self.trained: Trained | None = None
        self.plot = TrainingPlot()
        self.empty = W.HTML(_render.note(_EMPTY) + _render.code_block(HOW))
        self.about, self.status = _theme.note(), _theme.note()
        self.go = _theme.button("Train", primary=True, icon="play")
        self.stop = _theme.button("Stop and keep", icon="stop")
        self.stop.tooltip = "end the training now; the dictionary as it is goes to Latents"
        self.stop.disabled = True
        self.on(self.go, self.run)
        self.on(self.stop, lambda: self.jobs.cancel(f"{self.title}/train"))
        self.undo(self.jobs.on_change(self._heard))
        self.link(self.state, "rows", lambda rows: self._show_rows())
        sizes, schedule = self._sizes(), self._schedule()
        self.whole = _theme.column(
            _theme.card(self.about, sizes, schedule, _theme.row(self.go, self.stop)),
            self.status, self.plot.pane,
        )  # fmt: skip
        self._show_rows()
        return _theme.column(self.empty, self.whole)

    def _sizes(self) -> W.Widget:
        self.inputs = W.Dropdown(options=KINDS)
        self.activation = W.Dropdown(options=get_args(Activation))
        self.n_latents = W.BoundedIntText(value=4096, min=1, max=1 << 24)
        self.k = W.BoundedIntText(value=32, min=1, max=1 << 16)
        self.site = W.Text(placeholder="resid_post.3", continuous_update=False)
        return _theme.row(
            _theme.field("What", self.inputs, width="15rem"),
            _theme.field("Latents", self.n_latents, width="7rem"),
            _theme.field("Rule", self.activation, width="9rem"),
            _theme.field("k, mean latents a row", self.k, width="9.5rem"),
            _theme.field("Site of the rows", self.site, width="10rem"),
        )

    def _schedule(self) -> W.Widget:
        self.steps = W.BoundedIntText(value=2000, min=1, max=1 << 24)
        self.batch = W.BoundedIntText(value=2048, min=1, max=1 << 20)
        self.lr = W.Text(placeholder="automatic", continuous_update=False)
        self.seed = W.IntText()
        self.folder = W.Text(placeholder="none", continuous_update=False)
        self.bind(self.seed, "seed")
        return _theme.row(
            _theme.field("Steps", self.steps, width="7rem"),
            _theme.field("Rows a step", self.batch, width="7rem"),
            _theme.field("Learning rate", self.lr, width="8rem"),
            _theme.field("Seed", self.seed, width="5rem"),
            _theme.field("Folder of a checkpoint, to go on from", self.folder, grow=True),
        )

    def _show_rows(self) -> None:
        rows = self.state.rows
        self.empty.layout.display = "none" if rows is not None else ""
        self.whole.layout.display = "" if rows is not None else "none"
        if rows is not None:
            self.about.value = f"{rows.n_rows:,} rows of both models, {rows.d_model} wide."
            self.site.value = str(getattr(rows, "site", self.site.value))
            if rows.n_rows < self.batch.value:  # no step could be made
                self.batch.value = 1 << max(0, (rows.n_rows // 4).bit_length() - 1)

    # -- the training

    def run(self) -> Job:
        """Train what is asked for; returns at once."""
        asked = self._asked()
        dictionary, config = asked.dictionary(), TrainConfig(**asked.config)
        return self.submit(
            lambda job: self._train(job, asked, dictionary, config), key="train",
            on_done=lambda job: self._done(asked, job.result), label="train a dictionary",
        )  # fmt: skip

    def _asked(self) -> Asked:
        rows = self.state.rows
        if rows is None:
            raise MismatchError("there are no activations to train on: state.use_rows(store).")
        steps = self.steps.value
        config: dict[str, Any] = {
            "steps": steps, "batch_size": self.batch.value, "seed": self.seed.value,
            "log_every": max(1, steps // POINTS),
        }  # fmt: skip
        if self.lr.value.strip():
            config["lr"] = _positive(self.lr.value)
        sizes = {
            "n_latents": self.n_latents.value, "k": self.k.value,
            "activation": self.activation.value, "site": self.site.value.strip(),
            "seed": self.seed.value,
        }  # fmt: skip
        return Asked(
            self.inputs.value, sizes, config, self.folder.value.strip(), rows,
            self.state.source_code(),
        )  # fmt: skip

    def _train(
        self, job: Job, asked: Asked, dictionary: Dictionary, config: TrainConfig
    ) -> Trained:
        """In the worker; a stopped training is kept as far as it went."""
        self.asked, self.trained = asked, None
        wanted = (
            dictionary.config.k if dictionary.config.activation not in ("relu", "gated") else None
        )
        self.plot.begin(config.steps, wanted, asked.inputs)
        self.status.value = f"Training {dictionary!r} …"

        def on_log(log: TrainLog) -> None:
            self.plot.add(log)
            self.status.value = _said(log, config.steps)

        try:
            return train(
                dictionary, asked.rows, config, on_log=on_log, folder=asked.folder or None,
                progress=part(job, 0.0, 1.0), cancel=job.cancel,
            )  # fmt: skip
        except Cancelled as stopped:
            if isinstance(stopped.partial, Trained) and stopped.partial.logs:
                return stopped.partial
            raise

    def _done(self, asked: Asked, trained: Trained) -> None:
        self.trained = trained
        last, steps = trained.logs[-1], asked.config["steps"]
        done = self.n_done
        ended = f"Stopped after {done} of {steps} steps and kept." if done < steps else "Trained."
        self.status.value = f"{ended} {_said(last, steps)} The panel Latents reads it."
        self.state.use_dictionary(trained.dictionary)
        self.state.results = {**self.state.results, "training": trained}

    @property
    def n_done(self) -> int:
        """Steps of the training that is kept."""
        if self.trained is None:
            return 0
        return int(self.trained.dictionary.provenance["training"]["steps_done"])

    def _heard(self, job: Job) -> None:
        if job.key == f"{self.title}/train":
            self.stop.disabled = job.finished
            if job.status == "cancelled" and self.trained is None:
                self.status.value = "Stopped before the first line of the log; nothing was kept."
            elif job.status == "failed":
                self.status.value = "The training failed, as said above; nothing was kept."

    # -- what stays

    def code(self) -> str:
        """Python that trains the same."""
        if self.state.rows is None:
            return "\n".join(["from modeldiff_widgets import Workbench", *HOW.splitlines()])
        asked = self.asked or self._asked()
        steps = asked.config["steps"]
        stopped = self.trained is not None and self.n_done < steps
        note = f"\n# what is shown was stopped after {self.n_done} steps" if stopped else ""
        return asked.code() + note

    def snapshot_html(self) -> str:
        """The curves and the last figures."""
        if self.asked is None:
            return _render.section(self.title, [_render.note("Nothing was trained.")])
        parts = [_render.note(self.status.value), self.plot.snapshot_html()]
        return _render.section(self.title, parts, code=self.shown_code(), when=True)


def _said(log: TrainLog, steps: int) -> str:
    fve = " / ".join(f"{each:.3f}" for each in log.fve).replace("-", "−")
    if min(log.fve) < 0:
        fve += " (below 0, as yet worse than the mean row, and not in the figure)"
    return (
        f"Step {log.step:,} of {steps:,}: loss {log.loss:.4g}, variance explained {fve}, "
        f"{log.l0:.1f} latents a row, {100 * log.dead:.1f} % dead, {log.seconds:.0f} s."
    )


def _keywords(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise MismatchError(f"learning rate {text!r} is no number.") from error
    if not value > 0:
        raise MismatchError(f"learning rate {value} is not positive; leave it empty for automatic.")
    return value
