"""The file that a choice of candidates is kept in."""

from pathlib import Path

from modeldiff.errors import FileFormatError

SUFFIX = ".json"


def safe_path(text: str) -> Path:
    """The file that is meant, as an absolute path.

    Raises:
        FileFormatError: If it has not the suffix, climbs out of its folder, or is a folder.
    """
    path = Path(text.strip()).expanduser()
    if path.suffix != SUFFIX or not path.stem.strip("."):
        raise FileFormatError(f"{text!r}: choices are kept in files that end with {SUFFIX!r}.")
    if ".." in path.parts or "\0" in text:
        raise FileFormatError(f"{text!r} leads out of its folder; write the path without '..'.")
    path = path.absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise FileFormatError(f"{str(path)!r} is a folder, or lies in none.")
    return path
