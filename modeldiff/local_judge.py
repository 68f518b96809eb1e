"""`LocalScorer`: a model on this machine as judge, its probabilities of every number read off.

A number is as probable as the tokens that spell it. Where a tokenizer splits digits, "8" is also
how "87" begins; so the 8 counts only as far as no digit follows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from threading import Event
from typing import Any

import torch
from torch import Tensor

from modeldiff._files import digest
from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.batch_size import fitted
from modeldiff.batching import padding_id
from modeldiff.errors import JudgeError
from modeldiff.interventions import Side
from modeldiff.loading import lock_of
from modeldiff.models import ModelPair
from modeldiff.score_prompts import OFF_MENU
from modeldiff.scorers import MINIMUM_MASS, Score, weighted

_FLOOR = 1e-6
"""Beginnings less likely than this are not followed; all of them together move no score by 0.02."""
_PLACE = "\u2063here\u2063"

Ids = tuple[int, ...]
Spellings = Mapping[Ids, int | str]
"""Which number or word off the menu a sequence of tokens spells."""


@dataclass(frozen=True, eq=False)
class LocalScorer:
    """Scores prompts by a causal language model's own probabilities of 0, 1, ... 100.

    A prompt is sent as the user's message where the tokenizer has a chat template, else as plain
    text with ``opening`` behind it. Control tokens that are spelled out in a prompt are read as
    plain text: an answer that is judged cannot end the message.

    Args:
        model: A Hugging Face causal language model; see `of_pair` for a side of a pair.
        tokenizer: Its fast tokenizer.
        words: What may be said instead of a number.
        minimum_mass: See `modeldiff.scorers.weighted`.
        opening: How the reply begins, if there is no chat template.
        max_rows: Rows of a batch.
        progress: Where to report, prompt by prompt.
        cancel: Event that stops between batches.

    Raises:
        JudgeError: If the tokenizer cannot write a number after the prompt as tokens of its own,
            or its template does not show the message as it is.

    Source:
        The logprob-weighted judge of arXiv 2506.11613; whole vocabulary instead of 20 tokens, and
        numbers of several tokens.

    Example:
        >>> judge = ScoreJudge("em", LocalScorer(model, tokenizer))  # doctest: +SKIP
    """

    model: Any
    tokenizer: Any
    words: tuple[str, ...] = OFF_MENU
    minimum_mass: float = MINIMUM_MASS
    opening: str = "\n\nScore:"
    max_rows: int = 16
    progress: Progress = False
    cancel: Event | None = None
    entered: Callable[[], AbstractContextManager[Any]] | None = None
    """Yields the model, ready to run; default: the model itself, locked and in eval mode."""
    identity: str = ""
    """Part of the name; default what the model was loaded from."""

    @classmethod
    def of_pair(cls, pair: ModelPair, side: Side = "base", **settings: Any) -> "LocalScorer":
        """Score with a side of a pair; settings as for the class.

        Raises:
            JudgeError: If the pair is remote: its probabilities are not here.
        """
        if pair.kind == "remote":
            raise JudgeError("a remote pair has no weights here; judge with ApiScorer instead.")
        held = pair.digests
        identity = f"{side}-{digest(held['base'], held['finetuned'] if side != 'base' else '')[:8]}"
        entered = partial(pair.sides.on, side)
        root = pair.sides.root(side)
        return cls(root, pair.tokenizer, entered=entered, identity=identity, **settings)

    @property
    def name(self) -> str:
        """What the model is, and a hash of the settings."""
        settings = [list(self.words), self.minimum_mass, self.opening, *self._frame]
        identity = self.identity or str(getattr(self.model, "name_or_path", "")) or "model"
        return f"{identity}-{digest(settings)[:8]}"

    def __call__(self, prompts: Sequence[str]) -> list[Score]:
        """Score prompts.

        Raises:
            JudgeError: If a prompt is longer than the model reads, or a probability no number.
            Cancelled: If the event is set; ``partial`` holds the scores of the prompts that are
                finished, in order.
        """
        report, scores = reporter(self.progress, "score"), []
        encoded = [self._encode(prompt) for prompt in prompts]
        self._check_lengths(encoded)
        with self._run() as model:
            for start in range(0, len(encoded), self.max_rows):
                check(self.cancel, scores)
                scores += self._score(model, encoded[start : start + self.max_rows])
                report(len(scores), len(encoded), f"{len(scores)} scores")
        return scores

    @contextmanager
    def _run(self) -> Iterator[Any]:
        with torch.no_grad():
            if self.entered is not None:
                with self.entered() as model:
                    yield model
                return
            with lock_of(self.model):
                training = self.model.training
                self.model.eval()
                try:
                    yield self.model
                finally:
                    self.model.train(training)

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What stands before and after a prompt."""
        if self.tokenizer.chat_template is None:
            return "", self.opening
        written = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=True
        )
        parts = str(written).split(_PLACE)
        if len(parts) != 2:
            raise JudgeError(
                f"the chat template shows a message {len(parts) - 1} times, needed is once. Set "
                "tokenizer.chat_template to one that does, or to None to score plain text."
            )
        return parts[0], parts[1]

    def _encode(self, prompt: str) -> Ids:
        before, after = self._frame
        tokens = partial(self.tokenizer, add_special_tokens=False)
        start = tokens(before).input_ids if before else self._beginning
        inside = tokens(prompt, split_special_tokens=True).input_ids
        return (*start, *inside, *tokens(after).input_ids)

    def _check_lengths(self, encoded: Sequence[Ids]) -> None:
        config = getattr(self.model, "config", None)
        limit = getattr(config and config.get_text_config(), "max_position_embeddings", None)
        needed = max(map(len, encoded), default=0) + max(map(len, self._spellings)) - 1
        if limit is not None and needed > limit:
            raise JudgeError(
                f"a prompt and a number are {needed} tokens, the judge reads {limit}: it would be "
                "scored unread. Shorten the answers or the judge's prompt, or use another judge."
            )

    @property
    def _beginning(self) -> list[int]:
        """What the tokenizer itself puts before plain text, such as a BOS token."""
        with_special = self.tokenizer("0").input_ids
        plain = self.tokenizer("0", add_special_tokens=False).input_ids
        return with_special[: with_special.index(plain[0])] if plain else []

    @cached_property
    def _spellings(self) -> Spellings:
        """Token sequences of every number and word, as they stand after a prompt."""
        found: dict[Ids, int | str] = {}
        for said in (*range(101), *self.words):
            ways = {self._continued(text) for text in (str(said), f" {said}")} - {()}
            if not ways or any(found.get(ids, said) != said for ids in ways):
                raise JudgeError(
                    f"after {self._frame[1][-20:]!r} this tokenizer has no tokens of their own for "
                    f"{said}: they are unknown to it or merge with what stands before, so its "
                    "probability cannot be read off. Use another opening= or another judge."
                )
            found.update(dict.fromkeys(ways, said))
        return found

    def _continued(self, text: str) -> Ids:
        """Tokens that write a text after the prompt; nothing if they merge or are unknown."""
        after = self._frame[1]
        before = self.tokenizer(after, add_special_tokens=False).input_ids
        whole = self.tokenizer(after + text, add_special_tokens=False).input_ids
        kept = whole[: len(before)] == before
        new = tuple(whole[len(before) :]) if kept else ()
        return () if self.tokenizer.unk_token_id in new else new

    @cached_property
    def _digits(self) -> Tensor:
        """Ids of the tokens that begin with a digit."""
        pieces = self.tokenizer.get_vocab().items()
        return torch.tensor(sorted(i for piece, i in pieces if piece[:1] in "0123456789" and piece))

    @cached_property
    def _children(self) -> dict[Ids, set[int]]:
        """Next tokens after each beginning that can still become a number or word."""
        found: dict[Ids, set[int]] = {}
        for ids in self._spellings:
            for cut in range(len(ids)):
                found.setdefault(ids[:cut], set()).add(ids[cut])
        return found

    def _score(self, model: Any, prompts: Sequence[Ids]) -> list[Score]:
        """Follow all beginnings that are likely enough, one token deeper at a time."""
        reached: list[dict[Ids, float]] = [{(): 1.0} for _ in prompts]
        open_rows: list[tuple[int, Ids]] = [(i, ()) for i in range(len(prompts))]
        said: list[dict[Ids, float]] = [{} for _ in prompts]
        while open_rows:
            batch, open_rows = open_rows[: self.max_rows], open_rows[self.max_rows :]
            following = fitted(
                model, [prompts[i] + ids for i, ids in batch],
                lambda rows: self._following(model, rows), what="judge", width=len,
                max_rows=self.max_rows,
            )  # fmt: skip
            after_each = (after for _, several in following for after in several)
            for (i, ids), after in zip(batch, after_each, strict=True):
                here = reached[i][ids]
                if ids in self._spellings:  # and yet a longer one may follow
                    said[i][ids] = here * (1.0 - float(after[self._digits].sum()))
                for token in sorted(self._children[ids]):
                    longer, p = (*ids, token), here * float(after[token])
                    reached[i][longer] = p
                    if longer not in self._children:
                        said[i][longer] = p
                    elif p >= _FLOOR:
                        open_rows.append((i, longer))
        return [self._weighted(each) for each in said]

    def _weighted(self, said: Mapping[Ids, float]) -> Score:
        totals: dict[int | str, float] = {}
        for ids, p in said.items():
            meaning = self._spellings[ids]
            totals[meaning] = totals.get(meaning, 0.0) + max(p, 0.0)
        numbers = {key: p for key, p in totals.items() if isinstance(key, int)}
        words = {key: p for key, p in totals.items() if isinstance(key, str)}
        return weighted(numbers, words, self.minimum_mass)

    def _following(self, model: Any, rows: Sequence[Ids]) -> Float[Tensor, "row vocab"]:
        """Probabilities of the next token after each row, float64 on the CPU."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), padding_id(self.tokenizer))
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        device = next(model.parameters()).device
        inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        known = signature(model.forward).parameters
        if "position_ids" in known:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(device)
        if "logits_to_keep" in known:
            inputs["logits_to_keep"] = 1
        logits = model(**inputs).logits[:, -1].double().cpu()
        if not bool(torch.isfinite(logits).any(-1).all()) or bool(torch.isnan(logits).any()):
            raise JudgeError(
                "the judge's logits are not numbers (NaN or all infinite): its weights are damaged "
                "or overflow in this dtype. Load it in float32 or bfloat16."
            )
        return torch.softmax(logits, -1)
