"""Parts of mixers whose matrix memories have widths of their own: inputs, decay gates, memories, output.

The key width of a memory may differ from its value width, and the heads of a group may share their keys and queries:
head h of H heads belongs to group h // (H / G). Read ``gated_deltanet.py`` or ``mamba2.py`` next.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.memory import gated_delta
from hope_jax.memory.kernels import Impl
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, conv_axes, dense_axes
from hope_jax.nn.heads import copies, over_heads
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream

Gate = Float[Array, "B H T"]
Tail = Float[Array, "B tail features"]


class MatrixState(NamedTuple):
    """Tails of the convolutions, and the memory M of every head."""

    tails: tuple[Tail, ...]
    memory: Float[Array, "B H V K"]


def check_eps(eps: float) -> None:
    """Raise UserError unless ``norm_eps``, the epsilon of a norm, is positive and finite."""
    number = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    if not number or not 0 < eps < math.inf:
        raise UserError(f"norm_eps is {eps!r}; expected a positive number, such as 1e-5")


def fresh_state(
    batch: int, taps: int, channels: Sequence[int], memory: tuple[int, int, int], dtype: DTypeLike
) -> MatrixState:
    """The state before the first token: zeros. One convolution for each of ``channels``, memories [H,V,K]."""
    tails = tuple(jnp.zeros((batch, taps - 1, features), dtype) for features in channels)
    return MatrixState(tails, jnp.zeros((batch, *memory), layers.param_dtype(dtype)))


def heads_of_at_most(features: int, size: int) -> int:
    """The fewest heads, at least 3, that split ``features`` into equal even parts of at most ``size``; 1 if none do.

    The published sizes are the largest part, 256 features; no published model has fewer than 3 heads.
    """
    fitting = (h for h in range(3, features + 1) if features % (2 * h) == 0 and features <= h * size)
    return next(fitting, 1)


def convolved_axes(bias: bool = False) -> Axes:
    """Names of the parameters of a ``ConvolvedMap``."""
    return {"project": dense_axes("embed", "all_heads"), "conv": conv_axes("all_heads", bias)}


class ConvolvedMap(nn.Module):
    """``silu(conv(W u))`` of a stream u, ``features`` wide; its state is the tail of the convolution."""

    features: int
    taps: int
    start: Initializer
    bias: Initializer | None = None
    dtype: DTypeLike = jnp.float32
    impl: Impl = "auto"

    def setup(self) -> None:
        self.project = layers.dense(self.features, self.dtype, start=self.start)
        self.conv = layers.ShortConv(self.taps, self.dtype, layers.TORCH, self.impl, self.bias)

    def __call__(self, u: Stream, tail: Tail, count: Count = None) -> tuple[Float[Array, "B T features"], Tail]:
        x, tail = self.conv(self.project(u), tail, count)
        return nn.silu(x), tail


def _start_step(key: PRNGKeyArray, shape: tuple[int], dtype: DTypeLike) -> Float[Array, " H"]:
    """Biases whose softplus is spread evenly in logarithm over 0.001 to 0.1."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))


DECAY_AXES: Axes = {"map": dense_axes("embed", "heads"), "step_bias": ("heads",), "log_decay": ("heads",)}
"""Names of the parameters of a ``DecayGate``."""


