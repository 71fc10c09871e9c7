"""Delta momentum: the momentum forgets along the gradients it meets (Eq. 48-49; SPEC 5.2).

Plain momentum keeps what later gradients contradict. The delta rule, gradient descent on ``1/2 ||m G^T + P||^2``,
erases what is stored under the present gradient before it is written anew: a retention that depends on the gradient,
and a setting of ``generalized.py``. Formulas are printed for ``W [out, in]``; a Flax kernel is ``W^T``, so the Gram
matrix ``G^T G`` of the input side is a left factor ``G G^T`` here, with G [rows, columns] and rows the inputs.
"""

from typing import Any, Literal

import jax.numpy as jnp
import optax

from hope_jax.errors import check_word
from hope_jax.optim.checks import check, check_decay
from hope_jax.optim.generalized import Retention, scale_by_generalized_momentum
from hope_jax.optim.matrices import Labels, MatrixView, by_largest, squared_norm
from hope_jax.optim.recipe import recipe
from hope_jax.types import Array

Form = Literal["gram", "scalar", "raw"]


def _in_unit_ball(g: Array, erase: Any) -> Array:
    """``g sqrt(erase / (1 + erase ||g||^2))``, finite for every finite g."""
    u, largest = by_largest(g)
    size = jnp.square(1 / largest) + erase * squared_norm(u)
    return u * jnp.sqrt(erase / jnp.maximum(size, jnp.finfo(g.dtype).tiny))


def _erased(m: Array, g: Array) -> Array:
    """``G G^T m`` of [..., rows, columns], by the cheaper order of products."""
    adjoint = g.mT.conj()
    return g @ (adjoint @ m) if g.shape[-1] <= g.shape[-2] else (g @ adjoint) @ m


def delta_retention(decay: Any = 0.9, erase: Any = 1.0, form: Form = "gram") -> Retention:
    """What delta momentum keeps of m when G arrives, for ``generalized_momentum(retention=...)``."""
    check_word("form", form, Form)
    check("decay", decay, 0, 1, open_high=False)
    check("erase", erase, 0)

    def retain(state: Array, gradient: Array, view: MatrixView) -> Array:
        m, g = view.to_matrices(state), view.to_matrices(gradient)
        if form == "scalar":
            kept = jnp.maximum(0.0, decay - jnp.where(erase > 0, erase * squared_norm(g), 0.0)) * m
        elif form == "gram":
            kept = decay * m - _erased(m, _in_unit_ball(g, erase))
        else:
            kept = decay * m - erase * _erased(m, g)
        return view.from_matrices(kept)

    return retain


def scale_by_delta_momentum(
    decay: Any = 0.9,
    erase: Any = 1.0,
    form: Form = "gram",
    precondition: optax.GradientTransformation | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum whose decay depends on the gradient; the update is -m.

    ::

        gram    m <- decay m - e' G (G^T m) - P G      e' = erase / (1 + erase ||G||_F^2)
        scalar  m <- max(0, decay - erase ||G||_F^2) m - P G
        raw     m <- decay m - erase G (G^T m) - P G    as printed, with erase = 1

    With ``gram`` every direction of m is multiplied by a factor between decay - 1 and decay, however large G is, so it
    is stable whatever the loss; ``raw`` is not (it diverges where ||G||^2 passes 1 + decay) and is there to be compared
    with. ``scalar`` forgets alike in all directions. Erasing 0 is ``optax.trace(decay)``.

    State: one value per parameter, 4 bytes at float32. FLOPs: ``4 rows columns min(rows, columns)`` per matrix (none of
    it for ``scalar``), an eighth to a fifth of five Newton-Schulz steps.

    Args:
      decay: alpha, 0 to 1.
      erase: e, 0 or more: strength of the erase in units of the squared gradient.
      form: as above.
      precondition: P, any optax transformation of the gradients that are written; those that erase stay as they are.
      matrices, state_dtype: as of ``scale_by_generalized_momentum``.
        Of a leaf that is no matrix ``G G^T m = <G, m> G``.
    """
    check_decay("decay", decay, state_dtype)
    retention = delta_retention(decay, erase, form)
    return scale_by_generalized_momentum(None, None, retention, 1.0, precondition, None, matrices, state_dtype)


def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    decay: Any = 0.9,
    erase: Any = 1.0,
    form: Form = "gram",
    precondition: optax.GradientTransformation | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
    *,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``scale_by_delta_momentum`` with decoupled weight decay and a learning rate: see there and ``recipe``."""
    scale = scale_by_delta_momentum(decay, erase, form, precondition, matrices, state_dtype)
    return recipe(scale, learning_rate, weight_decay, mask, fallback, matrices)
