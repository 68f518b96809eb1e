"""`CodeView`: the Python that reproduces what is shown, behind a toggle."""

import anywidget
import traitlets

from modeldiff_widgets._theme import source


class CodeView(anywidget.AnyWidget):
    """Python to read and to copy.

    Example:
        >>> view = CodeView(code="pair.digests")
        >>> view.unfolded
        False
        >>> view.close()
    """

    _esm = source("code_view.js")
    _css = source("theme.css")

    code = traitlets.Unicode().tag(sync=True)
    unfolded = traitlets.Bool(False).tag(sync=True)
