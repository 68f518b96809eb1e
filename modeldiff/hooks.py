"""The plain executor: forward hooks. For training, threads, and everything where speed matters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modeldiff.architectures import SiteMap, module_at
from modeldiff.sites import Site


@runtime_checkable
class Edits(Protocol):
    """What is hooked: an `Editor`, or what stands for one."""

    step: int
    sites: tuple[Site, ...]

    def edits(self, site: Site) -> bool:
        """Whether anything at a site is changed rather than only read."""
        ...

    def at(self, site: Site, h: Tensor) -> Tensor:
        """Take the activation at a site, return what takes its place."""
        ...


class Stop(Exception):
    """Raised by a hook to end a forward pass early; `stopping` catches it."""


def first(output: Any) -> Tensor:
    """Return the hidden states of a module's output, tensor or tuple.

    Decoder layers return a bare tensor in transformers 5 and a tuple before; ``output[0]`` of a
    bare tensor would be its first batch row.
    """
    return output if isinstance(output, Tensor) else output[0]


def put(output: Any, h: Tensor) -> Any:
    """Return the output with its hidden states exchanged."""
    return h if isinstance(output, Tensor) else (h, *output[1:])


def _output_hook(editor: Edits, site: Site) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = editor.at(site, first(output))
        return put(output, h) if editor.edits(site) else None

    return hook


def _input_hook(editor: Edits, site: Site) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else "hidden_states"
        h = editor.at(site, args[0] if name is None else kwargs[name])
        if not editor.edits(site):
            return None
        return ((h, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: h})

    return hook


@contextmanager
def hooked(root: nn.Module, site_map: SiteMap, editor: Edits, adapter: str = "") -> Iterator[None]:
    """Run the editor on every forward of ``root`` inside the block; hooks are gone after it.

    Args:
        root: The causal language model.
        site_map: Where its sites are.
        editor: What to do; its step advances after each forward.
        adapter: Active adapter, for ``lora`` sites.

    Raises:
        SiteError: If a site's module does not exist; before anything runs.
    """
    handles: list[RemovableHandle] = []

    def advance(*_: Any) -> None:
        editor.step += 1

    try:
        for site in editor.sites:
            path, end = site_map.locate(site, adapter)
            module = module_at(root, path)
            if end == "input":
                hook = _input_hook(editor, site)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_output_hook(editor, site)))
        handles.append(root.register_forward_hook(advance))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stopping(root: nn.Module, path: str, end: str = "output") -> Iterator[None]:
    """End every forward inside the block before (``input``) or after the module at ``path``."""

    def stop(*_: Any) -> None:
        raise Stop

    module = module_at(root, path)
    register = module.register_forward_pre_hook if end == "input" else module.register_forward_hook
    handle = register(stop)
    try:
        yield
    except Stop:
        pass
    finally:
        handle.remove()


@contextmanager
def recorded(root: nn.Module, paths: list[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Record the ``(args, kwargs)`` with which the modules at ``paths`` are called."""
    calls: dict[str, tuple[Any, Any]] = {}
    handles: list[RemovableHandle] = []

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[path] = args, kwargs

        return hook

    try:
        for path in paths:
            module = module_at(root, path)
            handles.append(module.register_forward_pre_hook(record(path), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def outputs_of(root: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """Keep what the module at ``path`` returns, call by call."""
    kept: list[Tensor] = []
    handle = module_at(root, path).register_forward_hook(
        lambda module, args, output: kept.append(first(output))
    )
    try:
        yield kept
    finally:
        handle.remove()


def replay(root: nn.Module, calls: dict[str, tuple[Any, Any]], h: Tensor) -> Tensor:
    """Call recorded modules one after the other on ``h``, each with its recorded arguments.

    The first positional argument (or ``hidden_states``) is exchanged, the rest (masks, rotary
    embeddings) is as recorded.
    """
    for path, (args, kwargs) in calls.items():
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        h = first(module_at(root, path)(h, *args[1:], **rest))
    return h


def hidden_argument(call: tuple[Any, Any]) -> Tensor:
    """Return the hidden states of a recorded call."""
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def count_hooks(root: nn.Module) -> int:
    """Count forward hooks and pre-hooks on a model; equal before and after every call here."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in root.modules())
