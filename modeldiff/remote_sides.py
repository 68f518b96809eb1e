"""Pairs whose models live on a server: only tokenizer and configuration are loaded here."""

from collections.abc import Mapping
from typing import Any

from modeldiff._files import PathLike
from modeldiff.architectures import SiteMap, site_map_of
from modeldiff.errors import MismatchError
from modeldiff.loading import Sides


def remote_sides(
    base: PathLike,
    finetuned: PathLike | None,
    adapter: "PathLike | Mapping[str, PathLike] | None",
    site_map: SiteMap | None,
    remote: bool | str,
) -> Sides:
    """Make the two sides of a remote pair, each behind nnsight on the meta device.

    Every call becomes one job of one model; the adapter travels with the request.

    Args:
        base: Hub id of the base.
        finetuned: Hub id of a whole fine-tune, or None with an adapter.
        adapter: Hub id of one adapter.
        site_map: For families that are not known.
        remote: nnsight's ``remote=``: True for NDIF, or the address of a server.

    Raises:
        MismatchError: If several adapters are given; a request carries one.
    """
    from transformers import AutoTokenizer

    from modeldiff.tracing import meta

    if isinstance(adapter, Mapping):
        raise MismatchError("a remote pair takes one adapter=; load one pair for each adapter.")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    first = meta(base, tokenizer)
    second = meta(base, tokenizer, adapter) if finetuned is None else meta(finetuned, tokenizer)
    roots = first._module, second._module
    return Sides(
        kind="remote",
        roots=roots,
        tokenizer=tokenizer,
        site_map=site_map or site_map_of(roots[0]),
        names=(str(base), str(finetuned or adapter)),
        remote=remote,
        traced={"base": first, "finetuned": second},
    )
