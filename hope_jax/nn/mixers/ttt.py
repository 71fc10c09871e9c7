"""TTT layers: TTT-Linear and TTT-MLP, with the convolutions and gate of their Mamba backbone (arXiv 2407.04620).

    q, k = conv(W_qk u), conv'(W_qk u)          shared projection, convolutions with bias; v = W_v u
    y = W_o (LayerNorm(f(q)) * gelu(W_g u))     f: the inner model of every head, ``memory/ttt.py``

Queries and keys are turned by rotary positions that start again with every mini-batch; our pairs of features are
those of ``rotary.py``, a permutation of the features of each head. In its model a convolution comes before each layer
(``convolution.py``).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory import ttt
from hope_jax.memory.kernels import Impl
from hope_jax.memory.products import merged_rows
from hope_jax.memory.rule import Rule
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, conv_axes, dense_axes, memory_axes
from hope_jax.nn.heads import over_heads
from hope_jax.nn.rotary import apply_rope
from hope_jax.types import Array, Count, Float, Int, Stream

Memory = Literal["linear", "mlp"]
START = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class TTTConfig:
    """A TTT layer.

    Attributes:
      heads: independent inner models, each with an even number of features.
      memory: the inner model's map, "linear" or "mlp" (two layers, GELU).
      rate_max: bound of the inner learning rate, eta = rate_max sigmoid(w u + c) / (features of a head); published are
        1 for "linear" and 0.1 for "mlp". 0: no writes.
      hidden: hidden features of "mlp" as a multiple of the features of a head.
      mini_batch: tokens whose inner gradients are taken at the same weights; a property of the model.
      conv: taps of the convolutions of queries and keys.
      rope_base: the slowest rotary feature turns by about ``1 / rope_base`` per token.
      impl: how the inner model is evaluated, see ``memory.gated_delta``.
    """

    heads: int
    memory: Memory = "linear"
    rate_max: float = 1.0
    hidden: int = 4
    mini_batch: int = 16
    conv: int = 4
    rope_base: float = 10_000.0
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("heads", "hidden", "mini_batch", "conv"):
            whole(name, getattr(self, name))
        if self.rate_max < 0:
            raise UserError(f"rate_max is {self.rate_max}; expected 0 (no writes) or more")
        if self.rope_base <= 1:
            raise UserError(f"rope_base is {self.rope_base}; it must exceed 1 (10000 is usual)")

    def build(self, width: int, dtype: DTypeLike) -> "TTT":
        layers.check_heads(self.heads, width, even=True)
        return TTT(self, width, dtype)

    @property
    def rule(self) -> Rule:
        """The inner model's rule; ``memory.ttt.scan`` sets its objective, which has parameters."""
        return Rule(ttt.linear if self.memory == "linear" else ttt.mlp, period=self.mini_batch, read="after")


class TTTState(NamedTuple):
    """Tail of the convolutions, inner weights [B,H,...], and the position in the mini-batch."""

    tail: Float[Array, "B tail D"]
    inner: ttt.Inner
    position: Int[Array, ""] | np.ndarray


