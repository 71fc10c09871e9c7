"""Causal softmax attention, full or over a sliding window, with a cache of static size.

``y = softmax(q k^T / sqrt(K)) v`` over the tokens up to the present one (Eq. 62), rotary positions, no biases: the
mixer of ``transformer_pp`` and of ``hope_attention`` (SPEC.md 2.8).

The cache of full attention has as many slots as the state was made for. A call that would need more returns NaN, as a
traced program cannot raise: ask ``room_left`` first, as ``generate`` does. A window has no such limit.
Read ``language_model.py`` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory.kernels import Impl
from hope_jax.nn.axes import Axes, conv_axes, dense_axes
from hope_jax.nn.layers import ShortConv, dense, last_of, merge_heads, param_dtype
from hope_jax.nn.rotary import RopeScaling, apply_rope
from hope_jax.types import Array, Bool, Count, Float, Int, Stream


class FullCache(NamedTuple):
    """Keys and values of tokens 0, 1, ... in slots 0, 1, ...; ``position`` tokens have been seen."""

    keys: Float[Array, "B H slots K"]
    values: Float[Array, "B H slots K"]
    position: Int[Array, ""]


class WindowCache(NamedTuple):
    """Keys and values of the last ``window - 1`` tokens, oldest first; ``position`` tokens have been seen."""

    keys: Float[Array, "B H slots K"]
    values: Float[Array, "B H slots K"]
    position: Int[Array, ""]


Cache = FullCache | WindowCache


class AttentionState(NamedTuple):
    """The cache, and the tails of the convolutions of the query, key and value streams, if there are any."""

    cache: Cache
    tails: tuple[Float[Array, "B tail D"], ...]


def _is_full(node: Any) -> bool:
    return isinstance(node, FullCache)


def _full_caches(state: Any) -> list[FullCache]:
    return list(filter(_is_full, jax.tree.leaves(state, is_leaf=_is_full)))


def room_left(state: Any) -> int | None:
    """Tokens that every full cache inside ``state`` (any pytree, layers stacked or not) can still take; None: no limit.

    Reads the positions, so it waits for the device: call it between programs, not inside one.
    """
    return min((c.keys.shape[-2] - int(jnp.max(c.position)) for c in _full_caches(state)), default=None)


def slots_of(state: Any) -> int | None:
    """Tokens that the full caches inside ``state`` hold at most; None: there are none."""
    return min((cache.keys.shape[-2] for cache in _full_caches(state)), default=None)


def without_empty_slots(state: Any) -> Any:
    """``state`` with full caches cut to the tokens they hold: what a file has to keep. Waits for the device."""

    def cut(node: Any) -> Any:
        if not isinstance(node, FullCache):
            return node
        held = int(jnp.max(node.position))
        return node._replace(keys=node.keys[..., :held, :], values=node.values[..., :held, :])

    return jax.tree.map(cut, state, is_leaf=_is_full)


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


def attend(q: Float[Array, "B H T K"], cache: Cache, window: int | None) -> Float[Array, "B H T K"]:
    """The last T tokens of ``cache`` (positions ``cache.position - T ...``) look at their past.

    A full cache is filled from slot 0; a window's slots end with the present tokens, and slots of negative positions
    hold nothing. Queries go in blocks, and a block looks only at slots that can matter: whatever the position, queries
    before b see no slot from ``slots - T + b`` on.
    """
    time, slots = q.shape[2], cache.keys.shape[2]
    first_slot = 0 if window is None else cache.position - slots
    query_at, slot_at = cache.position - time + jnp.arange(time), first_slot + jnp.arange(slots)
    block, blocks = max(128, -(-time // 16)), []
    for a in range(0, time, block):
        b = min(a + block, time)
        end = slots - time + b
        start = 0 if window is None else max(0, end - (b - a) - window + 1)
        age = query_at[a:b, None] - slot_at[None, start:end]
        visible = (age >= 0) & (age < (window or slots)) & (slot_at[None, start:end] >= 0)
        keys, values = cache.keys[:, :, start:end], cache.values[:, :, start:end]
        blocks.append(_softmax_block(q[:, :, a:b], keys, values, visible))
    return jnp.concatenate(blocks, axis=2)


def _grouped_attend(q: Float[Array, "B H T K"], cache: Cache, window: int | None) -> Float[Array, "B H T K"]:
    """``attend`` where each head of the cache serves a group of heads of q that follow each other."""
    batch, heads, time, size = q.shape
    key_heads = cache.keys.shape[1]
    if heads == key_heads:
        return attend(q, cache, window)
    groups = q.reshape(batch, key_heads, heads // key_heads, time, size)
    return jax.vmap(lambda q: attend(q, cache, window), in_axes=2, out_axes=2)(groups).reshape(q.shape)


def _push(cache: Cache, k: Float[Array, "B H T K"], v: Float[Array, "B H T K"], count: Count) -> tuple[Cache, Cache]:
    """The cache with T more tokens in it: as those tokens look at it, and as it is kept for the next call."""
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


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention.

    heads: at least 1, of an even number of features each (rotary positions pair them).
    key_heads: heads of keys and values, a divisor of ``heads``: each serves a group of queries' heads (grouped-query
      attention, arXiv 2305.13245), and caches are smaller by that factor. None: as many as ``heads``.
    window: tokens a token sees, itself included, at least 1; None: all earlier ones.
    conv: width of causal convolutions on the inputs of the query, key and value maps, as Hope has them; 0: none.
    rope_base: the slowest rotary feature turns by about ``1 / rope_base`` per token.
    rope_scaling: slower rotary features for contexts longer than those of the training; None: none.
    impl: how the convolutions are computed, see ``memory.kernels``.
    """

    heads: int
    window: int | None = None
    conv: int = 0
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    impl: Impl = "auto"
    key_heads: int | None = None

    def __post_init__(self):
        check_choices(self)
        whole("heads", self.heads)
        if self.key_heads is not None:
            whole("key_heads", self.key_heads)
            if self.heads % self.key_heads:
                raise UserError(f"key_heads is {self.key_heads}; expected a divisor of the {self.heads} heads")
        if self.window is not None:
            whole("window", self.window, 1, "tokens; None: all")
        whole("conv", self.conv, 0, "tokens that a convolution sees; 0: no convolutions")
        if self.rope_base <= 1:
            raise UserError(f"Attention got rope_base={self.rope_base}; it must exceed 1 (10000 is usual).")

    def build(self, width: int, dtype: DTypeLike) -> "Attention":
        """The mixer for a model of ``width`` features. Raises UserError if the heads do not divide it evenly."""
        if width % (2 * self.heads):
            choose = f"choose a width that is a multiple of {2 * self.heads} (heads of an even number of features)"
            raise UserError(f"Attention with heads={self.heads} cannot split width={width}; {choose}.")
        return Attention(self, width, dtype)


