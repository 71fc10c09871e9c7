"""What every optimizer here owes its parameters: state of its own precision, whatever theirs is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.optim.checks import check_dtype, check_leaves

Cast = Callable[[Any], Any]


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

    Raises:
      UserError: dtype is no floating type; from ``init`` and ``update``, a leaf of the parameters or gradients that is
        no real or complex floating-point array, by its path.
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
