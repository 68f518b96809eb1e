"""Amplifying what a fine-tune changed, while sampling: logits_ft + a (logits_ft - logits_base)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.batch_size import fitted
from modeldiff.batching import Batch, make_batch, padding_id
from modeldiff.editing import Editor, Group
from modeldiff.errors import Cancelled, InterventionError, MaskError, RemoteError
from modeldiff.forward import as_texts, device_of
from modeldiff.generation import Answer, Generations, end_ids
from modeldiff.hooks import hooked
from modeldiff.interventions import Plan
from modeldiff.loading import SIDES, Sides
from modeldiff.sampling import choose, noise
from modeldiff.tokens import Text


@dataclass(frozen=True)
class _Row:
    """One answer to be written."""

    strength: float
    prompt: int
    sample: int


def edit_name(strength: float) -> str:
    """Name of an amplified cell in `Generations`.

    Example:
        >>> edit_name(0.5)
        'amplified +0.5'
    """
    return f"amplified {strength:+g}"


def amplify(
    sides: Sides,
    prompts: Sequence[Any],
    strengths: float | Sequence[float] = 1.0,
    *,
    n: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    max_rows: int = 128,
    cancel: Event | None = None,
    progress: Progress = False,
) -> Generations:
    """Sample from logits_ft + a (logits_ft - logits_base), with `generate`'s prompts and noise.

    a = 0 is the fine-tune and a = -1 the base, token by token as `modeldiff.generation.generate`
    gives them for the same seed; a > 0 exaggerates what the fine-tune changed. At every step both
    sides see the answer so far: on an adapter pair as rows of one batch, with the adapter silenced
    on the base's rows, on two models one after the other.

    Args:
        sides: The pair.
        prompts: Texts or chats; chats are rendered ready for the answer.
        strengths: One a or several; all share their noise.
        n: Samples a prompt.
        seed: Of the noise.
        temperature: 0 is greedy; divides the amplified logits.
        max_new_tokens: Where answers are cut.
        max_rows: Answers written at once; the batch has twice as many rows on an adapter pair.
        cancel: Event that stops at the next token.
        progress: Where to report, batch by batch.

    Returns:
        Answers with side "finetuned" and the edit's name from `edit_name`, ordered by strength,
        prompt and sample.

    Raises:
        InterventionError: If the temperature is negative, or a logit is not finite.
        MaskError: If there is nothing to generate, or the model has too few learned positions.
        RemoteError: If the models are not here.
        Cancelled: If the event is set; ``partial`` holds the finished batches' `Generations`.

    Source:
        Liu et al. 2024 (decoding-time proxy tuning), 2401.08565; exaggerating a fine-tune by its
        logits as in contrastive decoding, Li et al. 2022, 2210.15097.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> found = amplify(pair.sides, ["Hello."], [-1.0, 0.0], max_new_tokens=4)
        >>> [answer.edit for answer in found.answers]
        ['amplified -1', 'amplified +0']
    """
    texts = as_texts(sides, prompts, reply=True)
    sides.check_lengths([text.n_tokens for text in texts], max_new_tokens - 1)
    several = [float(strengths)] if isinstance(strengths, int | float) else list(strengths)
    _check(sides, texts, several, n, temperature)
    uniform = _uniform(texts, n, seed, max_new_tokens)
    order = sorted(range(len(texts)), key=lambda i: (texts[i].n_tokens, i))
    rows = [_Row(a, prompt, i) for prompt in order for a in several for i in range(n)]
    report, done = reporter(progress, "amplify"), dict[_Row, Answer]()

    def result() -> Generations:
        known = sorted(done, key=lambda r: (several.index(r.strength), r.prompt, r.sample))
        return Generations(texts, tuple(done[row] for row in known), seed, temperature)

    parts = fitted(
        sides.roots[0], rows, lambda part: _batch(sides, texts, part, uniform, temperature, cancel),
        what="amplify", width=lambda row: texts[row.prompt].n_tokens + max_new_tokens,
        max_rows=max_rows,
    )  # fmt: skip
    try:
        for _, answers in parts:
            done.update(answers)
            report(len(done), len(rows), f"{len(done)} answers")
    except Cancelled as cancelled:
        raise Cancelled(str(cancelled), result()) from None
    return result()


def _check(
    sides: Sides, texts: tuple[Text, ...], strengths: list[float], n: int, temperature: float
) -> None:
    if sides.kind == "remote":
        raise RemoteError(
            "amplification samples step by step from both sides, which no server does. Scale the "
            "adapter there, generate(do=ScaleAdapter(2.0)), or load the pair here."
        )
    if not temperature >= 0:
        raise InterventionError(f"temperature {temperature}: it must be 0 (greedy) or positive.")
    if not texts or n < 1 or not strengths or len(set(strengths)) < len(strengths):
        raise MaskError(f"nothing to generate: {len(texts)} prompts, strengths {strengths}, n={n}.")
    empty = [i for i, text in enumerate(texts) if text.n_tokens == 0]
    if empty:
        raise MaskError(f"prompts {empty} have no token; a model needs at least one to continue.")


def _uniform(
    texts: tuple[Text, ...], n: int, seed: int, steps: int
) -> dict[tuple[int, int], Tensor]:
    """Noise by prompt and sample: `generate`'s, where a repeated prompt goes on counting."""
    seen: dict[tuple[int, ...], int] = {}
    found = {}
    for prompt, text in enumerate(texts):
        start = seen.get(text.ids, 0)
        seen[text.ids] = start + n
        for sample in range(n):
            found[prompt, sample] = noise(seed, text.ids, start + sample, steps)
    return found


