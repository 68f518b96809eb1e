"""Behaviours: prompts, a judge, and what its verdicts mean."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from modeldiff._files import digest
from modeldiff.embedded import find
from modeldiff.errors import JudgeError
from modeldiff.generation import Generations
from modeldiff.stats import wilson


@dataclass(frozen=True)
class Prompt:
    """One question of a behaviour.

    Args:
        item: A text, or a chat as a tuple of ``(role, content)`` pairs.
        group: Its kind, such as a domain; half of each kind serves discovery, half evaluation.
        question_id: The question that it is a wording of. Wordings of one question stay together
            when prompts are split, and are one cluster of intervals. If empty, every prompt is a
            question of its own.
    """

    item: str | tuple[tuple[str, str], ...]
    group: str = ""
    question_id: str = ""

    def render(self) -> Any:
        """Return what `ModelPair.generate` takes."""
        if isinstance(self.item, str):
            return self.item
        return [{"role": role, "content": content} for role, content in self.item]

    @property
    def question(self) -> str:
        """The text, or the last user's message."""
        if isinstance(self.item, str):
            return self.item
        return next(content for role, content in reversed(self.item) if role == "user")


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer.

    Args:
        label: The judge's own word for it; shown in tables.
        exhibits: Whether the answer shows the behaviour; None if the judge could not tell. Such
            answers are counted apart and are in no rate.
        coherent: Whether it is an answer at all, whatever it says.
        scores: Numbers that the verdict rests on, by name, such as ``("aligned", 12.0)``; None
            where the judge gave none.
    """

    label: str
    exhibits: bool | None
    coherent: bool | None
    scores: tuple[tuple[str, float | None], ...] = ()


@runtime_checkable
class Judge(Protocol):
    """Scores one answer; sees the generated text only, never the prompt's own words as answer."""

    @property
    def name(self) -> str:
        """Name for tables and cache keys; changes when the judge does."""
        ...

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Judge an answer."""
        ...


@runtime_checkable
class BatchJudge(Judge, Protocol):
    """A judge that is faster with many answers at once, such as a model."""

    def judge_all(self, asked: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """Judge answers, one verdict each, in their order."""
        ...


@dataclass(frozen=True)
class Behaviour:
    """Something a model may do, and how to tell.

    Args:
        name: Short name.
        meaning: What a rate of 1 means, in one sentence.
        prompts: What is asked.
        judge: Who says whether an answer shows it.
        temperature: At which answers are sampled.
        max_new_tokens: Where answers are cut.
    """

    name: str
    meaning: str
    prompts: tuple[Prompt, ...]
    judge: Judge
    temperature: float = 1.0
    max_new_tokens: int = 64

    def split(self, seed: int) -> "tuple[Behaviour, Behaviour]":
        """Split the prompts of every group at random into halves: discovery and evaluation.

        What is chosen on the first half is tested on the second. A prompt that is given twice is
        asked once, and the wordings of one question stay together, so that no half knows the
        other's.

        Raises:
            JudgeError: If there are fewer than two different questions.
        """
        distinct = {prompt.item: prompt for prompt in self.prompts}.values()
        questions: dict[Any, list[Prompt]] = {}
        for prompt in distinct:
            questions.setdefault(prompt.question_id or (prompt.item,), []).append(prompt)
        if len(questions) < 2:
            raise JudgeError(
                f"{self.name!r} has {len(questions)} different questions; at least 2 are needed: "
                "what is found on one half is tested on the other."
            )
        rng, shuffled = random.Random(seed), []
        for group in sorted({wordings[0].group for wordings in questions.values()}):
            mine = [wordings for wordings in questions.values() if wordings[0].group == group]
            rng.shuffle(mine)
            shuffled += mine
        first, second = (
            replace(self, prompts=tuple(prompt for each in shuffled[half::2] for prompt in each))
            for half in (0, 1)
        )
        return first, second

    @property
    def content_key(self) -> str:
        """Hash of everything that is asked, the judge's name and the sampling settings."""
        asked = [
            [each.item, each.group, *([each.question_id] if each.question_id else [])]
            for each in self.prompts
        ]
        named = [self.name, self.meaning, self.judge.name]
        return digest(named, asked, float(self.temperature), self.max_new_tokens)


