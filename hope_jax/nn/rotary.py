"""Rotary positions, and slower ones for contexts longer than in training. Read ``mixers/attention.py`` next."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hope_jax.errors import UserError
from hope_jax.nn.layers import param_dtype
from hope_jax.types import Array, Float, Int


@dataclass(frozen=True)
class RopeScaling:
    """Features that turn at most ``low`` times within the training context are made ``factor`` times slower.

    Features that turn ``high`` times or more keep their speed. Between the two the speed is interpolated linearly in
    the number of turns (the rule of Llama 3.1).

    factor: at least 1.
    context: tokens of the training context, at least 1; None: all features are slowed (linear scaling).
    low, high: turns, 0 < low < high.
    """

    factor: float
    context: int | None = None
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        if not 1 <= self.factor < math.inf:
            raise UserError(f"Rotary scaling got factor={self.factor}; give a number of at least 1.")
        if self.context is not None and self.context < 1:
            raise UserError(f"Rotary scaling got context={self.context}; give at least 1 token, or None.")
        if not 0 < self.low < self.high < math.inf:
            raise UserError(f"Rotary scaling got low={self.low} and high={self.high}; give 0 < low < high.")

    def apply(self, speeds: Float[Array, " half"]) -> Float[Array, " half"]:
        """The speeds after scaling."""
        if self.context is None:
            return speeds / self.factor
        turns = self.context * speeds / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return speeds * (kept + (1 - kept) / self.factor)


def rope_speeds(size: int, base: float, scaling: RopeScaling | None, dtype: DTypeLike) -> Float[Array, " half"]:
    """Radians per token of the ``size // 2`` pairs of features of a head: ``base^(-2i/size)``, scaled."""
    half = size // 2
    speeds = base ** (-jnp.arange(half, dtype=dtype) / half)
    return speeds if scaling is None else scaling.apply(speeds)


def apply_rope(
    x: Float[Array, "B T H K"], positions: Int[Array, " T"], base: float = 10_000.0, scaling: RopeScaling | None = None
) -> Float[Array, "B T H K"]:
    """Rotary positions: feature i and i + K/2 of each head turn by ``position * rope_speeds[i]``; K must be even.

    The score of a rotated query and a rotated key then depends on the distance of their positions only.
    """
    wide = param_dtype(x.dtype)
    speeds = rope_speeds(x.shape[-1], base, scaling, wide)
    angles = jnp.outer(positions.astype(wide), speeds)[None, :, None, :]
    # A barrier keeps them apart from the features: XLA on CPU would compute them again for every head and sequence.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))
    left, right = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1).astype(x.dtype)
