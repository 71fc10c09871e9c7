"""The time mix of RWKV-7: a matrix memory that fades channel by channel and is written by a delta rule.

    M_t = M_{t-1} (diag(w_t) - kap_t (a_t * kap_t)^T) + v_t k~_t^T,    y_t = M_t r_t

(RWKV-7, arXiv 2503.14456; details and starts as in the authors' training code.) Every input is a mixture of the present
token and the one before; decay w, rate a and the output gate g come from low-rank maps. A token's own value is added
to the read once more (the bonus). Everything per head, kap of norm 1:

    kap = unit(k * erase_scale),    k~ = k (1 + (a - 1) key_scale)
    out = W_o((GroupNorm(y) + (sum_d r_d k~_d bonus_d) v) * g)

Departures from the published model. The values of the first layer do not reach later ones (its value residual). The
starts that differ from layer to layer, as layers are made alike here, are those of the middle of the depth. What starts
as orthogonal is nearly so, as QR is LAPACK, which can hang on CPU. ``mixers/channel_mix.py`` is the other half of
a block.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory import Erase, gated_delta
from hope_jax.memory.kernels import Impl
from hope_jax.memory.products import by_rows
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.optim.newton_schulz import orthogonalize
from hope_jax.types import Array, Count, Float, PRNGKeyArray, Stream

FASTEST = math.exp(-0.5)  # no channel decays faster than exp(-FASTEST) = 0.545 per token
EPS = 64e-5  # of the norm of a head's read
DEPTH = 0.5  # of the layer that the starts are for: 0 is the first, 1 the last
# How much of the token before goes into an input at the start: 1 - (n / D)^(power (1 - depth)) at channel n.
MIXTURES = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}


def published_rank(factor: float, width: int, power: float = 0.5) -> int:
    """Inner features of a low-rank map in the released models: factor width^power, in whole multiples of 32."""
    return max(32, 32 * round(factor * width**power / 32))


@dataclass(frozen=True)
class RWKV7Config:
    """The time mix of RWKV-7.

    Attributes:
      head_dim: features of a head, 2 or more; must divide the model width. Released models have 64.
      decay_rank, rate_rank, gate_rank: inner features of the low-rank maps; None: those of the released models,
        about 1.8 sqrt(width) for decay and rate and 0.6 width^0.8 for the gate, see ``published_rank``.
      impl: how the memory is evaluated, see ``memory.gated_delta``.
    """

    head_dim: int = 64
    decay_rank: int | None = None
    rate_rank: int | None = None
    gate_rank: int | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        whole("head_dim", self.head_dim, 2, "features of a head")
        for name in ("decay_rank", "rate_rank", "gate_rank"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1, "inner features; None: as published")

    def build(self, width: int, dtype: DTypeLike) -> "RWKV7":
        if width % self.head_dim:
            raise UserError(f"head_dim={self.head_dim} does not divide width {width}; choose a divisor")
        return RWKV7(self, width, dtype)

    def ranks(self, width: int) -> dict[str, int]:
        """Inner features of the low-rank maps in a model of that width."""
        small, large = published_rank(1.8, width), published_rank(0.6, width, 0.8)
        given = dict(decay=(self.decay_rank, small), rate=(self.rate_rank, small), gate=(self.gate_rank, large))
        return {name: published if rank is None else rank for name, (rank, published) in given.items()}


class RWKV7State(NamedTuple):
    """The input of the token before, and the memories."""

    last: Float[Array, "B 1 D"]
    memory: Float[Array, "B H V K"]


def orthogonal(gain: float) -> Initializer:
    """Matrices whose singular values are all near ``gain``, by products alone."""

    def draw(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        return gain * orthogonalize(jax.random.normal(key, shape, dtype))

    return draw


def fixed(values: np.ndarray) -> Initializer:
    """A start that is not drawn."""

    def start(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        del key
        return jnp.asarray(values, dtype).reshape(shape)

    return start


def mixture(width: int, power: float) -> Initializer:
    """See ``MIXTURES``."""
    return fixed(1 - (np.arange(width) / width) ** (power * (1 - DEPTH)))


def mixed(u: Stream, before: Stream, share: Float[Array, " D"]) -> Stream:
    """Per channel that share of the token before, and of the present one what is missing to 1."""
    return u + layers.scaled(before - u, share).astype(u.dtype)


def with_last(u: Stream, last: Float[Array, "B 1 D"], count: Count) -> tuple[Stream, Float[Array, "B 1 D"]]:
    """For every token the input of the one before; and the last one's, for the next call."""
    seen = jnp.concatenate([last, u], axis=1)
    return seen[:, :-1], layers.last_of(seen, u.shape[1], count, axis=1)


class LowRank(nn.Module):
    """``offset + up(inner(down(x)))``, [B,T,D] -> [B,T,D]; starts at the offset, None: there is none."""

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