class Attention(nn.Module):
    """``(x[B,T,D], state) -> (y[B,T,D], state)``; see the module docstring."""

    config: AttentionConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        c = self.config
        of_keys = self.width // c.heads * (c.key_heads or c.heads)
        sizes = (self.width, of_keys, of_keys, self.width)
        self.query, self.key, self.value, self.out = (dense(size, self.dtype) for size in sizes)
        self.convs = [ShortConv(c.conv, self.dtype, impl=c.impl) for _ in range(3)] if c.conv else []

    @nn.nowrap
    def axes(self) -> Axes:
        maps = {name: dense_axes("embed", "all_heads") for name in ("query", "key", "value")}
        convs = {f"convs_{i}": conv_axes("embed") for i in range(3)} if self.config.conv else {}
        return {**maps, "out": dense_axes("all_heads", "embed"), **convs}

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> AttentionState:
        """Nothing seen. ``capacity``: tokens a full cache can hold (a window needs ``window - 1`` slots instead)."""
        c = self.config
        kind, slots = (FullCache, capacity) if c.window is None else (WindowCache, c.window - 1)
        empty = jnp.zeros((batch, c.key_heads or c.heads, slots, self.width // c.heads), self.dtype)
        tails = 3 * (jnp.zeros((batch, c.conv - 1, self.width), self.dtype),) if c.conv else ()
        return AttentionState(kind(empty, empty, jnp.zeros((), jnp.int32)), tails)

    def __call__(self, x: Stream, state: AttentionState, count: Count = None) -> tuple[Stream, AttentionState]:
        streams, tails = [x] * 3, ()
        if self.convs:
            convolved = (conv(x, tail, count) for conv, tail in zip(self.convs, state.tails, strict=True))
            streams, tails = zip(*convolved, strict=True)
        q, k, v = self._project(streams, state.cache.position)
        seen, kept = _push(state.cache, k, v, count)
        y = _grouped_attend(q, seen, self.config.window)
        if isinstance(kept, FullCache):
            y = jnp.where(kept.position <= kept.keys.shape[2], y, jnp.nan)
        return self.out(merge_heads(y)), AttentionState(kept, tails)

    def _project(self, streams: Sequence[Stream], position: Int[Array, ""]) -> list[Array]:
        """Queries, keys and values ``[B,H,T,K]``, queries and keys turned to their absolute positions."""
        pairs = zip((self.query, self.key, self.value), streams, strict=True)
        size = self.width // self.config.heads
        q, k, v = (to(x).reshape(*x.shape[:2], -1, size) for to, x in pairs)
        at = position + jnp.arange(q.shape[1])
        q, k = (apply_rope(z, at, self.config.rope_base, self.config.rope_scaling) for z in (q, k))
        return [jnp.swapaxes(z, 1, 2) for z in (q, k, v)]
