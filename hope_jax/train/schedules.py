"""Shapes of the learning-rate schedule after the warmup, by name. Read ``optimizer.py`` next: it adds the rest."""

import abc
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from hope_jax.optim.checks import check
from hope_jax.types import Scalar


@dataclass(frozen=True)
class Schedule(abc.ABC):
    """How the learning rate goes on after the warmup."""

    @abc.abstractmethod
    def factor(self, progress: Any, final: float) -> Scalar:
        """The learning rate as a fraction of its peak.

        ``progress``: 0 at the end of the warmup, 1 at the end of the run. ``final``: the fraction to end with.
        """


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a wave of a cosine, from the peak down to the final fraction."""

    def factor(self, progress: Any, final: float) -> Scalar:
        """See ``Schedule``."""
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return final + (1 - final) * cosine


@dataclass(frozen=True)
class WSD(Schedule):
    """Warmup, stable, decay: the peak, then a straight line down to the final fraction."""

    cooldown: float = 0.2
    """Share of the batches after the warmup in which the learning rate falls, above 0 and up to 1."""

    def __post_init__(self) -> None:
        check("cooldown", self.cooldown, 0, 1, open_low=True, open_high=False)

    def factor(self, progress: Any, final: float) -> Scalar:
        """See ``Schedule``."""
        fallen = jnp.maximum(0.0, progress - (1 - self.cooldown)) / self.cooldown
        return 1 - (1 - final) * fallen


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak to the end; the final fraction plays no part."""

    def factor(self, progress: Any, final: float) -> Scalar:
        """See ``Schedule``."""
        return jnp.ones_like(progress)


COSINE = Cosine()
SCHEDULES: dict[str, Schedule] = {"cosine": COSINE, "wsd": WSD(), "constant": Constant()}
"""Every schedule by name, with its default settings."""
