"""Pairs whose models live on a server: only tokenizer and configuration are loaded here."""

import contextlib
from collections.abc import Mapping
from typing import Any

from modeldiff._files import PathLike
from modeldiff.architectures import SiteMap, site_map_of
from modeldiff.errors import MismatchError, SetupError
from modeldiff.loading import Sides, check_adapter, check_configs, check_tokenizers, raise_all
from modeldiff.remote_jobs import Server

_ATTACHED = "default"
"""nnsight's name of the adapter that a request brings."""


def remote_sides(
    base: PathLike,
    finetuned: PathLike | None,
    adapter: "PathLike | Mapping[str, PathLike] | None",
    site_map: SiteMap | None,
    remote: "bool | str | Server",
    *,
    revision: str | None = None,
    base_revision: str | None = None,
) -> Sides:
    """Make the two sides of a remote pair, each behind nnsight on the meta device.

    Every call becomes jobs of one model each; the adapter travels by its name with each request.

    Args:
        base: Hub id of the base.
        finetuned: Hub id of a whole fine-tune, or None with an adapter.
        adapter: Hub id of one LoRA adapter.
        site_map: For families that are not known.
        remote: True for NDIF, the address of a server, or a `Server`.
        revision: Revision of a whole fine-tune; a request cannot name one of an adapter.
        base_revision: Revision of the base.

    Raises:
        MismatchError: If the two do not fit, several adapters are given, or a revision of one.
        SetupError: If tokenizer or configuration cannot be loaded.
        RemoteError: If the address is none.
    """
    server = Server.of(remote)
    if isinstance(adapter, Mapping):
        raise MismatchError("a remote pair takes one adapter=; load one pair for each adapter.")
    if adapter is not None and revision is not None:
        raise MismatchError(
            f"revision={revision!r} of an adapter: a request names adapters by repository alone."
        )
    tokenizer = _tokenizer(base, base_revision)
    if adapter is not None:
        _check_adapter(adapter)
    first = _model(base, tokenizer, None, base_revision)
    if finetuned is None:
        second = _model(base, tokenizer, adapter, base_revision)
    else:
        second = _model(finetuned, tokenizer, None, revision)
        problems = check_tokenizers(tokenizer, _tokenizer(finetuned, revision, tokenizer))
        problems += check_configs(first._module.config, second._module.config)
        raise_all(problems, f"{base} and {finetuned} are not a pair", "Is it the right base?")
    if tokenizer.chat_template is None:  # plain bases leave it to their chat fine-tunes
        other = _tokenizer(finetuned or adapter, revision, tokenizer)
        tokenizer.chat_template = other.chat_template
    return Sides(
        kind="remote",
        roots=(first._module, second._module),
        tokenizer=tokenizer,
        site_map=site_map or site_map_of(first._module),
        names=(_named(base, base_revision), _named(finetuned or adapter, revision)),
        adapter="" if adapter is None else _ATTACHED,
        remote=server,
        traced={"base": first, "finetuned": second},
    )


def _named(path: Any, revision: str | None) -> str:
    return f"{path}@{revision}" if revision else str(path)


def _tokenizer(path: Any, revision: str | None, fallback: Any = None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        if fallback is None:
            raise SetupError(f"no tokenizer could be loaded from {str(path)!r}: {error}") from error
        return fallback  # fine-tunes are often published without one: the base's is meant


def _model(path: PathLike, tokenizer: Any, adapter: Any, revision: str | None) -> Any:
    """A model without weights, with the generation settings of its repository."""
    from transformers import GenerationConfig

    from modeldiff import tracing

    try:
        model = tracing.meta(path, tokenizer, adapter, revision)
    except (OSError, ValueError) as error:
        what = f"{path} with {adapter}" if adapter else str(path)
        raise SetupError(f"no configuration could be loaded from {what!r}: {error}") from error
    with contextlib.suppress(OSError):  # a repository without settings has the defaults
        model._module.generation_config = GenerationConfig.from_pretrained(
            path, revision=revision or "main"
        )
    return model


def _check_adapter(path: PathLike) -> None:
    from peft import PeftConfig

    try:
        settings = PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise SetupError(f"no adapter could be loaded from {str(path)!r}: {error}") from error
    advice = "Deploy the merged model and pass it as finetuned=."
    raise_all(check_adapter(settings), f"adapter {path}", advice)
