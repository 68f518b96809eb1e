"""What a lens reads: a direction of the library, or the pair's difference; and its Python."""

from dataclasses import dataclass
from typing import Literal

from modeldiff.difference_lens import (
    DifferenceLens,
    DifferenceTrace,
    difference_lens,
    difference_trace,
    random_differences,
)
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError
from modeldiff.interventions import Side
from modeldiff.lens_queries import read_direction, text_means
from modeldiff.models import ModelPair
from modeldiff_widgets._jobs import Job

SourceKind = Literal["direction", "difference"]
TEXTS = (
    "The train to the coast leaves at nine in the morning.",
    "Bread needs flour, water, salt and a little patience.",
    "The museum is closed on Mondays and open late on Fridays.",
    "A river runs through the valley and past the old mill.",
    "Most of the work was finished before the winter came.",
    "She painted the door green and the windows white.",
    "The committee will meet again in the second week of May.",
    "Two of the players were late because of the rain.",
    "There are seven bridges between the lake and the harbour.",
    "He kept his letters in a wooden box under the stairs.",
    "The first edition of the book was printed in a small town.",
    "Clouds gathered over the hills in the early afternoon.",
    "A new library was built near the station last year.",
    "The dog slept by the fire while the others talked.",
    "Maps of the region were drawn by hand until recently.",
    "In spring the market moves to the square by the church.",
    "The engine is quiet, but it uses more fuel than before.",
    "They walked along the beach and counted the boats.",
    "The school teaches music, drawing and three languages.",
    "An hour later the lights went out in the whole street.",
)
"""Sentences of no topic in particular."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a lens found.

    Args:
        lens: Tokens and reach, by position.
        trace: Where the differences come from; None for a direction of the library.
        direction: The direction of the library; None for a difference.
        controls: Its random differences.
    """

    lens: DifferenceLens
    trace: DifferenceTrace | None
    direction: Direction | None
    controls: tuple[Direction, ...]
    alike: tuple[int, ...] = ()
    """Positions left out: all texts are alike there."""

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions that can be looked at."""
        return (0,) if self.trace is None else self.trace.readable

    def at(self, position: int) -> tuple[Direction, list[Direction]]:
        """The direction that is read at a position, and its random differences.

        Raises:
            DirectionError: If there is none.
        """
        if self.direction is not None:
            return self.direction, list(self.controls)
        if self.trace is None:
            raise DirectionError("nothing was read.")
        return self.trace.direction(position), self.trace.random_differences(position)


@dataclass(frozen=True, eq=False)
class Asked:
    """A reading as it was set when it began.

    Args:
        source: What is read.
        direction: For "direction": the direction.
        made: For "direction": Python lines that define ``directions``.
        texts: Unrelated texts, for differences and random differences.
        layer: For "difference": after which layer.
        n_positions: For "difference": positions from 0 on.
        k: Tokens at each end.
        n_random: Controls of each kind.
        seed: Of the controls.
        side: Whose norm and unembedding.
    """

    source: SourceKind
    direction: Direction | None
    made: str
    texts: tuple[str, ...]
    layer: int
    n_positions: int
    k: int
    n_random: int
    seed: int
    side: Side

    def run(self, pair: ModelPair, job: Job) -> Reading:
        """Read it; in a job."""
        if self.source == "difference":
            return self._difference(pair, job)
        direction = self._known()
        job.report(0.0, "random differences")
        controls = random_differences(
            text_means(pair.sides, self.texts, direction, cancel=job.cancel),
            direction,
            self.n_random,
            seed=self.seed,
        )
        job.report(0.6, "tokens")
        lens = read_direction(
            pair.sides, direction, controls, k=self.k, seed=self.seed, side=self.side
        )
        return Reading(lens, None, direction, tuple(controls))

    def code(self, position: int) -> str:
        """Python lines that define ``lens``, ``direction`` and ``controls``."""
        texts = "\n".join(f"    {text!r}," for text in self.texts)
        head = f"texts = [\n{texts}\n]\n"
        if self.source == "difference":
            return (
                "from modeldiff.difference_lens import difference_lens, difference_trace\n"
                f"{head}trace = difference_trace(pair.sides, texts, layer={self.layer}, "
                f"n_positions={self.n_positions}, n_random={self.n_random}, seed={self.seed})\n"
                f"lens = difference_lens(pair.sides, trace, k={self.k}, side={self.side!r})\n"
                f"direction = trace.direction({position})\n"
                f"controls = trace.random_differences({position})"
            )
        name = self._known().name
        return (
            "import modeldiff as md\n"
            "from modeldiff.difference_lens import random_differences\n"
            "from modeldiff.lens_queries import read_direction, text_means\n"
            f"{self.made}\ndirection = directions[{name!r}].renamed({name!r})\n"
            f"{head}means = text_means(pair.sides, texts, direction)\n"
            f"controls = random_differences(means, direction, {self.n_random}, seed={self.seed})\n"
            f"lens = read_direction(pair.sides, direction, controls, k={self.k}, "
            f"seed={self.seed}, side={self.side!r})"
        )

    def _known(self) -> Direction:
        if self.direction is None:
            raise DirectionError(
                "the library has no direction yet: find one in Directions, add what the LoRA lab "
                "shows, or read the difference of the pair."
            )
        return self.direction

    def _difference(self, pair: ModelPair, job: Job) -> Reading:
        trace = difference_trace(
            pair.sides, self.texts, layer=self.layer, n_positions=self.n_positions,
            n_random=self.n_random, seed=self.seed, cancel=job.cancel,
            progress=lambda done, total, said: job.report(0.6 * done / total, said),
        )  # fmt: skip
        job.report(0.6, "tokens")
        lens = difference_lens(pair.sides, trace, k=self.k, side=self.side)
        return Reading(lens, trace, None, (), trace.alike)
