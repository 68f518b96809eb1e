"""Shape annotations: jaxtyping where it is installed, plain types otherwise.

To a type checker `Float[Tensor, "batch d_model"]` is `Tensor` either way.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:

        class _Plain:
            def __class_getitem__(cls, item):
                return item[0]

        Bool = Float = Int = _Plain
