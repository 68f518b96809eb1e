"""The stack of edits of the workbench: plain dicts, what they mean, and the Python that says it.

An edit is ``{"kind", "direction", "layers", "where", "coefficient", "on"}``. The coefficient of
``steer`` and ``clamp`` is a multiple of the direction's raw length, that of ``scale_along`` and
``adapter`` the factor itself; ``ablate`` and ``replace`` have none. An ``adapter`` edit may name
``"modules"``, such as "mlp.down_proj"; without, it is of all in its layers. ``where`` names
tokens, or is a mask as JSON text (`where_of`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import modeldiff as md
from modeldiff.directions import Direction
from modeldiff.errors import InterventionError
from modeldiff.interventions import Edit, Layers, Plan
from modeldiff.masks import Mask, Positions, Regex, Role, Span, mask_from_json, parse_mask

EditKind = Literal["steer", "ablate", "scale_along", "clamp", "replace", "adapter"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
_WITHOUT_DIRECTION = ("adapter", "replace")
_FIELDS = ("kind", "direction", "layers", "where", "coefficient", "on")


def new_edit(
    kind: str,
    direction: str = "",
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    where: str = "all",
    coefficient: float = 1.0,
    on: bool = True,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Make an edit for `AuditState.edits`.

    Args:
        kind: One of `EDIT_KINDS`.
        direction: Name of a direction of the state; "" where none is needed.
        layers: Layers, "all", or None for the direction's own layer (``adapter``: all).
        where: Tokens: a name such as "prompt", or what `where_of` gives.
        coefficient: See the module's docstring.
        on: Whether it takes part.
        modules: For ``adapter``: adapted modules such as ``"mlp.down_proj"``; all if empty.

    Raises:
        InterventionError: If the kind is unknown, or modules are named for another one.
        MaskError: If the tokens are unknown.
    """
    several = layers if layers is None or layers == "all" else [int(each) for each in layers]
    values = (kind, direction, several, where, float(coefficient), bool(on))
    named = {"modules": list(modules)} if modules else {}
    return checked({**dict(zip(_FIELDS, values, strict=True)), **named})