class RWKV7(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``."""

    config: RWKV7Config
    width: int
    dtype: DTypeLike = jnp.float32

    @property
    def heads(self) -> int:
        return self.width // self.config.head_dim

    def setup(self) -> None:
        wide, one = layers.param_dtype(self.dtype), (self.width,)
        self.mix = {n: self.param(f"mix_{n}", mixture(self.width, p), one, wide) for n, p in MIXTURES.items()}
        gains = {"receptance": 1.0, "key": 0.1, "value": 1.0}
        self.maps = {n: layers.dense(self.width, self.dtype, n, orthogonal(gain)) for n, gain in gains.items()}
        self.out = layers.dense(self.width, self.dtype, start=nn.initializers.zeros)
        self.decay, self.rate, self.gate = self._low_rank()
        ramp = np.linspace(-0.5, 0.5, self.width)
        self.erase_scale = self.param("erase_scale", fixed(0.71 - 0.1 * ramp), one, wide)
        self.key_scale = self.param("key_scale", nn.initializers.constant(1.02), one, wide)
        per_head = (self.heads, self.config.head_dim)
        self.bonus = self.param("bonus", nn.initializers.constant(-0.04), per_head, wide)
        scale = nn.initializers.constant(DEPTH**0.7)
        exact = functools.partial(nn.GroupNorm, dtype=wide, param_dtype=wide, use_fast_variance=False)
        self.norm = exact(self.heads, epsilon=EPS, scale_init=scale)

    @nn.nowrap
    def _low_rank(self, **kwargs) -> list[LowRank]:
        """The maps of decay, rate and output gate."""
        width, wide, ranks = self.width, layers.param_dtype(self.dtype), self.config.ranks(self.width)
        ramp, wave = np.linspace(0, 1, width), np.linspace(-1, 1, self.config.head_dim)
        wave = np.tile(wave * np.abs(wave), self.heads)
        decay = fixed(-5.5 + 6 * ramp ** (1 + DEPTH**0.3) + 2.5 * wave)
        rate = fixed(-0.19 + 0.3 * wave + 0.4 * (ramp - 0.5))
        return [
            LowRank(width, ranks["decay"], jnp.tanh, decay, wide, **kwargs),
            LowRank(width, ranks["rate"], jax.nn.identity, rate, wide, **kwargs),
            LowRank(width, ranks["gate"], jax.nn.sigmoid, None, self.dtype, **kwargs),
        ]

    @nn.nowrap
    def axes(self) -> Axes:
        low_rank = zip(("decay", "rate", "gate"), self._low_rank(parent=None), strict=True)
        return {
            **{f"mix_{name}": ("embed",) for name in MIXTURES},
            **{name: dense_axes("embed", "all_heads") for name in ("receptance", "key", "value")},
            **{name: one.axes() for name, one in low_rank},
            **dict.fromkeys(("erase_scale", "key_scale"), ("all_heads",)),
            "bonus": ("heads", "head_dim"),
            "norm": dict.fromkeys(("scale", "bias"), ("all_heads",)),
            "out": dense_axes("all_heads", "embed"),
        }

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> RWKV7State:
        """A fresh sequence: an empty memory, and zeros before the first token. ``capacity`` is for attention."""
        size, wide = self.config.head_dim, layers.param_dtype(self.dtype)
        memory = jnp.zeros((batch, self.heads, size, size), wide)
        return RWKV7State(jnp.zeros((batch, 1, self.width), self.dtype), memory)

    def __call__(self, u: Stream, state: RWKV7State, count: Count = None) -> tuple[Stream, RWKV7State]:
        u, impl = u.astype(self.dtype), self.config.impl
        before, last = with_last(u, state.last, count)
        streams, gate = self._streams(u, before)
        active = None if count is None else (jnp.arange(u.shape[1]) < count).astype(jnp.float32)

        def head(memory, receptance, key, value, retention, erase):
            return gated_delta(
                memory, key, value, receptance, retention=retention, erase=erase, active=active, read="after", impl=impl
            )[:2]

        reads, memory = layers.over_heads(head, (), (state.memory, *streams), impl)
        return self._out(reads, streams[:3], gate), RWKV7State(last, memory)

    @layers.light
    def _streams(self, u: Stream, before: Stream) -> tuple[tuple[Array, Array, Array, Array, Erase], Stream]:
        """Receptance, key, value, retention and erase of every head, [B,H,T,K], and the output gate [B,T,D]."""
        inputs = {name: mixed(u, before, share) for name, share in self.mix.items()}
        receptance, key, value = (to(inputs[n]).astype(self.norm.dtype) for n, to in self.maps.items())
        retention = jnp.exp(-FASTEST * jax.nn.sigmoid(self.decay(inputs["decay"])))
        rate = jax.nn.sigmoid(self.rate(inputs["rate"]))
        erased = layers.scaled(key, self.erase_scale)
        key = key + key * layers.scaled(rate - 1, self.key_scale)
        receptance, key, value, retention, erased, rate = (
            layers.split_heads(x, self.heads) for x in (receptance, key, value, retention, erased, rate)
        )
        erased = erased * jax.lax.rsqrt(jnp.maximum(jnp.sum(erased * erased, axis=-1, keepdims=True), 1e-24))
        streams = (receptance, key, value, retention, Erase(erased, rate * erased))
        return streams, self.gate(inputs["gate"])

    @layers.light
    def _out(self, reads: Float[Array, "B H T V"], streams: tuple[Array, Array, Array], gate: Stream) -> Stream:
        receptance, key, value = streams
        bonus = jnp.sum(receptance * key * self.bonus[None, :, None], axis=-1, keepdims=True) * value
        y = by_rows(self.norm, layers.merge_heads(reads)) + layers.merge_heads(bonus)
        return self.out(y.astype(self.dtype) * gate)
