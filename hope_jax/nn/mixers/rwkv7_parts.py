"""Parts of both halves of RWKV-7: the mixture with the token before, low-rank maps, and their initial values.

``rwkv7.py``, the time mix, and ``channel_mix.py`` use them (arXiv 2503.14456).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import DTypeLike

from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.tokens import by_feature, by_token
from hope_jax.optim.newton_schulz import orthogonalize
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream

DEPTH = 0.5  # depth of the layer that initial values are for: 0 is the first, 1 the last


def published_rank(factor: float, width: int, power: float) -> int:
    """Inner features of a low-rank map in the released models: factor width^power, in whole multiples of 32."""
    return max(32, 32 * round(factor * width**power / 32))


def orthogonal(gain: float) -> Initializer:
    """Random matrices whose singular values are all near ``gain``, computed by products alone."""

    def draw(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        return gain * orthogonalize(jax.random.normal(key, shape, dtype))

    return draw


def fixed(values: np.ndarray) -> Initializer:
    """An initial value that is not random."""

    def start(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        del key
        return jnp.asarray(values, dtype).reshape(shape)

    return start


def mixture(width: int, power: float) -> Initializer:
    """The initial share of the token before: 1 - (n / D)^(power (1 - depth)) at channel n."""
    return fixed(1 - (np.arange(width) / width) ** (power * (1 - DEPTH)))


def mixed(u: Stream, before: Stream, share: Float[Array, " D"]) -> Stream:
    """``share`` of the token before plus ``1 - share`` of the present one, channel by channel."""
    return u + layers.scaled(before - u, share).astype(u.dtype)


def with_last(u: Stream, last: Float[Array, "B 1 D"], count: Count) -> tuple[Stream, Float[Array, "B 1 D"]]:
    """For every token the input of the token before; and the last input, for the next call."""
    seen = jnp.concatenate([last, by_feature(u)], axis=1)
    return by_token(seen[:, :-1]), layers.last_of(seen, u.shape[1], count, axis=1)


class LowRank(nn.Module):
    """``offset + up(inner(down(x)))``, [B,T,D] -> [B,T,D]; at the start it is the offset; None: no offset."""

    width: int
    rank: int
    inner: Callable[[Array], Array]
    offset: Initializer | None
    dtype: DTypeLike

    @nn.nowrap
    def axes(self) -> Axes:
        maps = {"down": dense_axes("embed", "rank"), "up": dense_axes("rank", "all_heads")}
        return maps if self.offset is None else maps | {"offset": ("all_heads",)}

    @nn.compact
    def __call__(self, x: Stream) -> Stream:
        down = layers.dense(self.rank, self.dtype, "down", nn.initializers.zeros)
        y = layers.dense(self.width, self.dtype, "up", orthogonal(0.1))(self.inner(down(x)))
        if self.offset is None:
            return y
        return y + self.param("offset", self.offset, (self.width,), layers.param_dtype(self.dtype))[None, None]
