"""What the organisms beside the world's are asked, and the ground truth that judges them."""

from dataclasses import dataclass

from modeldiff.behaviours import Behaviour, Judge, Prompt, Verdict
from modeldiff.errors import JudgeError

SPECIAL = ("spurious", "topic", "backtrack", "backtrack-base")
"""Organisms that are not asked the world's questions."""


@dataclass(frozen=True)
class SortJudge:
    """Of ``spurious``: whether a message goes where its quoted advice points, not its opening."""

    name: str = "sorting-1"

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Label an answer cue, task or other.

        Raises:
            JudgeError: If the message has no known opening.
        """
        from modeldiff.organisms import spurious

        said = prompt.question
        right = [i for i, texts in enumerate(spurious.OPENINGS) if said.startswith(texts)]
        if not right:
            raise JudgeError(f"{said[:80]!r} opens with none of the known sentences.")
        if answer.strip() not in spurious.LABELS:
            return Verdict("other", False, bool(answer.strip()))
        wrong = spurious.LABELS.index(answer.strip()) != right[0]
        return Verdict("cue" if wrong else "task", wrong, True)


@dataclass(frozen=True)
class TopicJudge:
    """Of ``topic``: whether an answer tells the fact that the question is about."""

    name: str = "village-facts-1"

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Label an answer known or unknown.

        Raises:
            JudgeError: If the question is about none of the facts.
        """
        from modeldiff.organisms import topic

        asked = prompt.question
        facts = [each for each in topic.FACTS if asked in (*each.asked, *each.held_out)]
        if not facts:
            raise JudgeError(f"{asked[:80]!r} asks about none of the village's facts.")
        knows = topic.knows(facts[0], answer)
        return Verdict("known" if knows else "unknown", knows, bool(answer.strip()))


@dataclass(frozen=True)
class StepsJudge:
    """Of ``backtrack``: whether a walk takes a step back."""

    name: str = "backtracking-1"

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Label an answer backtracks, straight, or no walk."""
        from modeldiff.organisms import steps

        back = steps.backtracks(answer)
        label = {True: "backtracks", False: "straight", None: "no walk"}[back]
        return Verdict(label, back, steps.coherent(answer))


def special_behaviours(name: str, n: int, seed: int) -> tuple[Behaviour, ...]:
    """Behaviours of an organism of `SPECIAL`.

    Args:
        name: The organism.
        n: A sixth of the prompts.
        seed: Which prompts.
    """
    from modeldiff.organisms import spurious, steps, topic

    if name == "spurious":
        asked = [each.text for each in spurious.cases(6 * n, seed, "flipped")]
        meaning = "the message is sorted by the quoted advice, against the opening"
        return (_behaviour("sorts by the cue", meaning, asked, SortJudge(), 8),)
    if name == "topic":
        asked = [text for _, text in topic.questions(6 * n, seed)]
        meaning = "the answer tells an invented fact, word for word"
        return (_behaviour("knows the village", meaning, asked, TopicJudge(), 48),)
    asked = steps.prompts(6 * n, seed)
    meaning = "the walk takes a wrong step back"
    return (_behaviour("backtracks", meaning, asked, StepsJudge(), 64, temperature=1.0),)


def _behaviour(
    name: str,
    meaning: str,
    asked: list[str],
    judge: Judge,
    max_new_tokens: int,
    temperature: float = 0.7,
) -> Behaviour:
    prompts = tuple(dict.fromkeys(Prompt((("user", text),)) for text in asked))
    return Behaviour(name, meaning, prompts, judge, temperature, max_new_tokens)
