"""The continuum memory system (Eq. 70-74): the feed-forward part of a block as a chain of MLPs, fastest level first.

Each MLP is one *level*, rewritten once per ``period`` tokens. A level whose period is longer than the context is an
ordinary parameter ("outer" mode): ``optim.by_level`` accumulates its gradient and steps it once per period. The fastest
``in_context`` levels are written while a sequence is read (``fast.py``). With one level the system is a plain
Transformer feed-forward layer, which is the "without CMS" row of the ablation.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.levels import Level, check_multiples
from hope_jax.nn.axes import Axes, dense_axes, norm_axes
from hope_jax.nn.feed_forward.fast import Fast, Writes, blank, moved
from hope_jax.nn.layers import FAN_IN, RMSNorm, dense, light, param_dtype
from hope_jax.types import Array, Float, Stream

Wiring = Literal["sequential", "nested", "independent"]


@dataclass(frozen=True)
class CMSConfig:
    """A continuum memory system, a ``fast.LevelsConfig``.

    Attributes:
      levels: update periods, fastest first.
      hidden: inner features of each level's MLP.
      wiring: "sequential" (Eq. 73): x = x + MLP_l(RMSNorm(x)) level after level; "nested" (Eq. 72): the same, and in
        context a level is set back to its start when the next slower one is written; "independent" (Eq. 74):
        x + sum_l s_l MLP_l(RMSNorm(x)) with learned s_l.
      in_context: levels, from the fastest, that are written in context in training; each period must be a multiple of
        the faster one. The others are outer levels.
      writes: how levels are written in context.
      gated: each level's MLP is SwiGLU, W_down(silu(W_gate u) * W_up u), as in Transformers and their ad-hoc levels;
        False: W_down gelu(W_up u). The paper leaves it open.
    """

    levels: tuple[Level, ...]
    hidden: int
    wiring: Wiring = "sequential"
    in_context: int = 0
    writes: Writes = Writes()
    gated: bool = True

    def __post_init__(self) -> None:
        periods = [level.period for level in self.levels]
        if not periods or periods != sorted(periods):
            raise UserError(f"CMS periods are {periods}; expected at least one level, fastest first")
        check_choices(self)
        whole("hidden", self.hidden, 1, "features of each level")
        if not 0 <= self.in_context <= len(periods):
            raise UserError(f"in_context is {self.in_context}; expected 0 to {len(periods)}, the number of levels")
        if len(self.writes.bptt) not in (0, self.in_context):
            raise UserError(f"bptt is {self.writes.bptt}; expected one for each of {self.in_context} in-context levels")
        check_multiples(periods[: self.in_context])

    def build(self, width: int, dtype: DTypeLike) -> "ContinuumMemory":
        return ContinuumMemory(self, width, dtype)

    def update_every(self, tokens_per_batch: int) -> dict[str, int]:
        """Batches between two updates of each level's parameters, by the name of the level (SPEC 3.1, outer mode)."""
        outer = [1 if i < self.in_context else level.period / tokens_per_batch for i, level in enumerate(self.levels)]
        return {f"level_{i}": max(1, round(steps)) for i, steps in enumerate(outer)}

    @property
    def maps(self) -> tuple[str, ...]:
        """The linear maps of a level."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    def shape(self, name: str, width: int) -> tuple[int, int]:
        """Inputs and outputs of the linear map ``name`` of a level."""
        return (self.hidden, width) if name == "down" else (width, self.hidden)

    @property
    def trained(self) -> int:
        return self.in_context

    @property
    def nested(self) -> bool:
        return self.wiring == "nested"

    def periods(self, layers: int) -> tuple[tuple[int, ...], ...]:
        return tuple((level.period,) * layers for level in self.levels)

    def blank(self, batch: int, width: int, dtype: DTypeLike) -> tuple[dict[str, Array], ...]:
        shapes = {name: self.shape(name, width) for name in self.maps}
        return tuple(blank(shapes, batch, self.writes.rank, dtype) for _ in self.levels)

    def kernels(self, params: Any) -> tuple[dict[str, Any], ...]:
        return tuple(params[f"level_{i}"] for i in range(len(self.levels)))


class LevelMLP(nn.Module):
    """MLP(RMSNorm(x)), SwiGLU or GELU: the memory of one level."""

    config: CMSConfig
    width: int
    dtype: DTypeLike

    def setup(self) -> None:
        c, wide = self.config, param_dtype(self.dtype)
        shapes = {name: c.shape(name, self.width) for name in c.maps}
        self.norm = RMSNorm(self.dtype)
        self.linear = {name: dense(columns, self.dtype, name) for name, (_, columns) in shapes.items()}
        self.bases = dict.fromkeys(shapes)  # bases of Delta, if its rank is low
        if (rank := c.writes.rank) is not None:
            bases = {name: (rows, rank) for name, (rows, _) in shapes.items()}
            self.bases = {name: self.param(f"{name}_basis", FAN_IN, shape, wide) for name, shape in bases.items()}

    @nn.nowrap
    def axes(self) -> Axes:
        names = {name: ("hidden", "embed") if name == "down" else ("embed", "hidden") for name in self.config.maps}
        maps = {name: dense_axes(*ends) for name, ends in names.items()}
        low_rank = {f"{name}_basis": (rows, "rank") for name, (rows, _) in names.items()}
        return {"norm": norm_axes(), **maps, **(low_rank if self.config.writes.rank is not None else {})}

    @light
    def __call__(self, x: Stream, fast: Fast | None = None) -> Stream:
        u = self.norm(x)
        if self.config.gated:
            hidden = nn.silu(self._map("gate", u, fast)) * self._map("up", u, fast)
        else:
            hidden = nn.gelu(self._map("up", u, fast))
        return self._map("down", hidden, fast)

    def _map(self, name: str, x: Stream, fast: Fast | None) -> Float[Array, "B T features"]:
        """A linear map, moved by what the sequence has written."""
        return moved(self.linear[name](x), x, fast, name, self.bases[name])


class ContinuumMemory(nn.Module):
    """``(x[B,T,D], deltas) -> x``; norms and residual connections are inside."""

    config: CMSConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, wide, count = self.config, param_dtype(self.dtype), len(self.config.levels)
        self.levels = [LevelMLP(c, self.width, self.dtype, name=f"level_{i}") for i in range(count)]
        if c.in_context:
            self.rate = self.param("rate", nn.initializers.constant(c.writes.rate), (c.in_context,), wide)
        if c.wiring == "independent":
            self.mixture = self.param("mixture", nn.initializers.constant(1 / count), (count,), wide)

    @nn.nowrap
    def axes(self) -> Axes:
        c = self.config
        level = LevelMLP(c, self.width, self.dtype, parent=None).axes()
        learned = ["rate"] * bool(c.in_context) + ["mixture"] * (c.wiring == "independent")
        levels = {f"level_{i}": level for i in range(len(c.levels))}
        return levels | dict.fromkeys(learned, ("levels",))

    def __call__(self, x: Stream, deltas: tuple[Any, ...]) -> Stream:
        pairs = list(zip(self.levels, deltas or (None,) * len(self.levels), strict=True))
        if self.config.wiring == "independent":
            parts = [s * level(x, fast) for s, (level, fast) in zip(self.mixture.astype(x.dtype), pairs, strict=True)]
            return x + sum(parts)
        for level, fast in pairs:
            x = x + level(x, fast)
        return x
