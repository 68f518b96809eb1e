"""Passes, comparisons and gradients of remote pairs: the same plans, as jobs.

Every job is of one model: two models in one request would silently run as one. A pair with an
adapter is compared in one job of the adapted model, whose first pass has what the adapter writes
set to zero: that is the base exactly, and nothing on the server is switched. Jobs reduce where the
model is: what comes back are the tokens and sums that were asked for, never ``[token, vocab]``.
"""

from collections.abc import Callable
from threading import Event
from typing import Any

import torch
from torch import Tensor

from modeldiff.batching import Batch, make_batch, padding_id
from modeldiff.divergence import compared, kl_and_loss, softcap
from modeldiff.editing import Editor, Group
from modeldiff.errors import InterventionError, RemoteError
from modeldiff.forward import as_texts, check_sites, inputs_of, sources, take_over
from modeldiff.interventions import Cell, Plan, Side
from modeldiff.loading import PROBE, SIDES, Sides, lock_of
from modeldiff.remote_jobs import Log, Server, run_job
from modeldiff.sites import Site
from modeldiff.survey import measured

CPU = torch.device("cpu")
_FINAL = "final"
LARGEST = 256 << 20
"""Bytes of logits that `modeldiff.forward.run` accepts over the wire."""


def program_of(sides: Sides, editor: Editor, side: Side, *, final: bool = False) -> list[Any]:
    """What to do in a pass of a side; ``final`` also reads the output of the final norm."""
    program = editor.program(sides.site_map, sides.adapter_of(side))
    return [*program, norm_of(sides)] if final else program


def norm_of(sides: Sides) -> dict[str, Any]:
    """The output of the final norm, as a site to read."""
    return {"name": _FINAL, "path": sides.site_map.norm, "end": "output", "read": True,
            "leaf": False, "groups": []}  # fmt: skip


def head_of(sides: Sides) -> dict[str, Any]:
    """Where the unembedding is, and the bound on its logits; for `unembedded`."""
    return {"path": sides.site_map.unembed, "cap": softcap(sides.roots[0])}