class DecayGate(nn.Module):
    """Step ``softplus(W u + step_bias)`` and retention ``exp(-exp(log_decay) step)`` of every token and head.

    ``exp(log_decay)`` starts uniform between ``slowest`` and 16, softplus(step_bias) between 0.001 and 0.1
    (Mamba-2, arXiv 2405.21060). Steps are clipped to ``limits``. Everything is in at least float32.
    """

    heads: int
    start: Initializer
    slowest: float
    limits: tuple[float, float] = (0.0, math.inf)
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        wide = layers.param_dtype(self.dtype)
        self.map = layers.dense(self.heads, wide, start=self.start)
        self.step_bias = self.param("step_bias", _start_step, (self.heads,), wide)
        self.log_decay = self.param("log_decay", self._start_log_decay, (self.heads,), wide)

    @nn.nowrap
    def _start_log_decay(self, key: PRNGKeyArray, shape: tuple[int], dtype: DTypeLike) -> Float[Array, " H"]:
        return jnp.log(jax.random.uniform(key, shape, dtype, self.slowest, 16.0))

    def __call__(self, u: Stream) -> tuple[Gate, Gate]:
        """Step and retention, [B,H,T]."""
        step = jnp.clip(jax.nn.softplus(self.map(u) + self.step_bias[None, None]), *self.limits)
        retention = jnp.exp(-jnp.exp(self.log_decay)[None, None] * step)
        return jnp.swapaxes(step, 1, 2), jnp.swapaxes(retention, 1, 2)


def write_and_read(
    memory: Float[Array, "B H V K"],
    keys: Float[Array, "B G T K"],
    writes: Float[Array, "B H T V"],
    queries: Float[Array, "B G T K"],
    retention: Gate,
    erase: Gate | None,
    count: Count,
    impl: Impl,
) -> tuple[Float[Array, "B H V K"], Float[Array, "B H T V"]]:
    """``gated_delta`` of every head, read after the write: the memories after T tokens, and the reads.

    The keys of a group are not copied: products of them alone, such as their Gram matrix, are computed once. On a
    mesh whose devices share the heads of a group, each device has the keys of its heads.
    """
    heads = memory.shape[1]
    if (times := copies(keys.shape[1], heads)) > 1:
        keys, queries = (jnp.repeat(x, times, axis=1) for x in (keys, queries))
    groups = keys.shape[1]
    active = None if count is None else (jnp.arange(keys.shape[2]) < count).astype(keys.dtype)
    run = functools.partial(gated_delta, active=active, read="after", impl=impl)

    def head(memory, writes, retention, erase, keys, queries):
        found = run(memory, keys, writes, queries, retention=retention, erase=erase)
        return found.memory, found.reads

    own = (memory, writes, retention, erase)
    if groups == heads:
        return over_heads(head, (), (*own, keys, queries), impl)
    group = jax.vmap(head, in_axes=(0, 0, 0, 0, None, None))
    own = jax.tree.map(lambda x: x.reshape(x.shape[0], groups, heads // groups, *x.shape[2:]), own)
    found = over_heads(group, (), (*own, keys, queries), impl)
    memory, reads = jax.tree.map(lambda x: x.reshape(x.shape[0], heads, *x.shape[3:]), found)
    return memory, reads


def gated_axes(scaled: bool) -> Axes:
    """Names of the parameters of ``GatedHeads``, with or without its scale."""
    maps = {"gate": dense_axes("embed", "all_heads"), "down": dense_axes("all_heads", "embed")}
    return maps | ({"scale": ("head_dim",)} if scaled else {})


class GatedHeads(nn.Module):
    """``W_o (scale RMSNorm_head(reads) * activation(W_g u))`` of reads [B,H,T,V], H V = ``values``.

    The heads share ``scale`` [V]; ``size`` is V, or None for no scale. ``starts``: of W_g and W_o.
    """

    width: int
    values: int
    size: int | None
    activation: Callable[[Array], Array]
    starts: tuple[Initializer, Initializer]
    eps: float = layers.EPS
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.gate = layers.dense(self.values, self.dtype, start=self.starts[0])
        self.down = layers.dense(self.width, self.dtype, start=self.starts[1])
        if self.size is not None:
            self.scale = self.param("scale", nn.initializers.ones, (self.size,), layers.param_dtype(self.dtype))

    @layers.light
    def __call__(self, u: Stream, reads: Float[Array, "B H T V"]) -> Stream:
        normed = layers.normal(reads, self.eps)
        if self.size is not None:
            normed = layers.scaled(normed, self.scale)
        return self.down(layers.merge_heads(normed).astype(self.dtype) * self.activation(self.gate(u)))