def checked(edit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the edit as it is kept, or say what is wrong with it.

    Raises:
        InterventionError: If a field is missing, unknown or of no use.
        MaskError: If the tokens are unknown.
    """
    if set(edit) - {"modules"} != set(_FIELDS):
        raise InterventionError(f"an edit has the fields {_FIELDS}, got {tuple(edit)}.")
    if edit["kind"] not in EDIT_KINDS:
        raise InterventionError(f"unknown kind of edit {edit['kind']!r}. Known: {EDIT_KINDS}.")
    if edit.get("modules") and edit["kind"] != "adapter":
        raise InterventionError(f"modules are chosen for 'adapter', not for {edit['kind']!r}.")
    mask_of(edit["where"])
    return dict(edit)


def where_of(mask: str | Mask) -> str:
    """Write tokens as an edit keeps them: a name as it is, any other mask as JSON text."""
    return mask if isinstance(mask, str) else json.dumps(mask.to_json())


def mask_of(where: str) -> Mask:
    """Read what `where_of` wrote.

    Raises:
        MaskError: If it names no tokens.
    """
    return mask_from_json(json.loads(where)) if where.startswith("{") else parse_mask(where)


def plan_of(edits: Sequence[Mapping[str, Any]], directions: Mapping[str, Direction]) -> Plan | None:
    """Build what the edits that are on say; None if none is.

    Raises:
        InterventionError: If a direction is missing or an edit cannot be made.
    """
    parts = tuple(_built(edit, directions) for edit in edits if edit["on"])
    return Plan(parts) if parts else None


def code_of(edits: Sequence[Mapping[str, Any]], *, name: str = "do") -> str:
    """Write Python that makes the same plan; ``md`` and ``directions`` must be in scope."""
    lines = [_written(edit) for edit in edits if edit["on"]]
    if not lines:
        return f"{name} = None"
    if len(lines) == 1:
        return f"{name} = {lines[0]}"
    return "\n".join([f"{name} = (", f"    {lines[0]}", *(f"    + {e}" for e in lines[1:]), ")"])


def used(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the directions that edits which are on need, each once."""
    return list(dict.fromkeys(e["direction"] for e in edits if e["on"] and e["direction"]))


def imports_of(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Import lines that `code_of` needs beside ``import modeldiff as md``."""
    composed = any("mask_from_json" in _where(edit) for edit in edits if edit["on"])
    return ["from modeldiff.masks import mask_from_json"] if composed else []


def _found(edit: Mapping[str, Any], directions: Mapping[str, Direction]) -> Direction | None:
    name = edit["direction"]
    if not name and edit["kind"] in _WITHOUT_DIRECTION:
        return None
    if name not in directions:
        known = ", ".join(map(repr, directions)) or "none yet"
        raise InterventionError(
            f"the edit {edit['kind']!r} needs the direction {name!r}. There are: {known}."
        )
    return directions[name]


def _layers_of(edit: Mapping[str, Any]) -> Layers:
    layers = edit["layers"]
    return layers if layers is None or layers == "all" else tuple(layers)


def _sites_of(edit: Mapping[str, Any], along: Direction | None) -> tuple[str, ...]:
    layers = _layers_of(edit)
    if not isinstance(layers, tuple) and along is None:
        raise InterventionError(
            "replace without a direction needs its layers, such as [3]: what is copied is the "
            "whole residual stream there."
        )
    if layers == "all":
        raise InterventionError("replace needs the layers themselves, such as [2, 3].")
    kind = along.site.kind if along else "resid_post"
    chosen = layers if isinstance(layers, tuple) else (along.site.layer,)  # pyright: ignore
    return tuple(f"{kind}.{layer}" for layer in chosen)


def _built(edit: Mapping[str, Any], directions: Mapping[str, Direction]) -> Edit:
    found, layers, where = _found(edit, directions), _layers_of(edit), mask_of(edit["where"])
    amount = float(edit["coefficient"])
    if edit["kind"] == "replace":
        return md.Replace(_sites_of(edit, found), "base", found, where)
    if found is None:
        modules = tuple(edit.get("modules", ()))
        return md.ScaleAdapter(amount, "all" if layers is None else layers, modules, where)
    match edit["kind"]:
        case "steer":
            return md.Steer(found, amount, layers, where)
        case "ablate":
            return md.Ablate(found, layers, where)
        case "scale_along":
            return md.ScaleAlong(found, amount, layers, where)
        case "clamp":
            return md.Clamp(found, amount * found.scale, layers, where)
        case _:
            return md.ScaleAdapter(amount, "all" if layers is None else layers, (), where)


def _where(edit: Mapping[str, Any]) -> str:
    where = edit["where"]
    if not where.startswith("{"):
        return repr(where)
    mask = mask_of(where)
    if isinstance(mask, Positions | Regex | Span | Role):
        return f"md.{mask!r}"
    return f"mask_from_json({mask.to_json()!r})"


def _written(edit: Mapping[str, Any]) -> str:
    kind, layers, amount = edit["kind"], _layers_of(edit), f"{float(edit['coefficient'])!r}"
    direction, tail = f"directions[{edit['direction']!r}]", f"where={_where(edit)}"
    if kind == "adapter":
        chosen = "all" if layers is None else layers
        several = tuple(edit.get("modules", ()))
        modules = f"modules={several!r}, " if several else ""
        return f"md.ScaleAdapter({amount}, layers={chosen!r}, {modules}{tail})"
    if kind == "replace" and isinstance(layers, tuple):
        if not edit["direction"]:
            sites = tuple(f"resid_post.{layer}" for layer in layers)
            return f"md.Replace({sites!r}, 'base', {tail})"
        sites = f"tuple(md.Site({direction}.site.kind, i) for i in {layers!r})"
        return f"md.Replace({sites}, 'base', along={direction}, {tail})"
    if kind == "replace":
        return f"md.Replace(str({direction}.site), 'base', along={direction}, {tail})"
    options = f"layers={layers!r}, {tail}"
    match kind:
        case "steer":
            return f"md.Steer({direction}, {amount}, {options})"
        case "ablate":
            return f"md.Ablate({direction}, {options})"
        case "scale_along":
            return f"md.ScaleAlong({direction}, {amount}, {options})"
        case _:
            return f"md.Clamp({direction}, {amount} * {direction}.scale, {options})"
