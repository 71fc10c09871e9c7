"""What every optimizer here owes its parameters: state of its own precision.

``with_state_dtype`` wraps a transformation that is written as if everything were float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax.errors import UserError
from hope_jax.optim.checks import check_leaves


def with_state_dtype(
    transformation: optax.GradientTransformation, dtype: Any = None, name: str = "the optimizer"
) -> optax.GradientTransformationExtraArgs:
    """Gradients and parameters reach ``transformation`` in at least float32; updates leave in the gradients' dtype.

    Args:
      transformation: any; arithmetic and, with dtype None, state in float32 (or wider, where the parameters are).
      dtype: what floating-point state is stored in between steps. None: as computed, so bfloat16 parameters have
        float32 state. Half precision halves the memory; a decay above 0.996 then no longer moves (bfloat16 has 8 bits).
        Complex state keeps its kind: the complex type of float32.
      name: of the optimizer, for messages.

    Raises:
      UserError: dtype is no floating type; from ``init``, a leaf of the parameters that is no real or complex
        floating-point array, by its path.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"state_dtype is {dtype}; expected a floating type such as jnp.float32, or None")
    inner = optax.with_extra_args_support(transformation)

    def init(params: Any) -> Any:
        check_leaves(params, name)
        return _stored(inner.init(_wide(params)), dtype)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        wide, state = inner.update(_wide(updates), _wide(state), _wide(params), **extra)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), wide, updates), _stored(state, dtype)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _wide(tree: Any) -> Any:
    widen = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) if _is_float(x) else x  # noqa: E731
    return jax.tree.map(widen, tree)


def _stored(state: Any, dtype: Any) -> Any:
    def store(x: Any) -> Any:
        if dtype is None or not _is_float(x):
            return x
        complex_like = jnp.issubdtype(x.dtype, jnp.complexfloating)
        return x.astype(jnp.promote_types(dtype, jnp.complex64) if complex_like else dtype)

    return jax.tree.map(store, state)
