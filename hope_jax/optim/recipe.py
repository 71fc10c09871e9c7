"""From the mathematics of an optimizer to the optimizer: weight decay, learning rate, and who takes the rest."""

from typing import Any

import optax

from hope_jax.errors import UserError
from hope_jax.optim.checks import check
from hope_jax.optim.matrices import ADAMW, MATRIX, Labels, matrix_labels, partition_labels
from hope_jax.optim.precision import with_state_dtype


def recipe(
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    matrices: Labels | None = None,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """``params - learning_rate (scale(gradients) + weight_decay params)``.

    Args:
      scale: a ``scale_by_x``.
      learning_rate: a number, 0 or more, or a schedule over its steps.
      weight_decay: decoupled decay, 0 or more, multiplied by the learning rate.
      mask: which leaves decay, a tree of booleans or ``params -> tree``; None: all that ``scale`` has.
      fallback: a whole optimizer for the leaves that are not matrices, such as ``optax.adamw(learning_rate)``. None:
        ``scale`` has them all.
      matrices: ``params -> labels`` of ``matrices.py``, used with ``fallback``; None: ``matrix_labels()``.
      state_dtype: see ``precision.with_state_dtype``; of the fallback's state too.

    Raises:
      UserError: a number out of range; from ``update``, no parameters although weights decay.
    """
    check("learning_rate", learning_rate, 0)
    check("weight_decay", weight_decay, 0)
    links = [scale, _decay(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)]
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        del links[1]
    chain = optax.chain(*links)
    if fallback is not None:
        labels = partition_labels(matrix_labels() if matrices is None else matrices)
        chain = optax.partition({MATRIX: chain, ADAMW: fallback}, labels)
    return with_state_dtype(chain, state_dtype)


def _decay(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """optax's decay, which says what it misses."""
    inner = optax.add_decayed_weights(weight_decay, mask)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise UserError("weight_decay needs the parameters; call update(gradients, state, params)")
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
