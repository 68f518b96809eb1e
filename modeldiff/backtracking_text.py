"""Does a direction make a model take its steps back in what it writes: doses in both models.

The cue is counted in generated text alone, as a whole word, with coherence beside it: a model that
says nothing but "wait" is broken, not thoughtful. A coefficient that is chosen on some prompts is
tested on others.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Event
from typing import Any

import pandas as pd
import torch

from modeldiff._progress import Progress, check, reporter
from modeldiff.backtracking_scan import Row, chance_band, equal_length
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch
from modeldiff.behaviours import Behaviour, judge_answers, rate_of
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.divergence import unembedding
from modeldiff.errors import JudgeError
from modeldiff.forward import final_states
from modeldiff.generation import Answer, Generations
from modeldiff.interventions import Cell, Plan, Side, Steer
from modeldiff.loading import SIDES
from modeldiff.masks import Mask
from modeldiff.models import ModelPair
from modeldiff.stats import bootstrap_mean
from modeldiff.thinking_spans import CUE
from modeldiff.tokens import Text, with_response


def cue_rate(text: str, cue: str = CUE) -> float:
    """Occurrences of a cue as a whole word, for 100 words of a text; NaN without words.

    Example:
        >>> cue_rate("Wait, the waiter said: hmm. Then he left.")
        25.0
    """
    words = len(text.split())
    found = len(re.findall(rf"\b(?:{cue})\b", text, re.IGNORECASE))
    return 100 * found / words if words else math.nan


def distinct_trigrams(text: str) -> float:
    """Share of a text's word trigrams that are different; NaN below three words.

    Example:
        >>> distinct_trigrams("wait wait wait wait wait"), distinct_trigrams("one two three four")
        (0.3333333333333333, 1.0)
    """
    words = text.lower().split()
    found = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(found)) / len(found) if found else math.nan


def repetition(text: str) -> float:
    """Share of words that are the word before once more; NaN below two words.

    Example:
        >>> repetition("Wait, wait, wait, no.")
        0.6666666666666666
    """
    words = re.findall(r"\w+", text.lower())
    pairs = list(pairwise(words))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else math.nan


def steering_grid(
    pair: ModelPair,
    behaviour: Behaviour,
    vectors: Mapping[str, Direction],
    coefficients: Sequence[float],
    *,
    cue: str = CUE,
    where: "str | Mask" = "all",
    n_random: int = 5,
    models: Sequence[Side] = SIDES,
    perplexity: bool = False,
    n: int = 1,
    seed: int = 0,
    max_rows: int = 256,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Generate under each vector and coefficient, and count the cue in what is generated.

    The prompt is never counted. A prompt's sample has the same noise in every cell.

    Args:
        pair: The pair.
        behaviour: Prompts, sampling, and a judge whose rate is put beside.
        vectors: By name; all get the first one's length.
        coefficients: Multiples of that length; unsteered cells are always there, as 0.
        cue: Regular expression of the cue, matched as a whole word.
        where: Tokens that are steered.
        n_random: Random directions of the same length, the same for every vector.
        models: Sides.
        perplexity: Also how likely the answers are to the base, unsteered: one more pass.
        n: Answers to each prompt.
        seed: Of sampling, random directions and the bootstrap.
        max_rows: Rows of a batch.
        progress: Where to report, coefficient by coefficient.
        cancel: Event that stops at the next token.

    Returns:
        One row a vector, side and coefficient: vector, side, coefficient, per_100 (cues for 100
        words, mean over answers), low, high (95 %, over prompts), random_rate, random_low,
        random_high (per_100 of the random directions), n_random, distinct (trigrams), repetition,
        random_distinct, perplexity, and the judge's n, rate, coherent with their intervals.

    Raises:
        JudgeError: If the judge scored no answer at a coefficient.
        Cancelled: If the event is set.

    Source:
        Ward et al. 2025, 2507.12638; generated text only, whole words and the band are ours.
    """
    named = equal_length(vectors)
    controls = random_like(next(iter(named.values())), n_random, seed=seed)
    amounts = [0.0, *(c for c in sorted(coefficients, key=abs) if c)]
    report, rows = reporter(progress, "steer"), list[Row]()
    for number, c in enumerate(amounts):
        check(cancel)
        edits = {name: Steer(each, c, where=where) for name, each in named.items()}
        edits |= {f"random {i}": Steer(each, c, where=where) for i, each in enumerate(controls)}
        plans = {name: Plan((edit,)) for name, edit in edits.items()} if c else {"none": Plan()}
        made = pair.generate(
            [prompt.render() for prompt in behaviour.prompts],
            cells=[Cell(side, name, plan) for side in models for name, plan in plans.items()],
            n=n, seed=seed, temperature=behaviour.temperature,
            max_new_tokens=behaviour.max_new_tokens, max_rows=max_rows, cancel=cancel,
        )  # fmt: skip
        for side in models:
            rows += _grid_rows(pair, behaviour, made, side, c, tuple(named), cue, perplexity, seed)
        report(number + 1, len(amounts), f"coefficient {c:+g}")
    return pd.DataFrame(rows)


