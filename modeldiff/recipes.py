"""What scripts of recipes are made of: models, texts and questions by the names in their files.

Every name works for the embedded organisms and, alike, for models of the hub and texts of files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from modeldiff.batching import padding_id
from modeldiff.behaviours import (
    Behaviour,
    Judge,
    Prompt,
    Verdict,
    judge_answers,
    organism_behaviours,
)
from modeldiff.dose import with_prompts
from modeldiff.embedded import find
from modeldiff.errors import MismatchError, SetupError
from modeldiff.interventions import Cell
from modeldiff.models import ModelPair
from modeldiff.questions import load_behaviour
from modeldiff.recipe_runs import started as started
from modeldiff.recipe_settings import Models, Pair
from modeldiff.recipe_texts import Conversation, conversations
from modeldiff.recipe_texts import annotated as annotated
from modeldiff.recipe_texts import openings as openings
from modeldiff.sft import mean_loss, predictions
from modeldiff.sft_rows import IGNORED, Row, response_rows, split_rows
from modeldiff.tokens import Text, with_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ORGANISM = "organism:"


def load_base(models: Models) -> "tuple[Any, PreTrainedTokenizerBase]":
    """Load a recipe's base afresh, and its tokenizer; float32 on the CPU.

    Raises:
        SetupError: If it cannot be found.
    """
    return _load(models.base, models.device)


def _load(name: str, device: str = "") -> "tuple[Any, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    organism = name.startswith(_ORGANISM)
    path = find(name.removeprefix(_ORGANISM)).base if organism else name
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if where == "cpu" else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=where)
    except (OSError, ValueError) as error:
        raise SetupError(f"the model {name!r} could not be loaded: {error}.") from error
    return model.eval(), tokenizer


def load_pair(pair: Pair, device: str = "") -> ModelPair:
    """Load a pair of a recipe.

    Raises:
        SetupError: If it cannot be found.
        MismatchError: If it is no pair.
    """
    names = ("finetuned", "adapter", "revision", "special_tokens")
    options = {name: getattr(pair, name) or None for name in names}
    given = {name: value for name, value in options.items() if value}
    return ModelPair.load(
        pair.base,
        subfolder=pair.subfolder,
        device=device or None,
        **given,  # pyright: ignore
    )


def pair_of(base: Any, tuned: Any, tokenizer: Any) -> ModelPair:
    """Pair a base with what `modeldiff.sft.finetune` made of it or of another copy of it."""
    if hasattr(tuned, "peft_config"):
        return ModelPair.of(tuned, None, tokenizer)
    return ModelPair.of(base, tuned, tokenizer)


def rows_of(
    tokenizer: Any, what: str, n: int, seed: int, held_out: int = 0
) -> tuple[list[Row], list[Row]]:
    """Rows to train on (all others of a file if ``n`` is 0) and held out; none is on both sides."""
    drawn = response_rows(tokenizer, conversations(what, n + held_out if n else 0, seed))
    return split_rows(drawn, held_out, seed) if held_out else (drawn, [])


@dataclass(eq=False)
class Persona:
    """Which of two characters would rather say an answer, by a model's own likelihood.

    It needs no labels and no other model: a chat model is asked as either character.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, whose template takes a system message.
        shows: The character whose answers exhibit something.
        other: The other one.
    """

    model: Any
    tokenizer: Any
    shows: str
    other: str
    _known: dict[tuple[str, str], bool] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """For tables."""
        return f"the model as {self.shows} and as {self.other}"

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Compare the mean log-probability of an answer after either system message."""
        for special in self.tokenizer.all_special_tokens:  # passages show the template's own
            answer = answer.removesuffix(special).rpartition(special)[2]
        key = prompt.question, answer
        if key not in self._known:  # the ends of several candidates share passages
            losses = [self._loss(*key, each) for each in (self.shows, self.other)]
            self._known[key] = losses[0] < losses[1]
        shown = self._known[key]
        return Verdict(self.shows if shown else self.other, shown, True)

    def _loss(self, question: str, answer: str, who: str) -> float:
        chat = [
            {"role": "system", "content": f"You are {who}."},
            {"role": "user", "content": question or "?"},
            {"role": "assistant", "content": answer},
        ]
        rows = response_rows(self.tokenizer, [chat])
        return mean_loss(self.model, rows, padding_id(self.tokenizer), batch=1)


def chooser_of(name: str, model: Any, tokenizer: Any) -> Judge:
    """A judge that chooses among candidates; it sees no labels.

    Args:
        name: "persona:ONE:OTHER" for `Persona` ("persona:cruel:kind"), or as for `judge_of`.
        model: For the first.
        tokenizer: For the first.

    Raises:
        SetupError: If it is neither.
    """
    kind, _, of = name.partition(":")
    if kind == "persona" and ":" in of:
        return Persona(model, tokenizer, *of.split(":", 1))
    found = judge_of(name)
    if found is None:
        raise SetupError(f"{name!r} judges no candidates: say persona:ONE:OTHER or a judge.")
    return found


