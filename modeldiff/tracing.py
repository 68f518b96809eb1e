"""The nnsight executor, and the only file that opens nnsight traces.

One body, driven by an edit program (`modeldiff.editing.Editor.program`), serves forward passes and
generation, here and on a server; nobody writes a trace body in a notebook cell or a widget, where
nnsight's source inspection has traps (``%%time``, autoreload, bodies that start with ``try``).

What travels to a server is the source of the functions below, tensors and builtins: nothing of
this package need be installed there, and Python may be another version. Importing this file
imports nnsight.
"""

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import nnsight
import torch
import zstandard
from nnsight import TransformersModel
from nnsight.intervention.serialization import CustomCloudPickler, reduce_block
from nnsight.modeling.huggingface import _ID_CACHE
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.util import SerializedFrame
from torch import Tensor, nn

from modeldiff.architectures import SiteMap
from modeldiff.errors import RemoteError

# An open `tr.iter[:]` always ends like this; it is how "every generated token" is written.
warnings.filterwarnings(
    "ignore", message=r".*was never reached: the loop asked for a step", category=UserWarning
)

Program = list[dict[str, Any]]
"""Edits and reads as `Editor.program` gives them."""
Reduce = Callable[[Any, dict[str, Tensor], Any], dict[str, Any]]
"""Called in the trace with the model, the activations read and what was given along."""


def wrap(root: nn.Module, tokenizer: Any, site_map: SiteMap) -> TransformersModel:
    """Wrap a loaded model; ``layers``, ``ln_final``, ``embed`` and ``unembed`` work in traces.

    The tokenizer's padding side is kept as it was: nnsight sets it to the left.
    """
    with _padding_kept(tokenizer):
        return TransformersModel(
            root, task="text-generation", tokenizer=tokenizer, rename=site_map.renames
        )


def meta(
    path: Any, tokenizer: Any, adapter: Any = None, revision: str | None = None
) -> TransformersModel:
    """Build a model without weights, for a server to run; ``adapter`` is loaded there.

    A local folder is known to a server by its path; such a server must be one of your own.
    """
    if Path(path).is_dir():
        _ID_CACHE.setdefault(str(path), str(path))
    options = {} if adapter is None else {"peft": str(adapter)}
    with _padding_kept(tokenizer):
        return TransformersModel(
            str(path), task="text-generation", tokenizer=tokenizer, revision=revision, **options
        )


@contextmanager
def _padding_kept(tokenizer: Any) -> Iterator[None]:
    side = tokenizer.padding_side
    try:
        yield
    finally:
        tokenizer.padding_side = side


# ------------------------------------------------------------ carried out here or on a server


def _visited(model: Any, program: Program, step: int, fired: dict[int, int]) -> dict[str, Tensor]:
    """Visit the program's sites in forward order: edit what is to be edited, keep what is read."""
    acts = {}
    for site in program:
        envoy = model.get(site["path"])
        value = envoy.input if site["end"] == "input" else envoy.output
        h = value if isinstance(value, torch.Tensor) else value[0]
        if site["groups"]:
            h = _edited(site, h, step, fired)
        if site["leaf"]:
            h = h.detach().requires_grad_(True)
        if site["groups"] or site["leaf"]:
            new = h if isinstance(value, torch.Tensor) else (h, *value[1:])
            if site["end"] == "input":
                envoy.input = new
            else:
                envoy.output = new
        if site["read"]:
            acts[site["name"]] = h
    return acts


def _edited(site: dict[str, Any], h: Tensor, step: int, fired: dict[int, int]) -> Tensor:
    parts = []
    for group in site["groups"]:
        start, stop = group["rows"]
        part = h if (start, stop) == (0, h.shape[0]) else h[start:stop]
        if group["silenced"]:
            part = torch.zeros_like(part)
        for edit in group["edits"]:
            part = _applied(edit, part, step, fired)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _applied(edit: dict[str, Any], h: Tensor, step: int, fired: dict[int, int]) -> Tensor:
    """Apply one edit to the tokens it is for; float32 arithmetic, a new tensor."""
    if not edit["on_new" if step > 0 else "selected"]:
        return h
    if step == 0 and h.shape[1] != edit["width"]:
        raise ValueError(f"{h.shape[1]} tokens where the plan was made for {edit['width']}.")
    other = edit["other"] if step == 0 else None
    if other is not None and other.shape != h.shape:
        raise ValueError(f"a tensor of shape {other.shape} to copy to one of shape {h.shape}.")
    old = h.float()
    new = _arithmetic(edit["operation"], edit["amount"], old, edit["vectors"].to(h.device), other)
    count = h.shape[0] if step > 0 else edit["selected"]
    fired[edit["number"]] = fired.get(edit["number"], 0) + count
    mask = True if step > 0 else edit["mask"]
    if mask is True:
        return new.to(h.dtype)
    return torch.where(mask.to(h.device)[..., None], new, old).to(h.dtype)


