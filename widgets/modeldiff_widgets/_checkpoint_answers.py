"""What the model says at a step of its training, beside its base."""

from dataclasses import dataclass
from typing import Any

from modeldiff.generation import Row
from modeldiff.interventions import Cell, Plan, ScaleAdapter
from modeldiff.models import ModelPair
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._prompt_box import Asked
from modeldiff_widgets._streams import Said, Stream, said_of

AMPLIFIED = "amplified"


@dataclass(frozen=True)
class Question:
    """What is answered at which step.

    Args:
        step: Of the training.
        factor: What the adapter writes is multiplied by this, in a column of its own if not 1.
        item_code: Python of the prompt.
        seed: Of the noise; all steps share it.
        temperature: 0 is greedy.
        limit: Tokens of an answer at most.
    """

    step: int
    factor: float
    item_code: str
    seed: int
    temperature: float
    limit: int

    @classmethod
    def of(cls, asked: Asked, step: int, factor: float) -> "Question":
        """What is asked, at a step."""
        return cls(step, factor, asked.item_code, asked.seed, asked.temperature,
                   asked.max_new_tokens)  # fmt: skip

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Columns: base, the step, and the step amplified."""
        plain = (Cell("base"), Cell("finetuned"))
        if self.factor == 1:
            return plain
        return *plain, Cell("finetuned", AMPLIFIED, Plan((ScaleAdapter(self.factor),)))

    def columns(self) -> list[dict[str, str]]:
        """How they are headed in an `AnswerView`."""
        step = f"step {self.step}"
        heads = [("base", "base"), (step, "finetuned"), (f"{step}, × {self.factor:g}", "edited")]
        return [{"title": t, "kind": k, "note": ""} for t, k in heads[: len(self.cells)]]

    def code(self) -> str:
        """Python that defines ``answers``; ``base`` and ``checkpoints`` are in scope."""
        more = "" if self.factor == 1 else (
            f"\n    md.Cell('finetuned', {AMPLIFIED!r}, "
            f"md.Plan((md.ScaleAdapter({self.factor!r}),))),"
        )  # fmt: skip
        return (
            "from modeldiff.series import load_pairs\n"
            "pairs = load_pairs(base, checkpoints)\n"
            f"cells = (\n    md.Cell('base'),\n    md.Cell('finetuned'),{more}\n)\n"
            f"answers = pairs[{self.step}].generate(\n    [{self.item_code}],\n    cells=cells,\n"
            f"    seed={self.seed},\n    temperature={self.temperature!r},\n"
            f"    max_new_tokens={self.limit},\n).answers"
        )


def answered(pair: ModelPair, item: Any, question: Question, job: Job, show: Any) -> list[Said]:
    """Let the pair of a step answer; in a job.

    Args:
        pair: Of that step.
        item: The prompt.
        question: About it.
        job: Whose cancel button stops it.
        show: Called with texts by `Row` as they grow.
    """
    found = pair.generate(
        [item], cells=question.cells, seed=question.seed, temperature=question.temperature,
        max_new_tokens=question.limit, cancel=job.cancel,
        on_step=Stream(pair, job, question.limit, show),
    )  # fmt: skip
    said = said_of(found.answers, question.cells)
    return [said[Row(number, 0, 0)] for number in range(len(question.cells))]


def cell_of(said: Said) -> dict[str, Any]:
    """A complete answer as a cell of an `AnswerView`."""
    how = "ended" if said.ended else "cut at the limit"
    return {"parts": [["", said.text]], "state": "", "note": f"{len(said.ids)} tokens · {how}"}
