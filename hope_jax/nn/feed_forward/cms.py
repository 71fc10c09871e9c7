"""The continuum memory system (Eq. 70-74): the feed-forward part of a block as a chain of MLPs, fastest level first.

Each MLP is one *level*, rewritten once per ``period`` tokens. A level whose period is longer than the context is an
ordinary parameter ("outer" mode): ``optim.by_level`` accumulates its gradient and steps it once per period. The fastest
``in_context`` levels are written while a sequence is read (``fast.py``). With one level the system is a plain
Transformer feed-forward layer, which is the "without CMS" row of the ablation.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.levels import Level, check_multiples
from hope_jax.nn.axes import Axes, dense_axes, norm_axes
from hope_jax.nn.feed_forward.fast import Fast, Writes, blank, moved
from hope_jax.nn.layers import FAN_IN, RMSNorm, dense, light, param_dtype
from hope_jax.types import Array, Stream

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
    """

    levels: tuple[Level, ...]
    hidden: int
    wiring: Wiring = "sequential"
    in_context: int = 0
    writes: Writes = Writes()

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
    def trained(self) -> int:
        return self.in_context

    @property
    def nested(self) -> bool:
        return self.wiring == "nested"

    def periods(self, layers: int) -> tuple[tuple[int, ...], ...]:
        return tuple((level.period,) * layers for level in self.levels)

    def blank(self, batch: int, width: int, dtype: DTypeLike) -> tuple[dict[str, Array], ...]:
        shapes = {"up": (width, self.hidden), "down": (self.hidden, width)}
        return tuple(blank(shapes, batch, self.writes.rank, dtype) for _ in self.levels)

    def kernels(self, params: Any) -> tuple[dict[str, Any], ...]:
        return tuple(params[f"level_{i}"] for i in range(len(self.levels)))


class LevelMLP(nn.Module):
    """MLP(RMSNorm(x)) with GELU: the memory of one level."""

    hidden: int
    width: int
    dtype: DTypeLike
    rank: int | None = None

    def setup(self) -> None:
        self.norm = RMSNorm(self.dtype)
        self.up = dense(self.hidden, self.dtype)
        self.down = dense(self.width, self.dtype)
        rows, wide = {"up": self.width, "down": self.hidden}, param_dtype(self.dtype)
        self.bases = dict.fromkeys(rows)  # bases of Delta, if its rank is low
        if self.rank is not None:
            self.bases = {n: self.param(f"{n}_basis", FAN_IN, (size, self.rank), wide) for n, size in rows.items()}

    @nn.nowrap
    def axes(self) -> Axes:
        maps = {"up": dense_axes("embed", "hidden"), "down": dense_axes("hidden", "embed")}
        low_rank = {"up_basis": ("embed", "rank"), "down_basis": ("hidden", "rank")} if self.rank is not None else {}
        return {"norm": norm_axes(), **maps, **low_rank}

    @light
    def __call__(self, x: Stream, fast: Fast | None = None) -> Stream:
        u = self.norm(x)
        hidden = jax.nn.gelu(moved(self.up(u), u, fast, "up", self.bases["up"]))
        return moved(self.down(hidden), hidden, fast, "down", self.bases["down"])


class ContinuumMemory(nn.Module):
    """``(x[B,T,D], deltas) -> x``; norms and residual connections are inside."""

    config: CMSConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, wide, count = self.config, param_dtype(self.dtype), len(self.config.levels)
        level = functools.partial(LevelMLP, c.hidden, self.width, self.dtype, c.writes.rank)
        self.levels = [level(name=f"level_{i}") for i in range(count)]
        if c.in_context:
            self.rate = self.param("rate", nn.initializers.constant(c.writes.rate), (c.in_context,), wide)
        if c.wiring == "independent":
            self.mixture = self.param("mixture", nn.initializers.constant(1 / count), (count,), wide)

    @nn.nowrap
    def axes(self) -> Axes:
        c = self.config
        level = LevelMLP(c.hidden, self.width, self.dtype, c.writes.rank, parent=None).axes()
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