def _arithmetic(
    operation: str, amount: Any, h: Tensor, vectors: Tensor, other: Tensor | None
) -> Tensor:
    """The formulas of `modeldiff.interventions`, bit for bit, for where its classes are not."""
    if operation == "add":
        return h + amount * vectors[0]
    if operation == "ablate":
        return h - (h @ vectors.T) @ vectors
    if operation == "scale along":
        return h + amount * (h @ vectors.T) @ vectors
    if operation == "clamp":
        return h + (amount - h @ vectors.T) @ vectors
    if operation == "multiply":
        return h * amount
    if operation == "move":  # by another length at each token
        return h + amount.to(h.device) * vectors[0]
    if other is None:
        raise ValueError("no activations to copy for these tokens.")
    if operation == "copy":
        return other.to(h, copy=True)
    if operation == "copy channels":
        first, stop = amount
        return torch.cat([h[..., :first], other.to(h)[..., first:stop], h[..., stop:]], -1)
    return h + ((other.to(h) - h) @ vectors.T) @ vectors


def _plain(model: Any, acts: dict[str, Tensor], given: Any) -> dict[str, Any]:
    return {"acts": acts}


def forward(
    model: Any,
    inputs: dict[str, Tensor],
    program: Program,
    *,
    logits: bool = False,
    reduce: Reduce = _plain,
    given: Any = None,
    backend: Backend | None = None,
) -> Any:
    """Run one forward pass in a trace.

    Args:
        model: What `wrap` or `meta` returned.
        inputs: ``input_ids``, ``attention_mask`` and ``position_ids``, ``[row, token]``.
        program: What to change and read.
        logits: Also return them, as ``logits``; otherwise the pass stops after the last site.
        reduce: What to make of the activations, where the model is.
        given: Tensors and builtins for ``reduce``.
        backend: A `Packing`, to pack the pass instead of running it.

    Returns:
        What ``reduce`` returned and ``fired``: tokens changed by each edit, by its number.
    """
    found: Any = None
    with model.trace(**inputs, use_cache=False, backend=backend) as tracer:
        fired = {}
        acts = _visited(model, program, 0, fired)
        found = nnsight.save({**reduce(model, acts, given), "fired": fired})
        if not logits:
            tracer.stop()
        found["logits"] = model.output.logits
    return found


def pair(
    model: Any,
    inputs: dict[str, Tensor],
    base: Program,
    finetuned: Program,
    reduce: Callable[..., dict[str, Any]],
    given: Any,
    backend: Backend | None = None,
) -> Any:
    """Run two forward passes of one model on the same tokens, and compare them where it is.

    Args:
        model: What `wrap` or `meta` returned.
        inputs: As for `forward`.
        base: Program of the first pass; it silences the adapter.
        finetuned: Program of the second.
        reduce: Called with the model, both passes' activations, and ``given``.
        given: Tensors and builtins.
        backend: A `Packing`, to pack the passes instead of running them.
    """
    found: Any = None
    with model.session(backend=backend):
        with model.trace(**inputs, use_cache=False) as tracer:
            first = _visited(model, base, 0, {})
            tracer.stop()
        with model.trace(**inputs, use_cache=False) as tracer:
            second = _visited(model, finetuned, 0, {})
            found = nnsight.save(reduce(model, first, second, given))
            tracer.stop()
    return found


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    program: Program,
    options: dict[str, Any],
    backend: Backend | None = None,
) -> Any:
    """Generate in a trace; ``options`` are those of ``model.generate``.

    Returns:
        ``ids`` ``[row, prompt + new]`` and ``fired``.
    """
    found: Any = None
    if not program:
        with model.generate(**inputs, **options, backend=backend) as tracer:
            found = nnsight.save({"ids": tracer.result, "fired": {}})
        return found  # noqa: RET504
    with model.generate(**options, backend=backend) as tracer:
        with tracer.invoke(**inputs):
            fired = nnsight.save({})
            for step in tracer.iter[:]:
                _visited(model, program, step, fired)
        with tracer.invoke():
            found = nnsight.save({"ids": tracer.result})
    if found is not None:
        found["fired"] = fired  # pyright: ignore[reportPossiblyUnboundVariable]
    return found


