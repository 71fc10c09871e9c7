"""A memory rule as a mixer: static projections, short convolutions, heads, gates, and ``memory.scan.scan`` per head.

This is the layer of the baselines whose memory is a row of ``memory.RULES`` (linear attention, DeltaNet, Titans, deep
linear attention, Yaad, Moneta, Memora, Oja), and of Hope's rules without self-modification. ``self_modifying.py`` is
the same layer with memories in place of the projections and gates.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory.architectures import Architecture
from hope_jax.memory.kernels import Impl
from hope_jax.memory.rule import Gates, Rule
from hope_jax.memory.scan import read
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, conv_axes, dense_axes, memory_axes
from hope_jax.nn.shards import over_shards
from hope_jax.types import Array, Count, Float, Int, Stream

# Initial weights of memories are parameters times this. The optimizer moves all parameters by about the same amount, so
# the small initial weights move more slowly than the maps around them.
START_GAIN = 0.1


@dataclass(frozen=True)
class MemoryMixerConfig:
    """A mixer around one rule.

    Attributes:
      rule: what is written and read, a row of ``memory.RULES`` or your own.
      heads: independent memories; must divide the model width.
      hidden: hidden features of an MLP memory, as a multiple of the head size.
      conv: taps of the causal convolution after each projection.
      rate_max, rate_bias: eta = rate_max * sigmoid(w x + rate_bias); None as bias makes the rate the constant rate_max.
      horizon: initial span of a learned retention gate, 1 - alpha = 1/horizon tokens; None keeps everything.
      momentum_bias: initial bias of the momentum gate, where the rule has momentum.
      unit_values: give values norm 1, as keys and queries have.
      impl: how the memory is evaluated, see ``memory.gated_delta``.
      persistent: learned vectors that the memory reads before a sequence (Titans, arXiv 2501.00663, 3.3); 0: none.
    """

    rule: Rule
    heads: int
    hidden: int = 1
    conv: int = 4
    rate_max: float = 1.0
    rate_bias: float | None = 0.0
    horizon: int | None = None
    momentum_bias: float = -3.0
    unit_values: bool = False
    impl: Impl = "auto"
    persistent: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        whole("persistent", self.persistent, 0, "vectors in front of a sequence; 0: none")
        for name in ("heads", "hidden", "conv"):
            whole(name, getattr(self, name))
        if self.horizon is not None:
            whole("horizon", self.horizon, 2, "tokens; None: everything is kept")
        if self.rate_max < 0:
            raise UserError(f"rate_max is {self.rate_max}; expected 0 (no writes) or more")
        if self.persistent and self.rule.shard is not None:
            raise UserError("persistent vectors would be forgotten at the first shard; set persistent=0 or shard=None")
        if self.rule.self_values and not self.unit_values:
            raise UserError("a rule with self_values reads the value as a key; set unit_values=True")
        if self.rule.transposed and not self.unit_values:
            raise UserError("a rule with transposed=True diverges unless values have norm 1; set unit_values=True")

    def build(self, width: int, dtype: DTypeLike) -> "MemoryMixer":
        layers.check_heads(self.heads, width)
        return MemoryMixer(self, width, dtype)


class MemoryMixerState(NamedTuple):
    """Convolution tails of the q, k, v streams, fast weights [B,H,...], tokens since all anchors were refreshed."""

    tails: tuple[Array, ...]
    fast: Any
    position: Int[Array, ""] | np.ndarray


class Found(NamedTuple):
    """Results of the memories of a mixer, all [B,H,T,K]: the queries that they were asked, and the reads.

    ``streams`` are queries, keys and values as static maps made them. ``gates`` [B,H,T] are those that memories made,
    for inspection; None: no memory made them.
    """

    queries: Float[Array, "B H T K"]
    reads: Float[Array, "B H T V"]
    streams: tuple[Array, Array, Array]
    gates: Gates | None = None


def sow_gates(module: nn.Module, found: Found) -> None:
    """Put ``rate`` and ``retention`` of every token into the collection "intermediates", where memories made them."""
    if found.gates is not None:
        module.sow("intermediates", "rate", found.gates.rate)
        module.sow("intermediates", "retention", found.gates.retention)


def fresh_state(convs: Sequence[layers.ShortConv], start: Any, batch: int, width: int) -> MemoryMixerState:
    """The state before the first token, of memories that are at their ``start``, leaves [H,...]."""
    fast = layers.for_batch(start, batch)
    return MemoryMixerState(tuple(conv.init_state(batch, width) for conv in convs), fast, np.zeros((), np.int32))


def learned_start(
    module: nn.Module, name: str, architecture: Architecture, copies: tuple[int, ...], sizes: tuple[int, int, int]
) -> tuple[Array, ...]:
    """The initial weights of memories, ``START_GAIN`` times parameters of ``module``: per layer ``[*copies, in, out]``.

    ``sizes`` are the features of keys and values, and the hidden ones.
    """

    def draw(key: Array, layer: int) -> Array:
        keys = jax.random.split(key, math.prod(copies))
        weights = jax.vmap(lambda key: architecture.init(key, *sizes))(keys)[layer]
        weights = weights.reshape(*copies, *weights.shape[1:]) / START_GAIN
        return weights.astype(layers.param_dtype(module.dtype))

    return tuple(START_GAIN * module.param(f"start_{name}_{i}", draw, i) for i in range(architecture.layers))


class MemoryMixer(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``."""

    config: MemoryMixerConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, wide, size = self.config, layers.param_dtype(self.dtype), self.width // self.config.heads
        self.projections = [layers.dense(self.width, self.dtype, name=f"project_{n}") for n in "qkv"]
        self.convs = layers.short_convs(c.conv, self.dtype, c.impl)
        self.gates = {n: layers.dense(c.heads, wide, f"gate_{n}", bias=bias) for n, bias in self._gates().items()}
        self.out = layers.HeadOutput(c.heads, self.width, c.rule.architecture.keeps_query, self.dtype)
        if c.rule.learned_start:
            sizes = (size, size, c.hidden * size)
            self.initial = learned_start(self, "memory", c.rule.architecture, (c.heads,), sizes)
        else:
            self.initial = (jnp.zeros((c.heads, size, size), wide),)
        self.persistent = layers.persistent_vectors(self, c.persistent)

    @nn.nowrap
    def _gates(self) -> dict[str, float]:
        """Initial biases of the gates that depend on the token."""
        c = self.config
        retention = None if c.horizon is None else math.log(c.horizon - 1)
        biases = {"rate": c.rate_bias, "retention": retention, "momentum": c.momentum_bias if c.rule.momentum else None}
        return {name: bias for name, bias in biases.items() if bias is not None}

    @nn.nowrap
    def axes(self) -> Axes:
        c, memory = self.config, self.config.rule.architecture
        return {
            **{f"project_{n}": dense_axes("embed", "all_heads") for n in "qkv"},
            **{f"conv_{n}": conv_axes("all_heads") for n in "qkv"},
            **{f"gate_{name}": dense_axes("embed", "heads", bias=True) for name in self._gates()},
            **(memory_axes("memory", memory.layers) if c.rule.learned_start else {}),
            **({"persistent": ("persistent", "embed")} if c.persistent else {}),
            "out": layers.HeadOutput(c.heads, self.width, memory.keeps_query, self.dtype, parent=None).axes(),
        }

    def init_state(self, batch: int, capacity: int) -> MemoryMixerState:
        """A fresh sequence: the memory at its start. ``capacity`` is for attention and unused here."""
        return self.started(batch, self.persistent)

    def started(self, batch: int, persistent: Float[Array, "P D"] | None) -> MemoryMixerState:
        """The state of sequences that have read ``persistent`` alone, which is read once for all of them."""
        if persistent is None:
            return fresh_state(self.convs, self._start(), batch, self.width)
        _, state = self.read(persistent[None], self.started(1, None))
        tails, fast = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), state[:2])
        return MemoryMixerState(tails, fast, np.asarray(len(persistent) % self.config.rule.cycle, np.int32))

    def _start(self) -> Any:
        """The fast weights of a fresh sequence, leaves [H,...]."""
        return self.config.rule.start(self.initial)

    def __call__(self, u: Stream, state: MemoryMixerState, count: Count = None) -> tuple[Stream, MemoryMixerState]:
        found, state = self.read(u, state, count)
        return self.answer(u, found.queries, found.reads), state

    def read(self, u: Stream, state: MemoryMixerState, count: Count = None) -> tuple[Found, MemoryMixerState]:
        """All but the output map: the memories are read while they are written."""
        (q, k, v), tails = self._streams(u, state.tails, count)
        rule, impl = self.config.rule, self.config.impl
        head = functools.partial(self._read_head, count)
        own = (state.fast, (k, v, q, self._gates_of(u)))
        fast, (reads, asked) = over_shards(head, (self.initial,), own, state.position, rule.shard, impl, count)
        position = (state.position + (u.shape[1] if count is None else count)) % rule.cycle
        found = Found(q if asked is None else asked, reads, (q, k, v))
        return found, MemoryMixerState(tails, fast, position)

    def answer(self, u: Stream, q: Float[Array, "B H T K"], reads: Float[Array, "B H T V"]) -> Stream:
        """The output map, of queries and reads."""
        return self.out(u, *((q, reads - q) if self.config.rule.architecture.keeps_query else (reads,)))

    @layers.light
    def queries(self, u: Stream, tail: Array, count: Count = None) -> tuple[Array, Array]:
        """The queries alone, and the new tail of their convolution."""
        return self._stream(0, u, tail, count)

    @nn.nowrap
    def _read_head(self, count, position, initial, fast, tokens) -> tuple[Any, tuple[Array, Array | None]]:
        """``memory.scan.read`` of one head of one sequence."""
        return read(self.config.rule, initial, fast, tokens, position, self.config.impl, count)

    @layers.light
    def _streams(self, u: Stream, tails: tuple[Array, ...], count: Count) -> tuple[list[Array], tuple[Array, ...]]:
        """Queries, keys and values per head [B,H,T,K], and the convolutions' new tails."""
        streams, tails = zip(*(self._stream(i, u, tail, count) for i, tail in enumerate(tails)), strict=True)
        return list(streams), tails

    def _stream(self, i: int, u: Stream, tail: Array, count: Count) -> tuple[Array, Array]:
        """One of the streams: projection, convolution, SiLU, then unit norm (values: only with ``unit_values``)."""
        x, tail = self.convs[i](self.projections[i](u), tail, count)
        to_heads = layers.unit_heads if i < 2 or self.config.unit_values else layers.split_heads
        return to_heads(nn.silu(x), self.config.heads).astype(layers.param_dtype(x.dtype)), tail

    def _gates_of(self, u: Stream) -> Gates:
        """Rate, retention and momentum decay per token and head, [B,H,T]."""
        gates = {name: jnp.swapaxes(jax.nn.sigmoid(layer(u)), 1, 2) for name, layer in self.gates.items()}
        ones = jnp.ones((u.shape[0], self.config.heads, u.shape[1]), layers.param_dtype(self.dtype))
        rate = self.config.rate_max * gates.get("rate", ones)
        return Gates(rate, gates.get("retention", ones), gates.get("momentum"))
