"""Memory caching, arXiv 2602.24281: a copy of the memory is kept at the end of every segment.

    y_t = g_0 M_t(q_t) + sum_i g_i M_i(q_t)        g = softmax of u_t^T W^T m_t, u_t^T W^T m_i over the segments i

M_t is the memory now, M_i the memory at the end of segment i, and m_i the mean of the mixer's inputs u in segment i.
A token asks every memory (the paper's gated residual memory, Eq. 9-10). The answer of a memory has a large weight where
the mean of its segment is like what the token looks for, W u_t. As printed, m_t is the mean of the whole present
segment, and so sees the future; here it is the mean of the tokens up to t. Scores are divided by the root of the width,
which W can undo, so that no memory has all the weight at the start. The heads share the weights g.

Memories start a segment from the end of the one before, or all anew (``Rule.shard``). The state grows with the text:
it has a slot for every segment that ends before the last token that it was made for.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, whole
from hope_jax.memory.architectures import Weights
from hope_jax.memory.kernels import products_of
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.heads import over_heads
from hope_jax.nn.mixers.memory import MemoryMixerConfig, MemoryMixerState
from hope_jax.nn.segments import START, Position, by_segment, in_pieces
from hope_jax.types import Array, Count, Float, Int, Stream


@dataclass(frozen=True)
class MemoryCachingConfig:
    """A memory and the ends of its segments.

    Attributes:
      memory: the mixer of the memory, without persistent vectors and projected queries. ``shard`` of its rule is None
        (a segment goes on from the end of the one before) or ``segment`` (every segment starts anew).
      segment: tokens of a segment, a multiple of the anchor period of the memory's rule.
    """

    memory: MemoryMixerConfig
    segment: int = 256

    def __post_init__(self) -> None:
        whole("segment", self.segment, 1, "tokens")
        rule = self.memory.rule
        if rule.gradient_at == "anchor" and self.segment % rule.period:
            raise UserError(f"segment is {self.segment}; give a multiple of the memory's anchor period, {rule.period}")
        if rule.shard not in (None, self.segment):
            raise UserError(f"the memory's shard is {rule.shard}; set it to the segment, {self.segment}, or to None")
        if rule.project_queries:
            raise UserError("project_queries asks in the span of one segment's keys; set it to False")
        if self.memory.persistent:
            raise UserError(f"memory.persistent is {self.memory.persistent}; set it to 0, segments start with the text")

    def build(self, width: int, dtype: DTypeLike) -> "MemoryCaching":
        """The mixer for a model of ``width`` features. Raises UserError where the heads do not divide it."""
        self.memory.build(width, dtype)
        return MemoryCaching(self, width, dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryCachingState:
    """State between two tokens; ``nn.room`` knows its size. Slots that are not filled are zeros.

    Attributes:
      memory: state of the memory's mixer.
      total: sum of the inputs of the current segment, [B,D].
      weights: those of the memories at the end of each segment, [B,H,slots,in,out] for each layer.
      means: mean of the inputs of each segment, [B,slots,D].
      position: tokens that were read.
      segment: tokens of a segment.
    """

    memory: Any  # not typed by shape: JAX fills trees with other things than arrays
    total: Any
    weights: Any
    means: Any
    position: Any
    segment: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Tokens that can be read: one segment more than there are slots."""
        return (self.means.shape[-2] + 1) * self.segment

    def without_empty_slots(self) -> "MemoryCachingState":
        """The state with no more slots than segments that have ended."""
        held = int(jnp.max(self.position)) // self.segment
        weights = jax.tree.map(lambda w: w[..., :held, :, :], self.weights)
        return dataclasses.replace(self, weights=weights, means=self.means[..., :held, :])


class Written(NamedTuple):
    """Results of a memory while it is written.

    ``queries``, ``reads``: of each token. ``means``: mean of the segment's inputs up to the token.
    """

    queries: Float[Array, "B T H K"]
    reads: Float[Array, "B T H V"]
    means: Stream


