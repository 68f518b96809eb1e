"""Generation of remote pairs: one job a batch, with the same noise as here.

Tokens are shown while the job runs if the server passes on what jobs print: every step prints all
tokens so far, since a server keeps the last line alone. What is returned is the job's result; lines
that are missing change nothing, and lines that say otherwise are an error.
"""

from collections.abc import Callable
from threading import Event

import torch
from torch import Tensor

from modeldiff.batching import Batch, padding_id
from modeldiff.editing import Editor
from modeldiff.errors import RemoteError
from modeldiff.forward import inputs_of
from modeldiff.interventions import Side
from modeldiff.loading import Sides
from modeldiff.remote_runs import CPU, job, program_of
from modeldiff.sampling import choose

_NEUTRAL = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "min_length": 0,
    "min_new_tokens": 0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "renormalize_logits": False, "remove_invalid_values": False,
    "return_dict_in_generate": False, "output_scores": False, "guidance_scale": 1.0,
    "token_healing": False, "use_cache": True,
}  # fmt: skip
"""Settings that a server would otherwise fill in from the model's own."""
_UNDOABLE = (
    "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "exponential_decay_length_penalty",
    "watermarking_config", "penalty_alpha", "dola_layers",
)  # fmt: skip
"""Settings of a model that a request can set but not unset."""


_MARK = "modeldiff-tokens"
"""Begins the lines that jobs print."""
_MOST = 1 << 15
"""Tokens of a line; longer batches are shown up to there, and whole at the end."""


def generated(
    sides: Sides,
    batch: Batch,
    editor: Editor,
    side: Side,
    uniform: Tensor,
    temperature: float,
    ends: list[int],
    *,
    on_step: Callable[[int, Tensor], None] | None = None,
    cancel: Event | None = None,
) -> Tensor:
    """Generate on the server with the noise that is used here; new ids ``[row, new]``.

    Args:
        sides: The pair.
        batch: Prompts, padded on the left.
        editor: What is edited.
        side: Whose model runs.
        uniform: Noise ``[row, step]``.
        temperature: 0 is greedy.
        ends: Tokens that end an answer.
        on_step: Called with a step and its ids ``[row]``, for steps that are known before the end.
        cancel: Event that ends the wait.

    Raises:
        RemoteError: If the model's own settings change its answers and cannot be set aside, or
            the server printed other tokens than it returned.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    from modeldiff import tracing

    own = sides.root(side).generation_config
    kept = [name for name in _UNDOABLE if getattr(own, name, None)]
    if kept:
        raise RemoteError(f"{sides.names} generate with {kept}, which a request cannot unset.")
    width, pad = batch.ids.shape[1], padding_id(sides.tokenizer)
    settings = {**_NEUTRAL, "max_new_tokens": uniform.shape[1], "eos_token_id": ends,
                "pad_token_id": pad}  # fmt: skip
    options = {
        "generation_config": GenerationConfig(**settings),
        "logits_processor": LogitsProcessorList(
            [_sampler(uniform, temperature, width, on_step is not None)]
        ),
    }
    inputs = inputs_of(batch, CPU)
    del inputs["position_ids"]  # generate() derives them from the mask, step by step
    program, heard = program_of(sides, editor, side), Heard(len(uniform), uniform.shape[1], on_step)
    found = job(
        sides,
        side,
        lambda model, backend: tracing.generate(model, inputs, program, options, backend=backend),
        ["generate", inputs, program, settings, uniform, temperature],
        cancel,
        None if on_step is None else heard.line,
    )
    editor.fired.update(found["fired"])
    new = found["ids"][:, width:]
    heard.check(new, ends)
    return new


class Heard:
    """Tokens that a job printed, as far as its lines came here.

    Args:
        rows: Rows of the batch.
        most: Tokens a row at most.
        on_step: Called with each step once.
    """

    def __init__(self, rows: int, most: int, on_step: Callable[[int, Tensor], None] | None) -> None:
        self._rows, self._most, self._on_step = rows, most, on_step
        self._steps: list[Tensor] = []

    def line(self, text: str) -> None:
        """Read a line; one that is not of ours, or not whole, is passed over."""
        mark, _, numbers = text.strip().partition(" ")
        said = numbers.split(" ")
        if mark != _MARK or not all(n.isascii() and n.isdigit() and len(n) < 10 for n in said):
            return
        steps, left = divmod(len(said), self._rows)
        if left or steps > self._most or self._on_step is None:
            return
        ids = torch.tensor([int(n) for n in said]).view(steps, self._rows)
        for step in range(len(self._steps), steps):
            self._steps.append(ids[step])
            self._on_step(step, ids[step])

    def check(self, new: Tensor, ends: list[int]) -> None:
        """Compare what was printed with what was returned, up to each row's end.

        Raises:
            RemoteError: If they differ.
        """
        if not self._steps:
            return
        heard, n = torch.stack(self._steps, 1), len(self._steps)
        ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype)).cumsum(1)
        still = torch.nn.functional.pad(ended, (1, 0))[:, :n] == 0
        if n > new.shape[1] or bool(((heard != new[:, :n]) & still).any()):
            raise RemoteError(
                "the server printed other tokens than it returned: the answers that were shown "
                "are not those of the job. Nothing of it was used; generate again."
            )


def _sampler(
    uniform: Tensor, temperature: float, width: int, aloud: bool = False
) -> Callable[..., Tensor]:
    """`modeldiff.sampling.Sampler` as one function, which can travel.

    Args:
        uniform: Noise ``[row, step]``.
        temperature: 0 is greedy.
        width: Tokens of the prompt.
        aloud: Print all tokens so far at each step, step by step, as long as that is not much.
    """
    mark, most = _MARK, _MOST

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - width
        if bool(torch.isnan(scores).any()):
            raise ValueError(f"logits are NaN at generated token {step}: is an edit too strong?")
        chosen = choose(scores, uniform[:, step], temperature)
        if aloud and (step + 1) * len(chosen) <= most:
            so_far = torch.cat([ids[:, width:].T.flatten(), chosen]).tolist()
            print(" ".join([mark, *map(str, so_far)]))  # noqa: T201 - on the server: a status
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    return process
