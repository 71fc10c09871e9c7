"""Mamba-2 (arXiv 2405.21060): a memory that decays by the token's step, keys shared by all heads of a group, no erase.

    M_t = exp(-A step_t) M_{t-1} + (step_t x_t) B_t^T        y_t = M_t C_t + D x_t

B are the keys and C the queries, neither scaled nor normalised. [x | B | C] go through a convolution with bias and
SiLU; the output is ``W_o (scale RMSNorm(y * silu(W_z u)))``, gated before the norm. A published model has no
feed-forward parts: two of these layers stand for one attention layer and its MLP. Read ``matrix.py`` first.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory.kernels import Impl
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.mixers import matrix
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream


@dataclass(frozen=True)
class Mamba2Config:
    """Mamba-2, by default with the published sizes.

    Attributes:
      head_size: features of a head's values; must divide ``expand * width``.
      state: features of B and C, the key width of every memory.
      groups: the heads of a group share B and C; must divide the number of heads.
      expand: the width of the values, as a multiple of the model's.
      conv: taps of the causal convolution.
      step_limits: steps are clipped to this range.
      norm_eps: added to the mean square in the norm of the output.
      depth: residual branches of the whole model; the initial output map is divided by its square root.
      impl: how the memories are evaluated, see ``memory.gated_delta``.
    """

    head_size: int = 64
    state: int = 128
    groups: int = 1
    expand: int = 2
    conv: int = 4
    step_limits: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    depth: int = 1
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("head_size", "state", "groups", "expand", "conv", "depth"):
            whole(name, getattr(self, name))
        matrix.check_eps(self.norm_eps)
        low, high = self.step_limits
        if not 0 <= low < high:
            raise UserError(f"step_limits is {self.step_limits}; expected 0 <= low < high, such as (0.0, math.inf)")

    def heads(self, width: int) -> int:
        """Heads in a model of ``width`` features. Raises UserError if sizes do not divide."""
        features = self.expand * width
        if features % self.head_size:
            raise UserError(f"head_size is {self.head_size}; expected a divisor of expand * width = {features}")
        heads = features // self.head_size
        if heads % self.groups:
            raise UserError(f"groups is {self.groups}; expected a divisor of the {heads} heads of head_size features")
        return heads

    def build(self, width: int, dtype: DTypeLike) -> "Mamba2":
        """The mixer for a model of ``width`` features. Raises UserError if head_size or groups do not divide."""
        self.heads(width)
        return Mamba2(self, width, dtype)


class Mamba2(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``."""

    config: Mamba2Config
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, wide = self.config, layers.param_dtype(self.dtype)
        heads, features = c.heads(self.width), c.expand * self.width
        self.inputs = matrix.ConvolvedMap(self._inputs(), c.conv, layers.TORCH, self._start_bias, self.dtype, c.impl)
        self.decay = matrix.DecayGate(heads, layers.TORCH, 1.0, c.step_limits, self.dtype)
        self.gate = layers.dense(features, self.dtype, start=layers.TORCH)
        self.skip = self.param("skip", nn.initializers.ones, (heads,), wide)
        self.scale = self.param("scale", nn.initializers.ones, (features,), wide)
        self.down = layers.dense(self.width, self.dtype, start=self._start_down)

    @nn.nowrap
    def _inputs(self) -> int:
        """Features of [x | B | C]."""
        return self.config.expand * self.width + 2 * self.config.groups * self.config.state

    @nn.nowrap
    def _start_down(self, key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "rows columns"]:
        return layers.TORCH(key, shape, dtype) * self.config.depth**-0.5

    @nn.nowrap
    def _start_bias(self, key: PRNGKeyArray, shape: tuple[int], dtype: DTypeLike) -> Float[Array, " D"]:
        bound = self.config.conv**-0.5  # as in PyTorch, whose bound depends on the number of taps
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    @nn.nowrap
    def axes(self) -> Axes:
        return {
            "inputs": matrix.convolved_axes(bias=True),
            "decay": matrix.DECAY_AXES,
            "gate": dense_axes("embed", "all_heads"),
            "skip": ("heads",),
            "scale": ("all_heads",),
            "down": dense_axes("all_heads", "embed"),
        }

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> matrix.MatrixState:
        """A fresh sequence: memories of zeros. ``capacity`` is for attention and unused here."""
        c = self.config
        memory = (c.heads(self.width), c.head_size, c.state)
        return matrix.fresh_state(batch, c.conv, [self._inputs()], memory, self.dtype)

    def __call__(self, u: Stream, state: matrix.MatrixState, count: Count = None) -> tuple[Stream, matrix.MatrixState]:
        (x, keys, queries), tail = self._streams(u, state.tails[0], count)
        step, retention = self.decay(u)
        tokens = (keys, step[..., None] * x, queries)
        memory, reads = matrix.write_and_read(state.memory, *tokens, retention, None, count, self.config.impl)
        return self._output(u, x, reads), matrix.MatrixState((tail,), memory)

    @layers.light
    def _streams(self, u: Stream, tail: matrix.Tail, count: Count) -> tuple[list[Array], matrix.Tail]:
        """x [B,H,T,V], B and C [B,G,T,K], in at least float32."""
        c, features = self.config, self.config.expand * self.width
        inputs, tail = self.inputs(u, tail, count)
        parts = jnp.split(inputs, [features, features + c.groups * c.state], axis=-1)
        heads = (c.heads(self.width), c.groups, c.groups)
        wide = layers.param_dtype(self.dtype)
        return [layers.split_heads(part, h).astype(wide) for part, h in zip(parts, heads, strict=True)], tail

    @layers.light
    def _output(self, u: Stream, x: Float[Array, "B H T V"], reads: Float[Array, "B H T V"]) -> Stream:
        y = layers.merge_heads(reads + self.skip[None, :, None, None] * x)
        gated = y * nn.silu(self.gate(u)).astype(y.dtype)
        normed = layers.normal(gated.reshape(*y.shape[:2], self.config.groups, -1), self.config.norm_eps).reshape(
            y.shape
        )
        return self.down(layers.scaled(normed, self.scale).astype(self.dtype))
