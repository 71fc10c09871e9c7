"""A memory rule as a mixer: static projections, short convolutions, heads, gates, and ``memory.scan.scan`` per head.

The layer of the baselines (linear attention, DeltaNet, Gated DeltaNet, Titans) and of Hope rules without
self-modification. ``self_modifying.py`` is the same layer with memories in place of the projections and gates.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.memory.kernels import Impl, check_impl
from hope_jax.memory.rule import Fast, Gates, MemoryState, Rule
from hope_jax.memory.scan import scan
from hope_jax.nn.axes import Axes, conv_axes, dense_axes, memory_axes
from hope_jax.nn.layers import (
    AnswerOutput,
    HeadOutput,
    dense,
    light,
    over_heads,
    param_dtype,
    short_convs,
    split_heads,
    unit_heads,
)
from hope_jax.types import Array, Count, Int, Stream


@dataclass(frozen=True)
class MemoryMixerConfig:
    """A mixer around one rule. A residual memory (Titans) has the output ``AnswerOutput``, others ``HeadOutput``.

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

    def __post_init__(self) -> None:
        check_impl(self.impl)
        if min(self.heads, self.hidden, self.conv) < 1 or (self.horizon is not None and self.horizon < 2):
            raise UserError("heads, hidden and conv must be at least 1 and horizon at least 2 (or None)")
        if self.rate_max < 0:
            raise UserError(f"rate_max is {self.rate_max}; expected 0 (no writes) or more")
        if self.rule.self_values and not self.unit_values:
            raise UserError("a rule with self_values reads the value as a key; set unit_values=True")

    def build(self, width: int, dtype: DTypeLike) -> "MemoryMixer":
        """The module for a model of ``width`` features."""
        if width % self.heads:
            raise UserError(f"{self.heads} heads do not divide width {width}; choose a divisor")
        return MemoryMixer(self, width, dtype)


class MemoryMixerState(NamedTuple):
    """Convolution tails of the q, k, v streams, fast weights [B,H,...], tokens since the last anchor refresh."""

    tails: tuple[Array, ...]
    fast: Fast
    position: Int[Array, ""] | np.ndarray


class MemoryMixer(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``."""

    config: MemoryMixerConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.projections = [dense(self.width, self.dtype, name=f"project_{n}") for n in "qkv"]
        self.convs = short_convs(c.conv, self.dtype, c.impl)
        output = AnswerOutput if c.rule.architecture.residual else HeadOutput
        self.out = output(c.heads, self.width, self.dtype)
        if c.rate_bias is not None:
            self.rate = self._gate("rate", c.rate_bias)
        if c.horizon is not None:
            self.retention = self._gate("retention", math.log(c.horizon - 1))
        if c.rule.momentum:
            self.momentum = self._gate("momentum", c.momentum_bias)
        layers = c.rule.architecture.layers if c.rule.learned_start else 0
        self.learned = tuple(self.param(f"start_memory_{i}", self._draw, i) for i in range(layers))

    @nn.nowrap
    def axes(self) -> Axes:
        """See ``nn/axes.py``."""
        c, rule = self.config, self.config.rule
        gates = {"rate": c.rate_bias is not None, "retention": c.horizon is not None, "momentum": rule.momentum}
        output = AnswerOutput if rule.architecture.residual else HeadOutput
        return {
            **{f"project_{n}": dense_axes("embed", "all_heads") for n in "qkv"},
            **{f"conv_{n}": conv_axes("all_heads") for n in "qkv"},
            **{f"gate_{name}": dense_axes("embed", "heads", bias=True) for name, exists in gates.items() if exists},
            **(memory_axes("memory", rule.architecture.layers) if rule.learned_start else {}),
            "out": output(c.heads, self.width, self.dtype, parent=None).axes(),
        }

    def _gate(self, name: str, bias: float) -> nn.Dense:
        return dense(self.config.heads, param_dtype(self.dtype), f"gate_{name}", bias=bias)

    def _draw(self, key: Array, layer: int) -> Array:
        size, heads = self.width // self.config.heads, self.config.heads
        start = lambda k: self.config.rule.init_weights(k, size, size, self.config.hidden * size)  # noqa: E731
        return jax.vmap(start)(jax.random.split(key, heads))[layer].astype(param_dtype(self.dtype))

    def _initial(self) -> tuple[Array, ...]:
        if self.config.rule.learned_start:
            return self.learned
        size = self.width // self.config.heads
        return (jnp.zeros((self.config.heads, size, size), param_dtype(self.dtype)),)

    def init_state(self, batch: int, capacity: int) -> MemoryMixerState:
        """A fresh sequence: the memory at its start. ``capacity`` is for attention and unused here."""
        del capacity
        fast = self.config.rule.start(self._initial())
        fast = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), fast)
        tails = tuple(conv.init_state(batch, self.width) for conv in self.convs)
        return MemoryMixerState(tails, fast, np.zeros((), np.int32))

    def __call__(self, u: Stream, state: MemoryMixerState, count: Count = None) -> tuple[Stream, MemoryMixerState]:
        (q, k, v), tails = self._streams(u, state.tails, count)
        rule, position, impl = self.config.rule, state.position, self.config.impl

        def head(initial, fast, k, v, q, gates):
            reads, new = scan(rule, MemoryState(fast, position), k, v, q, gates, initial, impl, count)
            return reads, new.fast

        reads, fast = over_heads(head, (self._initial(),), (state.fast, k, v, q, self._gates(u)), impl)
        found = (q, reads - q) if rule.architecture.residual else (reads,)
        position = (position + (u.shape[1] if count is None else count)) % rule.period
        return self.out(u, *found), MemoryMixerState(tails, fast, position)

    @light
    def _streams(self, u: Stream, tails: tuple[Array, ...], count: Count) -> tuple[list[Array], tuple[Array, ...]]:
        """Queries, keys and values per head [B,H,T,K]: projection, convolution, SiLU, then unit norm."""
        streams, new_tails = [], []
        for name, project, conv, tail in zip("qkv", self.projections, self.convs, tails, strict=True):
            x, tail = conv(project(u), tail, count)
            make = unit_heads if name != "v" or self.config.unit_values else split_heads
            streams.append(make(nn.silu(x), self.config.heads).astype(param_dtype(x.dtype)))
            new_tails.append(tail)
        return streams, tuple(new_tails)

    def _gates(self, u: Stream) -> Gates:
        """Rate, retention and momentum decay per token and head, [B,H,T]."""
        c, wide = self.config, param_dtype(self.dtype)

        def gate(layer: nn.Dense) -> Array:
            return jnp.swapaxes(jax.nn.sigmoid(layer(u)), 1, 2)

        ones = jnp.ones((u.shape[0], c.heads, u.shape[1]), wide)
        return Gates(
            rate=c.rate_max * (ones if c.rate_bias is None else gate(self.rate)),
            retention=ones if c.horizon is None else gate(self.retention),
            momentum_decay=gate(self.momentum) if c.rule.momentum else None,
        )
