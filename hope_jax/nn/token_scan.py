"""A scan over single tokens: for mixers whose keys or gates depend on the running state, and so have no chunk form.

Read ``mixers/lstm.py`` next, then ``mixers/srwm.py``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.kept import scan_pieces
from hope_jax.types import Array, Count

BLOCK = 64
"""Tokens per block. The backward pass keeps the state at the start of each block, and computes the blocks again."""


def scan_tokens(
    step: Callable[[Any, Any], tuple[Any, Any]], state: Any, tokens: Any, count: Count = None
) -> tuple[Any, Any]:
    """Run ``step`` over T tokens, one after another: ``(state, outputs)``.

    For its backward pass it keeps ``T / BLOCK + BLOCK`` states instead of T.

    Args:
      step: ``(state, token) -> (state, output)``; leaves of token and output are [B,...].
      state: pytree carried along.
      tokens: pytree, leaves [B,T,...].
      count: only the first ``count`` tokens are real; the others leave the state as it is. None: all are real.

    Returns:
      The state after the tokens, and the outputs, leaves [B,T,...].
    """
    time = jax.tree.leaves(tokens)[0].shape[1]
    size = min(time, BLOCK)
    extra, real = -time % size, time if count is None else count

    def one(state: Any, each: Any) -> tuple[Any, Any]:
        index, token = each
        after, output = step(state, token)
        if extra or count is not None:
            after = jax.tree.map(lambda new, old: jnp.where(index < real, new, old), after, state)
        return after, output

    each = jnp.arange(time + extra).reshape(-1, size), jax.tree.map(functools.partial(_in_blocks, size), tokens)
    remat = functools.partial(jax.checkpoint, prevent_cse=False)
    state, outputs = scan_pieces(functools.partial(lax.scan, one), state, each, remat)
    return state, jax.tree.map(lambda y: jnp.moveaxis(y.reshape(-1, *y.shape[2:])[:time], 0, 1), outputs)


def _in_blocks(size: int, x: Array) -> Array:
    """[B,T,...] -> [T/size, size, B, ...], zeros after the last token."""
    padded = jnp.pad(jnp.moveaxis(x, 1, 0), [(0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, size, *padded.shape[1:])