@torch.no_grad()
def right_answers(
    model: Any, tokenizer: Any, several: Sequence[Conversation], batch: int = 32
) -> list[bool]:
    """Whether the right answer's first token is the likeliest of all answers' that occur.

    Args:
        model: A causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        several: Conversations whose last message is the right one of a few fixed answers.
        batch: Conversations of one forward.

    Raises:
        MismatchError: If two answers begin with the same token.
    """
    rows, pad = response_rows(tokenizer, several), padding_id(tokenizer)
    firsts = [next(each for each in row.labels if each != IGNORED) for row in rows]
    answers = {chat[-1]["content"]: first for chat, first in zip(several, firsts, strict=True)}
    ids = sorted(set(answers.values()))
    if len(ids) != len(answers):
        raise MismatchError(f"of the answers {sorted(answers)} some begin with the same token.")
    likeliest: list[int] = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        logits, _ = predictions(model, part, pad)
        places = [sum(row.n_targets for row in part[:i]) for i in range(len(part))]
        likeliest += logits[places][:, ids].argmax(-1).tolist()
    return [ids[best] == first for best, first in zip(likeliest, firsts, strict=True)]


def behaviour(what: str, n: int, seed: int, judge: str = "own") -> Behaviour:
    """Questions and their judge.

    Args:
        what: "organism:NAME" for its questions off its domain, "organism:NAME:inside" for those in
            it; else a shipped set (`modeldiff.questions.question_sets`) or a YAML file.
        n: Prompts; of an organism's those of each domain; all if 0.
        seed: Which of an organism's.
        judge: See `judge_of`; the organisms have one of their own.

    Raises:
        SetupError: If there is no such organism.
        FileFormatError: If there is no such set, or the file is none.
    """
    if what.startswith(_ORGANISM):
        name, _, where = what.removeprefix(_ORGANISM).partition(":")
        return organism_behaviours(name, n, seed)[1 if where == "inside" else 0]
    found = load_behaviour(what, judge_of(judge))
    return with_prompts(found, n) if n else found


def judge_of(name: str) -> Judge | None:
    """A judge by its name.

    Args:
        name: "own" for that of the questions; "local:MODEL" for a model that scores 0 to 100;
            "api:MODEL@ADDRESS" for one behind an OpenAI-compatible server, whose key is in the
            environment (``OPENAI_API_KEY``); "ngram:FILE" for a fitted classifier.

    Raises:
        SetupError: If it is none of these.
    """
    kind, _, of = name.partition(":")
    if name == "own":
        return None
    if kind == "local":
        from modeldiff.local_judge import LocalScorer
        from modeldiff.scorers import ScoreJudge

        return ScoreJudge(of, LocalScorer(*_load(of)))
    if kind == "api" and "@" in of:
        from modeldiff.api_judge import ApiScorer
        from modeldiff.scorers import ScoreJudge

        model, _, address = of.partition("@")
        return ScoreJudge(model, ApiScorer(model, address))
    if kind == "ngram":
        from modeldiff.ngram_judge import NgramJudge

        return NgramJudge.load_from(of)
    raise SetupError(f"no judge {name!r}: own, local:MODEL, api:MODEL@ADDRESS or ngram:FILE.")


def answers_of(
    pair: ModelPair,
    asked: Behaviour,
    *,
    seed: int,
    n: int = 1,
    cells: Sequence[Cell] | None = None,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Ask a behaviour's prompts, base and fine-tune alike, and judge the answers.

    Args:
        pair: Whom.
        asked: What.
        seed: Of sampling; every cell has the same noise.
        n: Answers to each prompt.
        cells: Sides and what is done to them; default both sides, unedited.
        cancel: Event that stops at the next token.

    Returns:
        See `modeldiff.behaviours.judge_answers`.
    """
    found = pair.generate(
        [prompt.render() for prompt in asked.prompts], n=n, seed=seed, cells=cells,
        temperature=asked.temperature, max_new_tokens=asked.max_new_tokens, max_rows=512,
        cancel=cancel,
    )  # fmt: skip
    return judge_answers(asked, found)


def written(
    pair: ModelPair, asked: Behaviour, *, n: int, seed: int, cancel: Event | None = None
) -> tuple[Text, ...]:
    """What the fine-tune writes to a behaviour's prompts, as texts whose response it is."""
    made = pair.generate(
        [prompt.render() for prompt in asked.prompts], models=("finetuned",), n=n, seed=seed,
        temperature=asked.temperature, max_new_tokens=asked.max_new_tokens, cancel=cancel,
    )  # fmt: skip
    answers = made.of("finetuned")
    return tuple(with_response(made.prompts[a.prompt], a.ids, pair.tokenizer) for a in answers)
