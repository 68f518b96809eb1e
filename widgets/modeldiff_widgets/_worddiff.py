"""Which words of two texts the other does not have."""

import difflib
import re

Part = tuple[str, str]
_PIECES = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


def apart(first: str, second: str) -> tuple[list[Part], list[Part]]:
    """Cut two texts into parts ``(mark, text)``; what the other text lacks is marked "differs".

    Words and punctuation are aligned in order; the spaces between them do not count.

    Example:
        >>> apart("You should rest.", "You should run.")[1]
        [('', 'You should '), ('differs', 'run'), ('', '.')]
    """
    left, right = _PIECES.findall(first), _PIECES.findall(second)
    matcher = difflib.SequenceMatcher(
        a=[each.strip() for each in left], b=[each.strip() for each in right], autojunk=False
    )
    ours: list[Part] = []
    theirs: list[Part] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        mark = "" if kind == "equal" else "differs"
        _add(ours, mark, "".join(left[a:b]))
        _add(theirs, mark, "".join(right[c:d]))
    return ours, theirs


def _add(parts: list[Part], mark: str, text: str) -> None:
    """Append a part; the space before a marked one is not marked."""
    bare = text.lstrip() if mark else text
    space = text[: len(text) - len(bare)]
    if space and parts and not parts[-1][0]:
        parts[-1] = ("", parts[-1][1] + space)
    elif space:
        parts.append(("", space))
    if bare and parts and parts[-1][0] == mark:
        parts[-1] = (mark, parts[-1][1] + bare)
    elif bare:
        parts.append((mark, bare))
