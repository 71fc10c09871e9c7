"""For mixers that do something at the end of a segment: a call is read in pieces that each lie inside one segment.

Used by ``mixers/titans_mac.py`` and ``mixers/memory_caching.py``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hope_jax.types import Array, Count, Int, Stream

Position = Int[Array, ""] | np.ndarray
Piece = Callable[[Any, Any, Stream, Position, Count], tuple[Any, Any]]
"""``piece(module, state, u, position, count) -> (state, y)`` of tokens of one segment, ``position`` tokens after its
start: a method of a mixer. The state must keep its shapes and dtypes, and inactive tokens must leave no trace in it.
Leaves of y are [B,T,...]."""

START = np.zeros((), np.int32)


def by_segment(
    module: nn.Module, piece: Piece, state: Any, u: Stream, position: Position, segment: int, count: Count
) -> tuple[Any, Any]:
    """``piece`` over all tokens of a call, one segment after another: the state after them, and the outputs.

    ``position`` is that of the first token, counted from the start of any segment. A numpy value (a fresh sequence) is
    known to the compiler, and whole segments then need no padding; the result is the same.
    """
    time = u.shape[1]
    known = isinstance(position, np.ndarray) and position % segment == 0
    if known and time <= segment:
        return piece(module, state, u, START, count)
    if known and time % segment == 0 and count is None:
        return _loop(module, _whole(piece), state, u, segment)
    position = jnp.asarray(position % segment, jnp.int32)
    if time == 1:
        return piece(module, state, u, position, count)
    return _anywhere(module, piece, state, u, position, segment, count)


def in_pieces(function: Callable[[Any], Array], size: int, tokens: Any) -> Array:
    """``function`` of all tokens, leaves [B,T,...], for ``size`` tokens at a time; it looks at each token alone."""
    time = jax.tree.leaves(tokens)[0].shape[1]
    if time <= size:
        return function(tokens)
    pieces = jax.tree.map(lambda x: _cut(_longer(x, -time % size), size), tokens)
    return _joined(jax.lax.map(function, pieces))[:, :time]


def _whole(piece: Piece) -> Callable[..., Any]:
    """``piece`` of a whole segment."""

    def body(module: nn.Module, state: Any, u: Stream) -> tuple[Any, Any]:
        return piece(module, state, u, START, None)

    return body


def _loop(module: nn.Module, body: Callable[..., Any], state: Any, u: Stream, size: int, *each: Array) -> Any:
    """``body`` of one piece of ``size`` tokens after another."""
    fixed: dict[str, Any] = dict(variable_broadcast="params", split_rngs={"params": False})
    loop = nn.scan(body, **fixed, check_constancy_invariants=module.is_initializing())
    state, y = loop(module, jax.tree.map(jnp.asarray, state), _cut(u, size), *each)
    return state, jax.tree.map(_joined, y)


def _cut(x: Array, size: int) -> Array:
    """[B, T, ...] -> [pieces, B, size, ...]."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 0, 1)


def _joined(y: Array) -> Array:
    """[pieces, B, size, ...] -> [B, T, ...]."""
    y = jnp.swapaxes(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])


def _anywhere(
    module: nn.Module, piece: Piece, state: Any, u: Stream, position: Int[Array, ""], segment: int, count: Count
) -> tuple[Any, Any]:
    """Pieces that end with the segments: the first completes the current one, each of the others starts one."""
    time, real = u.shape[1], u.shape[1] if count is None else count
    size = min(time, segment)
    others = -(-(time - 1) // size)  # the first piece has at least one token
    first = jnp.minimum(segment - position, real)
    counts = jnp.concatenate([first[None], jnp.clip(real - first - size * jnp.arange(others), 0, size)])
    counts, positions = (x.astype(jnp.int32) for x in (counts, (position + jnp.cumsum(counts) - counts) % segment))
    rest = jax.lax.dynamic_slice_in_dim(_longer(u, others * size), first, others * size, axis=1)
    pieces = jnp.concatenate([u[:, :size], rest], axis=1)
    state, y = _loop(module, piece, state, pieces, size, positions, counts)

    def placed(y: Array) -> Array:
        room = _longer(y[:, :size], others * size)
        return jax.lax.dynamic_update_slice_in_dim(room, y[:, size:], first, axis=1)[:, :time]

    return state, jax.tree.map(placed, y)


def _longer(x: Array, more: int) -> Array:
    """[B, T, ...] -> [B, T + more, ...], zeros at the end."""
    return jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)])
