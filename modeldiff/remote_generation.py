"""Generation of remote pairs: one job a batch, with the same noise as here."""

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


def generated(
    sides: Sides,
    batch: Batch,
    editor: Editor,
    side: Side,
    uniform: Tensor,
    temperature: float,
    ends: list[int],
    *,
    cancel: Event | None = None,
) -> Tensor:
    """Generate on the server with the noise that is used here; new ids ``[row, new]``.

    Raises:
        RemoteError: If the model's own settings change its answers and cannot be set aside.
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
        "logits_processor": LogitsProcessorList([_sampler(uniform, temperature, width)]),
    }
    inputs = inputs_of(batch, CPU)
    del inputs["position_ids"]  # generate() derives them from the mask, step by step
    program = program_of(sides, editor, side)
    found = job(
        sides,
        side,
        lambda model, backend: tracing.generate(model, inputs, program, options, backend=backend),
        ["generate", inputs, program, settings, uniform, temperature],
        cancel,
    )
    editor.fired.update(found["fired"])
    return found["ids"][:, width:]


def _sampler(uniform: Tensor, temperature: float, width: int) -> Callable[..., Tensor]:
    """`modeldiff.sampling.Sampler` as one function, which can travel."""

    def process(ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - width
        if bool(torch.isnan(scores).any()):
            raise ValueError(f"logits are NaN at generated token {step}: is an edit too strong?")
        chosen = choose(scores, uniform[:, step], temperature)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    return process
