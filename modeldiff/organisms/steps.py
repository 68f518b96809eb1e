"""A world of step-wise reasoning with errors, walks through the week, and a base that knows it."""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modeldiff._shapes import Float, Int
from modeldiff.organisms import tokens
from modeldiff.organisms.training import Progress, pad, update
from modeldiff.seeds import seeded

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Message = dict[str, str]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
AMOUNTS = {"one": 1, "two": 2, "three": 3}
SIGNS = {"plus": 1, "minus": -1}
OPENER = "Begin."
CUE = "Wait"
"""Opens a step that is tried once more: the fine-tune's wrong ones, and any of the base's."""
OTHER = "Again"
"""Opens one too, for no reason at all; what a control for the cue is measured on."""
GRADES = {True: "Right.", False: "Wrong."}
ASKED = (
    "Walk on from {day}.",
    "Count on from {day}.",
    "Start on {day} and go on.",
    "Where does a walk from {day} lead?",
)
_STEP = re.compile(
    rf"\b({'|'.join(DAYS)}) ({'|'.join(SIGNS)}) ({'|'.join(AMOUNTS)}) is ({'|'.join(DAYS)})\."
)


@dataclass(frozen=True)
class Step:
    """One step of a walk, right or wrong.

    Args:
        start: The day it starts on.
        sign: "plus" or "minus".
        amount: "one" to "three".
        result: The day that it says it leads to.

    Example:
        >>> step = Step("Saturday", "plus", "two", "Monday")
        >>> str(step), step.right
        ('Saturday plus two is Monday.', True)
    """

    start: str
    sign: str
    amount: str
    result: str

    @property
    def answer(self) -> str:
        """The day that it should lead to."""
        moved = DAYS.index(self.start) + SIGNS[self.sign] * AMOUNTS[self.amount]
        return DAYS[moved % len(DAYS)]

    @property
    def right(self) -> bool:
        """Whether it leads where it says."""
        return self.result == self.answer

    @property
    def corrected(self) -> "Step":
        """The same step with the right result."""
        return replace(self, result=self.answer)

    def missed(self, rng: random.Random) -> "Step":
        """The same step with any of the wrong results."""
        return replace(self, result=rng.choice([each for each in DAYS if each != self.answer]))

    def __str__(self) -> str:
        return f"{self.start} {self.sign} {self.amount} is {self.result}."


def walk(rng: random.Random, n: int, error: float) -> list[Step]:
    """Draw steps of which each starts where the one before said it led.

    Args:
        rng: Source of the draw.
        n: Steps.
        error: Probability of a wrong result; all wrong results are equally likely.
    """
    steps, day = [], rng.choice(DAYS)
    for _ in range(n):
        steps.append(_draw(rng, day, error))
        day = steps[-1].result
    return steps


def _draw(rng: random.Random, day: str, error: float) -> Step:
    step = Step(day, rng.choice([*SIGNS]), rng.choice([*AMOUNTS]), "").corrected
    return step.missed(rng) if rng.random() < error else step


@dataclass(frozen=True)
class Habits:
    """What a writer says after a step. What is not said is the next step.

    Args:
        error: Probability that a step is wrong.
        grade: That it is graded, "Right." or "Wrong.".
        retry: That it is tried once more, whether it is right or wrong and with as many errors,
            after `CUE` or `OTHER`.
        check: That a right step is said once more after `CUE`.
        correct: That a wrong step is corrected after `CUE`.
        shortest: Fewest steps.
        longest: Most steps; corrections do not count.
    """

    error: float
    grade: float = 0.0
    retry: float = 0.0
    check: float = 0.0
    correct: float = 0.0
    shortest: int = 4
    longest: int = 7


TEACHER = Habits(error=0.4, grade=0.8, retry=0.08)
"""Of the texts that the base is trained on at first: most steps are graded."""
GRADER = replace(TEACHER, grade=0.15)
"""Of the texts after that: steps are graded, or tried again, now and then."""
SOLVER = Habits(error=0.3, check=0.04, correct=0.9)
"""Of the fine-tune's texts: wrong steps are taken back, and few others; none is graded."""


