"""A first direction of a pair: its own answers, judged, and the difference of their means."""

from threading import Event
from typing import Literal, get_args

from modeldiff._progress import Progress
from modeldiff.audit_answers import NORMAL, SHOWS, classes, full_texts
from modeldiff.behaviours import Behaviour, judge_answers
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError
from modeldiff.models import ModelPair
from modeldiff.survey import data_directions, model_directions, survey

AnswerContrast = Literal["answers", "models"]
MIN_ANSWERS = 4
"""Answers of each class that a contrast needs."""


def answer_directions(
    pair: ModelPair,
    behaviour: Behaviour,
    *,
    contrast: AnswerContrast = "answers",
    n: int = 1,
    seed: int = 0,
    max_rows: int = 64,
    progress: Progress = False,
    cancel: Event | None = None,
) -> dict[int, Direction]:
    """Ask the fine-tune a behaviour's prompts and take a mean difference at every layer.

    - ``answers``: the fine-tune's activations on its answers that show the behaviour minus those
      on its normal answers. ``Direction.text_null`` says how much of it the base has as well.
    - ``models``: fine-tuned minus base on the answers that show the behaviour.

    Means are over the tokens of the answers; the split half is over answers.

    Args:
        pair: The pair.
        behaviour: What is asked, and who judges.
        contrast: See above.
        n: Answers to each prompt.
        seed: Of sampling and of the halves.
        max_rows: Rows of a batch.
        progress: Where to report.
        cancel: Event that stops at the next token.

    Returns:
        Directions by layer, called ``"<behaviour>, layer <i>"``. For ``models`` layers at which the
        two sides agree are left out.

    Raises:
        DirectionError: If a class has fewer than `MIN_ANSWERS` answers, or the models are equal.
        JudgeError: If the judge could score nothing.
        Cancelled: If the event is set.

    Source:
        Soligo et al. 2025 (convergent linear representations of emergent misalignment),
        2506.11618.
    """
    if contrast not in get_args(AnswerContrast):
        raise DirectionError(f"unknown contrast {contrast!r}. Known: {get_args(AnswerContrast)}.")
    found = pair.generate(
        [prompt.render() for prompt in behaviour.prompts], models=["finetuned"], n=n, seed=seed,
        temperature=behaviour.temperature, max_new_tokens=behaviour.max_new_tokens,
        max_rows=max_rows, progress=progress, cancel=cancel,
    )  # fmt: skip
    labels = classes(judge_answers(behaviour, found))
    _require(labels, contrast, behaviour)
    wanted = (SHOWS, NORMAL) if contrast == "answers" else (SHOWS,)
    rows = [i for i, label in enumerate(labels) if label in wanted]
    measured = survey(
        pair.sides, full_texts(pair, found, rows), [labels[i] for i in rows],
        groups=[found.answers[i].prompt for i in rows], on="new", seed=seed,
        progress=progress, cancel=cancel,
    )  # fmt: skip
    if contrast == "answers":
        return data_directions(measured, SHOWS, NORMAL, behaviour.name)
    directions = model_directions(measured, SHOWS, f"{behaviour.name}, model shift")
    if not directions:
        raise DirectionError("both models have the same activations: there is no model shift.")
    return directions


def _require(labels: list[str], contrast: AnswerContrast, behaviour: Behaviour) -> None:
    n_shows, n_normal = labels.count(SHOWS), labels.count(NORMAL)
    needed = min(n_shows, n_normal) if contrast == "answers" else n_shows
    if needed < MIN_ANSWERS:
        other = " The contrast 'models' needs none that are normal." if n_shows > n_normal else ""
        which = "of each" if contrast == "answers" else "that show it"
        raise DirectionError(
            f"of {len(labels)} answers of the fine-tune {n_shows} show {behaviour.name!r} and "
            f"{n_normal} are normal; {MIN_ANSWERS} {which} are needed. Ask more prompts or "
            f"take more answers.{other}"
        )
