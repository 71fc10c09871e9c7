"""The channel mix of RWKV-7: a feed-forward part that sees the token before (arXiv 2503.14456).

    y = W_v relu(W_k (u + (u_{t-1} - u) * mix))^2

It has a state, and so the signature of a mixer: a block of RWKV-7 is two mixers, ``mixers/rwkv7.py`` and this one, each
without a feed-forward part.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import whole
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.mixers.rwkv7_parts import DEPTH, mixed, mixture, orthogonal, with_last
from hope_jax.types import Array, Count, Float, Stream


@dataclass(frozen=True)
class ChannelMixConfig:
    """The channel mix of RWKV-7.

    Attributes:
      hidden: inner features, at least 1; released models have 4 times the model width.
    """

    hidden: int

    def __post_init__(self) -> None:
        whole("hidden", self.hidden, 1, "inner features")

    def build(self, width: int, dtype: DTypeLike) -> "ChannelMix":
        return ChannelMix(self, width, dtype)


class ChannelMixState(NamedTuple):
    """The input of the token before."""

    last: Float[Array, "B 1 D"]


class ChannelMix(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``. Its start values are those of the middle layer, as in ``RWKV7``."""

    config: ChannelMixConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        power = (1 - DEPTH) ** 3  # times 1 - DEPTH in ``mixture``: the fourth power
        self.mix = self.param("mix", mixture(self.width, power), (self.width,), layers.param_dtype(self.dtype))
        self.key = layers.dense(self.config.hidden, self.dtype, start=orthogonal(1.0))
        self.value = layers.dense(self.width, self.dtype, start=nn.initializers.zeros)

    @nn.nowrap
    def axes(self) -> Axes:
        return {"mix": ("embed",), "key": dense_axes("embed", "hidden"), "value": dense_axes("hidden", "embed")}

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> ChannelMixState:
        """Zeros before the first token. ``capacity`` is for attention and unused here."""
        return ChannelMixState(jnp.zeros((batch, 1, self.width), self.dtype))

    def __call__(self, u: Stream, state: ChannelMixState, count: Count = None) -> tuple[Stream, ChannelMixState]:
        u = u.astype(self.dtype)
        before, last = with_last(u, state.last, count)
        return self._through(u, before), ChannelMixState(last)

    @layers.light
    def _through(self, u: Stream, before: Stream) -> Stream:
        return self.value(jnp.square(jax.nn.relu(self.key(mixed(u, before, self.mix)))))
