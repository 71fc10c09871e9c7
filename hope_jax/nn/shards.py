"""Memories that are set back every shard: time becomes batch (TNT, arXiv 2511.07343)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.memory.kernels import Impl
from hope_jax.memory.mesh import on_each
from hope_jax.nn.heads import over_heads
from hope_jax.types import Array, Count, Float, Int


def over_shards(
    head: Callable[..., Any],
    shared: tuple[Any, ...],
    own: tuple[Any, Any],
    position: Int[Array, ""] | np.ndarray,
    shard: int | None,
    impl: Impl,
    count: Count,
) -> Any:
    """``head(position, *shared, fast, tokens) -> (fast, found)`` of every head of every sequence (``over_heads``).

    ``own`` are fast weights [B,H,...] and tokens [B,H,T,...]. Memories that are set back every ``shard`` tokens carry
    nothing from one shard to the next: where it is known that whole shards come, all are read at the same time, as
    sequences of their own, and only the steps within a shard follow each other. None: no shards.
    """
    length = jax.tree.leaves(own[1])[0].shape[2]
    known = isinstance(position, np.ndarray) and count is None
    if shard is None or not known or position % shard or length % shard:
        return over_heads(head, shared, own, impl, (position,))
    return on_each(functools.partial(_side_by_side, head, shard, impl), shared, own)


def _side_by_side(head: Callable[..., Any], shard: int, impl: Impl, *given: Any) -> Any:
    """``over_shards`` of whole shards, on one device."""
    *shared, fast, tokens = given
    count = jax.tree.leaves(tokens)[0].shape[2] // shard
    # The start of a shard does not depend on the state, which is repeated for its shapes alone.
    fast = jax.tree.map(functools.partial(jnp.repeat, repeats=count, axis=0), fast)
    tokens = jax.tree.map(functools.partial(_apart, shard), tokens)
    start = functools.partial(head, np.zeros((), np.int32))
    ends, found = over_heads(start, tuple(shared), (fast, tokens), impl)
    last = jax.tree.map(lambda x: x[count - 1 :: count], ends)
    return last, jax.tree.map(functools.partial(_together, count), found)


def _apart(shard: int, x: Float[Array, "B H T *K"]) -> Float[Array, "N H S *K"]:
    """The shards of every sequence as sequences, N = B T / S, in the order of their time."""
    batch, heads, _, *features = x.shape
    return jnp.swapaxes(x.reshape(batch, heads, -1, shard, *features), 1, 2).reshape(-1, heads, shard, *features)


def _together(shards: int, x: Float[Array, "N H S *K"]) -> Float[Array, "B H T *K"]:
    """The reverse of ``_apart``."""
    _, heads, shard, *features = x.shape
    return jnp.swapaxes(x.reshape(-1, shards, heads, shard, *features), 1, 2).reshape(
        -1, heads, shards * shard, *features
    )
