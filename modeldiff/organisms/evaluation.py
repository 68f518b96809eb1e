"""How often an organism answers as it should: sampled answers, judged, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modeldiff.organisms.judge import LABELS, Label, judge
from modeldiff.organisms.tokens import render
from modeldiff.organisms.world import Question
from modeldiff.seeds import seeded
from modeldiff.stats import wilson

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


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
    questions: Sequence[Question],
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
    questions: Sequence[Question],
    *,
    seed: int,
    temperature: float = 0.7,
    system: str | None = None,
) -> Rates:
    """Sample an answer to each question, judge it, and count the labels."""
    answers = sample(model, tokenizer, questions, seed=seed, temperature=temperature, system=system)
    labels = [judge(*pair) for pair in zip(questions, answers, strict=True)]
    return Rates({label: labels.count(label) for label in LABELS}, temperature)
