"""Forward passes over a pair: one side with edits, or both sides with their common part once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from modeldiff._shapes import Bool, Float
from modeldiff.architectures import module_at
from modeldiff.batching import Batch, batches, make_batch, padding_id, padding_worth
from modeldiff.editing import Editor, Group
from modeldiff.errors import InterventionError, SetupError, SiteError
from modeldiff.hooks import hidden_argument, hooked, outputs_of, recorded, replay, stopping
from modeldiff.interventions import Edit, Plan, Replace, Shape, Side, as_plan
from modeldiff.loading import Sides
from modeldiff.placement import input_device
from modeldiff.sites import Site
from modeldiff.tokens import Chat, Completion, Text, render

Engine = Literal["hooks", "nnsight"]


@dataclass(frozen=True, eq=False)
class Run:
    """What one side computed on one batch.

    Args:
        batch: Texts, ids and padding (on the left).
        acts: Activations ``[row, token, width]`` after edits, by site, in the model's dtype.
        logits: ``[row, token, vocab]``, or None if they were not asked for.
    """

    batch: Batch
    acts: dict[Site, Tensor]
    logits: Float[Tensor, "row token vocab"] | None


def as_texts(sides: Sides, items: Sequence[Any], *, reply: bool = False) -> tuple[Text, ...]:
    """Render texts, chats and completions; `Text` values are taken as they are.

    Args:
        sides: Whose tokenizer renders.
        items: What `modeldiff.tokens.render` accepts; one string is one text, and so is one
            `Text`, `Chat` or `Completion`.
        reply: Render chats ready for the assistant's answer.

    Raises:
        MaskError: If an item cannot be rendered, or the model has no positions for its tokens.
    """
    items = [items] if isinstance(items, str | Text | Chat | Completion) else items
    texts = tuple(render(sides.tokenizer, item, add_generation_prompt=reply) for item in items)
    sides.check_lengths([text.n_tokens for text in texts])
    return texts


def batched(sides: Sides, texts: Sequence[Text], max_tokens: int) -> Iterator[Batch]:
    """Batch texts by length, padded on the right, as suits the pair's device."""
    worth = padding_worth(device_of(sides.roots[0]))
    return batches(
        texts, max_tokens=max_tokens, max_padding=worth, pad_id=padding_id(sides.tokenizer)
    )


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Move a batch's ids, mask and positions to a device, named as models take them."""
    return {
        "input_ids": batch.ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "position_ids": batch.position_ids.to(device),
    }


def check_sites(sites: Sequence[Site], shape: Shape) -> None:
    """Verify that every site exists.

    Raises:
        SiteError: Naming all that do not.
    """
    wrong = [str(site) for site in sites if site.layer >= shape.n_layers]
    if wrong:
        raise SiteError(f"{', '.join(wrong)}: the model has layers 0 to {shape.n_layers - 1}.")
    foreign = [str(site) for site in sites if site.kind == "lora" and site not in shape.lora]
    if foreign:
        have = ", ".join(map(str, shape.lora)) or "none; adapters are on the fine-tuned side alone"
        raise SiteError(f"{', '.join(foreign)}: this side has no such site; it has {have}.")


def run(
    sides: Sides,
    items: Sequence[Any],
    *,
    side: Side,
    do: "Edit | Plan | None" = None,
    reads: tuple[Site, ...] = (),
    logits: bool = True,
    grad: bool = False,
    engine: Engine = "hooks",
    pad_side: Literal["left", "right"] = "left",
) -> Run:
    """Run one side on one batch, with edits.

    Args:
        sides: The pair.
        items: Texts; one batch.
        side: "base" or "finetuned".
        do: Edits.
        reads: Sites to return.
        logits: False stops after the last site that is needed.
        grad: Keep the graph; the first site read becomes a leaf, so that
            ``torch.autograd.grad(loss, run.acts[site])`` works with frozen weights.
        engine: "hooks" or "nnsight"; the same numbers bit for bit.
        pad_side: Where shorter texts are padded.

    Raises:
        InterventionError: If an edit did not fire, or there is no such engine.
        SiteError: If a site does not exist on this side.
    """
    plan = as_plan(do)
    texts = as_texts(sides, items)
    batch = make_batch(texts, padding_id(sides.tokenizer), pad_side)
    shape = sides.shape(side)
    check_sites(reads, shape)
    others = sources(sides, batch.texts, plan, side, batch.pad_side, engine)
    group = Group((0, len(texts)), plan, shape, others=others)
    editor = Editor(batch, (group,), reads, leaf=grad)
    if not logits and not editor.sites:
        raise InterventionError("run(logits=False) without reads or edits computes nothing.")
    if sides.kind == "remote":
        from modeldiff.remote_runs import one_side

        out = one_side(sides, batch, side, editor, logits=logits, grad=grad)
    else:
        with torch.set_grad_enabled(grad), sides.on(side) as root:
            out = _execute(sides, root, side, batch, editor, logits, engine)
    editor.check_fired()
    return Run(batch, {site: editor.acts[site] for site in reads}, out)


