"""The time mix of RWKV-7: a matrix memory that fades channel by channel and is written by a delta rule.

    M_t = M_{t-1} (diag(w_t) - kap_t (a_t * kap_t)^T) + v_t k~_t^T,    y_t = M_t r_t

(RWKV-7, arXiv 2503.14456; details and initial values as in the authors' training code.) Every input is a mixture of
the present token and the one before; decay w, rate a and the output gate g come from low-rank maps. A token's own value
is added to the read once more (the bonus). For each head, with kap of norm 1:

    kap = unit(k * erase_scale),    k~ = k (1 + (a - 1) key_scale)
    out = W_o((GroupNorm(y) + (sum_d r_d k~_d bonus_d) v) * g)

Later layers mix the value of the same token in the first layer into theirs, channel by channel:
v + (v_first - v) sigmoid(share). It goes from layer to layer and is no state (``nn.config.PassesOn``). Layers are made
alike, so the first has a map ``share``, too; it has no effect there.

Departures from the published model. The starts that differ from layer to layer, as layers are made alike here, are
those of the middle of the depth. What starts as orthogonal is nearly so, as QR is LAPACK, which can hang on CPU.
``mixers/channel_mix.py`` is the other half of a block.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.memory import Erase, gated_delta
from hope_jax.memory.kernels import Impl
from hope_jax.memory.products import merged_rows
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes
from hope_jax.nn.heads import over_heads
from hope_jax.nn.mixers.rwkv7_parts import DEPTH, LowRank, fixed, mixed, mixture, orthogonal, published_rank, with_last
from hope_jax.types import Array, Bool, Count, Float, Stream

FASTEST = math.exp(-0.5)  # no channel decays faster than exp(-FASTEST) = 0.545 per token
EPS = 64e-5  # epsilon of the norm of a head's read
# The initial share of the token before in each input, see ``mixture``.
MIXTURES = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
LOW_RANK = ("decay", "rate", "share", "gate")


class FirstValues(NamedTuple):
    """The first layer's values of the tokens of this call; in the first layer itself they are not ``known``."""

    values: Float[Array, "B T D"]
    known: Bool[Array, ""]


@dataclass(frozen=True)
class RWKV7Config:
    """The time mix of RWKV-7.

    Attributes:
      head_dim: features of a head, 2 or more; must divide the model width. Released models have 64.
      decay_rank, rate_rank, share_rank, gate_rank: inner features of the low-rank maps; None: those of the released
        models, about 1.8 sqrt(width) for decay and rate, 1.3 sqrt(width) for the share of the first layer's value and
        0.6 width^0.8 for the gate, see ``published_rank``.
      impl: how the memory is evaluated, see ``memory.gated_delta``.
    """

    head_dim: int = 64
    decay_rank: int | None = None
    rate_rank: int | None = None
    share_rank: int | None = None
    gate_rank: int | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        whole("head_dim", self.head_dim, 2, "features of a head")
        for name in (f"{name}_rank" for name in LOW_RANK):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1, "inner features; None: as published")

    def build(self, width: int, dtype: DTypeLike) -> "RWKV7":
        if width % self.head_dim:
            raise UserError(f"head_dim={self.head_dim} does not divide width {width}; choose a divisor")
        return RWKV7(self, width, dtype)

    def ranks(self, width: int) -> dict[str, int]:
        """Inner features of the low-rank maps in a model of that width."""
        formulas = {"decay": (1.8, 0.5), "rate": (1.8, 0.5), "share": (1.3, 0.5), "gate": (0.6, 0.8)}
        published = {name: published_rank(factor, width, power) for name, (factor, power) in formulas.items()}
        given = {name: getattr(self, f"{name}_rank") for name in LOW_RANK}
        return {name: published[name] if rank is None else rank for name, rank in given.items()}

    def nothing_passed(self, x: Stream) -> FirstValues:
        """What the first layer takes, see ``nn.config.PassesOn``."""
        return FirstValues(jnp.zeros(x.shape, layers.param_dtype(x.dtype)), jnp.zeros((), bool))


class RWKV7State(NamedTuple):
    """The input of the token before, and the memories."""

    last: Float[Array, "B 1 D"]
    memory: Float[Array, "B H V K"]


