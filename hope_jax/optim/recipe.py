"""From the mathematics of an optimizer to the optimizer: weight decay, learning rate, and who takes the rest."""

from typing import Any

import optax

from hope_jax.errors import UserError
from hope_jax.optim.checks import check, check_transformation
from hope_jax.optim.matrices import ADAMW, MATRIX, Labels, labels_or_default, partition_labels
from hope_jax.optim.precision import with_state_dtype


def recipe(
    scale: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any = 0.0,
    mask: Any = None,
    fallback: optax.GradientTransformation | None = None,
    matrices: Labels | None = None,
) -> optax.GradientTransformationExtraArgs:
    """``params - learning_rate (scale(gradients) + weight_decay params)``.

    A gradient that is not finite makes the state and the update not finite, as in all of optax; where that may happen,
    wrap the optimizer in ``optax.apply_if_finite``, which skips such a step and leaves the state as it was.

    Under ``optax.inject_hyperparams`` every number can be changed between steps; name functions among the arguments
    in its ``static_args`` (``("output", "objective")``), or it takes them for schedules. An injected ``weight_decay``
    needs the parameters in ``update`` even where it is 0. A ``state_dtype`` belongs to the static arguments as well.

    Args:
      scale: a ``scale_by_x``, whose state has the precision it chose.
      learning_rate: a number, 0 or more, or a schedule over its steps.
      weight_decay: decoupled decay, 0 or more, multiplied by the learning rate; a number or a schedule.
      mask: which leaves decay, a tree of booleans or ``params -> tree``; None: all that ``scale`` has.
      fallback: a whole optimizer for the leaves that are not matrices, such as ``optax.adamw(learning_rate)``. None:
        ``scale`` has them all. Its state is its own affair (``mu_dtype``), but at least float32 by default.
      matrices: ``params -> labels`` of ``matrices.py``, used with ``fallback``; None: ``matrix_labels()``.

    Raises:
      UserError: an argument out of range; from ``update``, no parameters although weights decay.
    """
    check("learning_rate", learning_rate, 0, schedule=True)
    check("weight_decay", weight_decay, 0, schedule=True)
    check_transformation("fallback", fallback)
    links = [scale, _decay(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)]
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        del links[1]
    chain = optax.chain(*links)
    if fallback is not None:
        chain = optax.partition({MATRIX: chain, ADAMW: fallback}, partition_labels(labels_or_default(matrices)))
    return with_state_dtype(chain)


def _decay(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """optax's decay, which says what it misses."""
    inner = optax.add_decayed_weights(weight_decay, mask)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise UserError("weight_decay needs the parameters; call update(gradients, state, params)")
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
