"""What every optimizer here owes its parameters: state of its own precision.

``with_state_dtype`` wraps a transformation that is written as if everything were float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from hope_jax.errors import UserError
from hope_jax.optim.checks import check_dtype, check_leaves, real_number

Cast = Callable[[Any], Any]


def with_state_dtype(
    transformation: optax.GradientTransformation,
    dtype: Any = None,
    stored: Callable[[Any, Cast], Any] = lambda state, cast: cast(state),
) -> optax.GradientTransformationExtraArgs:
    """Gradients and parameters reach ``transformation`` in at least float32; updates leave in the gradients' dtype.

    Args:
      transformation: any; arithmetic and, with dtype None, state in float32 (or wider, where the parameters are).
      dtype: what floating-point state is stored in between steps. None: as computed, so bfloat16 parameters have
        float32 state. Half precision halves the memory. Complex state keeps its kind: the complex type of float32.
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


def check_decay(name: str, decay: Any, dtype: Any) -> None:
    """Raise UserError if ``dtype`` has too few digits for a moment of this decay: it would stand still.

    A share smaller than half the spacing of the numbers is rounded away: 0.004 in bfloat16, hence decays up to 0.996.
    """
    check_dtype("state_dtype", dtype)
    share = None if dtype is None or isinstance(decay, Tracer) else real_number(decay)
    if share is None or share == 1:
        return
    least = float(jnp.finfo(dtype).eps) / 2
    if 1 - share < least:
        raise UserError(f"{name} is {share:g}, which {jnp.dtype(dtype)} cannot hold; expected at most {1 - least:g}")


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _wide(tree: Any) -> Any:
    def widen(x: Any) -> Any:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        if isinstance(x, jax.ShapeDtypeStruct):  # init needs no more of a parameter than its shape and place
            return jnp.zeros(x.shape, dtype, device=x.sharding)
        return jnp.asarray(x, dtype)

    return jax.tree.map(lambda x: widen(x) if _is_float(x) else x, tree)


def _narrow(tree: Any, dtype: Any) -> Any:
    def store(x: Any) -> Any:
        if not _is_float(x):
            return x
        complex_like = jnp.issubdtype(x.dtype, jnp.complexfloating)
        return x.astype(jnp.promote_types(dtype, jnp.complex64) if complex_like else dtype)

    return jax.tree.map(store, tree)
