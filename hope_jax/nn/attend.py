"""Softmax attention as functions: keys and values go into a cache, and queries look at it.

Used by every mixer with attention, see ``mixers/attention.py``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hope_jax.errors import UserError
from hope_jax.nn.heads import copies
from hope_jax.nn.layers import last_of, param_dtype
from hope_jax.nn.tokens import by_head
from hope_jax.types import Array, Bool, Count, Float, Int


class FullCache(NamedTuple):
    """Keys and values of tokens 0, 1, ... in slots 0, 1, ...; ``position`` tokens have been seen."""

    keys: Float[Array, "B H slots K"]
    values: Float[Array, "B H slots K"]
    position: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.keys.shape[-2]

    def without_empty_slots(self) -> "FullCache":
        """The cache of the tokens that were read, see ``nn/room.py``."""
        held = int(jnp.max(self.position))
        return FullCache(self.keys[..., :held, :], self.values[..., :held, :], self.position)


class WindowCache(NamedTuple):
    """Keys and values of the last ``window - 1`` tokens, oldest first; ``position`` tokens have been seen."""

    keys: Float[Array, "B H slots K"]
    values: Float[Array, "B H slots K"]
    position: Int[Array, ""]


Cache = FullCache | WindowCache


def _softmax_block(
    q: Float[Array, "B H t K"], k: Float[Array, "B H s K"], v: Float[Array, "B H s K"], visible: Bool[Array, "t s"]
) -> Float[Array, "B H t K"]:
    """Attention of some queries to some keys, statistics in at least float32.

    Dividing after the product with the values, and holding the maximum constant (it cancels), takes about half the time
    of the gradient of a softmax on a CPU.
    """
    wide = param_dtype(q.dtype)
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=wide)
    scores = jnp.where(visible[None, None], scores * q.shape[-1] ** -0.5, jnp.finfo(wide).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    mixed = jnp.einsum("bhts,bhsk->bhtk", weights.astype(v.dtype), v, preferred_element_type=wide)
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(v.dtype)


class Prefix(NamedTuple):
    """Keys and values that every query sees."""

    keys: Float[Array, "H P K"]
    values: Float[Array, "H P K"]


def _behind(prefix: Prefix, keys: Array, values: Array, visible: Array) -> tuple[Array, Array, Array]:
    """Keys, values, and which of them each query sees, with the prefix in front."""
    pairs = zip(prefix, (keys, values), strict=True)
    keys, values = (jnp.concatenate([jnp.broadcast_to(p, (len(x), *p.shape)), x], axis=2) for p, x in pairs)
    seen = jnp.ones((len(visible), prefix.keys.shape[1]), bool)
    return keys, values, jnp.concatenate([seen, visible], axis=1)


def attend(
    q: Float[Array, "B H T K"], cache: Cache, window: int | None, prefix: Prefix | None = None, each: int = 1
) -> Float[Array, "B H T K"]:
    """The last T tokens of ``cache`` (positions ``cache.position - T ...``) look at their past, and at ``prefix``.

    Each head of the cache serves a group of heads of q that follow each other; where devices share the heads of a
    group, each has the keys and values of its heads. ``each``: slots of a full cache per token; a
    token sees all of its own, and ``cache.position`` counts slots.
    """
    batch, heads, time, size = q.shape
    if (times := copies(cache.keys.shape[1], heads)) > 1:
        keys, values = (by_head(jnp.repeat(x, times, axis=1)) for x in (cache.keys, cache.values))
        cache = cache._replace(keys=keys, values=values)
        if prefix is not None:
            prefix = Prefix(*(jnp.repeat(x, times, axis=0) for x in prefix))
    key_heads = cache.keys.shape[1]
    if heads == key_heads:
        return _attend(q, cache, window, prefix, each)
    groups = q.reshape(batch, key_heads, heads // key_heads, time, size)
    of_group = functools.partial(_attend, cache=cache, window=window, prefix=prefix, each=each)
    return jax.vmap(of_group, in_axes=2, out_axes=2)(groups).reshape(q.shape)


def _attend(
    q: Float[Array, "B H T K"], cache: Cache, window: int | None, prefix: Prefix | None, each: int
) -> Float[Array, "B H T K"]:
    """``attend`` where q and the cache have equally many heads.

    A full cache is filled from slot 0; a window's slots end with the present tokens, and slots of negative positions
    hold nothing. Queries are computed in blocks, and a block looks only at slots that it can see: at every position,
    queries before b see no slot from ``slots - each * (T - b)`` on.
    """
    time, slots = q.shape[2], cache.keys.shape[2]
    first_slot = 0 if window is None else cache.position - slots
    query_at = cache.position - 1 - each * jnp.arange(time)[::-1]
    slot_at = first_slot + jnp.arange(slots)
    block, blocks = max(128, -(-time // 16)), []
    for a in range(0, time, block):
        b = min(a + block, time)
        end = slots - each * (time - b)
        start = 0 if window is None else max(0, end - (b - a) - window + 1)
        age = query_at[a:b, None] - slot_at[None, start:end]
        visible = (age >= 0) & (age < (window or slots)) & (slot_at[None, start:end] >= 0)
        keys, values = cache.keys[:, :, start:end], cache.values[:, :, start:end]
        seen = (keys, values, visible) if prefix is None else _behind(prefix, keys, values, visible)
        blocks.append(_softmax_block(q[:, :, a:b], *seen))
    return jnp.concatenate(blocks, axis=2)


def push(cache: Cache, k: Float[Array, "B H T K"], v: Float[Array, "B H T K"], count: Count) -> tuple[Cache, Cache]:
    """The cache with T more tokens, twice: as those tokens look at it, and as it is kept for the next call."""
    time = k.shape[2]
    end, position = cache.position + time, cache.position + (time if count is None else count)
    pairs = ((cache.keys, k), (cache.values, v))
    if isinstance(cache, WindowCache):
        keys, values = (jnp.concatenate(pair, axis=2) for pair in pairs)
        kept_keys, kept_values = (last_of(x, time, count, axis=2) for x in (keys, values))
        return WindowCache(keys, values, end), WindowCache(kept_keys, kept_values, position)
    slots = cache.keys.shape[2]
    if count is None and time > slots:
        raise UserError(f"Attention got {time} tokens and a cache of {slots}; make the state with a larger capacity.")
    if count is not None:  # room for the padding after the last token; it leaves no trace
        real = (jnp.arange(time) < count)[None, None, :, None]
        pairs = [(jnp.pad(old, ((0, 0), (0, 0), (0, time), (0, 0))), jnp.where(real, new, 0)) for old, new in pairs]
    keys, values = (jax.lax.dynamic_update_slice_in_dim(*pair, cache.position, axis=2) for pair in pairs)
    return FullCache(keys, values, end), FullCache(keys[:, :, :slots], values[:, :, :slots], position)
