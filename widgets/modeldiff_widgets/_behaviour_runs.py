"""Runs of the panel *Behaviour*: what is asked, what came, what one or two judges say of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from modeldiff.agreement import Agreement, agreement
from modeldiff.behaviours import Behaviour, Judge, Verdict, verdicts_of
from modeldiff.dose import with_prompts
from modeldiff.errors import JudgeError
from modeldiff.generation import Answer, Generations
from modeldiff.interventions import Cell, Plan
from modeldiff.judge_rates import Rate, rate_difference, rate_with_interval, rates_by_question
from modeldiff.models import ModelPair
from modeldiff.stats import Interval
from modeldiff.tokens import Text
from modeldiff_widgets._behaviour_choice import KnownJudge, imports_for
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._known_behaviours import KnownBehaviour
from modeldiff_widgets._prompt_box import tidy

ROWS = 48
"""Answers that are generated at once: what is finished is kept, whole questions at a time."""
JUDGED = 64
"""Answers that a second judge is given at once."""
Key = tuple[str, str]
"""Side and edit of a cell."""
_PAIRS: tuple[tuple[Key, Key], ...] = (
    (("base", "none"), ("finetuned", "none")),
    (("finetuned", "none"), ("finetuned", "edited")),
    (("finetuned", "none"), ("finetuned", "random")),
)
"""Which cells are compared."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One press of Run, as things were set then.

    Args:
        known: What is asked.
        judge: Who judges.
        n_prompts: Of the behaviour's prompts.
        models: Whether the base and whether the fine-tune answer unedited.
        edits: Plans of the fine-tune, by name.
        edits_code: Python that defines ``do``, if there are edits.
        n: Answers to each prompt.
        seed: Of the noise, and of the intervals' resampling.
        temperature: 0 is greedy.
        limit: Tokens of an answer at most.
    """

    known: KnownBehaviour
    judge: KnownJudge
    n_prompts: int
    models: tuple[bool, bool]
    edits: Mapping[str, Plan]
    edits_code: str
    n: int
    seed: int
    temperature: float
    limit: int

    @cached_property
    def behaviour(self) -> Behaviour:
        """The prompts that are asked, and the judge."""
        some = with_prompts(self.known.behaviour, self.n_prompts)
        return replace(some, judge=self.judge.judge)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """Who answers."""
        plain = [Cell("base")] * self.models[0] + [Cell("finetuned")] * self.models[1]
        return (*plain, *(Cell("finetuned", name, plan) for name, plan in self.edits.items()))

    @property
    def keys(self) -> tuple[Key, ...]:
        """Side and edit of each cell."""
        return tuple((cell.side, cell.name) for cell in self.cells)

    @property
    def step(self) -> int:
        """Prompts that are asked at once; all if one comes twice, whose samples share noise."""
        items = [prompt.item for prompt in self.behaviour.prompts]
        if len(set(items)) < len(items):
            return len(items)
        return max(1, ROWS // max(1, len(self.cells) * self.n))

    def code(self, n_done: int | None = None) -> list[str]:
        """Python lines that define ``behaviour`` and ``found``; of a stopped run the first prompts.

        Args:
            n_done: Prompts that were answered; all if None.
        """
        handed = not self.known.written or self.judge.code.startswith("judges[")
        note = ["# behaviours and judges are those that the panel was given"] if handed else []
        lines = ["import modeldiff as md", *note, self.edits_code or "do = {}"]
        lines.append(f"behaviour = {self.known.some(self.n_prompts).code}")
        if self.judge.code != f"{self.known.code}.judge":
            lines.append(f"behaviour = replace(behaviour, judge={self.judge.code})")
        if n_done is not None and n_done < len(self.behaviour.prompts):
            lines.append(f"behaviour = replace(behaviour, prompts=behaviour.prompts[:{n_done}])")
        plain = ", ".join(f"md.Cell({cell.side!r})" for cell in self.cells if cell.name == "none")
        edited = "*(md.Cell('finetuned', name, md.Plan() + plan) for name, plan in do.items())"
        cells = ", ".join(filter(None, (plain, edited if self.edits else "")))
        lines += [
            f"cells = [{cells}]",
            "found = pair.generate([each.render() for each in behaviour.prompts], cells=cells, "
            f"n={self.n}, seed={self.seed}, temperature={self.temperature!r}, "
            f"max_new_tokens={self.limit})",
        ]
        return lines if self.edits else [line for line in lines if line != "do = {}"]


@dataclass(frozen=True, eq=False)
class Second:
    """What another judge says of the same answers.

    Args:
        judge: Who.
        verdicts: One an answer, in the order of `Measured.answers`.
    """

    judge: KnownJudge
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, eq=False)
class Measured:
    """A run, perhaps one that was stopped.

    Args:
        asked: What was asked.
        n_done: Prompts that every cell has answered.
        prompts: They, rendered.
        judged: Answers with their verdicts, by cell, prompt and sample.
        second: What another judge says.
    """

    asked: Asked
    n_done: int = 0
    prompts: tuple[Text, ...] = ()
    judged: tuple[tuple[Answer, Verdict], ...] = ()
    second: Second | None = None

    @property
    def stopped(self) -> bool:
        """Whether prompts are left."""
        return self.n_done < len(self.asked.behaviour.prompts)

    def more(self, pair: ModelPair, job: Job) -> "Measured":
        """Ask and judge the next few prompts; in a job."""
        asked, start = self.asked, self.n_done
        several = asked.behaviour.prompts[start : start + asked.step]
        found = pair.generate(
            [each.render() for each in several], cells=asked.cells, n=asked.n, seed=asked.seed,
            temperature=asked.temperature, max_new_tokens=asked.limit,
            on_step=_ticker(job, self, len(several)), cancel=job.cancel,
        )  # fmt: skip
        pairs = [(several[answer.prompt], answer.text) for answer in found.answers]
        verdicts = verdicts_of(asked.behaviour.judge, pairs)
        moved = [replace(answer, prompt=answer.prompt + start) for answer in found.answers]
        judged = [*self.judged, *zip(moved, verdicts, strict=True)]
        judged.sort(key=lambda each: _place(each[0], asked.keys))
        texts = (*self.prompts, *found.prompts)
        return Measured(asked, start + len(several), texts, tuple(judged))

    def judged_again(self, judge: KnownJudge, job: Job) -> "Measured":
        """Let another judge judge the same answers; in a job."""
        prompts, verdicts = self.asked.behaviour.prompts, list[Verdict]()
        asked = [(prompts[answer.prompt], answer.text) for answer in self.answers]
        for start in range(0, len(asked), JUDGED):
            job.report(start / len(asked), f"{start} of {len(asked)} answers")
            verdicts += verdicts_of(judge.judge, asked[start : start + JUDGED])
        return replace(self, second=Second(judge, tuple(verdicts)))

    @property
    def answers(self) -> list[Answer]:
        """What came."""
        return [answer for answer, _ in self.judged]

    @cached_property
    def table(self) -> pd.DataFrame:
        """As `modeldiff.behaviours.judge_answers` gives it, also where no answer is scored."""
        return self._table([verdict for _, verdict in self.judged])

    @cached_property
    def second_table(self) -> pd.DataFrame | None:
        """The other judge's."""
        return None if self.second is None else self._table(self.second.verdicts)

    def of(self, key: Key) -> pd.DataFrame:
        """The answers of one cell."""
        return cell_answers(self.table, key)

    @cached_property
    def rates(self) -> dict[Key, Rate]:
        """Rate of each cell that has a scored answer."""
        return {key: rate_with_interval(self.of(key)) for key in self.asked.keys
                if self.of(key)["exhibits"].notna().any()}  # fmt: skip

    @cached_property
    def questions(self) -> dict[Key, pd.DataFrame]:
        """Rates by question of each of these cells; the last row is of all."""
        return {key: rates_by_question(self.of(key)) for key in self.rates}

    @cached_property
    def differences(self) -> dict[tuple[Key, Key], Interval]:
        """Difference of rates between cells that are compared, by paired questions."""
        return {
            (a, b): rate_difference(self.of(a), self.of(b))
            for a, b in _PAIRS
            if a in self.rates and b in self.rates
        }

    def agreement(self, on: str) -> Agreement | None:
        """Agreement of both judges; None without a second one.

        Raises:
            JudgeError: If there is no answer that both scored.
        """
        table = self.second_table
        return None if table is None else agreement(self.table, table, on=on)

    def code(self, on: str = "exhibits") -> str:
        """Python that gives the same numbers; ``pair`` is in scope."""
        lines = self.asked.code(self.n_done if self.judged else None)
        scored = bool(self.rates) or not self.judged
        lines += self._rate_lines() if scored else [
            f"# judge {self.asked.judge.name!r} scored none of these answers: there is no rate"
        ]  # fmt: skip
        lines += self._second_lines(on) if scored else []
        imports = imports_for(lines)
        if any("replace(behaviour" in line for line in lines):
            imports.append("from dataclasses import replace")
        return tidy([*imports, *lines])

    def _second_lines(self, on: str) -> list[str]:
        if self.second is None:
            return []
        try:
            self.agreement(on)
        except JudgeError as error:
            return [f"# {' '.join(str(error).split())}"]
        return [
            "from modeldiff.agreement import agreement",
            f"second = judge_answers(replace(behaviour, judge={self.second.judge.code}), found)",
            f"agreed = agreement(answers, second, on={on!r})",
        ]

    def _rate_lines(self) -> list[str]:
        lines = [
            "from modeldiff.behaviours import judge_answers",
            "from modeldiff.judge_rates import rate_difference, rates_by_cell, rates_by_question",
            "answers = judge_answers(behaviour, found)",
        ]
        unscored = self.judged and len(self.rates) < len(self.asked.cells)
        if unscored:
            lines.append(
                "scored = answers.groupby(['side', 'edit'])"
                ".filter(lambda cell: cell['exhibits'].notna().any())"
            )
        lines += [
            f"rates = rates_by_cell({'scored' if unscored else 'answers'})",
            f"by_cell = dict(list({'scored' if unscored else 'answers'}"
            ".groupby(['side', 'edit'], sort=False)))",
            "questions = {key: rates_by_question(mine) for key, mine in by_cell.items()}",
        ]
        known = self.rates if self.judged else self.asked.keys
        pairs = [pair for pair in _PAIRS if set(pair) <= set(known)]
        if pairs:
            lines.append(
                "differences = {(a, b): rate_difference(by_cell[a], by_cell[b]) "
                f"for a, b in {pairs!r}}}"
            )
        return lines

    def _table(self, verdicts: Sequence[Verdict]) -> pd.DataFrame:
        answers = tuple(self.answers)
        table = Generations(self.prompts, answers, self.asked.seed, self.asked.temperature).table()
        prompts = [self.asked.behaviour.prompts[answer.prompt] for answer in answers]
        names = dict.fromkeys(name for verdict in verdicts for name, _ in verdict.scores)
        scores = {
            f"{name}_score": pd.Series([dict(v.scores).get(name) for v in verdicts], dtype=float)
            for name in names
        }
        return table.assign(
            prompt=[prompt.question for prompt in prompts],
            group=[prompt.group for prompt in prompts],
            question_id=[prompt.question_id or prompt.question for prompt in prompts],
            label=[verdict.label for verdict in verdicts],
            exhibits=pd.array([verdict.exhibits for verdict in verdicts], dtype="boolean"),
            coherent=pd.array([verdict.coherent for verdict in verdicts], dtype="boolean"),
            **scores,
        )


def cell_answers(table: pd.DataFrame, key: Key) -> pd.DataFrame:
    """The rows of one cell."""
    return table[(table["side"] == key[0]) & (table["edit"] == key[1])]


def checked_judge(judge: Any) -> Judge:
    """A judge, or what is wrong with it.

    Raises:
        JudgeError: If it is none.
    """
    if not isinstance(judge, Judge):
        raise JudgeError(
            f"{judge!r} is no judge: one has a name and maps (prompt, answer) to a Verdict."
        )
    return judge


def _place(answer: Answer, keys: Sequence[Key]) -> tuple[int, int, int]:
    return keys.index((answer.side, answer.edit)), answer.prompt, answer.sample


def _ticker(job: Job, before: Measured, n_new: int) -> Callable[[Any], None]:
    """Report each token as a part of the way through the prompts that are being answered."""
    asked, steps = before.asked, [0]
    total = len(asked.behaviour.prompts)

    def tick(new: Any) -> None:
        steps[0] += 1
        share = min(steps[0] / asked.limit, 1.0)
        done = before.n_done + share * n_new
        job.report(done / total, f"{before.n_done} of {total} questions")

    return tick