def job(
    sides: Sides,
    side: Side,
    trace: Callable[[Any, Any], Any],
    asked: Any,
    cancel: Event | None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Run a trace of a side's model on the server; ``asked`` is all that it depends on."""
    from modeldiff import tracing

    def pack() -> tracing.Packed:
        packing = tracing.Packing(sides.traced[side])
        with lock_of(sides.root(side)):
            trace(sides.traced[side], packing)
        if packing.packed is None:
            raise RemoteError("nnsight packed nothing: was its Tracer changed?")
        return packing.packed

    adapter = sides.names[1] if sides.adapter_of(side) else ""
    model = sides.names[0] if adapter else sides.names[SIDES.index(side)]
    return run_job(Server.of(sides.remote), [model, adapter, asked], pack, cancel, log)


def pass_of(
    sides: Sides,
    side: Side,
    batch: Batch,
    program: list[Any],
    reduce: Callable[..., dict[str, Any]],
    given: Any,
    cancel: Event | None,
) -> dict[str, Any]:
    """One pass of one side up to the last site of its program, reduced on the server."""
    from modeldiff import tracing

    inputs = inputs_of(batch, CPU)
    return job(
        sides,
        side,
        lambda model, backend: tracing.forward(
            model, inputs, program, reduce=reduce, given=given, backend=backend
        ),
        [reduce.__name__, inputs, program, given],
        cancel,
    )


# ------------------------------------------------------------ one side


def one_side(
    sides: Sides, batch: Batch, side: Side, editor: Editor, *, logits: bool, grad: bool
) -> Tensor | None:
    """Run one side with its edits; the editor has the activations read.

    Raises:
        RemoteError: If the graph is asked for, or more logits than may travel.
    """
    from modeldiff import tracing

    if grad:
        raise RemoteError(
            "a graph cannot travel: ask for gradients of a score with "
            "modeldiff.remote_runs.gradients, or load the pair here."
        )
    vocab = sides.config.get_text_config().vocab_size
    if logits and batch.ids.numel() * vocab * 4 > LARGEST:
        raise RemoteError(
            f"logits of {batch.ids.numel()} tokens are {batch.ids.numel() * vocab * 4 >> 20} MiB: "
            "run fewer texts, pass logits=False, or use output_diff, which compares them there."
        )
    program, inputs = program_of(sides, editor, side), inputs_of(batch, CPU)
    found = job(
        sides,
        side,
        lambda model, backend: tracing.forward(
            model, inputs, program, logits=logits, backend=backend
        ),
        ["forward", inputs, program, logits],
        None,
    )
    take_over(editor, found)
    return found.get("logits")


def states(
    sides: Sides, batch: Batch, side: Side, editor: Editor, *, cancel: Event | None = None
) -> Tensor:
    """Final norm's output ``[row, token, d_model]`` of one side; zero at padding."""
    keep = batch.attention_mask.bool()
    program = program_of(sides, editor, side, final=True)
    found = pass_of(sides, side, batch, program, rows_of, _places(keep), cancel)
    editor.fired.update(found["fired"])
    return _padded(found["acts"][_FINAL], keep)


def _places(keep: Tensor) -> dict[str, Any]:
    row, column = keep.nonzero(as_tuple=True)
    return {"row": row, "column": column}


def rows_of(model: Any, acts: dict[str, Tensor], given: Any) -> dict[str, Any]:
    """The wanted tokens of each activation."""
    row, column = given["row"], given["column"]
    return {"acts": {k: h[row.to(h.device), column.to(h.device)].detach() for k, h in acts.items()}}


def _padded(rows: Tensor, keep: Tensor) -> Tensor:
    h = rows.new_zeros(*keep.shape, rows.shape[-1])
    h[keep] = rows
    return h


# ------------------------------------------------------------ both sides


def _editors(sides: Sides, batch: Batch, reads: tuple[Site, ...]) -> tuple[Editor, Editor]:
    """Editors that change nothing, the base's silencing the adapter if there is one."""
    rows, plain = (0, len(batch.texts)), tuple(site for site in reads if site.kind != "lora")
    off = Group(rows, Plan(), sides.shape("base"), adapter_off=bool(sides.adapter))
    on = Group(rows, Plan(), sides.shape("finetuned"))
    return Editor(batch, (off,), plain, lora=sides.lora), Editor(batch, (on,), reads)


def _together(
    sides: Sides,
    batch: Batch,
    reads: tuple[Site, ...],
    final: bool,
    reduce: Callable[..., dict[str, Any]],
    given: Any,
    cancel: Event | None,
) -> dict[str, Any]:
    """One job of the adapted model with both passes."""
    from modeldiff import tracing

    name = sides.adapter
    base, tuned = _editors(sides, batch, reads)
    end = [norm_of(sides)] if final else []
    first, second = ([*each.program(sides.site_map, name), *end] for each in (base, tuned))
    inputs = inputs_of(batch, CPU)
    return job(
        sides,
        "finetuned",
        lambda model, backend: tracing.pair(
            model, inputs, first, second, reduce, given, backend=backend
        ),
        [reduce.__name__, inputs, first, second, given],
        cancel,
    )


Both = tuple[dict[Site, Tensor], dict[Site, Tensor], tuple[Tensor, Tensor] | None]


def both_sides(
    sides: Sides,
    batch: Batch,
    reads: tuple[Site, ...],
    final: bool,
    keep: Tensor | None,
    cancel: Event | None,
) -> Both:
    """What `modeldiff.forward.run_pair` returns; tokens that are not kept are zero."""
    check_sites(reads, sides.shape("finetuned"))
    keep = batch.attention_mask.bool() if keep is None or final else keep
    base, tuned = (
        _both_rows(sides, batch, reads, final, keep, cancel)
        if sides.adapter
        else [_one_row(sides, batch, side, reads, final, keep, cancel) for side in SIDES]
    )
    acts = [
        {Site.parse(k): _padded(h, keep) for k, h in each.items() if k != _FINAL}
        for each in (base, tuned)
    ]
    ends = (_padded(base[_FINAL], keep), _padded(tuned[_FINAL], keep)) if final else None
    return acts[0], acts[1], ends


def _both_rows(
    sides: Sides,
    batch: Batch,
    reads: tuple[Site, ...],
    final: bool,
    keep: Tensor,
    cancel: Event | None,
) -> list[dict[str, Tensor]]:
    found = _together(sides, batch, reads, final, _rows_of_both, _places(keep), cancel)
    return [found["base"], found["finetuned"]]


def _rows_of_both(model: Any, base: Any, tuned: Any, given: Any) -> dict[str, Any]:
    return {s: rows_of(model, h, given)["acts"] for s, h in (("base", base), ("finetuned", tuned))}


def _one_row(
    sides: Sides,
    batch: Batch,
    side: Side,
    reads: tuple[Site, ...],
    final: bool,
    keep: Tensor,
    cancel: Event | None,
) -> dict[str, Tensor]:
    editor = Editor(batch, (Group((0, len(batch.texts)), Plan(), sides.shape(side)),), reads)
    program = program_of(sides, editor, side, final=final)
    return pass_of(sides, side, batch, program, rows_of, _places(keep), cancel)["acts"]


# ------------------------------------------------------------ reduced on the server


def outputs_compared(
    sides: Sides,
    batch: Batch,
    row: Tensor,
    column: Tensor,
    came: Tensor,
    k: int,
    budget: int,
    *,
    cancel: Event | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`modeldiff.divergence.compared` of both sides' predictions.

    Args:
        sides: The pair.
        batch: What to run.
        row: Rows of the predicting tokens.
        column: Their columns.
        came: The tokens that came.
        k: Size of the top lists.
        budget: Bytes for the server's temporaries.
        cancel: Event that ends the wait.

    Raises:
        RemoteError: If two whole models unembed differently: their distributions could only be
            compared by sending all of them.
    """
    given = {"row": row, "column": column, "came": came, "k": k, "budget": budget, **head_of(sides)}
    if sides.adapter:
        found = _together(sides, batch, (), True, _compared_both, given, cancel)
    else:
        check_heads(sides, cancel)
        keep = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        keep[row, column] = True
        given["known"] = _one_row(sides, batch, "base", (), True, keep, cancel)[_FINAL]
        found = pass_of(sides, "finetuned", batch, [norm_of(sides)], _compared_one, given, cancel)
    return found["columns"], found["sums"]


def _compared_both(model: Any, base: Any, tuned: Any, given: Any) -> dict[str, Any]:
    known = rows_of(model, base, given)["acts"][_FINAL]
    return _compared_one(model, tuned, {**given, "known": known})


def _compared_one(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    h = rows_of(model, acts, given)["acts"][_FINAL]

    def head(states: Tensor) -> Tensor:
        return unembedded(model, states, given)

    known, came = given["known"].to(h.device), given["came"]
    columns, sums = compared(known, h, head, head, came, given["k"], given["budget"])
    return {"columns": columns, "sums": sums}


def unembedded(model: Any, h: Tensor, given: Any) -> Tensor:
    """Float32 logits of final states, where the model is."""
    return _logits(model, h, given).detach()


def _logits(model: Any, h: Tensor, given: Any) -> Tensor:
    logits, cap = model.get(given["path"])(h).float(), given["cap"]
    return torch.tanh(logits / cap) * cap if cap else logits


def check_heads(sides: Sides, cancel: Event | None) -> None:
    """Compare what both models' unembeddings make of the same vectors.

    Raises:
        RemoteError: If they differ.
    """
    width = sides.shape("base").d_model
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    given, program = {"probe": probe, **head_of(sides)}, [norm_of(sides)]
    one = make_batch(as_texts(sides, [PROBE]), padding_id(sides.tokenizer))
    found = [pass_of(sides, side, one, program, _probed, given, cancel)["sums"] for side in SIDES]
    if not torch.equal(*found):
        raise RemoteError(
            f"{sides.names[0]} and {sides.names[1]} have different unembeddings: on two servers "
            "their predictions can only be compared by sending every probability. Load the pair "
            "here, or extract the fine-tune as a LoRA adapter and pass adapter=."
        )


def _probed(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    logits = unembedded(model, given["probe"].to(acts[_FINAL]), given).double()
    n = torch.arange(1, logits.shape[-1] + 1).to(logits) ** 0.5
    return {"sums": torch.stack([logits.sum(-1), logits.square().sum(-1), logits @ n]).cpu()}


def effect(
    sides: Sides,
    batch: Batch,
    keep: Tensor,
    cell: Cell,
    reference: Cell,
    known: Tensor,
    budget: int,
    *,
    cancel: Event | None = None,
) -> tuple[Tensor, Tensor]:
    """KL to a reference and loss of each kept token under a cell's edits, in nats.

    Args:
        sides: The pair.
        batch: What to run.
        keep: Predicted tokens that count.
        cell: Side and edits.
        reference: What ``known`` is of.
        known: The reference's final states at the predicting tokens, ``[token, d_model]``.
        budget: Bytes for the server's temporaries.
        cancel: Event that ends the wait.

    Raises:
        RemoteError: As for `outputs_compared`.
        InterventionError: If an edit did not fire.
    """
    if cell.side != reference.side and not sides.adapter:
        check_heads(sides, cancel)
    others = sources(sides, batch.texts, cell.plan, cell.side, batch.pad_side)
    group = Group((0, len(batch.texts)), cell.plan, sides.shape(cell.side), others=others)
    editor = Editor(batch, (group,))
    row, column = keep.nonzero(as_tuple=True)
    given = {"row": row, "column": column - 1, "came": batch.ids[keep], "known": known,
             "budget": budget, **head_of(sides)}  # fmt: skip
    program = program_of(sides, editor, cell.side, final=True)
    found = pass_of(sides, cell.side, batch, program, effect_of, given, cancel)
    editor.fired.update(found["fired"])
    editor.check_fired()
    return found["kl"], found["loss"]


def effect_of(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    """KL to known states and loss, where the model is."""
    h = rows_of(model, acts, given)["acts"][_FINAL]

    def head(states: Tensor) -> Tensor:
        return unembedded(model, states, given)

    known, came = given["known"].to(h.device), given["came"].to(h.device)
    kl, loss = kl_and_loss(h, known, head, head, came, given["budget"])
    return {"kl": kl.cpu(), "loss": loss.cpu()}


def surveyed(
    sides: Sides,
    batch: Batch,
    sites: tuple[Site, ...],
    keep: Tensor,
    text_index: Tensor,
    *,
    cancel: Event | None = None,
) -> dict[Site, dict[int, dict[str, Any]]]:
    """`modeldiff.survey.measured` at every site; only means come back."""
    given = {**_places(keep), "text_index": text_index}
    found = _together(sides, batch, sites, False, _surveyed, given, cancel)
    return {Site.parse(name): each for name, each in found["sites"].items()}


def _surveyed(model: Any, base: Any, tuned: Any, given: Any) -> dict[str, Any]:
    both = _rows_of_both(model, base, tuned, given)
    pairs = {name: (h, both["finetuned"][name]) for name, h in both["base"].items()}
    return {"sites": {name: _on_cpu(*pair, given["text_index"]) for name, pair in pairs.items()}}


def _on_cpu(base: Tensor, tuned: Tensor, text_index: Tensor) -> dict[int, dict[str, Any]]:
    found = measured(base, tuned, text_index)
    for one in found.values():
        for side in ("base", "finetuned"):
            one[side] = (one[side][0].cpu(), one[side][1])
    return found


# ------------------------------------------------------------ gradients


def gradients(
    sides: Sides,
    batch: Batch,
    side: Side,
    reads: tuple[Site, ...],
    targets: Tensor,
    *,
    minus: Tensor | None = None,
    plan: Plan | None = None,
    cancel: Event | None = None,
) -> tuple[Tensor, dict[Site, Tensor], dict[Site, Tensor]]:
    """Gradients of the log probability of each row's next token, taken where the model is.

    Args:
        sides: A remote pair.
        batch: Texts, padded on the left: each row ends with the token that predicts.
        side: "base" or "finetuned".
        reads: Sites; the first in the forward pass becomes the leaf.
        targets: The next token of each row; the score is the sum of their log probabilities.
        minus: Tokens whose log probability is subtracted, row by row.
        plan: Edits.
        cancel: Event that ends the wait.

    Returns:
        Each row's score, and by site the activations and the gradients ``[row, token, width]``.

    Raises:
        InterventionError: If an edit did not fire, or the batch is padded on the right.
        RemoteError: If the server refused or failed.
    """
    if batch.pad_side != "left":
        raise InterventionError("gradients need a batch padded on the left: rows end together.")
    check_sites(reads, sides.shape(side))
    plan = plan or Plan()
    others = sources(sides, batch.texts, plan, side, batch.pad_side)
    group = Group((0, len(batch.texts)), plan, sides.shape(side), others=others)
    editor = Editor(batch, (group,), reads, leaf=True)
    given = {"targets": targets, "minus": minus, **head_of(sides)}
    program = program_of(sides, editor, side, final=True)
    found = pass_of(sides, side, batch, program, _gradients, given, cancel)
    editor.fired.update(found["fired"])
    editor.check_fired()
    acts, grads = (
        {Site.parse(name): h for name, h in found[each].items()} for each in ("acts", "gradients")
    )
    return found["scores"], acts, grads


def _gradients(model: Any, acts: Any, given: Any) -> dict[str, Any]:
    last = acts[_FINAL][:, -1]
    logprobs = _logits(model, last, given).log_softmax(-1)
    scores = logprobs.gather(-1, given["targets"].to(last.device)[:, None])[:, 0]
    if given["minus"] is not None:
        scores = scores - logprobs.gather(-1, given["minus"].to(last.device)[:, None])[:, 0]
    names = [name for name in acts if name != _FINAL]
    found = torch.autograd.grad(scores.sum(), [acts[name] for name in names])
    return {
        "scores": scores.detach(),
        "acts": {name: acts[name].detach() for name in names},
        "gradients": dict(zip(names, found, strict=True)),
    }
