"""Every exception this package raises on purpose.

ModelDiffError
├── SiteError             a site, or a family of models, that cannot be resolved
├── MismatchError         two things that must agree do not (vocabulary, width, tokens, site)
│   └── InactiveAdapterError   the "fine-tune" computes exactly what the base computes
├── InterventionError     an edit that did not fire, or cannot be carried out as written
├── MaskError             a mask that selects nothing, or a text that cannot be rendered exactly
├── DirectionError        too few tokens, or no difference, to find a direction in
├── TrainingError         a training whose loss is no number any more
├── JudgeError            a judge that scored nothing
├── FileFormatError       a file that is not what it should be; nothing was read from it
├── StoreError            the system refused to write a store, or another process is writing it
├── SetupError            the installation lacks something; says what to install
├── Cancelled             the caller asked to stop; what is finished is kept
└── RemoteError           the remote server refused, timed out, or lacks the model
"""

from typing import Any


class ModelDiffError(Exception):
    """Base class; catch it to catch everything below."""


class SiteError(ModelDiffError, ValueError):
    """A site, or a family of models, that cannot be resolved."""


class MismatchError(ModelDiffError, ValueError):
    """Two things that must agree do not."""


class InactiveAdapterError(MismatchError):
    """The fine-tune computes exactly what the base computes."""


class InterventionError(ModelDiffError, ValueError):
    """An edit that did not fire, or cannot be carried out as written."""


class MaskError(ModelDiffError, ValueError):
    """A mask that selects nothing, or a text that cannot be rendered exactly."""


class DirectionError(ModelDiffError, ValueError):
    """Too few tokens, or no difference, to find a direction in."""


class TrainingError(ModelDiffError, ValueError):
    """A training whose loss is no number any more."""


class JudgeError(ModelDiffError, ValueError):
    """A judge that scored nothing."""


class FileFormatError(ModelDiffError, ValueError):
    """A file that is not what it should be; nothing was read from it."""


class StoreError(ModelDiffError, OSError):
    """The system refused to write a store, or another process is writing it."""


class SetupError(ModelDiffError, RuntimeError):
    """The installation lacks something; the message says what to install."""


class Cancelled(ModelDiffError):
    """The caller asked to stop; what is finished is kept in ``partial``."""

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class RemoteError(ModelDiffError, RuntimeError):
    """The remote server refused, timed out, or lacks the model."""
