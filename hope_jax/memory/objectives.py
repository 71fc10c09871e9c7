"""Inner objectives, ``(prediction, value) -> loss`` for one token.

The gradient at the prediction is the *error* that is written against the key (SPEC 1.3, 4.2).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hope_jax.types import Array, Float, Scalar

Objective = Callable[[Float[Array, " V"], Float[Array, " V"]], Scalar]


def l2(prediction: Float[Array, " V"], value: Float[Array, " V"]) -> Scalar:
    """Regression, 1/2 ||prediction - value||^2 (Eq. 65, 93): the delta rule."""
    return 0.5 * jnp.sum(jnp.square(prediction - value))


def dot(prediction: Float[Array, " V"], value: Float[Array, " V"]) -> Scalar:
    """Similarity, -<prediction, value> (Eq. 64, 92): the Hebbian rule."""
    return -jnp.sum(prediction * value)


def error(objective: Objective, prediction: Float[Array, "T V"], value: Float[Array, "T V"]) -> Float[Array, "T V"]:
    """Gradient of the objective at each token's prediction."""
    return jax.vmap(jax.grad(objective))(prediction, value)
