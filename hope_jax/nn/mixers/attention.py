"""Causal softmax attention, full or over a sliding window, with a cache of static size.

``y = softmax(q k^T / sqrt(K)) v`` over the tokens up to the present one (Eq. 62), rotary positions, no biases: the
mixer of ``transformer_pp`` and of ``hope_attention`` (SPEC.md 2.8). With ``persistent`` every token also sees learned
vectors, whatever the window (Titans, arXiv 2501.00663, section 3.3).

The cache of full attention has as many slots as the state was made for. A call that would need more returns NaN, as a
traced program cannot raise: ask ``nn.room.room_left`` first, as ``generate`` does. A window has no such limit.
Read ``language_model.py`` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory.kernels import Impl
from hope_jax.nn.attend import Cache, FullCache, Prefix, WindowCache, attend, push
from hope_jax.nn.axes import Axes, conv_axes, dense_axes
from hope_jax.nn.layers import ShortConv, check_heads, dense, merge_heads, persistent_vectors, split_heads
from hope_jax.nn.rotary import RopeScaling, apply_rope
from hope_jax.nn.tokens import by_head, by_token
from hope_jax.types import Array, Count, Float, Int, Stream


class AttentionState(NamedTuple):
    """The cache, and the tails of the convolutions of the query, key and value streams, if there are any."""

    cache: Cache
    tails: tuple[Float[Array, "B tail D"], ...]


@dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention.

    Attributes:
      heads: at least 1, of an even number of features each (rotary positions pair them).
      key_heads: heads of keys and values, a divisor of ``heads``: each serves a group of query heads (grouped-query
        attention, arXiv 2305.13245), and caches are smaller by that factor. None: as many as ``heads``.
      window: tokens a token sees, itself included, at least 1; None: all earlier ones.
      conv: width of causal convolutions on the inputs of the query, key and value maps, as Hope has them; 0: none.
      rope_base: the slowest rotary feature turns by about ``1 / rope_base`` per token.
      rope_scaling: slower rotary features for contexts longer than in training; None: none.
      impl: how the convolutions are computed, see ``memory.kernels``.
      persistent: learned vectors that go through the key and value maps, without convolution and position; 0: none.
    """

    heads: int
    window: int | None = None
    conv: int = 0
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    impl: Impl = "auto"
    key_heads: int | None = None
    persistent: int = 0

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
        whole("persistent", self.persistent, 0, "vectors that every token sees; 0: none")
        if self.rope_base <= 1:
            raise UserError(f"Attention got rope_base={self.rope_base}; it must exceed 1 (10000 is usual).")

    def build(self, width: int, dtype: DTypeLike) -> "Attention":
        """The mixer for a model of ``width`` features. Raises UserError if the heads do not divide it evenly."""
        check_heads(self.heads, width, even=True)
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
        self.persistent = persistent_vectors(self, c.persistent)

    @nn.nowrap
    def axes(self) -> Axes:
        maps = {name: dense_axes("embed", "all_heads") for name in ("query", "key", "value")}
        convs = {f"convs_{i}": conv_axes("embed") for i in range(3)} if self.config.conv else {}
        vectors = {"persistent": ("persistent", "embed")} if self.config.persistent else {}
        return {**maps, "out": dense_axes("all_heads", "embed"), **convs, **vectors}

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> AttentionState:
        """Nothing seen. ``capacity``: tokens a full cache can hold (a window needs ``window - 1`` slots instead)."""
        c = self.config
        kind, slots = (FullCache, capacity) if c.window is None else (WindowCache, c.window - 1)
        empty = jnp.zeros((batch, c.key_heads or c.heads, slots, self.width // c.heads), self.dtype)
        tails = 3 * (jnp.zeros((batch, c.conv - 1, self.width), self.dtype),) if c.conv else ()
        return AttentionState(kind(empty, empty, jnp.zeros((), jnp.int32)), tails)

    def __call__(self, x: Stream, state: AttentionState, count: Count = None) -> tuple[Stream, AttentionState]:
        y, state = self.mix(x, state, count, self.persistent)
        return self.out(y), state

    def mix(
        self, x: Stream, state: AttentionState, count: Count, persistent: Float[Array, "P D"] | None
    ) -> tuple[Stream, AttentionState]:
        """The heads' results side by side, before the output map. Every token sees ``persistent``, too."""
        streams, tails = [x] * 3, ()
        if self.convs:
            convolved = (conv(x, tail, count) for conv, tail in zip(self.convs, state.tails, strict=True))
            streams, tails = zip(*convolved, strict=True)
            streams = list(map(by_token, streams))
        q, k, v = self.project(streams, state.cache.position)
        seen, kept = push(state.cache, k, v, count)
        y = attend(q, seen, self.config.window, self.prefix(persistent))
        if isinstance(kept, FullCache):
            y = jnp.where(kept.position <= kept.keys.shape[2], y, jnp.nan)
        return merge_heads(y), AttentionState(kept, tails)

    def prefix(self, vectors: Float[Array, "P D"] | None) -> Prefix | None:
        """Keys and values of the vectors, which every query sees. They have no position."""
        if vectors is None:
            return None
        heads = self.config.key_heads or self.config.heads
        return Prefix(*(split_heads(to(vectors[None]), heads)[0] for to in (self.key, self.value)))

    def project(self, streams: Sequence[Float[Array, "_ T D"]], position: Int[Array, ""] | np.ndarray) -> list[Array]:
        """Queries, keys and values ``[B,H,T,K]`` of three streams, queries and keys turned to absolute positions."""
        pairs = zip((self.query, self.key, self.value), streams, strict=True)
        size = self.width // self.config.heads
        q, k, v = (to(x).reshape(*x.shape[:2], -1, size) for to, x in pairs)
        at = jnp.arange(q.shape[1]) + position
        q, k = (apply_rope(z, at, self.config.rope_base, self.config.rope_scaling) for z in (q, k))
        return [by_head(jnp.swapaxes(z, 1, 2)) for z in (q, k, v)]
