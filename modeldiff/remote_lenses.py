"""What is read through the unembedding of a remote pair: vectors go there, words come back."""

from collections.abc import Callable
from threading import Event
from typing import Any

import torch
from torch import Tensor

from modeldiff._shapes import Float, Int
from modeldiff.batching import Batch, make_batch, padding_id
from modeldiff.editing import Editor, Group
from modeldiff.errors import RemoteError
from modeldiff.forward import as_texts, inputs_of
from modeldiff.interventions import Cell, Plan, Side
from modeldiff.loading import PROBE, Sides
from modeldiff.logit_lens import centred, ends_of
from modeldiff.remote_runs import (
    CPU,
    LARGEST,
    check_heads,
    effect_of,
    head_of,
    job,
    pass_of,
    program_of,
    unembedded,
)
from modeldiff.token_scores import columns_of
from modeldiff.tokens import n_ids


def with_head(
    sides: Sides,
    side: Side,
    reduce: Callable[..., dict[str, Any]],
    given: dict[str, Any],
    cancel: Event | None = None,
) -> dict[str, Any]:
    """Compute something with the modules of a side where they are; no pass is run.

    Args:
        sides: A remote pair.
        side: Whose modules.
        reduce: Called with the model, nothing, and ``given``; it travels as source.
        given: Tensors and builtins; the unembedding's ``path`` and ``cap`` are added.
        cancel: Event that ends the wait.
    """
    from modeldiff import tracing

    one = make_batch(as_texts(sides, [PROBE]), padding_id(sides.tokenizer))
    inputs, given = inputs_of(one, CPU), {**given, **head_of(sides)}
    found = job(
        sides,
        side,
        lambda model, backend: tracing.forward(
            model, inputs, [], reduce=reduce, given=given, backend=backend
        ),
        ["modules", reduce.__name__, inputs, given],
        cancel,
    )
    return {name: value for name, value in found.items() if name != "fired"}


# ------------------------------------------------------------ the logit lens


def lens_ends(
    sides: Sides, units: Float[Tensor, "n d_model"], side: Side, k: int
) -> dict[str, Tensor]:
    """`modeldiff.logit_lens.ends_of` the lens's logits, found on the server."""
    return with_head(sides, side, _lens_ends, {**_lens(sides, units), "k": k})


def lens_logits(
    sides: Sides, units: Float[Tensor, "n d_model"], side: Side
) -> Float[Tensor, "n vocab"]:
    """`modeldiff.logit_lens.lens_logits`, whole.

    Raises:
        RemoteError: If they are more than may travel.
    """
    known = n_ids(sides.tokenizer)
    if len(units) * known * 4 > LARGEST:
        raise RemoteError(
            f"the logits of {len(units)} vectors are {len(units) * known * 4 >> 20} MiB: ask for "
            "fewer at a time, or for the tokens at the ends (logit_lens)."
        )
    return with_head(sides, side, _lens_logits, _lens(sides, units))["logits"]


def _lens(sides: Sides, units: Tensor) -> dict[str, Any]:
    return {"units": units, "norm": sides.site_map.norm, "known": n_ids(sides.tokenizer)}


