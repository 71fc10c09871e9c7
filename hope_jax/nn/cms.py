"""The continuum memory system (Eq. 70-74): the feed-forward part of a block as a chain of MLPs, fastest level first.

Each MLP is one *level*, rewritten once per ``period`` tokens. A level whose period is longer than the context is an
ordinary parameter ("outer" mode): ``optim.by_level`` accumulates its gradient and steps it once per period. With one
level the system is a plain Transformer feed-forward layer, which is the "without CMS" row of the ablation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.nn.layers import RMSNorm, dense, light, param_dtype
from hope_jax.types import Array, Stream

Wiring = Literal["sequential", "independent"]


@dataclass(frozen=True)
class CMSConfig:
    """A continuum memory system.

    Attributes:
      levels: update periods, fastest first.
      hidden: inner features of each level's MLP.
      wiring: "sequential" (Eq. 73): x = x + MLP_l(RMSNorm(x)) level after level; "independent" (Eq. 74):
        x + sum_l s_l MLP_l(RMSNorm(x)) with learned s_l.
    """

    levels: tuple[Level, ...]
    hidden: int
    wiring: Wiring = "sequential"

    def __post_init__(self) -> None:
        periods = [level.period for level in self.levels]
        if not periods or periods != sorted(periods):
            raise UserError(f"CMS periods are {periods}; expected at least one level, fastest first")
        if self.wiring not in get_args(Wiring):
            raise UserError(f"wiring is {self.wiring!r}; expected one of {get_args(Wiring)}")
        if self.hidden < 1:
            raise UserError(f"CMS hidden is {self.hidden}; expected at least 1 feature")

    def build(self, width: int, dtype: DTypeLike) -> "ContinuumMemory":
        """The module for a model of ``width`` features."""
        return ContinuumMemory(self, width, dtype)

    def update_every(self, tokens_per_batch: int) -> dict[str, int]:
        """Batches between two updates of each level's parameters, by the name of the level (SPEC 3.1, outer mode)."""
        steps = (max(1, round(level.period / tokens_per_batch)) for level in self.levels)
        return {f"level_{i}": n for i, n in enumerate(steps)}


class CMSState(NamedTuple):
    """Fast deviations of the levels that learn in context, and their pending gradients; empty in outer mode."""

    deltas: tuple[Array, ...]
    gradients: tuple[Array, ...]


class LevelMLP(nn.Module):
    """MLP(RMSNorm(x)) with GELU: the memory of one level."""

    hidden: int
    width: int
    dtype: DTypeLike

    def setup(self) -> None:
        self.norm = RMSNorm(self.dtype)
        self.up = dense(self.hidden, self.dtype)
        self.down = dense(self.width, self.dtype)

    @light
    def __call__(self, x: Stream) -> Stream:
        return self.down(jax.nn.gelu(self.up(self.norm(x))))


class ContinuumMemory(nn.Module):
    """``(x[B,T,D], state) -> (x, state)``; norms and residual connections are inside."""

    config: CMSConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        count = len(self.config.levels)
        levels = range(count)
        self.levels = [LevelMLP(self.config.hidden, self.width, self.dtype, name=f"level_{i}") for i in levels]
        if self.config.wiring == "independent":
            start = nn.initializers.constant(1 / count)
            self.mixture = self.param("mixture", start, (count,), param_dtype(self.dtype))

    @nn.nowrap
    def init_state(self, batch: int, capacity: int) -> CMSState:
        """No level learns in context in outer mode, so there is nothing to hold."""
        del batch, capacity
        return CMSState((), ())

    def __call__(self, x: Stream, state: CMSState) -> tuple[Stream, CMSState]:
        if self.config.wiring == "independent":
            added = [s * level(x) for s, level in zip(self.mixture.astype(x.dtype), self.levels, strict=True)]
            return x + sum(added), state
        for level in self.levels:
            x = x + level(x)
        return x, state
