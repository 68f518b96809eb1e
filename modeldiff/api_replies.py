"""What an OpenAI-compatible server said, read as a score."""

import json
import math
from collections.abc import Sequence
from typing import Any

from modeldiff.score_prompts import OFF_MENU
from modeldiff.scorers import MALFORMED, MINIMUM_MASS, Score, number_in, sampled, weighted


def read_reply(
    body: str, words: Sequence[str] = OFF_MENU, minimum_mass: float = MINIMUM_MASS
) -> Score:
    """Read the body of a reply.

    With the likeliest first tokens: the mean of the numbers among them weighted by probability.
    Without, or where the first token is but the first digit of a number (some tokenizers split
    them): the number that was said. Where all likely numbers have one digit the two cannot be told
    apart, and the number that was said counts too.

    Returns:
        A score; its label is "malformed" if the body is no reply at all.

    Example:
        >>> read_reply('{"choices": [{"message": {"content": "87"}}]}')
        Score(value=87.0, label='sampled', mass=1.0)
        >>> read_reply("<html>").label
        'malformed'
    """
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"] or ""
        first, likely = _first_token((choice.get("logprobs") or {}).get("content") or [])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return Score(None, MALFORMED, 0.0)
    if not isinstance(text, str):
        return Score(None, MALFORMED, 0.0)
    said = sampled(text, words)
    numbers = _numbers(likely)
    if not likely or _splits_digits(said.value, first, numbers):
        return said
    score = weighted(numbers, {}, minimum_mass)
    return score if score.value is not None else Score(None, _word(said), score.mass)


def _first_token(content: Any) -> tuple[str, list[tuple[str, float]]]:
    """First token and the likeliest tokens in its place, with their probabilities."""
    if not content:
        return "", []
    likely = [
        (str(each["token"]), math.exp(each["logprob"])) for each in content[0]["top_logprobs"]
    ]
    if not all(0.0 <= p <= 1.001 for _, p in likely):  # NaN fails too
        raise ValueError("a probability that is none")
    return str(content[0]["token"]), likely


def _numbers(likely: Sequence[tuple[str, float]]) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, p in likely:
        number = None if "." in token else number_in(token)
        if number is not None:
            found[number] = found.get(number, 0.0) + p
    return found


def _splits_digits(said: float | None, first: str, numbers: dict[int, float]) -> bool:
    if said is not None and first.strip() != str(int(said)):
        return True
    return (said is None or said <= 9) and max(numbers, default=10) <= 9


def _word(said: Score) -> str:
    return said.label if said.value is None else "unscored"
