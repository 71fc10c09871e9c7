"""Titans, memory as context (MAC): attention within a segment, to its tokens and to what a memory recalls for them.

For token j of a segment, with M_s the memory as it was at the start of the segment:

    h_j = norm(M_s(q(u_j)))                                     recalled
    y_j = attention of u_j to [P | h_1, u_1, ..., h_j, u_j]
    M   is written with key and value of y_j
    o_j = W_o(norm(y_j) * sigmoid(norm(M(q(y_j)))))             M after the write of y_j

(arXiv 2501.00663, Eq. 21-25; the norm of h is a choice.) P are learned vectors. Nothing but the memory and the tails of
its convolutions goes from one segment to the next. As printed, two steps see the future: u_j attends to all of h, which
stands before the segment, and o_j reads the memory after the whole segment. Here h_j has the position of u_j, and o_j
reads the memory as token j left it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, whole
from hope_jax.memory.architectures import Weights
from hope_jax.memory.kernels import products_of
from hope_jax.memory.rule import Fast
from hope_jax.nn import layers
from hope_jax.nn.attend import FullCache, attend, push
from hope_jax.nn.axes import Axes, norm_axes
from hope_jax.nn.heads import over_heads
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig, MemoryMixerState
from hope_jax.nn.mixers.titans_mag import AttentionAndMemory, built, check_parts
from hope_jax.nn.segments import START, Position, by_segment
from hope_jax.types import Array, Count, Float, Stream


@dataclass(frozen=True)
class TitansMACConfig:
    """Attention over segments, and a memory.

    Attributes:
      attention, memory: the two parts, without persistent vectors of their own; attention without window (a segment is
        its window) and convolutions; a memory that is read after the write, as o_j reads what j has written (Eq. 25).
      persistent: learned vectors that every token sees; 0: none.
      segment: tokens of a segment, a multiple of the anchor period of the memory's rule.
    """

    attention: AttentionConfig
    memory: MemoryMixerConfig
    persistent: int = 16
    segment: int = 512

    def __post_init__(self) -> None:
        check_parts(self)
        whole("segment", self.segment, 1, "tokens")
        period = self.memory.rule.period
        if self.memory.rule.gradient_at == "anchor" and self.segment % period:
            raise UserError(f"segment is {self.segment}; give a multiple of the period of the memory's rule, {period}")
        if self.memory.rule.read != "after":
            came = f"the read of the memory's rule is {self.memory.rule.read!r}"
            raise UserError(f"{came}; set it to 'after', a token reads what it has written")
        if self.attention.window is not None:
            raise UserError(f"attention.window is {self.attention.window}; set it to None, a segment is the window")
        if self.attention.conv:
            raise UserError(f"attention.conv is {self.attention.conv}; set it to 0, segments share no convolution")

    def build(self, width: int, dtype: DTypeLike) -> "TitansMAC":
        """The mixer for a model of ``width`` features. Raises UserError where the heads of a part do not divide it."""
        return built(TitansMAC(self, width, dtype))


class TitansMACState(NamedTuple):
    """State between two tokens.

    Attributes:
      frozen: the memory at the start of the segment, leaves [B,H,...].
      fast: the memory now.
      recall_tail: tail of the convolution of the queries of recall, [B,tail,D].
      tails: tails of the convolutions of the queries, keys and values of y.
      keys, values: those of the segment, of h and u of each token in turn; zero where nothing was read.
      position: tokens read since a segment started.
    """

    frozen: Weights
    fast: Fast
    recall_tail: Float[Array, "B tail D"]
    tails: tuple[Array, ...]
    keys: Float[Array, "B H slots K"]
    values: Float[Array, "B H slots K"]
    position: Position


class TitansMAC(AttentionAndMemory):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``; see the module docstring."""

    config: TitansMACConfig

    def setup(self) -> None:
        super().setup()
        self.norm_recalled = layers.RMSNorm(self.dtype)

    @nn.nowrap
    def axes(self) -> Axes:
        return super().axes() | {"norm_recalled": norm_axes()}

    def init_state(self, batch: int, capacity: int) -> TitansMACState:
        """A fresh sequence: the memory at its start. ``capacity`` is unused: the cache holds one segment."""
        tails, fast, _ = self.memory.started(batch, None)
        c = self.config.attention
        shape = (batch, c.key_heads or c.heads, 2 * self.config.segment, self.width // c.heads)
        empty = jnp.zeros(shape, self.dtype)
        return TitansMACState(fast.running, fast, tails[0], tails, empty, empty, START)

    def __call__(self, u: Stream, state: TitansMACState, count: Count = None) -> tuple[Stream, TitansMACState]:
        state, y = by_segment(self, TitansMAC._piece, state, u, state.position, self.config.segment, count)
        return y, state

    def _piece(
        self, state: TitansMACState, u: Stream, position: Position, count: Count
    ) -> tuple[TitansMACState, Stream]:
        """Read tokens of one segment, after ``position`` earlier ones of it."""
        queries, recall_tail = self.memory.queries(u, state.recall_tail, count)
        y, keys, values = self._attend(u, self._recalled(state.frozen, queries), state, position, count)
        found, (tails, fast, _) = self.memory.read(y, MemoryMixerState(state.tails, state.fast, position), count)
        position = (position + (u.shape[1] if count is None else count)) % self.config.segment
        state = TitansMACState(state.frozen, fast, recall_tail, tails, keys, values, position)
        return self._left(state), self.out(y, layers.merge_heads(found.reads))

    def _left(self, state: TitansMACState) -> TitansMACState:
        """After the last token of a segment, the memory to recall from is frozen and the cache is emptied."""
        ended = state.position == 0

        def set_back(new: Array, old: Array) -> Array:
            return (new if ended else old) if isinstance(ended, np.bool_) else jnp.where(ended, new, old)

        frozen = jax.tree.map(set_back, state.fast.running, state.frozen)
        keys, values = (set_back(jnp.zeros_like(x), x) for x in (state.keys, state.values))
        return state._replace(frozen=frozen, keys=keys, values=values, position=jnp.asarray(state.position, jnp.int32))

    def _recalled(self, frozen: Weights, queries: Float[Array, "B H T K"]) -> Stream:
        """The answer of the frozen memory to each token."""
        c = self.config.memory

        def head(weights: Weights, queries: Array) -> Array:
            return c.rule.apply(weights, queries, products_of(c.impl))

        return self.norm_recalled(layers.merge_heads(over_heads(head, (), (frozen, queries), c.impl)))

    def _attend(
        self, u: Stream, h: Stream, state: TitansMACState, position: Position, count: Count
    ) -> tuple[Stream, Array, Array]:
        """Attention of the tokens; and the keys and values of the segment, theirs included."""
        both = jnp.concatenate([h, u])
        q, k, v = self.attention.project((u, both, both), position)
        k, v = (_in_turn(x) for x in (k, v))
        cache = FullCache(state.keys, state.values, jnp.asarray(2 * position))
        seen, kept = push(cache, k, v, None if count is None else 2 * count)
        y = attend(q, seen, None, self.attention.prefix(self.persistent), each=2)
        return layers.merge_heads(y), kept.keys, kept.values


def _in_turn(x: Float[Array, "both H T K"]) -> Float[Array, "B H slots K"]:
    """Tokens of both halves of the batch in turn: one of the first, the same of the second, the next of the first."""
    first, second = jnp.split(x, 2)
    return jnp.stack([first, second], axis=3).reshape(*first.shape[:2], -1, first.shape[3])
