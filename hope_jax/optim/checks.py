"""Mistakes in hyper-parameters and parameters are refused at construction or in ``init``, by name."""

import math
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr, tree_leaves_with_path

from hope_jax.errors import UserError


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in words for a message."""
    return f"parameter {keystr(path)}" if path else "the only parameter"


def check_leaves(params: Any, name: str) -> None:
    """Raise UserError for a leaf that is no floating-point array."""
    for path, leaf in tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            what = getattr(leaf, "dtype", type(leaf).__name__)
            raise UserError(
                f"{name} got {leaf_name(path)} of type {what}; expected "
                "floating-point arrays. Keep others out with optax.masked or optax.partition"
            )


def check(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = True
) -> None:
    """Raise UserError unless ``value`` is a number from ``low`` to ``high``; an open end is not included.

    A traced value (``optax.inject_hyperparams`` inside ``jit``) or a schedule is not known yet and passes.
    """
    if callable(value) or isinstance(value, Tracer):
        return
    if value is None or isinstance(value, str | bytes | bool) or jnp.ndim(value) != 0:
        raise UserError(f"{name} is {value!r}; expected a number")
    number = float(value)
    if not (low < number < high or (number == low and not open_low) or (number == high and not open_high)):
        start, end = f"above {low:g}" if open_low else f"{low:g} or more", "below" if open_high else "up to"
        raise UserError(f"{name} is {number:g}; expected {start} and {end} {high:g}")
