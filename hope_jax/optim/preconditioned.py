"""Preconditioned momentum (Eq. 47, 51) and a preconditioner that is itself learned (Eq. 38-41): SPEC 5.1."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.errors import UserError
from hope_jax.optim.checks import check, check_function, check_transformation
from hope_jax.optim.generalized import scale_by_generalized_momentum
from hope_jax.optim.precision import check_decay, with_state_dtype
from hope_jax.optim.recipe import recipe
from hope_jax.types import Array


def scale_by_preconditioned_momentum(
    decay: Any = 0.9,
    precondition: optax.GradientTransformation | None = None,
    feature_map: Callable[[Array], Array] | None = None,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum of preconditioned gradients (Eq. 47; with a feature map phi Eq. 51); the update is -m.

    ::

        m <- decay m - P phi(G)

    ``scale_by_generalized_momentum`` with the value -P. Without P and phi it is ``optax.trace(decay)``.

    State: one value per parameter, 4 bytes at float32, and that of P. FLOPs: 3 per parameter, and those of P and phi.

    Args:
      decay: alpha, 0 to 1.
      precondition: P, any optax transformation: ``optax.scale_by_rms()``, ``learned_preconditioner()``, ...
      feature_map: phi, of one leaf's gradient to one of the same shape, such as ``jnp.sign``.
      state_dtype: see ``precision.with_state_dtype``.

    Raises:
      UserError: decay out of range; from ``init``, leaves that are no floating-point arrays.
    """
    check("decay", decay, 0, 1, open_high=False)
    check_decay("decay", decay, state_dtype)
    check_function("feature_map", feature_map, "of one leaf's gradient, such as jnp.sign")
    check_transformation("precondition", precondition)
    links = [] if feature_map is None else [optax.stateless_with_tree_map(lambda g, _: _mapped(feature_map, g))]
    links += [] if precondition is None else [precondition]
    return scale_by_generalized_momentum(
        retention=decay, precondition=optax.chain(*links) if links else None, state_dtype=state_dtype
    )


def _mapped(feature_map: Callable[[Array], Array], gradient: Any) -> Array:
    g = jnp.asarray(gradient)
    if (features := feature_map(g)).shape != g.shape:
        raise UserError(f"feature_map makes {features.shape} of a gradient {g.shape}; expected the same shape")
    return features


def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: Any = 0.9,
    precondition: optax.GradientTransformation | None = None,
    feature_map: Callable[[Array], Array] | None = None,
    state_dtype: Any = None,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """``scale_by_preconditioned_momentum`` with weight decay and a learning rate: see there and ``recipe``."""
    scale = scale_by_preconditioned_momentum(decay, precondition, feature_map, state_dtype)
    return recipe(scale, learning_rate, weight_decay, mask)


class LearnedPreconditionerState(NamedTuple):
    """P of every parameter, one value per element; 0 where there was no gradient yet."""

    preconditioner: Any


def learned_preconditioner(rate: Any = 0.01, eps: Any = 1e-8) -> optax.GradientTransformationExtraArgs:
    """A diagonal P, learned online as a memory that maps the gradient's sign to the gradient (Eq. 38-41).

    ::

        P <- P - rate grad_P L(P),    L(P) = 1/2 ||P * sign(g) - g||^2,    starting from the first |g| that is not 0
        update: g / (P + eps)

    The key of Eq. 38-41 is left open. With the sign (of a complex number, ``g/|g|``) the minimiser is the size of the
    gradient. So P^-1 g is free of scale like Adam's step, with the mean of ``|g|`` where Adam has the root of the mean
    of g^2. A gradient of 0 has no sign and teaches nothing: P is the mean size of the gradients that are not 0.

    State: one real value per parameter, 4 bytes at float32. FLOPs: about 6 per parameter.

    Args:
      rate: zeta, step of the inner gradient descent, above 0 and up to 1, which forgets all but the present gradient.
      eps: added to P, above 0.

    Raises:
      UserError: rate or eps out of range; from ``init``, leaves that are no floating-point arrays.
    """
    check("rate", rate, 0, 1, open_low=True, open_high=False)
    check("eps", eps, 0, open_low=True)

    def init(params: Any) -> LearnedPreconditionerState:
        return LearnedPreconditionerState(jax.tree.map(lambda p: jnp.zeros_like(p).real, params))

    def descend(p: Array, g: Array) -> Array:
        key = jnp.sign(g)
        return jnp.where(p == 0, jnp.abs(g), p - rate * ((p * key - g) * key.conj()).real)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        learned = jax.tree.map(lambda g, p: descend(p, g), updates, state.preconditioner)
        return jax.tree.map(lambda g, p: g / (p + eps), updates, learned), LearnedPreconditionerState(learned)

    return with_state_dtype(optax.GradientTransformation(init, update))
