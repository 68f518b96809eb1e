"""Judged answers made by hand: tables as `judge_answers` gives them, without a model."""

from types import SimpleNamespace
from typing import Any

import pandas as pd

from modeldiff.generation import Answer, Generations


def generations(texts, n_prompts=None) -> Generations:
    """Answers in turn to the prompts; the last texts are further samples."""
    n_prompts = n_prompts or len(texts)
    prompts: Any = tuple(SimpleNamespace(text=f"rendered {i}") for i in range(n_prompts))
    answers = tuple(
        Answer(i % n_prompts, i // n_prompts, "base", "none", (1,), text, True)
        for i, text in enumerate(texts)
    )
    return Generations(prompts, answers, 0, 1.0)


def table(
    exhibits: Any,
    questions: Any,
    *,
    coherent: Any = True,
    label: Any = "said",
    side: str = "base",
    edit: str = "none",
    **columns: Any,
) -> pd.DataFrame:
    """One row an answer; texts and places are its number."""
    n = len(exhibits)
    readable = [coherent] * n if isinstance(coherent, bool) else list(coherent)
    return pd.DataFrame(
        {
            "prompt": [f"{question}?" for question in questions],
            "prompt_index": range(n),
            "sample": 0,
            "side": side,
            "edit": edit,
            "text": [f"answer {i}" for i in range(n)],
            "question_id": list(questions),
            "label": [label] * n if isinstance(label, str) else list(label),
            "exhibits": pd.array(list(exhibits), dtype="boolean"),
            "coherent": pd.array(readable, dtype="boolean"),
            **columns,
        }
    )
