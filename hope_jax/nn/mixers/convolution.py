"""A short causal convolution as a mixer of its own: ``y = conv(u) + b``, every feature for itself.

TTT (arXiv 2407.04620) has one in front of each of its blocks: in a pattern, this mixer without a feed-forward part.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import check_choices, whole
from hope_jax.memory.kernels import Impl
from hope_jax.nn.axes import Axes, conv_axes
from hope_jax.nn.layers import FAN_IN, ShortConv
from hope_jax.nn.tokens import by_token
from hope_jax.types import Array, Count, Float, Stream


@dataclass(frozen=True)
class ConvolutionConfig:
    """A convolution as a mixer.

    conv: tokens that it sees, the present one included, at least 1.
    impl: how it is computed, see ``memory.kernels``.
    """

    conv: int = 4
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        whole("conv", self.conv, 1, "tokens that a convolution sees")

    def build(self, width: int, dtype: DTypeLike) -> "Convolution":
        return Convolution(self, width, dtype)


class Convolution(nn.Module):
    """``(u[B,T,D], tail) -> (y[B,T,D], tail)``; the state is the tail, the last ``conv - 1`` inputs."""

    config: ConvolutionConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.conv = ShortConv(self.config.conv, self.dtype, FAN_IN, self.config.impl, nn.initializers.zeros)

    @nn.nowrap
    def axes(self) -> Axes:
        return {"conv": conv_axes("embed", bias=True)}

    def init_state(self, batch: int, capacity: int) -> Float[Array, "B tail D"]:
        """Nothing seen: zeros. ``capacity`` is for attention and unused here."""
        return self.conv.init_state(batch, self.width)

    def __call__(
        self, u: Stream, tail: Float[Array, "B tail D"], count: Count = None
    ) -> tuple[Stream, Float[Array, "B tail D"]]:
        y, tail = self.conv(u, tail, count)
        return by_token(y), tail