class TTT(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``. The inner model computes in at least float32."""

    config: TTTConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, wide, size = self.config, layers.param_dtype(self.dtype), self.width // self.config.heads
        self.project_qk, self.project_v, self.gate, self.out = (
            layers.dense(self.width, self.dtype, start=START) for _ in range(4)
        )
        self.conv_q, self.conv_k = (
            layers.ShortConv(c.conv, self.dtype, layers.FAN_IN, c.impl, nn.initializers.zeros) for _ in range(2)
        )
        self.rate = layers.dense(c.heads, wide, start=START, bias=0.0)
        self.norm = nn.LayerNorm(layers.EPS, wide, wide, use_fast_variance=False)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        self.gain = self.param("gain", zeros, (c.mini_batch,), wide)
        draws = {"inner_scale": ones, "inner_bias": zeros}
        self.inner_norm = ttt.Norm(*(self.param(name, draw, (c.heads, size), wide) for name, draw in draws.items()))
        sizes = [size, *[c.hidden * size] * (c.rule.architecture.layers - 1), size]
        self.initial = tuple(self._start(i, *sizes[i : i + 2]) for i in range(len(sizes) - 1))

    def _start(self, layer: int, inputs: int, outputs: int) -> Float[Array, "H G V"]:
        """Initial weights of one layer of the inner models; the bias is the last row."""
        heads, wide = self.config.heads, layers.param_dtype(self.dtype)
        weights = self.param(f"start_weights_{layer}", START, (heads, inputs, outputs), wide)
        bias = self.param(f"start_bias_{layer}", nn.initializers.zeros, (heads, outputs), wide)
        return jnp.concatenate([weights, bias[:, None]], axis=1)

    @nn.nowrap
    def axes(self) -> Axes:
        count = self.config.rule.architecture.layers
        starts = memory_axes("weights", count)
        biases = {f"start_bias_{i}": ("heads", starts[f"start_weights_{i}"][-1]) for i in range(count)}
        return {
            **{name: dense_axes("embed", "all_heads") for name in ("project_qk", "project_v", "gate")},
            "out": dense_axes("all_heads", "embed"),
            **{f"conv_{n}": conv_axes("all_heads", bias=True) for n in "qk"},
            "rate": dense_axes("embed", "heads", bias=True),
            "norm": {"scale": ("all_heads",), "bias": ("all_heads",)},
            "gain": ("places",),
            **dict.fromkeys(("inner_scale", "inner_bias"), ("heads", "head_dim")),
            **starts,
            **biases,
        }

    def init_state(self, batch: int, capacity: int) -> TTTState:
        """A fresh sequence: inner models at their start. ``capacity`` is for attention and unused here."""
        inner = layers.for_batch(ttt.start(self.initial), batch)
        return TTTState(self.conv_q.init_state(batch, self.width), inner, np.zeros((), np.int32))

    def __call__(self, u: Stream, state: TTTState, count: Count = None) -> tuple[Stream, TTTState]:
        c, time = self.config, u.shape[1]
        q, k, v, tail = self._streams(u, state.tail, state.position, count)
        rate = jnp.swapaxes(jax.nn.sigmoid(self.rate(u)), 1, 2) * (c.rate_max * c.heads / self.width)
        gains = jax.nn.relu(1 / jnp.arange(1, c.mini_batch + 1, dtype=self.gain.dtype) + self.gain)

        def head(gains, position, norm, inner, k, v, q, rate):
            return ttt.scan(c.rule, norm, inner, k, v, q, rate, gains, position, c.impl, count)

        own = state.inner, k, v, q, rate
        inner, reads = over_heads(head, (self.inner_norm,), own, c.impl, (gains, state.position))
        position = (state.position + (time if count is None else count)) % c.mini_batch
        return self._output(u, reads), TTTState(tail, inner, position)

    @layers.light
    def _streams(
        self, u: Stream, tail: Array, position: Int[Array, ""] | np.ndarray, count: Count
    ) -> tuple[Array, ...]:
        """Queries, keys and values per head [B,H,T,K] in at least float32, and the new tail."""
        c, shape = self.config, (*u.shape[:2], self.config.heads, -1)
        places = (jnp.asarray(position) + jnp.arange(u.shape[1])) % c.mini_batch
        both = self.project_qk(u)
        (q, new), (k, _) = self.conv_q(both, tail, count), self.conv_k(both, tail, count)
        wide = [x.reshape(shape).astype(layers.param_dtype(self.dtype)) for x in (q, k, self.project_v(u))]
        turned = [apply_rope(x, places, c.rope_base) for x in wide[:2]]
        return *(jnp.swapaxes(x, 1, 2) for x in (*turned, wide[2])), new

    @layers.light
    def _output(self, u: Stream, reads: Float[Array, "B H T K"]) -> Stream:
        normed = merged_rows(self.norm, layers.merge_heads(reads)).astype(self.dtype)
        return self.out(normed * nn.gelu(self.gate(u)))
