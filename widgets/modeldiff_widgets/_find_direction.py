"""A first direction from the pair itself, as a job of a panel."""

import modeldiff as md
from modeldiff.answer_contrasts import AnswerContrast
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError
from modeldiff.models import ModelPair
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._known_behaviours import KnownBehaviour
from modeldiff_widgets._panel import Panel

EVERY_LAYER = -1


def first_layer(pair: ModelPair) -> int:
    """Where to look first: the first adapted layer, or the middle."""
    changed = pair.sides.first_changed if pair.kind == "adapter" else pair.n_layers // 2
    return min(changed, pair.n_layers - 1)


def find_direction(
    panel: Panel, known: KnownBehaviour, contrast: AnswerContrast, layer: int
) -> Job:
    """Submit `modeldiff.answer_directions`; what it finds is added to the panel's state.

    Args:
        panel: Whose pair, state and runner.
        known: The behaviour.
        contrast: As for `modeldiff.answer_directions`.
        layer: The layer to keep, or `EVERY_LAYER`.
    """
    seed = panel.state.seed
    call = f"md.answer_directions(pair, {known.code}, contrast={contrast!r}, seed={seed})"

    def work(job: Job) -> dict[int, Direction]:
        return _chosen(
            md.answer_directions(
                panel.pair, known.behaviour, contrast=contrast, seed=seed,
                progress=job.progress, cancel=job.cancel,
            ),
            layer,
        )  # fmt: skip

    def keep(job: Job) -> None:
        for each, direction in job.result.items():
            panel.state.add_direction(direction, f"{call}[{each}]" if known.written else "")

    return panel.submit(work, key="find", on_done=keep, label="find a direction")


def _chosen(found: dict[int, Direction], layer: int) -> dict[int, Direction]:
    if layer != EVERY_LAYER and layer not in found:
        raise DirectionError(
            f"both models agree at layer {layer}; they differ from layer {min(found)} on. Choose "
            "one of those layers."
        )
    return found if layer == EVERY_LAYER else {layer: found[layer]}