def _grid_rows(
    pair: ModelPair,
    behaviour: Behaviour,
    made: Generations,
    side: Side,
    coefficient: float,
    names: tuple[str, ...],
    cue: str,
    perplexity: bool,
    seed: int,
) -> list[Row]:
    """Rows of one side and coefficient; an unsteered model is the same for every vector."""
    mine = replace(made, answers=tuple(a for a in made.answers if a.side == side))
    judged = judge_answers(behaviour, mine)
    edits = dict.fromkeys(answer.edit for answer in mine.answers)
    random = [edit for edit in edits if edit.startswith("random ")]
    chance = [_text_means(mine.of(side, edit), cue) for edit in random]
    band = chance_band([each["per_100"] for each in chance])
    distinct = [each["distinct"] for each in chance if math.isfinite(each["distinct"])]
    rows = []
    for name in names:
        edit = name if coefficient else "none"
        answers = mine.of(side, edit)
        rates = [(cue_rate(a.text, cue), a.prompt) for a in answers]
        kept = [(rate, prompt) for rate, prompt in rates if math.isfinite(rate)]
        found = bootstrap_mean([r for r, _ in kept], clusters=[p for _, p in kept], seed=seed)
        rows.append(
            {
                "vector": name,
                "side": side,
                "coefficient": coefficient,
                "per_100": found.estimate,
                "low": found.low,
                "high": found.high,
                **band,
                **{k: v for k, v in _text_means(answers, cue).items() if k != "per_100"},
                "random_distinct": sum(distinct) / len(distinct) if distinct else math.nan,
                "perplexity": base_perplexity(pair, made.prompts, answers) if perplexity
                else math.nan,
                **rate_of(judged[judged["edit"] == edit]),
            }
        )  # fmt: skip
    return rows


def _text_means(answers: Sequence[Answer], cue: str) -> dict[str, float]:
    """Means over answers in which they can be had."""
    measures = {
        "per_100": [cue_rate(each.text, cue) for each in answers],
        "distinct": [distinct_trigrams(each.text) for each in answers],
        "repetition": [repetition(each.text) for each in answers],
    }
    finite = {name: [v for v in values if math.isfinite(v)] for name, values in measures.items()}
    return {name: sum(v) / len(v) if v else math.nan for name, v in finite.items()}


def base_perplexity(pair: ModelPair, prompts: Sequence[Text], answers: Sequence[Answer]) -> float:
    """Perplexity of answers under the unedited base, over all their tokens; NaN without any."""
    sides, total, n = pair.sides, 0.0, 0
    texts = [with_response(prompts[a.prompt], a.ids, sides.tokenizer) for a in answers if a.ids]
    unembed = unembedding(sides.root("base"), sides.site_map)

    @torch.no_grad()
    def of_batch(batch: Batch) -> list[tuple[float, int]]:
        states, found = final_states(sides, batch, "base", Plan()), []
        for row, text in enumerate(batch.texts):
            first = max(1, text.n_prompt)
            came = torch.tensor(text.ids[first:])
            logp = unembed(states[row, first - 1 : text.n_tokens - 1]).log_softmax(-1)
            found.append((float(logp.double().cpu().gather(-1, came[:, None]).sum()), len(came)))
        return found

    for _, found in each_batch(sides, texts, 4096, of_batch, what="perplexity"):
        for logprob, n_tokens in found:
            total, n = total - logprob, n + n_tokens
    return math.exp(min(total / n, 700.0)) if n else math.nan


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A coefficient chosen on some prompts, and what it does on others.

    Args:
        coefficient: The chosen one.
        curve: `steering_grid` on the prompts on which it was chosen, one model.
        grid: `steering_grid` on the others at that coefficient, both models.
    """

    coefficient: float
    curve: pd.DataFrame
    grid: pd.DataFrame


def held_out_grid(
    pair: ModelPair,
    behaviour: Behaviour,
    vectors: Mapping[str, Direction],
    coefficients: Sequence[float],
    *,
    keep: float = 0.8,
    seed: int = 0,
    **settings: Any,
) -> HeldOut:
    """Choose a coefficient on half of the prompts, report the grid on the other half.

    Args:
        pair: The pair.
        behaviour: As for `steering_grid`.
        vectors: As for `steering_grid`; the first one's curve in the fine-tune chooses.
        coefficients: To choose from.
        keep: See `choose_coefficient`.
        seed: Of the split, and as for `steering_grid`.
        **settings: For `steering_grid`.

    Raises:
        JudgeError: If no coefficient keeps the text coherent.
    """
    first, second = behaviour.split(seed)
    lead = dict([next(iter(vectors.items()))])
    curve = steering_grid(
        pair, first, lead, coefficients, models=("finetuned",), seed=seed, **settings
    )
    chosen = choose_coefficient(curve, keep=keep)
    grid = steering_grid(pair, second, vectors, [chosen], seed=seed, **settings)
    return HeldOut(chosen, curve, grid)


def choose_coefficient(curve: pd.DataFrame, *, keep: float = 0.8) -> float:
    """Coefficient of most cues among those that leave the text whole.

    Args:
        curve: Rows of `steering_grid` of one vector and side, the unsteered one among them.
        keep: Share of the unsteered text's distinct trigrams, and of its coherent answers where
            the judge tells, that must be left. A model that says nothing but the cue has neither.

    Raises:
        JudgeError: If the curve is of several vectors or sides, or no coefficient is left.
    """
    plain = curve[curve["coefficient"] == 0]
    if len(curve[["vector", "side"]].drop_duplicates()) != 1 or len(plain) != 1:
        raise JudgeError("a coefficient is chosen on the curve of one vector and one side, with 0.")
    least = keep * plain[["distinct", "coherent"]].iloc[0]
    varied = (curve["distinct"] >= least["distinct"]) | math.isnan(least["distinct"])
    whole = varied & ~(curve["coherent"] < least["coherent"])
    left = curve[(curve["coefficient"] != 0) & whole].dropna(subset=["per_100"])
    if left.empty:
        raise JudgeError(
            f"no coefficient keeps {keep:.0%} of the unsteered text's distinct trigrams and of its "
            f"coherence ({least['distinct']:.2f} and {least['coherent']:.2f} are needed). Try "
            "smaller coefficients, or steer fewer tokens."
        )
    return float(left["coefficient"].iloc[int(left["per_100"].argmax())])