def _lens_logits(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    norm, head, units = model.get(given["norm"]), model.get(given["path"]), given["units"]
    weight = next(norm._module.parameters())
    rows = (units * units.shape[-1] ** 0.5).to(weight)
    return {"logits": centred(norm, head, rows, given["known"])}


def _lens_ends(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    return ends_of(_lens_logits(model, acts, given)["logits"], given["k"])


# ------------------------------------------------------------ predictions


def tokens_compared(
    sides: Sides,
    cell: Cell,
    reference: Cell,
    states: Float[Tensor, "token d_model"],
    known: Float[Tensor, "token d_model"],
    came: Int[Tensor, " token"],
    k: int,
    budget: int,
) -> dict[str, Tensor]:
    """`modeldiff.token_scores.columns_of` two cells' final states, made on the server.

    Args:
        sides: A remote pair.
        cell: Whose ``states``.
        reference: Whose ``known``.
        states: Final norm's output.
        known: The same of the reference.
        came: The token that came next.
        k: Size of the top lists.
        budget: Bytes for the server's temporaries.

    Raises:
        RemoteError: If two whole models unembed differently.
    """
    if cell.side != reference.side and not sides.adapter:
        check_heads(sides, None)
    given = {"states": states, "known": known, "came": came, "k": k, "budget": budget}
    return with_head(sides, cell.side, _tokens_compared, given)


def _tokens_compared(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    head = model.get(given["path"])
    weight = next(head._module.parameters())
    known, states = (given[each].to(weight) for each in ("known", "states"))
    came = given["came"].to(weight.device)

    def unembed(h: Tensor) -> Tensor:
        return unembedded(model, h, given)

    return columns_of(known, states, unembed, unembed, came, given["k"], given["budget"])


def last_logprobs(
    sides: Sides, batch: Batch, side: Side, plan: Plan, cancel: Event | None = None
) -> Float[Tensor, "row vocab"]:
    """Log probabilities after the last token of each row, of the tokens that have a name.

    Raises:
        InterventionError: If an edit did not fire.
        RemoteError: If they are more than may travel.
    """
    known = n_ids(sides.tokenizer)
    if len(batch.texts) * known * 4 > LARGEST:
        raise RemoteError(
            f"{len(batch.texts)} distributions are {len(batch.texts) * known * 4 >> 20} MiB: give "
            "a smaller max_rows."
        )
    group = Group((0, len(batch.texts)), plan, sides.shape(side))
    editor = Editor(batch, (group,))
    given = {"known": known, **head_of(sides)}
    program = program_of(sides, editor, side, final=True)
    found = pass_of(sides, side, batch, program, _last_logprobs, given, cancel)
    editor.fired.update(found["fired"])
    editor.check_fired()
    return found["logprobs"]


def _last_logprobs(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    logits = unembedded(model, acts["final"][:, -1], given)
    return {"logprobs": logits[:, : given["known"]].log_softmax(-1).cpu()}


def likeliest(sides: Sides, states: Float[Tensor, "n d_model"], side: Side) -> Int[Tensor, " n"]:
    """The token that each final state holds most likely."""
    return with_head(sides, side, _likeliest, {"states": states})["ids"]


def _likeliest(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    head = model.get(given["path"])
    weight = next(head._module.parameters())
    return {"ids": unembedded(model, given["states"].to(weight), given).argmax(-1).cpu()}


def effect_at_the_end(
    sides: Sides,
    batch: Batch,
    side: Side,
    plan: Plan,
    known: Float[Tensor, "row d_model"],
    came: Int[Tensor, " row"],
    budget: int,
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """KL to the base and loss after each row's last token, see `modeldiff.remote_runs.effect`.

    Args:
        sides: A remote pair.
        batch: Rows of one length.
        side: Whose model.
        plan: Edits of tensors.
        known: The base's final states there.
        came: The token whose loss is taken.
        budget: Bytes for the server's temporaries.

    Raises:
        InterventionError: If an edit did not fire.
        RemoteError: If two whole models unembed differently.
    """
    if side != "base" and not sides.adapter:
        check_heads(sides, None)
    editor = Editor(batch, (Group((0, len(batch.texts)), plan, sides.shape(side)),))
    last = torch.full((len(batch.texts),), batch.ids.shape[1] - 1)
    given = {"row": torch.arange(len(last)), "column": last, "came": came, "known": known,
             "budget": budget, **head_of(sides)}  # fmt: skip
    program = program_of(sides, editor, side, final=True)
    found = pass_of(sides, side, batch, program, effect_of, given, None)
    editor.fired.update(found["fired"])
    editor.check_fired()
    return found["kl"], found["loss"]
