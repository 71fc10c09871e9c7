"""Preconditioned momentum (Eq. 47, 51) and a preconditioner that is itself learned (Eq. 38-41): SPEC 5.1."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hope_jax.optim.checks import check, check_decay
from hope_jax.optim.generalized import scale_by_generalized_momentum
from hope_jax.optim.recipe import recipe, with_state_dtype


def scale_by_preconditioned_momentum(
    decay: Any = 0.9, precondition: optax.GradientTransformation | None = None, state_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Momentum of preconditioned gradients, ``m <- decay m - P G`` (Eq. 47); the update is -m.

    ``scale_by_generalized_momentum`` with the value -P. Without P it is ``optax.trace(decay)``. Features phi of the
    gradient (Eq. 51) are a part of P: ``optax.chain(signed_powers((0.0, 1.0)), optax.scale_by_rms())``.

    State: one value per parameter, 4 bytes at float32, and that of P. FLOPs: 3 per parameter, and those of P.

    Args:
      decay: alpha, 0 to 1.
      precondition: P, any optax transformation, such as ``learned_preconditioner()``.
      state_dtype: see ``with_state_dtype``.
    """
    check_decay("decay", decay, state_dtype)
    return scale_by_generalized_momentum(retention=decay, precondition=precondition, state_dtype=state_dtype)


def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: Any = 0.9,
    precondition: optax.GradientTransformation | None = None,
    state_dtype: Any = None,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """``scale_by_preconditioned_momentum`` with weight decay and a learning rate: see there and ``recipe``."""
    scale = scale_by_preconditioned_momentum(decay, precondition, state_dtype)
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
    """
    check("rate", rate, 0, 1, open_low=True, open_high=False)
    check("eps", eps, 0, open_low=True)

    def init(params: Any) -> LearnedPreconditionerState:
        return LearnedPreconditionerState(jax.tree.map(lambda p: jnp.zeros_like(p).real, params))

    def descend(g: Any, p: Any) -> Any:
        key = jnp.sign(g)
        return jnp.where(p == 0, jnp.abs(g), p - rate * ((p * key - g) * key.conj()).real)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        learned = jax.tree.map(descend, updates, state.preconditioner)
        return jax.tree.map(lambda g, p: g / (p + eps), updates, learned), LearnedPreconditionerState(learned)

    return with_state_dtype(optax.GradientTransformation(init, update))
