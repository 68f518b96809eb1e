"""Recipes as files: finding, reading and copying them.

A recipe is a TOML file that is readable without the code, and a short script beside it. Every key
is known and has a type, see `modeldiff.recipe_settings`; a recipe sets those its script reads.
"""

import re
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from modeldiff._files import PathLike
from modeldiff.errors import FileFormatError, SetupError
from modeldiff.recipe_settings import Recipe

_SECTIONS = ("models", "data", "sites", "directions", "asked", "training")


def folder() -> Path:
    """Folder of the shipped recipes, in a checkout or an installation."""
    packed = Path(__file__).parent / "_recipes"
    return packed if packed.is_dir() else Path(__file__).parent.parent / "recipes"


def names() -> list[str]:
    """Names of the shipped recipes.

    Example:
        >>> "caft_em" in names()
        True
    """
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name_or_path: PathLike) -> Path:
    """Path of a recipe's TOML file.

    Raises:
        SetupError: If there is no recipe of that name, and no such file.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if not path.is_file():
            raise SetupError(f"there is no file {path}.")
        return path
    if str(name_or_path) not in names():
        raise SetupError(
            f"there is no recipe {str(name_or_path)!r}.{_hint(str(name_or_path), names())} Known: "
            f"{', '.join(names())}; or give the path of a TOML file."
        )
    return folder() / f"{name_or_path}.toml"


def script_of(toml: Path) -> Path:
    """Script of a recipe: the one beside the file, else the shipped one of the recipe's name.

    Raises:
        SetupError: If there is neither.
    """
    name = str(_parsed(toml).get("name", toml.stem))
    for path in (toml.with_suffix(".py"), toml.with_name(f"{name}.py"), folder() / f"{name}.py"):
        if path.is_file():
            return path
    raise SetupError(f"{toml} has no script: neither {name}.py beside it nor a shipped one.")


def read(
    name_or_path: PathLike, *, smoke: bool = False, changes: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe.

    Args:
        name_or_path: Name of a shipped recipe, or path of a TOML file.
        smoke: Whether its ``smoke`` tables replace what they name.
        changes: Values by dotted key, e.g. ``{"data.n_train": "100"}``, in TOML's notation;
            what cannot be read as that is text. They win over ``smoke``.

    Raises:
        FileFormatError: If it is no recipe; names every problem.
        SetupError: If there is no such recipe, or no script for it.
    """
    path = find(name_or_path)
    data = _parsed(path)
    _made(data, path)  # a mistake in the file is told as the file's
    _read_by_script(data, path)
    if smoke:
        data = _merged(data, data.get("smoke", {}))
    for key, text in (changes or {}).items():
        _set(data, key, _value(text), path)
    return _made(data, path)


def copy(name: str, to: PathLike) -> tuple[Path, Path]:
    """Copy a shipped recipe's two files into a folder, where they can be changed.

    Raises:
        SetupError: If there is no such recipe, or a file of one of the names is there.
    """
    toml = find(name)
    sources = (toml, script_of(toml))
    targets = tuple(Path(to) / each.name for each in sources)
    there = [str(each) for each in targets if each.exists()]
    if there:
        raise SetupError(f"{' and '.join(there)} exist; nothing was copied. Give another folder.")
    Path(to).mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, targets, strict=True):
        shutil.copyfile(source, target)
    return targets[0], targets[1]


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not TOML: {error}.") from error


def _merged(data: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(data)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = _merged(inner, value)
        merged[key] = value
    return merged


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(data: dict[str, Any], key: str, value: Any, path: Path) -> None:
    """Set a value that the file sets; only those are sure to be read."""
    node: Any = {"": data}
    at: Any = ""
    for part in key.split("."):
        node = node[at]
        known = list(node) if isinstance(node, dict) else [str(i) for i in range(_length(node))]
        if part not in known:
            raise FileFormatError(
                f"{path.name} does not set {key!r}, so it cannot be changed: {part!r} is none of "
                f"{', '.join(known) or 'nothing'}.{_hint(part, known)}"
            )
        at = part if isinstance(node, dict) else int(part)
    node[at] = value


def _length(node: Any) -> int:
    return len(node) if isinstance(node, list) else 0


def _hint(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _read_by_script(data: Mapping[str, Any], path: Path) -> None:
    """Verify that the script reads what the file sets: what it does not read changes nothing."""
    script = script_of(path)
    code = script.read_text(encoding="utf-8")
    unread = [
        f"{section}.{key}"
        for section in _SECTIONS
        for key in data.get(section, {})
        if not re.search(rf"\b{section}\.{key}\b|\brecipe\.{section}\b(?!\.)", code)
    ]
    if unread:
        raise FileFormatError(
            f"{path} sets {', '.join(unread)}, which {script} does not read. Take it out, or read "
            "it there."
        )


def _made(data: Mapping[str, Any], path: Path) -> Recipe:
    problems: list[str] = []
    made = _built(Recipe, data, "", problems)
    if problems:
        raise FileFormatError(f"{path} is no recipe: {'; '.join(problems)}.")
    return made


def _built(cls: Any, data: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """Make a dataclass; notes every problem, and returns None if there are any."""
    before, hints, values = len(problems), get_type_hints(cls), {}
    for key, value in data.items():
        if key in hints:
            values[key] = _converted(value, hints[key], f"{where}{key}", problems)
        else:
            problems.append(f"unknown key {where + key!r}.{_hint(key, list(hints))}".rstrip("."))
    for each in fields(cls):
        optional = each.default is not MISSING or each.default_factory is not MISSING
        if each.name not in data and not optional:
            problems.append(f"{where + each.name!r} is missing")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except (ValueError, SetupError) as error:
        problems.append(f"{where.rstrip('.')!r}: {str(error).rstrip('.')}")
        return None


def _converted(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Read a value as a type; notes what does not fit."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType and value == []:  # TOML has no word for None
        return None
    if origin is UnionType:
        return _converted(value, next(each for each in inner if each is not NoneType), where,
                          problems)  # fmt: skip
    if origin is Literal:
        if value not in inner:
            problems.append(f"{where!r} is {value!r}; it must be one of {list(inner)}")
        return value
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _built(hint, value, f"{where}.", problems)
    if origin is tuple and isinstance(value, list):
        return tuple(
            _converted(each, inner[0], f"{where}.{i}", problems) for i, each in enumerate(value)
        )
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, _taken(hint)):
        problems.append(f"{where!r} is {value!r}; it must be {_WORDS.get(hint, 'a table')}")
    return float(value) if hint is float and isinstance(value, int) else value


_WORDS: dict[Any, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false",
}  # fmt: skip


def _taken(hint: Any) -> Any:
    """Types of Python that a type of the schema takes as they are."""
    if hint in _WORDS:
        return (int, float) if hint is float else hint
    return Mapping if get_origin(hint) not in (tuple, None) else NoneType