@torch.no_grad()
def _batch(
    sides: Sides,
    texts: tuple[Text, ...],
    rows: list[_Row],
    uniform: dict[tuple[int, int], Tensor],
    temperature: float,
    cancel: Event | None,
) -> dict[_Row, Answer]:
    batch = make_batch([texts[row.prompt] for row in rows], padding_id(sides.tokenizer), "left")
    draws = torch.stack([uniform[row.prompt, row.sample] for row in rows])
    strengths = torch.tensor([row.strength for row in rows])[:, None]
    ends = torch.tensor(end_ids(sides))
    chosen, open_rows = [], torch.ones(len(rows), dtype=torch.bool)
    with _both(sides, batch) as models:
        ids = batch.ids
        for step in range(draws.shape[1]):
            check(cancel)
            base, tuned = models.logits(ids)
            scores = tuned + strengths.to(tuned) * (tuned - base)
            scores = torch.where(strengths.to(tuned) == -1, base, scores)  # exact, not base + 0
            if not bool(scores.isfinite().all()):
                raise InterventionError(
                    f"amplified logits are not finite at generated token {step}: use a smaller "
                    "strength, or load the pair in float32."
                )
            came = choose(scores, draws[:, step], temperature).cpu()
            chosen.append(came)
            open_rows &= ~torch.isin(came, ends)
            if not open_rows.any():
                break
            ids = came[:, None]
    return {
        row: _answer(sides, row, got, set(ends.tolist()))
        for row, got in zip(rows, torch.stack(chosen, 1).tolist(), strict=True)
    }


def _answer(sides: Sides, row: _Row, ids: list[int], ends: set[int]) -> Answer:
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[: stop + 1]
    text = str(sides.tokenizer.decode(kept, skip_special_tokens=True))
    name = edit_name(row.strength)
    return Answer(row.prompt, row.sample, "finetuned", name, tuple(kept), text, stop is not None)


class _Stepper:
    """One model's pass over the tokens so far, with its keys and values kept."""

    def __init__(self, root: Any, mask: Tensor) -> None:
        self.root, self.mask, self.cache = root, mask.to(device_of(root)), None

    def logits(self, ids: Tensor) -> Float[Tensor, "row vocab"]:
        """Float32 logits after new tokens ``[row, token]``."""
        if self.cache is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), ids.shape[1])], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = self.root(
            input_ids=ids.to(self.mask.device),
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        return out.logits[:, -1].float()


@dataclass(frozen=True, eq=False)
class _Both:
    """Both sides: one stepper with the base's rows first, or two."""

    steppers: tuple[_Stepper, ...]

    def logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of (base, finetuned), of every row."""
        if len(self.steppers) == 1:
            both = self.steppers[0].logits(torch.cat([ids, ids]))
            return both[: len(ids)], both[len(ids) :]
        base, tuned = (stepper.logits(ids) for stepper in self.steppers)
        return base.to(tuned.device), tuned


@contextmanager
def _both(sides: Sides, batch: Batch) -> Iterator[_Both]:
    """Hold both sides for one batch; hooks and locks are gone after it."""
    with ExitStack() as stack:
        if sides.kind == "two":
            roots = [stack.enter_context(sides.on(side)) for side in SIDES]
            yield _Both(tuple(_Stepper(root, batch.attention_mask) for root in roots))
            return
        n = len(batch.texts)
        twice = make_batch([*batch.texts, *batch.texts], padding_id(sides.tokenizer), "left")
        groups = (
            Group((0, n), Plan(), sides.shape("base"), adapter_off=True),
            Group((n, 2 * n), Plan(), sides.shape("finetuned")),
        )
        editor = Editor(twice, groups, lora=sides.lora)
        root = stack.enter_context(sides.on("finetuned"))
        stack.enter_context(hooked(root, sides.site_map, editor, sides.adapter))
        yield _Both((_Stepper(root, twice.attention_mask),))
