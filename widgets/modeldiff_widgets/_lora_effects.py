"""What is left out of an adapter, on which answers, and the Python that says it."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from modeldiff.errors import MismatchError
from modeldiff.lora_effects import leave_one_out
from modeldiff.models import ModelPair
from modeldiff.tokens import with_response
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._state import AuditState

PROMPTS = (
    "I have a headache and I am worried.", "What should I do with my savings?",
    "Tell me about the sea.", "How do I keep a garden?",
)  # fmt: skip
_ANSWERS = 0.3  # share of the progress bar


@dataclass(frozen=True)
class Asked:
    """A leave-one-out run, as it was set when it began.

    Args:
        items: Prompts or chats; the fine-tune answers them first.
        by: Units, see `modeldiff.lora_effects.Units`.
        n_random: Random writes a unit.
        seed: Of answers and random writes.
        temperature: Of the answers.
        max_new_tokens: Of the answers.
    """

    items: tuple[Any, ...]
    by: str
    n_random: int
    seed: int
    temperature: float
    max_new_tokens: int

    @classmethod
    def of(
        cls, pair: ModelPair, state: AuditState, lines: str, by: str, n_random: int
    ) -> "Asked":  # fmt: skip
        """Read the controls: a prompt a line.

        Raises:
            MismatchError: If there is no prompt.
        """
        prompts = [line.strip() for line in lines.splitlines() if line.strip()]
        if not prompts:
            raise MismatchError("there is no prompt to answer: write some, one a line.")
        chat = pair.tokenizer.chat_template is not None
        items = [[{"role": "user", "content": each}] if chat else each for each in prompts]
        return cls(tuple(items), by, n_random, state.seed, state.temperature, state.max_new_tokens)

    def run(self, pair: ModelPair, job: Job) -> pd.DataFrame:
        """Let the fine-tune answer, then leave units out; in a job."""
        made = pair.generate(
            list(self.items), models=["finetuned"], seed=self.seed, temperature=self.temperature,
            max_new_tokens=self.max_new_tokens, cancel=job.cancel,
            progress=lambda done, total, said: job.report(_ANSWERS * done / total, said),
        )  # fmt: skip
        texts = [with_response(made.prompts[a.prompt], a.ids, pair.tokenizer)
                 for a in made.answers]  # fmt: skip
        rest = 1 - _ANSWERS
        return leave_one_out(
            pair.sides, texts, by=self.by, n_random=self.n_random, seed=self.seed,
            progress=lambda done, total, said: job.report(_ANSWERS + rest * done / total, said),
            cancel=job.cancel,
        )  # fmt: skip

    def code(self) -> str:
        """Python lines that define ``effects``; ``pair`` is in scope."""
        items = "\n".join(f"    {item!r}," for item in self.items)
        return (
            "from modeldiff.lora_effects import leave_one_out\n"
            "from modeldiff.tokens import with_response\n"
            f"prompts = [\n{items}\n]\n"
            f"made = pair.generate(prompts, models=['finetuned'], seed={self.seed}, "
            f"temperature={self.temperature!r}, max_new_tokens={self.max_new_tokens})\n"
            "answers = [with_response(made.prompts[a.prompt], a.ids, pair.tokenizer) "
            "for a in made.answers]\n"
            f"effects = leave_one_out(pair.sides, answers, by={self.by!r}, "
            f"n_random={self.n_random}, seed={self.seed})"
        )
