"""Mistakes in hyper-parameters and parameters are refused at construction or in ``init``, by name."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import keystr, tree_leaves_with_path

from hope_jax.errors import UserError


def leaf_name(path: tuple[Any, ...], kind: str = "parameter") -> str:
    """A leaf's path in words for a message."""
    return f"{kind} {keystr(path)}" if path else f"the only {kind}"


def check_leaves(tree: Any, kind: str) -> None:
    """Raise UserError for a leaf that is no floating-point array."""
    for path, leaf in tree_leaves_with_path(tree):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            what = getattr(leaf, "dtype", type(leaf).__name__)
            raise UserError(
                f"The optimizer got {leaf_name(path, kind)} of type {what}; expected "
                "floating-point arrays. Keep others out with optax.masked or optax.partition"
            )


def check(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = True,
    schedule: bool = False,
) -> None:
    """Raise UserError unless ``value`` is a finite number from ``low`` to ``high``; an open end is not included.

    A traced value (``optax.inject_hyperparams`` inside ``jit``) is not known yet and passes; a function does where a
    ``schedule`` may be given.
    """
    if isinstance(value, Tracer) or (schedule and callable(value)):
        return
    number = _real_number(value)
    if number is None:
        raise UserError(f"{name} is {value!r}; expected a number{' or a schedule' if schedule else ''}")
    inside = low < number < high or (number == low and not open_low) or (number == high and not open_high)
    if not (inside and math.isfinite(number)):
        start = "any number" if low == -math.inf else f"above {low:g}" if open_low else f"{low:g} or more"
        end = "finite" if high == math.inf else f"{'below' if open_high else 'up to'} {high:g}"
        raise UserError(f"{name} is {number:g}; expected {start} and {end}")


def _real_number(value: Any) -> float | None:
    """A real scalar as Python's, None for anything else."""
    if isinstance(value, str | bytes) or callable(value):
        return None
    kind = np.asarray(value)
    real = jnp.issubdtype(kind.dtype, jnp.floating) or jnp.issubdtype(kind.dtype, jnp.integer)
    return float(kind) if real and kind.ndim == 0 else None


def check_decay(name: str, decay: Any, dtype: Any) -> None:
    """Raise UserError unless a moment of type ``dtype`` can have this decay, 0 to 1.

    A share smaller than half the spacing of the numbers is rounded away, and the moment stands still: 0.004 in
    bfloat16, hence decays up to 0.996, or 1. ``dtype`` None: any decay.
    """
    check(name, decay, 0, 1, open_high=False)
    check_dtype("state_dtype", dtype)
    if dtype is None or isinstance(decay, Tracer):
        return
    share, least = 1 - float(decay), float(jnp.finfo(dtype).eps) / 2
    if 0 < share < least:
        raise UserError(f"{name} is {decay:g}, which {jnp.dtype(dtype)} cannot hold; expected at most {1 - least:g}")


def check_function(name: str, value: Any, signature: str) -> None:
    """Raise UserError unless ``value`` is None or can be called."""
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise UserError(f"{name} is {value!r}; expected a function {signature}")


def check_transformation(name: str, value: Any) -> None:
    """Raise UserError unless ``value`` is None or an optax transformation."""
    if value is not None and not isinstance(value, optax.GradientTransformation):
        raise UserError(f"{name} is {value!r}; expected an optax transformation such as optax.scale_by_rms()")


def check_dtype(name: str, value: Any) -> None:
    """Raise UserError unless ``value`` is None or a floating type."""
    try:
        floating = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except (TypeError, ValueError):
        floating = False
    if not floating:
        raise UserError(f"{name} is {value!r}; expected a floating type such as jnp.bfloat16, or None")