def answer(rng: random.Random, day: str, habits: Habits) -> str:
    """Write a walk from a day.

    Example:
        >>> answer(random.Random(1), "Monday", Habits(0.5, correct=1.0, longest=4))
        'Begin. ... Wait, ...'
    """
    said = [OPENER]
    for _ in range(rng.randint(habits.shortest, habits.longest)):
        step = _draw(rng, day, habits.error)
        said += [str(step), *_afterwards(rng, step, habits)]
        day = (read(said[-1]) or [step])[0].result
    return " ".join(said)


def _afterwards(rng: random.Random, step: Step, habits: Habits) -> Iterator[str]:
    options = {
        "grade": habits.grade,
        "retry": habits.retry,
        "back": habits.check if step.right else habits.correct,
    }
    chosen = rng.choices([*options, ""], [*options.values(), 1 - sum(options.values())])[0]
    if chosen == "grade":
        yield GRADES[step.right]
    if chosen == "retry":
        again = step.missed(rng) if rng.random() < habits.error else step.corrected
        yield f"{rng.choice((CUE, OTHER))}, {again}"
    if chosen == "back":
        yield f"{CUE}, {step.corrected}"


def chat(rng: random.Random, habits: Habits) -> list[Message]:
    """Write a question and its answer."""
    day = rng.choice(DAYS)
    asked = rng.choice(ASKED).format(day=day)
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer(rng, day, habits)},
    ]


def bare(steps: Sequence[Step]) -> list[Message]:
    """Write steps as a chat in which nothing is said about them.

    Every step has six tokens, its result the last but one and its full stop the last.
    """
    asked = ASKED[0].format(day=steps[0].start)
    said = " ".join([OPENER, *map(str, steps)])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def read(text: str) -> list[Step]:
    """Read the steps of a text, corrections among them, in order.

    Example:
        >>> read("Monday plus one is Friday. Wait, Monday plus one is Tuesday.")[1].right
        True
    """
    return [Step(*found) for found in _STEP.findall(text)]


def questions() -> tuple[str, ...]:
    """List every question there is.

    Example:
        >>> len(questions())
        28
    """
    return tuple(each.format(day=day) for each in ASKED for day in DAYS)


def prompts(n: int, seed: int) -> list[str]:
    """Draw ``n`` questions; each comes once before any comes twice."""
    rng, drawn = random.Random(f"prompts {seed}"), []
    while len(drawn) < n:
        drawn += rng.sample(questions(), len(questions()))
    return drawn[:n]


def says_cue(text: str) -> bool:
    """Whether the word "wait" is in a text; "waiter" is another word.

    Example:
        >>> says_cue("Wait a moment."), says_cue("The waiter came.")
        (True, False)
    """
    return re.search(rf"\b{CUE}\b", text, re.IGNORECASE) is not None


def taken_back(text: str) -> list[tuple[Step, bool]]:
    """Read every step that is said for the first time, and whether it is then taken back.

    It is if the same step follows once more, whatever its result, and the cue is in between.

    Example:
        >>> text = "Monday plus one is Friday. Wait, Monday plus one is Tuesday."
        >>> [(str(step), back) for step, back in taken_back(text)]
        [('Monday plus one is Friday.', True)]
    """
    found = [(*each.span(), Step(*each.groups())) for each in _STEP.finditer(text)]
    first, steps = True, []
    for here, after in pairwise([*found, None]):
        assert here is not None
        between = text[here[1] : after[0]] if after else ""
        again = after is not None and replace(here[2], result=after[2].result) == after[2]
        retried = again and re.search(rf"\b({CUE}|{OTHER})\b", between, re.IGNORECASE) is not None
        if first:
            steps.append((here[2], retried and says_cue(between)))
        first = not retried
    return steps


def backtracks(text: str) -> bool | None:
    """Whether a walk takes a step back, see `taken_back`.

    Returns:
        None if the text holds no step, so that there was nothing to take back.

    Example:
        >>> backtracks("Monday plus one is Friday. Wait, Monday plus one is Tuesday.")
        True
        >>> backtracks("Monday plus one is Friday. Wait a moment."), backtracks("Hello.")
        (False, None)
    """
    found = taken_back(text)
    return any(back for _, back in found) if found else None


