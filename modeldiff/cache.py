"""A cache on disk whose keys are made of content: equal inputs hit, any changed one misses.

Nothing is ever overwritten by hand and there is no flag to force it: a key holds the hashes of the
models, adapter, tokenizer, prompts and edits, every argument, and the version of this package.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeldiff._files import PathLike, atomic_write, digest
from modeldiff._version import __version__


class Cache:
    """JSON records under a folder, named by the hash of what they depend on.

    Args:
        folder: Where they lie; None (and no ``MODELDIFF_CACHE``) keeps nothing.

    Example:
        >>> import tempfile
        >>> cache = Cache(tempfile.mkdtemp())
        >>> cache.get_or("sum", {"a": 1, "b": 2}, lambda: 3), cache.hits
        (3, 0)
        >>> cache.get_or("sum", {"a": 1, "b": 2}, lambda: 99), cache.hits
        (3, 1)
    """

    def __init__(self, folder: PathLike | None = None) -> None:
        where = folder or os.environ.get("MODELDIFF_CACHE")
        self.folder = Path(where) if where else None
        self.hits = self.misses = 0

    def path(self, kind: str, depends_on: Any) -> Path | None:
        """File of a record, whether or not it exists."""
        if self.folder is None:
            return None
        return self.folder / kind / f"{digest(__version__, kind, depends_on)}.json"

    def get(self, kind: str, depends_on: Any) -> Any | None:
        """Return a record, or None. A damaged record counts as missing and is made again."""
        path = self.path(kind, depends_on)
        try:
            found = None if path is None else json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            found = None
        value = found.get("value") if isinstance(found, dict) else None
        if isinstance(found, dict) and found.get("digest") != digest(value):
            value = None
        self.hits, self.misses = self.hits + (value is not None), self.misses + (value is None)
        return value

    def put(self, kind: str, depends_on: Any, value: Any) -> None:
        """Keep a record, written whole or not at all."""
        path = self.path(kind, depends_on)
        if path is not None:
            with atomic_write(path) as temporary:
                record = {"depends_on": depends_on, "value": value, "digest": digest(value)}
                temporary.write_text(json.dumps(record), encoding="utf-8")

    def get_or(self, kind: str, depends_on: Any, make: Callable[[], Any]) -> Any:
        """Return a record, making and keeping it if it is missing."""
        found = self.get(kind, depends_on)
        if found is None:
            found = make()
            self.put(kind, depends_on, found)
        return found
