"""Gated DeltaNet and Comba: a delta rule that also forgets, in the published form of the layers.

    M_t = M_{t-1} (alpha I - a k k^T) + beta v k^T        y_t = M_t q / sqrt(K)

Gated DeltaNet (arXiv 2412.06464): a = alpha beta, so the memory is retained first and then corrected. Comba
(arXiv 2506.02475): a = b beta, and the query is q - d k; b and d are learned, one for each key head. Keys and queries
have norm 1 and alpha is that of ``DecayGate``. Read ``matrix.py`` first.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import check_choices, whole
from hope_jax.memory.kernels import Impl
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.mixers import matrix
from hope_jax.types import Array, Count, Stream

Form = Literal["gated_deltanet", "comba"]

START = nn.initializers.normal(0.02)
SLOWEST = 0.01  # smallest rate of decay at the start; a rate of 0 would have no logarithm
COMBA = ("erase_share", "correction")  # the logits of b, and d
# Activation of the output gate and epsilon of the norm before it, as published.
OUTPUTS = {"gated_deltanet": (nn.silu, 1e-6), "comba": (nn.sigmoid, 1e-5)}


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet or Comba. The widths do not depend on that of the model; ``published`` has the usual ones.

    Attributes:
      heads: key heads, at least 1.
      key_size, value_size: features of a key and of a value, each per head.
      values_per_key: value heads, each with a memory and gates of its own, that share one key head.
      conv: taps of the causal convolution after each projection.
      form: "gated_deltanet" or "comba".
      norm_eps: added to the mean square in the norm of the output; None: as published.
      impl: how the memories are evaluated, see ``memory.gated_delta``.
    """

    heads: int
    key_size: int
    value_size: int
    values_per_key: int = 1
    conv: int = 4
    form: Form = "gated_deltanet"
    norm_eps: float | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("heads", "key_size", "value_size", "values_per_key", "conv"):
            whole(name, getattr(self, name))
        matrix.check_eps(self.eps)

    @property
    def eps(self) -> float:
        """Epsilon of the norm of the output."""
        return OUTPUTS[self.form][1] if self.norm_eps is None else self.norm_eps

    @property
    def value_heads(self) -> int:
        """Heads that have a memory, H."""
        return self.heads * self.values_per_key

    @classmethod
    def published(cls, width: int, form: Form = "gated_deltanet") -> "GatedDeltaNetConfig":
        """Keys of 3/4 of the width in heads of 256 features where these divide it (6 at 2048), values twice as wide."""
        heads = matrix.heads_of_at_most(3 * width // 4, 256)
        size = 3 * width // 4 // heads
        return cls(heads, size, 2 * size, form=form)

    def build(self, width: int, dtype: DTypeLike) -> "GatedDeltaNet":
        return GatedDeltaNet(self, width, dtype)


class GatedDeltaNet(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``."""

    config: GatedDeltaNetConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, wide = self.config, layers.param_dtype(self.dtype)
        keys, values = c.heads * c.key_size, c.value_heads * c.value_size
        convolved = functools.partial(matrix.ConvolvedMap, taps=c.conv, start=START, dtype=self.dtype, impl=c.impl)
        self.query, self.key, self.value = convolved(keys), convolved(keys), convolved(values)
        self.decay = matrix.DecayGate(c.value_heads, START, SLOWEST, dtype=self.dtype)
        self.rate = layers.dense(c.value_heads, wide, start=START)
        if c.form == "comba":
            numbers = (self.param(name, nn.initializers.ones, (c.heads,), wide) for name in COMBA)
            self.erase_share, self.correction = numbers
        activation, _ = OUTPUTS[c.form]
        self.out = matrix.GatedHeads(self.width, values, c.value_size, activation, (START, START), c.eps, self.dtype)

    @nn.nowrap
    def axes(self) -> Axes:
        return {
            **dict.fromkeys(("query", "key", "value"), matrix.convolved_axes()),
            "decay": matrix.DECAY_AXES,
            "rate": dense_axes("embed", "heads"),
            **(dict.fromkeys(COMBA, ("heads",)) if self.config.form == "comba" else {}),
            "out": matrix.gated_axes(scaled=True),
        }

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> matrix.MatrixState:
        """A fresh sequence: memories of zeros. ``capacity`` is for attention and unused here."""
        c = self.config
        channels = (c.heads * c.key_size, c.heads * c.key_size, c.value_heads * c.value_size)
        return matrix.fresh_state(batch, c.conv, channels, (c.value_heads, c.value_size, c.key_size), self.dtype)

    def __call__(self, u: Stream, state: matrix.MatrixState, count: Count = None) -> tuple[Stream, matrix.MatrixState]:
        (q, k, v), tails = self._streams(u, state.tails, count)
        rate = jnp.swapaxes(jax.nn.sigmoid(self.rate(u)), 1, 2)
        _, retention = self.decay(u)
        erase = retention * rate
        if self.config.form == "comba":
            q = q - self.correction[None, :, None, None] * k
            share = jnp.repeat(jax.nn.sigmoid(self.erase_share), self.config.values_per_key)
            erase = share[None, :, None] * rate
        tokens = (k, rate[..., None] * v, q * self.config.key_size**-0.5)
        memory, reads = matrix.write_and_read(state.memory, *tokens, retention, erase, count, self.config.impl)
        return self.out(u, reads), matrix.MatrixState(tails, memory)

    @layers.light
    def _streams(self, u: Stream, tails: tuple[Array, ...], count: Count) -> tuple[list[Array], tuple[Array, ...]]:
        """Queries and keys [B,G,T,K] of norm 1 and values [B,H,T,V], in at least float32."""
        c, wide = self.config, layers.param_dtype(self.dtype)
        pairs = zip((self.query, self.key, self.value), tails, strict=True)
        (q, k, v), tails = zip(*(stream(u, tail, count) for stream, tail in pairs), strict=True)
        values = layers.split_heads(v, c.value_heads).astype(wide)
        return [layers.unit_heads(q, c.heads), layers.unit_heads(k, c.heads), values], tails