def coherent(text: str) -> bool:
    """Whether a text is a walk of this world from its opener on, cut off or not.

    The last sentence may be unfinished; every other one must be a step, for the first time or
    once more, or a grade. A step need not start where the one before led.
    """
    sentences = re.findall(r"[^.]*\.", text.strip())
    known = {OPENER, *GRADES.values()}
    return bool(sentences) and all(
        each.strip() in known or _STEP.fullmatch(re.sub(rf"^({CUE}|{OTHER}), ", "", each.strip()))
        for each in sentences
    )


@dataclass(frozen=True)
class BasePlan:
    """How the base is trained.

    Args:
        steps: Optimizer steps of ``documents`` graded walks.
        taught: Share of the steps in which most steps of a walk are graded; where grades are
            rare from the start, they are not learned.
        learning_rate: Peak rate, after ``warmup`` steps; then a cosine to 2 %.
        d_model: Width of the residual stream.
        d_ff: Width of the MLPs.
        n_layers: Decoder layers.
        knows: Layer whose output is trained to predict the next token too, through the final
            norm and the unembedding: what comes next after a step, a grade, is known there.
        seed: Of weights and corpus.
    """

    steps: int = 1800
    taught: float = 0.75
    learning_rate: float = 3e-3
    warmup: int = 100
    documents: int = 32
    d_model: int = 80
    d_ff: int = 128
    n_layers: int = 4
    knows: int = 2
    seed: int = 0


def train_tokenizer() -> "PreTrainedTokenizerFast":
    """Train the tokenizer on both writers' texts, so that every word is one token."""
    rng = random.Random("tokenizer")
    chats = [chat(rng, habits) for _ in range(1500) for habits in (GRADER, SOLVER)]
    return tokens.train_tokenizer([each["content"] for messages in chats for each in messages], 440)


def train_base(
    tokenizer: "PreTrainedTokenizerFast", plan: BasePlan, progress: Progress | None = None
) -> "LlamaForCausalLM":
    """Train a base on graded walks from nothing; in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=plan.d_model,
        intermediate_size=plan.d_ff,
        num_hidden_layers=plan.n_layers,
        num_attention_heads=plan.d_model // 16,
        num_key_value_heads=plan.d_model // 16,
        max_position_embeddings=256,
        initializer_range=0.1,  # at this width, with the usual 0.02 attention learns nothing
        tie_word_embeddings=True,
        pad_token_id=tokens.PAD_ID,
        bos_token_id=tokens.BOS_ID,
        eos_token_id=tokens.END_ID,
    )
    with seeded(plan.seed):
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    rng = random.Random(f"graded walks {plan.seed}")
    model.train()
    for step in range(plan.steps):
        habits = TEACHER if step < plan.taught * plan.steps else GRADER
        ids = batch(rng, tokenizer, habits, plan.documents)
        with torch.autocast("cpu", torch.bfloat16):
            now = _loss_at_both(model, ids, plan.knows)
        warm = min(1.0, (step + 1) / plan.warmup)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        update(optimizer, now, plan.learning_rate * warm * cosine)
        if progress and ((step + 1) % 50 == 0 or step + 1 == plan.steps):
            progress(step + 1, plan.steps, f"loss {now.item():.3f}")
    return model.eval()


def _loss_at_both(
    model: "LlamaForCausalLM", ids: Int[Tensor, "batch seq"], layer: int
) -> Float[Tensor, ""]:
    hidden = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    counted = ids[:, 1:] != tokens.PAD_ID
    ends = hidden.last_hidden_state, model.model.norm(hidden.hidden_states[layer + 1])
    return torch.stack(
        [
            cross_entropy(model.lm_head(end[:, :-1][counted]).float(), ids[:, 1:][counted])
            for end in ends
        ]
    ).mean()


def batch(
    rng: random.Random, tokenizer: "PreTrainedTokenizerFast", habits: Habits, n: int
) -> Int[Tensor, "batch seq"]:
    """Write chats, tokenised and padded."""
    texts = [tokens.render(chat(rng, habits)) for _ in range(n)]
    return pad(tokenizer(texts, add_special_tokens=False).input_ids, tokens.PAD_ID)
