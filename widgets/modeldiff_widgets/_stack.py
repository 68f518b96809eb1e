"""The stack of edits of the workbench: plain dicts, what they mean, and the Python that says it.

An edit is ``{"kind", "direction", "layers", "where", "coefficient", "on"}``. The coefficient of
``steer`` and ``clamp`` is a multiple of the direction's raw length, that of ``scale_along`` and
``adapter`` the factor itself; ``ablate`` and ``replace`` have none. An ``adapter`` edit may name
``"modules"``, such as "mlp.down_proj"; without, it is of all in its layers. A ``replace`` edit
copies the residual stream of the base, or what its ``"site"`` (a key of `SITES`), ``"channels"``
(the first, and the one after the last) and ``"source"`` ("base" or "finetuned") say. ``where``
names tokens, or is a mask as JSON text (`where_of`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import modeldiff as md
from modeldiff.directions import Direction
from modeldiff.errors import InterventionError
from modeldiff.interventions import Edit, Layers, Plan, Side
from modeldiff.masks import Mask, Positions, Regex, Role, Span, mask_from_json, parse_mask

EditKind = Literal["steer", "ablate", "scale_along", "clamp", "replace", "adapter"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
_WITHOUT_DIRECTION = ("adapter", "replace")
_FIELDS = ("kind", "direction", "layers", "where", "coefficient", "on")
_OPTIONAL = {"modules": "adapter", "site": "replace", "source": "replace", "channels": "replace"}
"""Fields that may be left out, and the kind that has them."""
SITES = {
    "resid_post": "residual stream", "resid_pre": "residual stream before the layer",
    "attn_out": "attention output", "z": "attention heads", "mlp_out": "MLP output",
    "mlp_act": "MLP activations (neurons)",
}  # fmt: skip
SOURCES: dict[Side, str] = {"base": "base", "finetuned": "fine-tune"}


def new_edit(
    kind: str,
    direction: str = "",
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    where: str = "all",
    coefficient: float = 1.0,
    on: bool = True,
    modules: Sequence[str] = (),
    site: str = "",
    source: Side = "base",
    channels: Sequence[int] = (),
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
        site: For ``replace`` without a direction: a key of `SITES`; "" is the residual stream.
        source: For ``replace``: the side that is copied from.
        channels: For ``replace`` without a direction: the first, and the one after the last; all
            if empty.

    Raises:
        InterventionError: If the kind is unknown, or a field is for another one or of no use.
        MaskError: If the tokens are unknown.
    """
    several = layers if layers is None or layers == "all" else [int(each) for each in layers]
    values = (kind, direction, several, where, float(coefficient), bool(on))
    named = {
        "modules": list(modules), "site": site, "source": "" if source == "base" else source,
        "channels": list(channels),
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value}
    return checked({**dict(zip(_FIELDS, values, strict=True)), **given})


def checked(edit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the edit as it is kept, or say what is wrong with it.

    Raises:
        InterventionError: If a field is missing, unknown or of no use.
        MaskError: If the tokens are unknown.
    """
    if set(edit) - set(_OPTIONAL) != set(_FIELDS):
        raise InterventionError(
            f"an edit has the fields {_FIELDS} and may have {tuple(_OPTIONAL)}, got {tuple(edit)}."
        )
    if edit["kind"] not in EDIT_KINDS:
        raise InterventionError(f"unknown kind of edit {edit['kind']!r}. Known: {EDIT_KINDS}.")
    for name, kind in _OPTIONAL.items():
        if edit.get(name) and edit["kind"] != kind:
            raise InterventionError(f"{name} is chosen for {kind!r}, not for {edit['kind']!r}.")
    _check_copy(edit)
    mask_of(edit["where"])
    return dict(edit)


def _check_copy(edit: Mapping[str, Any]) -> None:
    site, source = edit.get("site") or "resid_post", source_of(edit)
    if site not in SITES or source not in SOURCES:
        raise InterventionError(
            f"replace at {site!r} from {source!r}: sites are {', '.join(SITES)}; sources are "
            f"{' and '.join(SOURCES)}."
        )
    if edit["direction"] and (edit.get("site") or edit.get("channels")):
        raise InterventionError(
            "replace along a direction is at the direction's own site, and has no channels: leave "
            "site and channels out."
        )
    if edit.get("channels"):
        md.Replace(f"{site}.0", channels=tuple(edit["channels"]))  # says what is wrong


def source_of(edit: Mapping[str, Any]) -> Side:
    """The side that a ``replace`` edit copies from."""
    return edit.get("source") or "base"


def copied(edit: Mapping[str, Any]) -> str:
    """What a ``replace`` edit copies, in words."""
    what = SITES[edit.get("site") or "resid_post"]
    if edit["direction"]:
        what = f"component along {edit['direction']}"
    if edit.get("channels"):
        what += ", channels {} to {},".format(edit["channels"][0], edit["channels"][1] - 1)
    return f"{what} of the {SOURCES[source_of(edit)]}"


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
            f"whole {SITES[edit.get('site') or 'resid_post']} there."
        )
    if layers == "all":
        raise InterventionError("replace needs the layers themselves, such as [2, 3].")
    kind = along.site.kind if along else edit.get("site") or "resid_post"
    chosen = layers if isinstance(layers, tuple) else (along.site.layer,)  # pyright: ignore
    return tuple(f"{kind}.{layer}" for layer in chosen)


def _built(edit: Mapping[str, Any], directions: Mapping[str, Direction]) -> Edit:
    found, layers, where = _found(edit, directions), _layers_of(edit), mask_of(edit["where"])
    amount = float(edit["coefficient"])
    if edit["kind"] == "replace":
        channels = tuple(edit.get("channels") or ()) or None
        return md.Replace(_sites_of(edit, found), source_of(edit), found, where, channels)  # pyright: ignore[reportArgumentType]
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
    if kind == "replace":
        return _copy_written(edit, direction, tail)
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


def _copy_written(edit: Mapping[str, Any], direction: str, tail: str) -> str:
    layers, source = _layers_of(edit), repr(source_of(edit))
    if isinstance(layers, tuple) and not edit["direction"]:
        sites = tuple(f"{edit.get('site') or 'resid_post'}.{layer}" for layer in layers)
        channels = tuple(edit.get("channels") or ())
        part = f"channels={channels!r}, " if channels else ""
        return f"md.Replace({sites!r}, {source}, {part}{tail})"
    sites = f"str({direction}.site)"
    if isinstance(layers, tuple):
        sites = f"tuple(md.Site({direction}.site.kind, i) for i in {layers!r})"
    return f"md.Replace({sites}, {source}, along={direction}, {tail})"
