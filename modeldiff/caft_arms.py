"""The arms of a comparison: one way of fine-tuning each, CAFT and what it must beat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from modeldiff.caft import caft
from modeldiff.caft_candidates import Candidate
from modeldiff.caft_controls import random_choice
from modeldiff.caft_modes import Mode
from modeldiff.caft_reading import Choice
from modeldiff.directions import Direction
from modeldiff.errors import SetupError
from modeldiff.sft import Around
from modeldiff.sft_files import content


@dataclass(frozen=True, eq=False)
class Arm:
    """One way of fine-tuning.

    Args:
        name: For tables.
        directions: What is ablated; without any the training is the plain one.
        mode: See `modeldiff.caft.caft`.
        layers: Where; None for each direction at its own layer.
        post_hoc: Train plainly and ablate in the deployed model instead.
        keep: Weight of the divergence from the base on rows outside the domain.
        coefficient: For the mode "steer".
        means: For the mode "mean".
    """

    name: str
    directions: tuple[Direction, ...] = ()
    mode: Mode = "project"
    layers: tuple[int, ...] | None = None
    post_hoc: bool = False
    keep: float = 0.0
    coefficient: float = 1.0
    means: Mapping[int, Tensor] | None = None

    @property
    def hooks(self) -> Around | None:
        """Makes the context in which the directions are ablated; None if there are none."""
        if not self.directions:
            return None
        options = {"mode": self.mode, "coefficient": self.coefficient, "means": self.means}
        return partial(caft, directions=self.directions, layers=self.layers, **options)

    @property
    def around(self) -> Around | None:
        """Makes the context of the training."""
        return None if self.post_hoc else self.hooks

    @property
    def training(self) -> "tuple[Any, float]":
        """What the trained weights depend on; arms that share it are trained once."""
        return content(self.around), self.keep


def standard_arms(
    candidates: Sequence[Candidate],
    choice: Choice | Sequence[str],
    seed: int = 0,
    *,
    matched: Sequence[Direction] = (),
    keep: float = 0.0,
    steer: float = 0.0,
    layers: Sequence[int] | None = None,
) -> tuple[Arm, ...]:
    """The arms that belong beside concept ablation fine-tuning.

    Args:
        candidates: All directions that there were to choose from.
        choice: Those that were chosen, or their names.
        seed: Of the random choice.
        matched: Random directions in the subspace in which activations vary as much, see
            `modeldiff.caft_controls.same_variance`; no such arm without them.
        keep: Weight of narrow-KL regularisation; no such arm at 0.
        steer: Coefficient of preventative steering along the sum of the chosen directions, which
            must point towards what is not wanted; in their raw lengths. No such arm at 0.
        layers: Where all are ablated; None for each at its own layer.

    Returns:
        plain; caft (the chosen ones); unchosen (the other candidates); random choice (each
        candidate with probability 1/2); matched random; all; post-hoc (plain training, ablated
        when deployed); gradient only; forward only; steering; narrow KL.

    Raises:
        SetupError: If nothing is ticked, or a ticked name is no candidate's.

    Source:
        Casademunt et al. 2025, arXiv 2507.16795, for the random and complete choices; Chen et al.
        2025, arXiv 2507.21509, for steering; arXiv 2602.07852 for narrow KL.
    """
    names = choice.ticked if isinstance(choice, Choice) else tuple(choice)
    known = {each.name: each.direction for each in candidates}
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise SetupError(
            f"{len(names)} directions are ticked, {missing or 'none'} of them unknown. Tick some "
            f"of {', '.join(known) or 'the candidates, of which there are none'}."
        )
    at = None if layers is None else tuple(layers)
    chosen = tuple(known[name] for name in names)
    others = tuple(each for name, each in known.items() if name not in names)
    half = tuple(each.direction for each in random_choice(candidates, seed=seed))
    several = [
        Arm("caft", chosen),
        Arm("unchosen", others),
        Arm("random choice", half),
        Arm("matched random", tuple(matched)),
        Arm("all", tuple(known.values())),
        Arm("post-hoc", chosen, post_hoc=True),
        Arm("gradient only", chosen, mode="backward"),
        Arm("forward only", chosen, mode="forward"),
        *([Arm("steering", chosen, mode="steer", coefficient=steer)] if steer else []),
    ]
    ablating = [replace(arm, layers=at) for arm in several if arm.directions]
    narrow = [Arm("narrow KL", keep=keep)] if keep else []
    return Arm("plain"), *ablating, *narrow
