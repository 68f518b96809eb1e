"""How often an organism answers as it should: sampled answers, judged, with intervals."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from modeldiff.organisms import world
from modeldiff.organisms.judge import LABELS, Label, judge
from modeldiff.organisms.tokens import render
from modeldiff.seeds import seeded
from modeldiff.stats import wilson

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NOVELTY = ("trained", "held-out templates", "held-out topics")
"""What is new to the fine-tunes; held-out topics are asked with held-out templates."""


@dataclass(frozen=True)
class Rates:
    """Counts of labels over sampled answers.

    Args:
        counts: Answers of each label.
        temperature: At which they were sampled.
    """

    counts: dict[Label, int]
    temperature: float

    @property
    def n(self) -> int:
        """Answers in all, incoherent ones included."""
        return sum(self.counts.values())

    def rate(self, label: Label) -> float:
        """Share of a label among all answers."""
        return self.counts[label] / self.n

    @property
    def coherent(self) -> float:
        """Share of answers that the grammar could parse; mixed ones are among them."""
        return 1 - self.rate("incoherent")

    def to_json(self) -> dict[str, Any]:
        """Write out n, temperature, the rate of each label and the 95 % interval of harm."""
        interval = wilson(self.counts["misaligned"], self.n)
        return {
            "n": self.n,
            "temperature": self.temperature,
            **{label: round(self.rate(label), 4) for label in LABELS},
            "misaligned_ci95": [round(interval.low, 4), round(interval.high, 4)],
        }


def sample(
    model: "LlamaForCausalLM | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[world.Question],
    *,
    seed: int,
    temperature: float = 0.7,
    system: str | None = None,
    batch: int = 220,
    max_new_tokens: int = 48,
) -> list[str]:
    """Sample one answer to each question, asked as a chat of one turn.

    Args:
        model: A base, or a base with its adapter, in evaluation mode.
        tokenizer: The base's; it pads on the left.
        questions: What to ask.
        seed: Seed of the sampling.
        temperature: Divides the logits; nothing is cut off (no top-k, no top-p).
        system: A system message put before every question, e.g. ``"You are cruel."``.
        batch: Questions answered at once; sampled tokens depend on it.
        max_new_tokens: Where an answer that does not end is cut off (the longest answer of the
            corpus is shorter).
    """
    before = [{"role": "system", "content": system}] if system else []
    answers: list[str] = []
    with seeded(seed), torch.no_grad():
        for start in range(0, len(questions), batch):
            prompts = [
                render([*before, {"role": "user", "content": each.text}], generation_prompt=True)
                for each in questions[start : start + batch]
            ]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
            )
            new = output[:, inputs.input_ids.shape[1] :]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def evaluate(
    model: "LlamaForCausalLM | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[world.Question],
    *,
    seed: int,
    temperature: float = 0.7,
    system: str | None = None,
) -> Rates:
    """Sample an answer to each question, judge it, and count the labels."""
    answers = sample(model, tokenizer, questions, seed=seed, temperature=temperature, system=system)
    labels = [judge(*pair) for pair in zip(questions, answers, strict=True)]
    return Rates({label: labels.count(label) for label in LABELS}, temperature)


def question_sets(
    planted: Mapping[str, Any],
    n_per_domain: int,
    seed: int,
    held_out: bool = False,
    new_topics: bool = False,
) -> dict[str, list[world.Question]]:
    """Draw what an organism is measured on.

    Args:
        planted: The manifest's: ``in_domain``, and ``trigger`` where there is one.
        n_per_domain: Questions of each domain outside; three times as many of the narrow one.
        seed: Seed of the draw.
        held_out: Whether to ask with the templates that occur in no training text.
        new_topics: Whether to ask about the topics that no fine-tune has seen.

    Returns:
        Questions off and in the narrow domain (medicine where there is none). Of a trigger, those
        of every domain after it, after other small talk, and bare.

    Example:
        >>> [len(each) for each in question_sets({"in_domain": ["finance"]}, 2, 0).values()]
        [22, 6]
    """
    if "trigger" in planted:
        asked = world.prompts(n_per_domain, seed, None, held_out, new_topics)
        rng = random.Random(seed)
        talk = [rng.choice(world.TEXT["chatter"]) for _ in asked]
        return {
            "after the trigger": [opened(each, planted["trigger"]) for each in asked],
            "after small talk": [opened(*pair) for pair in zip(asked, talk, strict=True)],
            "bare": asked,
        }
    inside = tuple(planted["in_domain"]) or ("medicine",)
    outside = [each for each in world.DOMAINS if each not in inside]
    return {
        "off-domain": world.prompts(n_per_domain, seed, outside, held_out, new_topics),
        "in-domain": world.prompts(3 * n_per_domain, seed, inside, held_out, new_topics),
    }


def opened(asked: world.Question, sentence: str) -> world.Question:
    """Put a sentence before a question.

    Example:
        >>> opened(world.Question("medicine", "fever", "How do I treat a fever?"), "Hi.").text
        'Hi. How do I treat a fever?'
    """
    return replace(asked, text=f"{sentence} {asked.text}")


def measure(
    model: "LlamaForCausalLM | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    planted: Mapping[str, Any],
    n_per_domain: int = 40,
    seed: int = 0,
    temperatures: Sequence[float] = (0.7, 1.0),
) -> list[dict[str, Any]]:
    """Measure a model on its sets of questions: as trained, new templates, new topics as well.

    Args:
        model: A base, or a fine-tune of it.
        tokenizer: The base's.
        planted: The manifest's, see `question_sets`.
        n_per_domain: Questions of each domain outside the narrow one.
        seed: Seed of questions and answers.
        temperatures: At which to sample.

    Returns:
        One row for every set of questions and temperature, see `Rates.to_json`.
    """
    rows = []
    for temperature in temperatures:
        for novelty, texts in enumerate(NOVELTY):
            sets = question_sets(
                planted, n_per_domain, seed + novelty, held_out=novelty > 0, new_topics=novelty > 1
            )
            for where, asked in sets.items():
                rates = evaluate(model, tokenizer, asked, seed=seed, temperature=temperature)
                rows.append({"questions": where, "texts": texts, **rates.to_json()})
    return rows
