"""The nnsight executor, and the only file that opens nnsight traces.

One body, driven by an `Editor`, serves forward passes and generation, local and remote; nobody
writes a trace body in a notebook cell or a widget, where nnsight's source inspection has traps
(``%%time``, autoreload, bodies that start with ``try``). Importing this file imports nnsight.
"""

import warnings
from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
from torch import Tensor, nn

from modeldiff.architectures import SiteMap
from modeldiff.editing import Editor
from modeldiff.hooks import first, put

# An open `tr.iter[:]` always ends like this; it is how "every generated token" is written.
warnings.filterwarnings(
    "ignore", message=r".*was never reached: the loop asked for a step", category=UserWarning
)


def wrap(root: nn.Module, tokenizer: Any, site_map: SiteMap) -> TransformersModel:
    """Wrap a loaded model; ``layers``, ``ln_final``, ``embed`` and ``unembed`` work in traces.

    The tokenizer's padding side is kept as it was: nnsight sets it to the left.
    """
    side = tokenizer.padding_side
    model = TransformersModel(
        root, task="text-generation", tokenizer=tokenizer, rename=site_map.renames
    )
    tokenizer.padding_side = side
    return model


def meta(path: Any, tokenizer: Any, adapter: Any = None) -> TransformersModel:
    """Build a model without weights, for a server to run; ``adapter`` is loaded there."""
    side = tokenizer.padding_side
    options = {} if adapter is None else {"peft": str(adapter)}
    model = TransformersModel(str(path), task="text-generation", tokenizer=tokenizer, **options)
    tokenizer.padding_side = side
    return model


def _body(
    model: Any, editor: Editor, site_map: SiteMap, adapter: str, step: int
) -> dict[str, Tensor]:
    editor.step = step
    for site in editor.sites:
        path, end = site_map.locate(site, adapter)
        envoy = model.get(path)
        value = envoy.input if end == "input" else envoy.output
        h = editor.at(site, first(value))
        if editor.edits(site):
            if end == "input":
                envoy.input = put(value, h)
            else:
                envoy.output = put(value, h)
    return {str(site): h for site, h in editor.acts.items()}


def _returned(editor: Editor, fired: dict[int, int]) -> None:
    """Take over what the editor's copy on the server counted; locally it is the same editor."""
    editor.fired.update({k: v - editor.fired[k] for k, v in fired.items()})


def forward(
    model: Any,
    inputs: dict[str, Tensor],
    editor: Editor,
    site_map: SiteMap,
    *,
    adapter: str = "",
    logits: bool = True,
    remote: bool | str = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Run one forward pass in a trace.

    Args:
        model: What `wrap` returned.
        inputs: ``input_ids``, ``attention_mask`` and ``position_ids``, ``[row, token]``.
        editor: What to change and read.
        site_map: Where the sites are.
        adapter: Active adapter, for ``lora`` sites.
        logits: False stops after the last site.
        remote: Passed to nnsight.

    Returns:
        The activations read, by the site's name, and the logits ``[row, token, vocab]``.
    """
    extra = {"remote": remote} if remote else {}
    out = None
    with model.trace(**inputs, use_cache=False, **extra) as tracer:
        acts = nnsight.save(_body(model, editor, site_map, adapter, 0))
        fired = nnsight.save(dict(editor.fired))
        if not logits:
            tracer.stop()
        out = model.output.logits.save()
    _returned(editor, fired)
    return acts, out if logits else None


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    editor: Editor,
    site_map: SiteMap,
    *,
    adapter: str = "",
    remote: bool | str = False,
    **options: Any,
) -> Tensor:
    """Generate in a trace; ``options`` are those of ``model.generate``.

    Returns:
        Token ids ``[row, prompt + new]``.
    """
    extra = {"remote": remote} if remote else {}
    ids = None
    if not editor.sites:
        with model.generate(**inputs, **options, **extra) as tracer:
            ids = tracer.result.save()
        return _ids(ids)
    with model.generate(**options, **extra) as tracer:
        with tracer.invoke(**inputs):
            fired = nnsight.save({})
            for step in tracer.iter[:]:
                _body(model, editor, site_map, adapter, step)
                fired.update(editor.fired)
        with tracer.invoke():
            ids = tracer.result.save()
    _returned(editor, fired)
    return _ids(ids)


def _ids(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else torch.as_tensor(result.sequences)
