"""A gated feed-forward part, the Transformer's, whose matrices can be made levels (ad-hoc stacking, SPEC 3.3)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, whole
from hope_jax.levels import Level
from hope_jax.nn.axes import Axes, dense_axes, norm_axes
from hope_jax.nn.feed_forward.fast import Writes, blank, moved
from hope_jax.nn.layers import RMSNorm, dense, light, param_dtype
from hope_jax.types import Array, Float, Stream


@dataclass(frozen=True)
class SwiGLUConfig:
    """A gated feed-forward part, a ``fast.LevelsConfig``.

    Attributes:
      hidden: inner features, at least 1 (about 8/3 of the model width is usual).
      levels: for each layer the level that its matrices form, or None where they are never written. (): no layer is
        written; such a part has no learned rates.
      writes: how levels are written in context. ``rank`` must be None, and ``bptt`` has one number, for all layers.
    """

    hidden: int
    levels: tuple[Level | None, ...] = ()
    writes: Writes = Writes()

    def __post_init__(self):
        whole("hidden", self.hidden, 1, "inner features")
        if self.writes.rank is not None:
            raise UserError(f"rank is {self.writes.rank}; SwiGLU layers are written whole, leave it None")
        if len(self.writes.bptt) not in (0, self.trained):
            raise UserError(f"bptt is {self.writes.bptt}; all SwiGLU layers have one, so give one number, or none")

    def build(self, width: int, dtype: DTypeLike) -> "SwiGLU":
        return SwiGLU(self, width, dtype)

    nested: ClassVar[bool] = False

    @property
    def trained(self) -> int:
        return int(any(self.levels))

    def periods(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """One tree, whose layers have periods of their own."""
        if not self.levels:
            return ()
        if len(self.levels) != layers:
            raise UserError(f"levels are given for {len(self.levels)} layers; the model has {layers}")
        return (tuple(0 if level is None else level.period for level in self.levels),)

    def blank(self, batch: int, width: int, dtype: DTypeLike) -> tuple[dict[str, Array], ...]:
        shapes = {"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)}
        return (blank(shapes, batch, None, dtype),)

    def kernels(self, params: Any) -> tuple[dict[str, Any], ...]:
        return (params,)


def learned_rate(module: Any) -> Float[Array, "1"] | None:
    """Parameter ``rate`` of a part, eta of its writes; None where training writes nothing in context."""
    start = nn.initializers.constant(module.config.writes.rate)
    return module.param("rate", start, (1,), param_dtype(module.dtype)) if module.config.trained else None


def rate_axes(config: SwiGLUConfig) -> Axes:
    """Name of the parameter of ``learned_rate``."""
    return {"rate": ("levels",)} if config.trained else {}


class SwiGLU(nn.Module):
    """``x + W_down(silu(W_gate u) * W_up u)`` with ``u = RMSNorm(x)``: norm and residual are inside."""

    config: SwiGLUConfig
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.norm = RMSNorm(self.dtype)
        self.gate = dense(self.config.hidden, self.dtype)
        self.up = dense(self.config.hidden, self.dtype)
        self.down = dense(self.width, self.dtype)
        self.rate = learned_rate(self)

    @nn.nowrap
    def axes(self) -> Axes:
        maps = {"gate": dense_axes("embed", "hidden"), "up": dense_axes("embed", "hidden")}
        return {"norm": norm_axes(), **maps, "down": dense_axes("hidden", "embed"), **rate_axes(self.config)}

    @light
    def __call__(self, x: Stream, deltas: tuple[Any, ...]) -> Stream:
        u, fast = self.norm(x), deltas[0] if deltas else None
        gate, up = moved(self.gate(u), u, fast, "gate"), moved(self.up(u), u, fast, "up")
        hidden = nn.silu(gate) * up
        return x + moved(self.down(hidden), hidden, fast, "down")
