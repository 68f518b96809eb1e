"""The audit: what a fine-tune changed, which direction carries it, and the proof with controls.

Five stages. *Answers*: both models answer, and a judge says which answers show the behaviour.
*Outputs*: divergences on text that each model wrote. *Activations*: where in the layers the two
differ. *Directions*: differences of means, with split halves and the base-text null. *Proof*: on
prompts that played no part so far, ablate the direction beside random ones, and add it to the base.
Without a behaviour the same proof is made on the distance between the two models' predictions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from threading import Event
from typing import Any

from modeldiff._files import digest
from modeldiff._progress import Progress
from modeldiff._version import __version__
from modeldiff.audit_findings import caveats
from modeldiff.audit_stages import Settings, Work, audit_behaviour, audit_texts
from modeldiff.behaviours import Behaviour
from modeldiff.cache import Cache
from modeldiff.errors import Cancelled, ModelDiffError
from modeldiff.models import ModelPair
from modeldiff.report import Report


@dataclass(frozen=True, eq=False)
class Audit:
    """An audit of one pair.

    Args:
        pair: The pair.
        behaviours: The first is the one that is explained; others are measured beside it.
        texts: Without a behaviour: at least eight texts or chats that begin differently. One
            half serves to find the direction, the other to prove it, which takes six: of fewer than
            twelve texts no proof can hold.
        settings: Seed, numbers of controls and samples, sizes of batches.
        cache: Where finished work is kept; a second run, or one that was interrupted, reads it.
        load: How the pair (and the behaviours) can be had again; recorded in the manifest so
            that ``modeldiff rerun`` can repeat the audit.

    Example:
        >>> from modeldiff.behaviours import organism_behaviours
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> audit = Audit(pair, organism_behaviours("em-rank1", n=2))
        >>> audit.settings.n_random
        20
    """

    pair: ModelPair
    behaviours: Sequence[Behaviour] = ()
    texts: Sequence[Any] = ()
    settings: Settings = field(default_factory=Settings)
    cache: Cache = field(default_factory=Cache)
    load: Mapping[str, Any] = field(default_factory=dict)

    def run(self, *, progress: Progress = False, cancel: Event | None = None) -> Report:
        """Carry the audit out.

        Args:
            progress: Where to report.
            cancel: Event that stops at the next token or batch.

        Returns:
            The report; ``complete`` is False if it was cancelled, with what was finished.

        Raises:
            ModelDiffError: If there is neither a behaviour nor enough text, or there are both.
        """
        if self.behaviours and self.texts:
            raise ModelDiffError(
                f"an audit explains a behaviour or the distance on texts, got {len(self.texts)} "
                "texts beside a behaviour. Make two audits."
            )
        work = Work(self.pair, self.settings, self.cache, progress, cancel)
        try:
            if self.behaviours:
                audit_behaviour(work, self.behaviours)
            else:
                audit_texts(work, self.texts)
        except Cancelled:
            return self._report(work, complete=False)
        return self._report(work, complete=True)

    def _asked(self) -> dict[str, str]:
        """Content hashes of the behaviours, or of the texts."""
        if self.behaviours:
            return {behaviour.name: behaviour.content_key for behaviour in self.behaviours}
        return {"texts": digest([text.key for text in self.pair.texts(self.texts)])}

    def _again(self) -> dict[str, str]:
        """The Python that loads the same pair and audits it again, where that is known."""
        if "base" not in self.load:
            return {}
        names = ("finetuned", "adapter", "subfolder", "revision", "device")
        given = "".join(f", {n}={self.load[n]!r}" for n in names if self.load.get(n))
        changed = "".join(
            f", {name}={value!r}"
            for name, value in asdict(self.settings).items()
            if value != getattr(Settings(), name)
        )
        what = "texts=texts"
        if self.behaviours:
            organism = str(self.load["base"]).removeprefix("organism:")
            n, seed = self.load.get("prompts"), self.settings.seed
            what = f"md.organism_behaviours({organism!r}, n={n}, seed={seed})"
        return {
            "python": f"import modeldiff as md\n"
            f"pair = md.ModelPair.load({self.load['base']!r}{given})\n"
            f"report = md.Audit(pair, {what}, settings=md.Settings({changed[2:]})).run()"
        }

    def _report(self, work: Work, complete: bool) -> Report:
        pair = self.pair
        own, held = pair.n_parameters
        return Report(
            title=f"{pair.sides.names[1]} against {pair.sides.names[0]}",
            pair={
                "kind": pair.kind,
                "base": pair.sides.names[0],
                "finetuned": pair.sides.names[1],
                "n_layers": pair.n_layers,
                "d_model": pair.d_model,
                "n_parameters": own,
                "parameters_held": held,
                "digests": dict(pair.digests),
            },
            settings={
                **asdict(self.settings),
                "load": dict(self.load),
                "asked": self._asked(),
                **self._again(),
            },
            versions=versions(),
            findings=tuple(work.findings),
            tables=work.tables,
            directions=tuple(work.directions),
            caveats=(*caveats(pair, self.behaviours), *work.caveats),
            seconds=work.seconds,
            complete=complete,
        )


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "nnsight", "numpy", "pandas")
    return {"modeldiff": __version__, **{name: version(name) for name in names}}