# ------------------------------------------------------------ packed for a server


@dataclass(frozen=True)
class Packed:
    """A job for a server.

    Args:
        model_key: nnsight's name of the deployed model.
        metadata: JSON that routes the job; names the adapter.
        blob: Compressed source, tensors and builtins.
    """

    model_key: str
    metadata: str
    blob: bytes = field(repr=False)


class Packing(Backend):
    """Packs a traced block for a server instead of running it; the job is in ``packed``."""

    def __init__(self, model: TransformersModel) -> None:
        self._key, self._env = _model_key(model), model._remoteable_get_env()
        self.packed: Packed | None = None

    def __call__(self, tracer: Any) -> None:
        """Pack; called by nnsight where the block ends."""
        request = RequestModel(model_key=self._key, compress=True, env=self._env)
        self.packed = Packed(self._key, request.metadata(), _blob(tracer))


def _model_key(model: TransformersModel) -> str:
    try:
        return model.to_model_key()
    except (OSError, ValueError):  # the hub is out of reach: take the name as it was written
        _ID_CACHE.setdefault(str(model.repo_id), str(model.repo_id))
        return model.to_model_key()


def _blob(tracer: Any) -> bytes:
    """What `RequestModel.serialize` makes, without this machine's paths and our classes."""
    frame = tracer.info.frame
    code = frame.f_code
    tracer.info.frame = SerializedFrame("modeldiff/tracing.py", code.co_firstlineno, code.co_name)
    block = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump((tracer, block))
    return zstandard.ZstdCompressor(level=6).compress(buffer.getvalue())


class _Pickler(CustomCloudPickler):
    """Sends functions of this package as source, and refuses its classes and modules.

    ``nnsight.register("modeldiff")`` would do the first, but for every user of cloudpickle in the
    process (Ray is one), with annotations, and with the paths of this machine.
    """

    def reducer_override(self, obj: Any) -> Any:
        named = obj.__name__ if isinstance(obj, ModuleType) else getattr(obj, "__module__", "")
        if not isinstance(obj, FunctionType) and _own(named):  # it would travel as a mere name
            raise RemoteError(f"{obj!r} cannot travel: a job is source, tensors and builtins.")
        return super().reducer_override(obj)

    def _function_reduce(self, obj: FunctionType) -> Any:
        own = _own(obj.__module__)
        return self._dynamic_function_reduce(obj) if own else super()._function_reduce(obj)

    def _dynamic_function_reduce(self, func: FunctionType) -> Any:
        load, arguments, *rest = super()._dynamic_function_reduce(func)
        if len(arguments) != 7:
            raise RemoteError(f"{func.__qualname__} has no source that could travel.")
        source, name, defaults, keywords, _, _, line = arguments
        first = str(source).lstrip().partition("\n")[0]
        if _own(func.__module__) and f"def {func.__name__}(" not in first:
            raise RemoteError(
                f"the source of {func.__qualname__} is not where it was when it was imported: "
                "the package's files have changed since. Restart Python."
            )
        place = str(func.__module__).replace(".", "/") + ".py"
        return load, (source, name, defaults, keywords, None, place, line), *rest


def _own(module: Any) -> bool:
    return str(module).split(".")[0] == "modeldiff"


def unpacked(content: bytes) -> dict[str, Any]:
    """Read a result; tensors and builtins alone, so that no server can run code here.

    Raises:
        RemoteError: If it is anything else.
    """
    unsafe = torch.serialization.pickle.UnpicklingError
    try:
        raw = zstandard.ZstdDecompressor().decompress(content)
        saved = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        found = saved.pop("found")
    except (zstandard.ZstdError, unsafe, EOFError, KeyError, RuntimeError, TypeError) as error:
        raise RemoteError(
            f"the server's answer cannot be read ({type(error).__name__}): a job's result must be "
            "tensors and builtins, as nnsight 0.8.1 packs them. Nothing of it was used."
        ) from error
    return {**found, **saved}


def host_of(remote: bool | str) -> str:
    """Address of the server; True is the one that nnsight is configured for."""
    return (remote if isinstance(remote, str) else CONFIG.API.HOST).rstrip("/")


def api_key() -> str | None:
    """The NDIF key from the environment or nnsight's configuration; never kept or logged here."""
    return os.environ.get("NDIF_API_KEY") or CONFIG.API.APIKEY


def versions() -> Mapping[str, str]:
    """What nnsight's protocol wants to know of the client, as headers."""
    return {"nnsight-version": version("nnsight"), "python-version": sys.version}
