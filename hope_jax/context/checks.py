"""What ``context.py`` asks of a state before it reads, and of what comes out."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.fast import ContextState, InterruptedState
from hope_jax.nn.mixers.attention import room_left
from hope_jax.storage.digests import first_difference, kinds
from hope_jax.types import Array, Bool


def same_kinds(state: Any, expected: Any) -> None:
    """Raise UserError unless all arrays have the expected dtypes and shapes."""
    if different := first_difference(kinds(state), kinds(expected)):
        name, there, here = different
        raise UserError(f"the state is of another model, batch size or dtype: {name} is {there}; expected {here}")


def require_finite(finite: Bool[Array, ""]) -> None:
    """Raise UserError if ``finite`` is known and false."""
    if not isinstance(finite, Tracer) and not finite:
        raise UserError(
            "this made losses or weights that are not finite, so nothing was learned: the parameters or the state are "
            "damaged, or the rate of a level is too high"
        )


def is_finite(*trees: Any) -> Bool[Array, ""]:
    """Whether all numbers are."""
    return jnp.isfinite(sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(trees)))


def check_room(state: ContextState | InterruptedState, tokens: Array) -> None:
    """Raise UserError where an attention cache is known to be too small for ``tokens``."""
    if isinstance(tokens, Tracer) or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        return
    room = room_left(state.blocks)
    if room is not None and tokens.shape[1] > room:
        raise UserError(
            f"{tokens.shape[1]} tokens do not fit: the attention cache has room for {room} more; make the state with "
            "a larger capacity (context.start), or use a model without full attention"
        )
