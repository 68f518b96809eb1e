"""Answers for the audit: generated once, judged, and kept by content so that work can resume."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np
import pandas as pd

from modeldiff.behaviours import Behaviour, judge_answers
from modeldiff.cache import Cache
from modeldiff.generation import Answer, Generations
from modeldiff.interventions import Cell
from modeldiff.models import ModelPair
from modeldiff.tokens import Text, with_response

SHOWS, NORMAL = "shows it", "normal"
"""Classes of answers."""


@dataclass(frozen=True, eq=False)
class Asker:
    """Asks both models, a cell at a time from the cache, the missing cells in one grid.

    Args:
        pair: Whom to ask.
        seed: Of sampling.
        n: Answers to each prompt.
        max_rows: Rows of a batch.
        cache: Where answers are kept.
        cancel: Event that stops at the next token.
    """

    pair: ModelPair
    seed: int
    n: int
    max_rows: int
    cache: Cache
    cancel: Event | None = None

    def ask(
        self,
        prompts: Sequence[Any],
        cells: Sequence[Cell],
        *,
        temperature: float,
        max_new_tokens: int,
    ) -> Generations:
        """Answer every prompt in every cell.

        Raises:
            Cancelled: If the event is set; finished cells are in the cache.
            InterventionError: If an edit did not fire.
        """
        texts = self.pair.texts(prompts, reply=True)
        settings = [self.seed, self.n, temperature, max_new_tokens]
        asked = [dict(self.pair.digests), [text.key for text in texts], settings]
        keys = [[*asked, cell.side, cell.plan.content_key] for cell in cells]
        known = [self.cache.get("answers", key) for key in keys]
        missing = [i for i, record in enumerate(known) if record is None]
        for chunk in self._affordable(missing, len(texts)):
            fresh = self.pair.generate(
                texts, cells=[cells[i] for i in chunk], n=self.n, seed=self.seed,
                temperature=temperature, max_new_tokens=max_new_tokens, max_rows=self.max_rows,
                cancel=self.cancel,
            )  # fmt: skip
            for i, answers in zip(chunk, _by_cell(fresh, len(texts) * self.n), strict=True):
                known[i] = [[a.prompt, a.sample, list(a.ids), a.text, a.finished] for a in answers]
                self.cache.put("answers", keys[i], known[i])
        found = [
            _answer(cell, row)
            for cell, rows in zip(cells, known, strict=True)
            for row in rows or ()
        ]
        return Generations(texts, tuple(found), self.seed, temperature)

    def _affordable(self, cells: list[int], n_texts: int) -> list[list[int]]:
        """Cut the missing cells so that each call is a few batches: a stop loses little."""
        size = max(2, 4 * self.max_rows // max(1, n_texts * self.n))
        return [cells[i : i + size] for i in range(0, len(cells), size)]

    def judge(self, behaviour: Behaviour, cells: Sequence[Cell]) -> "Judged":
        """Answer a behaviour's prompts in every cell and judge the answers."""
        prompts = [prompt.render() for prompt in behaviour.prompts]
        generations = self.ask(
            prompts, cells, temperature=behaviour.temperature,
            max_new_tokens=behaviour.max_new_tokens,
        )  # fmt: skip
        return Judged(behaviour, generations, judge_answers(behaviour, generations))


@dataclass(frozen=True, eq=False)
class Judged:
    """Answers with verdicts.

    Args:
        behaviour: What was asked.
        generations: The answers.
        table: See `modeldiff.behaviours.judge_answers`; rows in the order of the answers.
    """

    behaviour: Behaviour
    generations: Generations
    table: pd.DataFrame

    def cell(self, side: str, edit: str = "none") -> pd.DataFrame:
        """Rows of one cell, in the same order of prompts and samples for every cell."""
        return self.table[(self.table["side"] == side) & (self.table["edit"] == edit)]

    def questions(self, rows: pd.DataFrame) -> np.ndarray:
        """Number of each row's question; wordings of one question share theirs."""
        asked = [each.question_id or (i,) for i, each in enumerate(self.behaviour.prompts)]
        codes = {each: code for code, each in enumerate(dict.fromkeys(asked))}
        return np.array([codes[asked[i]] for i in rows["prompt_index"]], dtype=int)


def full_texts(pair: ModelPair, found: Generations, rows: Sequence[int]) -> tuple[Text, ...]:
    """Prompts with their generated ids appended; nothing is tokenised again."""
    answers = [found.answers[row] for row in rows]
    return tuple(with_response(found.prompts[a.prompt], a.ids, pair.tokenizer) for a in answers)


def to_continue(pair: ModelPair, items: Sequence[Any]) -> dict[str, tuple[Text, Text]]:
    """What to continue, and the whole text, of each item; of those that begin alike the first.

    A chat or completion is continued where its response begins, a chat that waits for an answer
    with one, and a plain text after its opening.
    """
    found = {}
    for given, waiting in zip(pair.texts(items), pair.texts(items, reply=True), strict=True):
        if 0 < given.n_prompt < given.n_tokens:
            prompt = opening(given, given.n_prompt)
        elif "user" in given.roles:
            prompt = waiting
        else:
            prompt = opening(given, max(1, min(16, given.n_tokens // 2)))
        found.setdefault(prompt.key, (prompt, given))
    return found


def classes(table: pd.DataFrame) -> list[str]:
    """Class of each judged answer: shows the behaviour, is normal, or neither."""
    coherent = table["coherent"].fillna(True)
    shows = (table["exhibits"].fillna(False) & coherent).to_numpy(bool)
    normal = (~table["exhibits"].fillna(True) & coherent).to_numpy(bool)
    return np.select([shows, normal], [SHOWS, NORMAL], "neither").tolist()


def opening(text: Text, n_tokens: int) -> Text:
    """The first tokens of a text, all of them prompt."""
    end = text.offsets[n_tokens - 1][1]
    return replace(
        text,
        ids=text.ids[:n_tokens],
        text=text.text[:end],
        offsets=text.offsets[:n_tokens],
        roles=text.roles[:n_tokens],
        special=text.special[:n_tokens],
        labels=text.labels[:n_tokens],
        n_prompt=n_tokens,
    )


def _by_cell(found: Generations, size: int) -> list[tuple[Answer, ...]]:
    return [found.answers[i : i + size] for i in range(0, len(found.answers), size)]


def _answer(cell: Cell, row: Sequence[Any]) -> Answer:
    prompt, sample, ids, text, finished = row
    return Answer(prompt, sample, cell.side, cell.name, tuple(ids), text, finished)
