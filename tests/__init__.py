"""The tests; ``pytest --jaxtyping-packages=modeldiff,tests.checked`` checks shapes as well."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Type checker in which an int passes for a float, as it does everywhere in Python."""
