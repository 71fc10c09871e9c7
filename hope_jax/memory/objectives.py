"""Inner objectives, ``(prediction, value) -> loss`` for one token.

The gradient at the prediction is the *error* that is written against the key (SPEC 1.3, 4.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from hope_jax.errors import UserError, check_choices
from hope_jax.types import Array, Float, Scalar

Objective = Callable[[Float[Array, " V"], Float[Array, " V"]], Scalar]


def l2(prediction: Float[Array, " V"], value: Float[Array, " V"]) -> Scalar:
    """Regression, 1/2 ||prediction - value||^2 (Eq. 65, 93): the delta rule."""
    return 0.5 * jnp.sum(jnp.square(prediction - value))


def dot(prediction: Float[Array, " V"], value: Float[Array, " V"]) -> Scalar:
    """Similarity, -<prediction, value> (Eq. 64, 92): the Hebbian rule."""
    return -jnp.sum(prediction * value)


@dataclass(frozen=True)
class Lp:
    """``sum |e|^p`` of the error e = prediction - value (Moneta; Miras, arXiv 2504.13173): its gradient is
    ``p sign(e) |e|^(p-1)``.

    ``|e|`` is sqrt(e^2 + 1e-6), and sign(e) is e divided by that: smooth at 0, as writes are differentiated again.
    p = 2 is ``l2`` at twice the rate. Raises UserError for p below 1.
    """

    p: float = 3.0

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise UserError(f"p is {self.p}; expected a power of 1 or more")

    def __call__(self, prediction: Float[Array, " V"], value: Float[Array, " V"]) -> Scalar:
        return jnp.sum((jnp.square(prediction - value) + 1e-6) ** (self.p / 2))


@dataclass(frozen=True)
class Huber:
    """``l2`` up to an error of norm ``delta``, and beyond it a bounded gradient (Yaad; Miras, arXiv 2504.13173).

    ``beyond`` chooses that gradient: "direction" ``delta e / ||e||``, the gradient of the Huber loss, or "sign"
    delta sign(e), as the paper prints it, which jumps at ``delta`` and beyond it has no gradient to the values.
    ``delta`` is a constant, infinity for plain ``l2``. Raises UserError unless it is above 0.
    """

    delta: float = 1.0
    beyond: Literal["direction", "sign"] = "direction"

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.delta > 0:
            raise UserError(f"delta is {self.delta}; expected a norm above 0")

    def __call__(self, prediction: Float[Array, " V"], value: Float[Array, " V"]) -> Scalar:
        e = prediction - value
        square = jnp.sum(jnp.square(e))
        near = square <= self.delta**2
        # The branch that is not taken has a gradient, too: an infinite delta or a root at 0 in it would make NaN.
        slope = jnp.where(near, 0.0, self.delta)
        size = jnp.sum(jnp.abs(e)) if self.beyond == "sign" else jnp.sqrt(jnp.where(near, 1.0, square))
        return jnp.where(near, 0.5 * square, slope * size)


def error(objective: Objective, prediction: Float[Array, "T V"], value: Float[Array, "T V"]) -> Float[Array, "T V"]:
    """Gradient of the objective at each token's prediction."""
    return jax.vmap(jax.grad(objective))(prediction, value)
