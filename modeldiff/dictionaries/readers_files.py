"""Tensors and settings of dictionary files that other packages wrote.

The one place of this package that opens a ``.pt`` file, and only as plain tensors: a file that
would run code is refused.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modeldiff.errors import FileFormatError

_REFUSED = torch.serialization.pickle.UnpicklingError  # pyright: ignore[reportPrivateImportUsage]
_PREFIXES = ("_orig_mod.", "module.")


def read_tensors(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a ``.pt``, ``.safetensors`` or ``.npz`` file of tensors.

    Args:
        path: The file. A ``.pt`` file may nest its tensors under ``state_dict``.
        device: Where they go, whatever device they were on when they were written.

    Raises:
        FileNotFoundError: If there is no such file.
        FileFormatError: If it is damaged, holds more than tensors, or is of another kind.
    """
    readers = {".pt": _pt, ".pth": _pt, ".safetensors": _safetensors, ".npz": _npz}
    if path.suffix not in readers:
        raise FileFormatError(f"{str(path)!r} is no {', '.join(sorted(readers))} file.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    found = {_plain(name): tensor for name, tensor in readers[path.suffix](path, device).items()}
    if not found:
        raise FileFormatError(f"{str(path)!r} holds no tensors.")
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of settings; tags of YAML that name classes are left out.

    Raises:
        FileFormatError: If it is no mapping.
    """
    text = path.read_text(encoding="utf-8")
    try:
        found = _yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise FileFormatError(f"{str(path)!r} cannot be read as settings: {error}.") from error
    if not isinstance(found, dict):
        raise FileFormatError(
            f"{str(path)!r} holds a {type(found).__name__}, not settings by name."
        )
    return found


def _pt(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        found = torch.load(path, weights_only=True, map_location=device)
    except (_REFUSED, RuntimeError, EOFError, KeyError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileFormatError(
            f"{str(path)!r} cannot be read as plain tensors: {line} A file that holds Python "
            "objects could run code and is refused; save its state_dict() alone."
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise FileFormatError(f"{str(path)!r} holds a {type(found).__name__}, not a state dict.")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _safetensors(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise FileFormatError(f"{str(path)!r} is damaged: {error}.") from error


def _npz(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise FileFormatError(f"{str(path)!r} is damaged: {error}.") from error


def _plain(name: str) -> str:
    """The name without what compiling or wrapping put before it."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _yaml(text: str) -> Any:
    import yaml

    class Plain(yaml.SafeLoader):
        """Knows no classes: a tag of Python becomes its list, or nothing."""

    def constructed(loader: Any, suffix: str, node: Any) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        return None

    Plain.add_multi_constructor("tag:yaml.org,2002:python/", constructed)
    try:
        return yaml.load(text, Loader=Plain)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
