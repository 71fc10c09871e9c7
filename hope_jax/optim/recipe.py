"""From the mathematics of an optimizer to the optimizer: precision, weight decay, learning rate, who takes the rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.errors import UserError
from hope_jax.optim.checks import check, check_dtype, check_leaves, check_transformation
from hope_jax.optim.matrices import ADAMW, MATRIX, Labels, labels_or_default, partition_labels

Cast = Callable[[Any], Any]


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
      weight_decay: decoupled decay, 0 or more, multiplied by the learning rate; a number or a schedule. ``update`` then
        needs the parameters.
      mask: which leaves decay, a tree of booleans or ``params -> tree``; None: all that ``scale`` has.
      fallback: a whole optimizer for the leaves that are not matrices, such as ``optax.adamw(learning_rate)``. None:
        ``scale`` has them all. Its state is its own affair (``mu_dtype``), but at least float32 by default.
      matrices: ``params -> labels`` of ``matrices.py``, used with ``fallback``; None: ``matrix_labels()``.
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


def with_state_dtype(
    transformation: optax.GradientTransformation,
    dtype: Any = None,
    stored: Callable[[Any, Cast], Any] = lambda state, cast: cast(state),
) -> optax.GradientTransformationExtraArgs:
    """Gradients and parameters reach ``transformation`` in at least float32; updates leave in the gradients' dtype.

    Args:
      transformation: any; it may be written as if everything were float32.
      dtype: what floating-point state is stored in between steps. None: as computed, float32 (or wider, where the
        parameters are), so bfloat16 parameters have float32 state. Half precision halves the memory. Complex state is
        stored as complex64.
      stored: ``(state, cast) -> state`` says which parts of the state ``cast`` makes of that dtype; by default all.
    """
    check_dtype("state_dtype", dtype)
    inner = optax.with_extra_args_support(transformation)

    def keep(state: Any) -> Any:
        return state if dtype is None else stored(state, lambda part: _narrow(part, dtype))

    def init(params: Any) -> Any:
        check_leaves(params, "parameter")
        return keep(inner.init(_wide(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_leaves(updates, "gradient")
        wide, state = inner.update(_wide(updates), _wide(state), _wide(params), **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), wide, updates), keep(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_floats(change: Callable[[Any], Any], tree: Any) -> Any:
    def leaf(x: Any) -> Any:
        return change(x) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(leaf, tree)


def _wide(tree: Any) -> Any:
    def widen(x: Any) -> Any:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        if isinstance(x, jax.ShapeDtypeStruct):  # init needs no more of a parameter than its shape and place
            return jnp.zeros(x.shape, dtype, device=x.sharding)
        return jnp.asarray(x, dtype)

    return _of_floats(widen, tree)


def _narrow(tree: Any, dtype: Any) -> Any:
    def store(x: Any) -> Any:
        return x.astype(jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype)

    return _of_floats(store, tree)