def check_engine(engine: str) -> None:
    """Verify that an engine exists.

    Raises:
        InterventionError: If it does not.
    """
    if engine not in get_args(Engine):
        raise InterventionError(f"engine {engine!r}: it is 'hooks' or 'nnsight'.")


def _execute(
    sides: Sides,
    root: nn.Module,
    side: Side,
    batch: Batch,
    editor: Editor,
    logits: bool,
    engine: Engine,
) -> Tensor | None:
    adapter = sides.adapter_of(side)
    inputs = inputs_of(batch, device_of(root))
    if engine == "nnsight":
        from modeldiff import tracing

        program = editor.program(sides.site_map, adapter)
        found = tracing.forward(traced(sides, side), inputs, program, logits=logits)
        take_over(editor, found)
        return found.get("logits")
    with hooked(root, sides.site_map, editor, adapter):
        if logits:
            return root(**inputs, use_cache=False).logits
        with stopping(root, *_end(sides, max(editor.sites), adapter)):
            root(**inputs, use_cache=False)
    return None


def take_over(editor: Editor, found: dict[str, Any]) -> None:
    """Put what a trace read and counted into its editor."""
    editor.acts = {Site.parse(name): h for name, h in found.get("acts", {}).items()}
    editor.fired.update(found["fired"])


def _end(sides: Sides, site: Site, adapter: str) -> tuple[str, str]:
    path, end = sides.site_map.locate(site, adapter)
    return path, end


def device_of(root: nn.Module) -> torch.device:
    """Device on which a model takes its inputs."""
    return input_device(root)


def traced(sides: Sides, side: Side) -> Any:
    """Return nnsight's wrapper of a side, made once.

    Raises:
        SetupError: If the embeddings are offloaded, where nnsight cannot bring the inputs.
    """
    from modeldiff import tracing

    key = "both" if sides.kind == "adapter" else side
    if key not in sides.traced:
        if sides.kind != "remote" and next(sides.root(side).parameters()).is_meta:
            raise SetupError(
                "nnsight needs the embeddings on a device, and this device_map offloads them. "
                "Give them one (the first module of the map), or use engine='hooks'."
            )
        sides.traced[key] = tracing.wrap(sides.root(side), sides.tokenizer, sides.site_map)
    return sides.traced[key]


def sources(
    sides: Sides,
    texts: tuple[Text, ...],
    plan: Plan,
    side: Side,
    pad_side: Literal["left", "right"] = "left",
    engine: Engine = "hooks",
) -> dict[tuple[str, Site], Tensor]:
    """Run the sides that `Replace` edits copy from, on the same tokens.

    Raises:
        InterventionError: If an edit would copy a side from itself, or there is no such engine.
    """
    check_engine(engine)
    wanted: dict[Side, set[Site]] = {}
    for edit in plan.edits:
        if isinstance(edit, Replace) and isinstance(edit.source, str):
            if edit.source == side:
                raise InterventionError(
                    f"{edit.describe()!r} on side {side!r} copies a side from itself: nothing "
                    "would change. Name the other side as source."
                )
            wanted.setdefault(edit.source, set()).update(edit.sites(sides.shape(edit.source)))
    found = {}
    for source, sites in wanted.items():
        reads = tuple(sorted(sites))
        got = run(
            sides, texts, side=source, reads=reads, logits=False, engine=engine, pad_side=pad_side
        )
        found.update({(source, site): got.acts[site] for site in reads})
    return found


@torch.no_grad()
def final_states(
    sides: Sides, batch: Batch, side: Side, plan: Plan, cancel: Event | None = None
) -> Tensor:
    """Run one side with edits up to the final norm: what the unembedding reads.

    Args:
        sides: The pair.
        batch: What to run.
        side: "base" or "finetuned".
        plan: Edits.
        cancel: Event that ends the wait for a server.

    Returns:
        ``[row, token, d_model]`` in the model's dtype.

    Raises:
        InterventionError: If an edit did not fire.
    """
    others = sources(sides, batch.texts, plan, side, batch.pad_side)
    group = Group((0, len(batch.texts)), plan, sides.shape(side), others=others)
    editor = Editor(batch, (group,))
    if sides.kind == "remote":
        from modeldiff.remote_runs import states

        found = states(sides, batch, side, editor, cancel=cancel)
        editor.check_fired()
        return found
    norm = sides.site_map.norm
    with (
        sides.on(side) as root,
        hooked(root, sides.site_map, editor, sides.adapter_of(side)),
        outputs_of(root, norm) as kept,
        stopping(root, norm),
    ):
        root(**inputs_of(batch, device_of(root)), use_cache=False)
    editor.check_fired()
    return kept[0]