class RWKV7(nn.Module):
    """``(u[B,T,D], state, count, first) -> (y[B,T,D], state, first)``, ``first`` a ``FirstValues``."""

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
        self.decay, self.rate, self.share, self.gate = self._low_rank()
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
        """The maps of decay, rate, share of the first layer's value, and output gate: ``LOW_RANK``."""
        width, wide, ranks = self.width, layers.param_dtype(self.dtype), self.config.ranks(self.width)
        ramp, wave = np.linspace(0, 1, width), np.linspace(-1, 1, self.config.head_dim)
        wave = np.tile(wave * np.abs(wave), self.heads)
        decay = fixed(-5.5 + 6 * ramp ** (1 + DEPTH**0.3) + 2.5 * wave)
        rate, share = fixed(-0.19 + 0.3 * wave + 0.4 * (ramp - 0.5)), fixed(0.73 - 0.4 * (ramp - 0.5))
        return [
            LowRank(width, ranks["decay"], jnp.tanh, decay, wide, **kwargs),
            LowRank(width, ranks["rate"], jax.nn.identity, rate, wide, **kwargs),
            LowRank(width, ranks["share"], jax.nn.identity, share, wide, **kwargs),
            LowRank(width, ranks["gate"], jax.nn.sigmoid, None, self.dtype, **kwargs),
        ]

    @nn.nowrap
    def axes(self) -> Axes:
        low_rank = zip(LOW_RANK, self._low_rank(parent=None), strict=True)
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

    def __call__(
        self, u: Stream, state: RWKV7State, count: Count, first: FirstValues
    ) -> tuple[Stream, RWKV7State, FirstValues]:
        u, impl = u.astype(self.dtype), self.config.impl
        before, last = with_last(u, state.last, count)
        streams, gate, first = self._streams(u, before, first)
        active = None if count is None else (jnp.arange(u.shape[1]) < count).astype(jnp.float32)

        def head(memory, receptance, key, value, retention, erase):
            return gated_delta(
                memory, key, value, receptance, retention=retention, erase=erase, active=active, read="after", impl=impl
            )[:2]

        reads, memory = over_heads(head, (), (state.memory, *streams), impl)
        return self._out(reads, streams[:3], gate), RWKV7State(last, memory), first

    @layers.light
    def _streams(
        self, u: Stream, before: Stream, first: FirstValues
    ) -> tuple[tuple[Array, Array, Array, Array, Erase], Stream, FirstValues]:
        """Receptance, key, value, retention and erase of every head, [B,H,T,K]; output gate [B,T,D]; first values."""
        inputs = {name: mixed(u, before, share) for name, share in self.mix.items()}
        receptance, key, value = (to(inputs[n]).astype(self.norm.dtype) for n, to in self.maps.items())
        values = jnp.where(first.known, first.values, value)
        value = value + (values - value) * jax.nn.sigmoid(self.share(inputs["value"]))
        retention = jnp.exp(-FASTEST * jax.nn.sigmoid(self.decay(inputs["decay"])))
        rate = jax.nn.sigmoid(self.rate(inputs["rate"]))
        erased = layers.scaled(key, self.erase_scale)
        key = key + key * layers.scaled(rate - 1, self.key_scale)
        receptance, key, value, retention, erased, rate = (
            layers.split_heads(x, self.heads) for x in (receptance, key, value, retention, erased, rate)
        )
        erased = erased * jax.lax.rsqrt(jnp.maximum(jnp.sum(erased * erased, axis=-1, keepdims=True), 1e-24))
        streams = (receptance, key, value, retention, Erase(erased, rate * erased))
        return streams, self.gate(inputs["gate"]), FirstValues(values, jnp.ones((), bool))

    @layers.light
    def _out(self, reads: Float[Array, "B H T V"], streams: tuple[Array, Array, Array], gate: Stream) -> Stream:
        receptance, key, value = streams
        bonus = jnp.sum(receptance * key * self.bonus[None, :, None], axis=-1, keepdims=True) * value
        y = merged_rows(self.norm, layers.merge_heads(reads)) + layers.merge_heads(bonus)
        return self.out(y.astype(self.dtype) * gate)
