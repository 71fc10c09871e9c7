"""RetNet's retention (arXiv 2307.08621): memories with fixed decays, rotated keys and queries, no convolution.

    M_t = gamma_h M_{t-1} + v_t k_t^T        y_t = M_t q_t        gamma_h = 1 - 2^(-5-h) for head h = 0, 1, ...

Keys and queries are turned by their position, as in the authors' code (torchscale): pair i of features, neighbours, by
``10000^(-i / (pairs - 1))`` radians per token, so the slowest by exactly 1/10000. Keys are divided by the root of their
size. The authors' further divisions of y, by sums over the decays and the like, vanish in the norm that follows.
The norm has no scale; the output is ``W_o (RMSNorm_head(y) * silu(W_g u))``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import check_choices, whole
from hope_jax.memory.kernels import Impl
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.mixers import matrix
from hope_jax.types import Array, Count, Float, Int, Stream

# Xavier's uniform starts with gains 2^-2.5 and 2^-1, as in torchscale.
START_IN = nn.initializers.variance_scaling(2**-5, "fan_avg", "uniform")
START_OUT = nn.initializers.variance_scaling(2**-2, "fan_avg", "uniform")


@dataclass(frozen=True)
class RetNetConfig:
    """Retention.

    Attributes:
      heads: at least 1, each with an even number of key features. Head h forgets in about 2^(5+h) tokens, so few heads
        mean a short memory.
      expand: the width of the values, as a multiple of the model's.
      impl: how the memories are evaluated, see ``memory.gated_delta``.
    """

    heads: int
    expand: int = 2
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        whole("heads", self.heads)
        whole("expand", self.expand)

    @classmethod
    def published(cls, width: int) -> "RetNetConfig":
        """Heads of 256 key features where these divide the width (3 at 768, 8 at 2048), values twice as wide."""
        return cls(matrix.heads_of_at_most(width, 256))

    def build(self, width: int, dtype: DTypeLike) -> "RetNet":
        """The mixer for a model of ``width`` features. Raises UserError if the heads do not divide it evenly."""
        layers.check_heads(self.heads, width, even=True)
        return RetNet(self, width, dtype)


class RetNetState(NamedTuple):
    """The memory M of every head, and how many tokens have been seen."""

    memory: Float[Array, "B H V K"]
    position: Int[Array, ""] | np.ndarray


def angles(positions: Int[Array, " T"], pairs: int, dtype: DTypeLike) -> Float[Array, "T pairs"]:
    """Radians by which each pair of features is turned at each position, up to whole turns.

    A float32 product of position and speed would be wrong by 0.06 at position 10^6. Here a turn is 2^32 units: whole
    units per token are multiplied in integers, which wrap exactly where a turn ends, and the rest is too small to hurt.
    """
    speeds = 10_000.0 ** -np.linspace(0, 1, pairs) * 2**32 / (2 * math.pi)
    units = np.rint(speeds)
    turned = (positions.astype(jnp.int32)[:, None] * units.astype(np.int32)[None]).astype(dtype)
    rest = positions[:, None].astype(dtype) * (speeds - units).astype(dtype)[None]
    return (turned + rest) * (2 * math.pi / 2**32)


def rotated(x: Float[Array, "B T H K"], angle: Float[Array, "T pairs"]) -> Float[Array, "B T H K"]:
    """Neighbouring features turned as pairs. In the result the first of each pair come first; products are the same."""
    cos, sin = (f(angle)[None, :, None] for f in (jnp.cos, jnp.sin))
    left, right = x[..., ::2], x[..., 1::2]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


class RetNet(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``."""

    config: RetNetConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        values = self.config.expand * self.width
        self.query, self.key = (layers.dense(self.width, self.dtype, start=START_IN) for _ in range(2))
        self.value = layers.dense(values, self.dtype, start=START_IN)
        starts = (START_IN, START_OUT)
        self.out = matrix.GatedHeads(self.width, values, None, nn.silu, starts, dtype=self.dtype)

    @nn.nowrap
    def axes(self) -> Axes:
        maps = dict.fromkeys(("query", "key", "value"), dense_axes("embed", "all_heads"))
        return {**maps, "out": matrix.gated_axes(scaled=False)}

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> RetNetState:
        """A fresh sequence: memories of zeros. ``capacity`` is for attention and unused here."""
        heads, wide = self.config.heads, layers.param_dtype(self.dtype)
        shape = (batch, heads, self.config.expand * self.width // heads, self.width // heads)
        return RetNetState(jnp.zeros(shape, wide), np.zeros((), np.int32))

    def __call__(self, u: Stream, state: RetNetState, count: Count = None) -> tuple[Stream, RetNetState]:
        batch, time, _ = u.shape
        heads, impl = self.config.heads, self.config.impl
        q, k, v = self._streams(u, state.position)
        gamma = jnp.asarray(1 - 2.0 ** (-5 - np.arange(heads)), v.dtype)
        retention = jnp.broadcast_to(gamma[None, :, None], (batch, heads, time))
        memory, reads = matrix.write_and_read(state.memory, k, v, q, retention, None, count, impl)
        return self.out(u, reads), RetNetState(memory, state.position + (time if count is None else count))

    @layers.light
    def _streams(self, u: Stream, position: Int[Array, ""] | np.ndarray) -> list[Float[Array, "B H T _"]]:
        """Queries, keys and values of every head, in at least float32."""
        heads, wide = self.config.heads, layers.param_dtype(self.dtype)
        size = self.width // heads
        angle = angles(jnp.asarray(position) + jnp.arange(u.shape[1]), size // 2, wide)
        q, k = (to(u).astype(wide).reshape(*u.shape[:2], heads, size) for to in (self.query, self.key))
        turned = [jnp.swapaxes(rotated(x, angle), 1, 2) for x in (q, k * size**-0.5)]
        return [*turned, layers.split_heads(self.value(u), heads).astype(wide)]