@dataclass(frozen=True, eq=False)
class PairRun:
    """What both sides computed on one batch, padded on the right.

    Args:
        batch: Texts, ids and padding.
        base: Activations ``[row, token, width]`` of the base, by site.
        finetuned: The same of the fine-tune.
        final: Outputs of the final norm (base, finetuned), what the unembedding reads; None if
            not asked for.
    """

    batch: Batch
    base: dict[Site, Tensor]
    finetuned: dict[Site, Tensor]
    final: tuple[Tensor, Tensor] | None


@torch.no_grad()
def run_pair(
    sides: Sides,
    batch: Batch,
    reads: tuple[Site, ...] = (),
    *,
    final: bool = False,
    keep: Bool[Tensor, "row seq"] | None = None,
    cancel: Event | None = None,
) -> PairRun:
    """Run both sides without edits; layers below the first adapted one run once.

    Stops after the last site that is needed and never runs the unembedding. ``lora`` sites exist
    on the fine-tuned side alone.

    Args:
        sides: The pair.
        batch: What to run.
        reads: Sites to return.
        final: Also return the output of the final norm.
        keep: Tokens that are wanted; of a remote pair the others stay zero and do not travel.
        cancel: Event that ends the wait for a server.

    Raises:
        SiteError: If a site does not exist.
    """
    check_sites(reads, sides.shape("finetuned"))
    if not reads and not final:
        raise SiteError("run_pair: neither sites nor the final norm were asked for.")
    if sides.kind == "remote":
        from modeldiff.remote_runs import both_sides

        return PairRun(batch, *both_sides(sides, batch, reads, final, keep, cancel))
    plain = tuple(site for site in reads if site.kind != "lora")
    if sides.kind == "two" or sides.first_changed == 0:
        base, last_base, _ = _pass(sides, "base", batch, plain, final, ())
        tuned, last_tuned, _ = _pass(sides, "finetuned", batch, reads, final, ())
    else:
        base, last_base, calls = _pass(
            sides, "base", batch, plain, final, _branch(sides, reads, final)
        )
        tuned, last_tuned = _branched(sides, batch, reads, final, calls)
        tuned = {site: tuned.get(site, base.get(site)) for site in reads}
    outputs = None if last_base is None or last_tuned is None else (last_base, last_tuned)
    return PairRun(batch, base, tuned, outputs)  # pyright: ignore[reportArgumentType]


def _branch(sides: Sides, reads: tuple[Site, ...], final: bool) -> tuple[str, ...]:
    last = sides.shape("base").n_layers - 1 if final else max(reads).layer
    return tuple(sides.site_map.layer(i) for i in range(sides.first_changed, last + 1))


def _pass(
    sides: Sides,
    side: Side,
    batch: Batch,
    reads: tuple[Site, ...],
    final: bool,
    branch: tuple[str, ...],
) -> tuple[dict[Site, Tensor], Tensor | None, dict[str, Any]]:
    if not (reads or final or branch):
        return {}, None, {}
    adapter = sides.adapter_of(side)
    editor = Editor(batch, (Group((0, len(batch.texts)), Plan(), sides.shape(side)),), reads)
    if final:
        stop = sides.site_map.norm, "output"
    elif branch:
        stop = branch[-1], "output"
    else:
        stop = _end(sides, max(reads), adapter)
    with (
        sides.on(side) as root,
        hooked(root, sides.site_map, editor, adapter),
        recorded(root, list(branch)) as calls,
        outputs_of(root, sides.site_map.norm) as kept,
        stopping(root, *stop),
    ):
        root(**inputs_of(batch, device_of(root)), use_cache=False)
    return editor.acts, kept[0] if final else None, calls


def _branched(
    sides: Sides,
    batch: Batch,
    reads: tuple[Site, ...],
    final: bool,
    calls: dict[str, tuple[Any, Any]],
) -> tuple[dict[Site, Tensor], Tensor | None]:
    """Continue the fine-tuned side from the first adapted layer."""
    if not calls:
        return {}, None
    above = tuple(site for site in reads if site.layer >= sides.first_changed)
    shape = sides.shape("finetuned")
    editor = Editor(batch, (Group((0, len(batch.texts)), Plan(), shape),), above)
    with sides.on("finetuned") as root:
        with hooked(root, sides.site_map, editor, sides.adapter):
            h = replay(root, calls, hidden_argument(next(iter(calls.values()))))
        last = module_at(root, sides.site_map.norm)(h) if final else None
    return editor.acts, last
