"""TNT, arXiv 2511.07343: a local memory that is set back at every shard, and a global one that is written rarely.

    y_t = M(V_n, q_t) + M(W_t, unit(P_t q_t))        P_t = sum of k_s k_s^T / ||k_s||^2 over the shard up to t

W is the memory of any memory mixer (of Hope's, all boxes are set back together) and starts anew every ``shard`` tokens:
whole shards of a fresh sequence are read side by side, like sequences of a batch, and the sequential steps fall from
T / C to shard / C. V is written once every ``global_period`` tokens, with all of them; within such a period it is read
as it was at the start. Only V and the tails of the convolutions go from one shard to the next.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, whole
from hope_jax.memory.frozen import scan_frozen
from hope_jax.memory.rule import Fast, Rule
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes, memory_axes
from hope_jax.nn.heads import over_heads
from hope_jax.nn.mixers.memory import MemoryMixerConfig, MemoryMixerState, learned_start, sow_gates
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.types import Array, Count, Float, Int, Stream


@dataclass(frozen=True)
class TNTConfig:
    """A mixer with a local and a global memory.

    Attributes:
      local: the mixer of the local memory. Hope's mixer, or the rule of the other one, has ``shard``, which must be
        given, and ``project_queries``: whether the queries go through P_t.
      global_period: tokens between two updates of the global memory, which has the architecture and the loss of
        the local one.
      rate_max: bound of the sum of the global memory's rates over such a period; each token's is between 0 and
        rate_max / global_period. Above 2 a period of equal keys would diverge. 0 switches its writes off.
    """

    local: MemoryMixerConfig | SelfModifyingConfig
    global_period: int = 2048
    rate_max: float = 2.0

    def __post_init__(self) -> None:
        whole("global_period", self.global_period, 1, "tokens")
        if self.rate_max < 0:
            raise UserError(f"rate_max is {self.rate_max}; expected 0 (no writes) or more")
        if self.local_rule.shard is None:
            raise UserError("shard of the local memory is None; give the tokens after which it is set back")

    @property
    def local_rule(self) -> Rule:
        """The rule of the local memory that is read."""
        return self.local.rule if isinstance(self.local, MemoryMixerConfig) else self.local.spec().rules.memory

    @property
    def rule(self) -> Rule:
        """The rule of the global memory."""
        local = self.local_rule
        return Rule(local.architecture, local.objective, period=self.global_period, read="anchor", link=local.link)

    @property
    def adaptive(self) -> tuple[str, ...]:
        """Those of "q", "k", "v" that local memories make: they jump at every shard, so the global one has its own."""
        return () if isinstance(self.local, MemoryMixerConfig) else self.local.inner_projection

    def build(self, width: int, dtype: DTypeLike) -> "TNTMixer":
        self.local.build(width, dtype)  # checks the heads
        return TNTMixer(self, width, dtype)


class TNTState(NamedTuple):
    """State of the local mixer, weights of the global memory [B,H,...], tokens since its anchor moved."""

    local: MemoryMixerState
    global_memory: Fast
    position: Int[Array, ""] | np.ndarray


class TNTMixer(nn.Module):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``; see the module docstring.

    Sows the gates of the local memories as ``SelfModifyingMixer`` does.
    """

    config: TNTConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, local = self.config, self.config.local
        size, wide = self.width // local.heads, layers.param_dtype(self.dtype)
        self.local = local.build(self.width, self.dtype)
        self.static = {
            n: layers.dense(self.width, self.dtype, f"project_{n}", layers.near_identity) for n in c.adaptive
        }
        self.rate = layers.dense(local.heads, wide, "gate_rate", bias=0.0)
        sizes = (size, size, local.hidden * size)
        self.initial = learned_start(self, "memory", c.rule.architecture, (local.heads,), sizes)

    @nn.nowrap
    def axes(self) -> Axes:
        c = self.config
        return {
            "local": c.local.build(self.width, self.dtype).axes(),
            "gate_rate": dense_axes("embed", "heads", bias=True),
            **{f"project_{n}": dense_axes("all_heads", "all_heads") for n in c.adaptive},
            **memory_axes("memory", c.rule.architecture.layers),
        }

    def init_state(self, batch: int, capacity: int) -> TNTState:
        """A fresh sequence: both memories at their learned starts. ``capacity`` is for attention and unused here."""
        weights = layers.for_batch(self.config.rule.start(self.initial), batch)
        return TNTState(self.local.init_state(batch, capacity), weights, np.zeros((), np.int32))

    def __call__(self, u: Stream, state: TNTState, count: Count = None) -> tuple[Stream, TNTState]:
        rule, impl = self.config.rule, self.config.local.impl
        found, local = self.local.read(u, state.local, count)
        sow_gates(self, found)
        q, k, v = map(self._projected, "qkv", found.streams)

        def head(position, fast, *tokens):
            return scan_frozen(rule, fast, tokens, position, impl, count)

        of_heads = (state.global_memory, k, v, q, self._rates(u))
        weights, reads = over_heads(head, (), of_heads, impl, (state.position,))
        position = (state.position + (u.shape[1] if count is None else count)) % rule.period
        y = self.local.answer(u, q + found.queries, reads + found.reads)
        return y, TNTState(local, weights, position)

    def _projected(self, name: str, x: Float[Array, "B H T K"]) -> Float[Array, "B H T K"]:
        """A stream for the global memory: that of the local mixer, through a static map where the mixer has none."""
        if name not in self.config.adaptive:
            return x
        return layers.unit_heads(self.static[name](layers.merge_heads(x).astype(self.dtype)), self.config.local.heads)

    def _rates(self, u: Stream) -> Float[Array, "B H T"]:
        """Inner rates of the global memory."""
        return self.config.rate_max / self.config.global_period * jnp.swapaxes(jax.nn.sigmoid(self.rate(u)), 1, 2)