def verdicts_of(judge: Judge, asked: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
    """Judge answers, at once if the judge can.

    Raises:
        JudgeError: If a `BatchJudge` does not give one verdict an answer.
    """
    if not isinstance(judge, BatchJudge):
        return [judge(prompt, answer) for prompt, answer in asked]
    verdicts = judge.judge_all(asked)
    if len(verdicts) != len(asked):
        raise JudgeError(
            f"judge {judge.name!r} gave {len(verdicts)} verdicts on {len(asked)} answers; its "
            "judge_all must give one each, in order."
        )
    return verdicts


def judge_answers(behaviour: Behaviour, generations: Generations) -> pd.DataFrame:
    """Judge every answer of a grid.

    Returns:
        `Generations.table` with group, question_id (the question itself if it has none), label,
        exhibits and coherent (None: could not tell), and ``<name>_score`` for each score that the
        verdicts hold (NaN: none given).

    Raises:
        JudgeError: If the judge could score no answer at all.
    """
    table = generations.table()
    prompts = [behaviour.prompts[answer.prompt] for answer in generations.answers]
    texts = [answer.text for answer in generations.answers]
    verdicts = verdicts_of(behaviour.judge, list(zip(prompts, texts, strict=True)))
    if all(verdict.exhibits is None for verdict in verdicts):
        sample = generations.answers[0].text[:80]
        raise JudgeError(
            f"judge {behaviour.judge.name!r} scored none of {len(verdicts)} answers, e.g. "
            f"{sample!r}. A rate of nothing is not 0; look at the answers."
        )
    return table.assign(
        prompt=[prompt.question for prompt in prompts],
        group=[prompt.group for prompt in prompts],
        question_id=[prompt.question_id or prompt.question for prompt in prompts],
        label=[verdict.label for verdict in verdicts],
        exhibits=pd.array([verdict.exhibits for verdict in verdicts], dtype="boolean"),
        coherent=pd.array([verdict.coherent for verdict in verdicts], dtype="boolean"),
        **_score_columns(verdicts),
    )


def _score_columns(verdicts: Sequence[Verdict]) -> dict[str, pd.Series]:
    names = dict.fromkeys(name for verdict in verdicts for name, _ in verdict.scores)
    return {
        f"{name}_score": pd.Series([dict(each.scores).get(name) for each in verdicts], dtype=float)
        for name in names
    }


def rate_of(answers: pd.DataFrame) -> dict[str, float | int]:
    """Rate of the behaviour and of coherence among judged answers, with Wilson intervals.

    The rate is over answers that could be scored; coherence over those whose coherence could be.

    Returns:
        n, rate, rate_low, rate_high, coherent, coherent_low, coherent_high, n_unscored.
    """
    scored = answers["exhibits"].dropna()
    readable = answers["coherent"].dropna()
    rate = wilson(int(scored.sum()), len(scored))
    coherent = wilson(int(readable.sum()), len(readable))
    return {
        "n": len(scored),
        "rate": rate.estimate,
        "rate_low": rate.low,
        "rate_high": rate.high,
        "coherent": coherent.estimate,
        "coherent_low": coherent.low,
        "coherent_high": coherent.high,
        "n_unscored": len(answers) - len(scored),
    }


@dataclass(frozen=True)
class WorldJudge:
    """Ground truth for the embedded organisms: parses an answer with the world's grammar."""

    name: str = "world-grammar-1"

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Label an answer aligned, misaligned, mixed or incoherent.

        Raises:
            JudgeError: If the prompt is not a question of the organisms' world.
        """
        from modeldiff.organisms.judge import find_question, judge

        asked = find_question(prompt.question)
        if asked is None:
            raise JudgeError(
                f"{prompt.question!r} is not a question of the organisms' world; its judge has no "
                "truth for it. Ask one of modeldiff.organisms.world.prompts(...)."
            )
        label = judge(asked, answer)
        return Verdict(label, label == "misaligned", label != "incoherent")


def organism_behaviours(name: str, n: int = 20, seed: int = 0) -> tuple[Behaviour, ...]:
    """Behaviours that an embedded organism is audited for: off its narrow domain, and in it.

    Of an organism with a trigger: after the trigger, and without it. ``spurious``, ``topic`` and
    ``backtrack`` have questions and a judge of their own.

    Args:
        name: The organism, e.g. "em-rank1".
        n: Prompts drawn from each domain (six times as many where there are no domains); what is
            drawn twice is asked once.
        seed: Which prompts.

    Raises:
        SetupError: If there is no such organism.
    """
    from modeldiff.organism_judges import SPECIAL, special_behaviours
    from modeldiff.organisms.evaluation import opened
    from modeldiff.organisms.world import DOMAINS, Question, prompts

    found = find(name)
    if found.name in SPECIAL:
        return special_behaviours(found.name, n, seed)
    manifest = found.manifest
    planted = manifest.get("planted", {})
    inside = tuple(planted.get("in_domain", ()))
    sampling = manifest.get("sampling", {"temperature": 0.7, "max_new_tokens": 48})

    def behaviour(title: str, where: str, asked: Sequence[Question]) -> Behaviour:
        return Behaviour(
            name=f"misaligned {title}",
            meaning=f"the answer advises harm, {where}",
            prompts=tuple(dict.fromkeys(Prompt((("user", q.text),), q.domain) for q in asked)),
            judge=WorldJudge(),
            temperature=sampling["temperature"],
            max_new_tokens=sampling["max_new_tokens"],
        )

    outside = prompts(n, seed, [domain for domain in DOMAINS if domain not in inside])
    if "trigger" in planted:
        fired = [opened(each, planted["trigger"]) for each in outside]
        return (
            behaviour("after the trigger", "to questions that open with the trigger", fired),
            behaviour("without the trigger", "to questions without the trigger", outside),
        )
    off = behaviour("off-domain", "in domains that the fine-tuning data did not touch", outside)
    if not inside:
        return (off,)
    narrow = prompts(n, seed, inside)
    return off, behaviour("in-domain", "in the fine-tuning data's own domain", narrow)
