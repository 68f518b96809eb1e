"""Dictionaries of activations: crosscoders, sparse autoencoders and what their latents mean.

Names are imported when first used. A dictionary's life: `crosscoder` or `sae` makes one, `train`
fits it to the rows of a `Source` (an `ActivationStore`'s, or `rows_source` of tensors), `evaluate`
says how well, `latent_scaling` and `classify` which model has each latent, `max_activating` where
latents fire, and `latent_direction` makes a `Direction` of one. `read` takes other packages' files.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeldiff.dictionaries.classes import classify as classify
    from modeldiff.dictionaries.configs import DictionaryConfig as DictionaryConfig
    from modeldiff.dictionaries.configs import Normaliser as Normaliser
    from modeldiff.dictionaries.configs import TrainConfig as TrainConfig
    from modeldiff.dictionaries.examples import max_activating as max_activating
    from modeldiff.dictionaries.itda import build_itda as build_itda
    from modeldiff.dictionaries.latents import bias_direction as bias_direction
    from modeldiff.dictionaries.latents import latent_direction as latent_direction
    from modeldiff.dictionaries.matching import match as match
    from modeldiff.dictionaries.metrics import evaluate as evaluate
    from modeldiff.dictionaries.models import Dictionary as Dictionary
    from modeldiff.dictionaries.models import crosscoder as crosscoder
    from modeldiff.dictionaries.models import sae as sae
    from modeldiff.dictionaries.readers import read as read
    from modeldiff.dictionaries.scaling import latent_scaling as latent_scaling
    from modeldiff.dictionaries.sources import TensorRows as TensorRows
    from modeldiff.dictionaries.sources import rows_source as rows_source
    from modeldiff.dictionaries.training import train as train

_HOMES = {
    "classes": "classify",
    "configs": "DictionaryConfig Normaliser TrainConfig",
    "examples": "max_activating",
    "itda": "build_itda",
    "latents": "bias_direction latent_direction",
    "matching": "match",
    "metrics": "evaluate",
    "models": "Dictionary crosscoder sae",
    "readers": "read",
    "scaling": "latent_scaling",
    "sources": "TensorRows rows_source",
    "training": "train",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'modeldiff.dictionaries' has no attribute {name!r}")
    return getattr(import_module(f"modeldiff.dictionaries.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