class MemoryCaching(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``; see the module docstring."""

    config: MemoryCachingConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.memory = self.config.memory.build(self.width, self.dtype)
        self.relevance = layers.dense(self.width, self.dtype)

    @nn.nowrap
    def axes(self) -> Axes:
        memory = self.config.memory.build(self.width, self.dtype).axes()
        return {"memory": memory, "relevance": dense_axes("embed", "embed")}

    def init_state(self, batch: int, capacity: int) -> MemoryCachingState:
        """A fresh sequence: the memory at its start, and slots for ``capacity`` tokens, none of them filled."""
        memory, segment = self.memory.init_state(batch, capacity), self.config.segment
        slots, wide = max(0, (capacity - 1) // segment), layers.param_dtype(self.dtype)
        weights = jax.tree.map(lambda w: jnp.zeros((*w.shape[:2], slots, *w.shape[2:]), w.dtype), memory.fast.running)
        total, means = jnp.zeros((batch, self.width), wide), jnp.zeros((batch, slots, self.width), wide)
        return MemoryCachingState(memory, total, weights, means, START, segment)

    def __call__(self, u: Stream, state: MemoryCachingState, count: Count = None) -> tuple[Stream, MemoryCachingState]:
        if count is None and u.shape[1] > state.capacity:
            came = f"{u.shape[1]} tokens and slots for {state.capacity}"
            raise UserError(f"Memory caching got {came}; make the state with a larger capacity.")
        before = state.position
        state, written = by_segment(self, MemoryCaching._write, state, u, before, self.config.segment, count)
        queries, reads = (jnp.swapaxes(z, 1, 2) for z in (written.queries, self._mix(u, written, before, state)))
        return jnp.where(state.position <= state.capacity, self.memory.answer(u, queries, reads), jnp.nan), state

    def _write(
        self, state: MemoryCachingState, u: Stream, position: Position, count: Count
    ) -> tuple[MemoryCachingState, Written]:
        """Write tokens of one segment, after ``position`` earlier ones of it; this does not look at the slots."""
        found, memory = self.memory.read(u, state.memory._replace(position=position), count)
        means, total = self._means(u, state.total, position, count)
        queries, reads = (jnp.swapaxes(z, 1, 2) for z in (found.queries, found.reads))
        state = self._later(state, memory, total, position, u.shape[1] if count is None else count)
        return state, Written(queries, reads, means)

    def _means(
        self, u: Stream, total: Float[Array, "B D"], position: Position, count: Count
    ) -> tuple[Stream, Float[Array, "B D"]]:
        """Mean of the segment's inputs up to each token, in at least float32, and the sum of all."""
        places = jnp.arange(u.shape[1])
        u = u.astype(total.dtype)
        if count is not None:
            u = jnp.where((places < count)[None, :, None], u, 0)
        sums = total[:, None] + jnp.cumsum(u, axis=1)
        return sums / (position + 1 + places)[None, :, None].astype(sums.dtype), sums[:, -1]

    def _mix(self, u: Stream, written: Written, before: Position, state: MemoryCachingState) -> Float[Array, "B T H V"]:
        """The mixed reads of the memory and of its past, for tokens with ``before`` others before them.

        ``state`` is the state after all of them. A token looks at those slots that were filled before it; so training
        keeps the slots once, and not once for each segment.
        """
        segment, asked = self.config.segment, self.relevance(u).astype(written.means.dtype)
        ended = jnp.broadcast_to((before + jnp.arange(u.shape[1])) // segment, u.shape[:2])
        # Rematerialised: the answers of all slots are larger than their mixture.
        mixed = jax.checkpoint(functools.partial(self._mixed, state.weights, state.means), prevent_cse=False)
        return in_pieces(mixed, segment, (asked, written, ended))

    @nn.nowrap
    def _mixed(
        self,
        weights: Weights,
        cached: Float[Array, "B slots D"],
        tokens: tuple[Stream, Written, Int[Array, "B T"]],
    ) -> Float[Array, "B T H V"]:
        """``_mix`` of a piece; ``tokens``: for each token W u, what the memory gave, how many segments had ended."""
        asked, (queries, reads, means), ended = tokens
        filled = jnp.arange(cached.shape[1])[None, None] < ended[..., None]
        now = jnp.sum(asked * means, axis=-1, keepdims=True)
        past = jnp.where(filled, jnp.einsum("btd,bsd->bts", asked, cached), -jnp.inf)
        shares = jax.nn.softmax(self.width**-0.5 * jnp.concatenate([now, past], axis=-1), axis=-1)
        own = weights, jnp.swapaxes(queries, 1, 2)
        answers = over_heads(self._answers, (), own, self.config.memory.impl)
        # A share of 0 is not enough: the memory of a later segment may be NaN.
        answers = jnp.where(jnp.swapaxes(filled, 1, 2)[:, None, :, :, None], answers, 0)
        return shares[..., :1, None] * reads + jnp.einsum("bts,bhstv->bthv", shares[..., 1:], answers)

    @nn.nowrap
    def _answers(self, weights: Weights, queries: Float[Array, "T K"]) -> Float[Array, "slots T V"]:
        """The answers of the cached memories of one head of one sequence."""
        c = self.config.memory

        def one(weights: Weights) -> Float[Array, "T V"]:
            return c.rule.apply(weights, queries, products_of(c.impl))

        return jax.vmap(one)(weights)

    @nn.nowrap
    def _later(
        self, state: MemoryCachingState, memory: MemoryMixerState, total: Array, position: Position, count: Any
    ) -> MemoryCachingState:
        """The state after ``count`` more tokens; at the end of a segment its memory goes into its slot."""
        ended = position + count == state.segment
        here = (jnp.arange(state.means.shape[1]) == state.position // state.segment) & ended

        def kept(new: Float[Array, "B H F V"], old: Float[Array, "B H slots F V"]) -> Float[Array, "B H slots F V"]:
            return jnp.where(here[None, None, :, None, None], new[:, :, None], old)

        weights = jax.tree.map(kept, memory.fast.running, state.weights)
        means = jnp.where(here[None, :, None], total[:, None] / state.segment, state.means)
        position = jnp.asarray(state.position + count, jnp.int32)
        return MemoryCachingState(memory, jnp.where(ended, 0, total), weights, means, position, state.segment)
