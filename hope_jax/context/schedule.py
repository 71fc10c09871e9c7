"""Which levels of a model are written in context, and when. Read ``writes.py`` next."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import check_multiples
from hope_jax.nn.feed_forward.fast import LevelsConfig, Writes
from hope_jax.types import Array, Int


@dataclass(frozen=True)
class Schedule:
    """Which levels are written, and when.

    Attributes:
      periods: for each level the period in tokens of every layer; 0: that layer is never written.
      nested: a slower level's write sets the faster ones back.
      writes: how.
    """

    periods: tuple[tuple[int, ...], ...]
    nested: bool
    writes: Writes

    def __post_init__(self) -> None:
        if not any(self.distinct):
            raise UserError("the model has no level that can be written in context; use a hope or stacked model")
        check_multiples(self.distinct)

    @property
    def distinct(self) -> tuple[int, ...]:
        """All periods, fastest first."""
        return tuple(sorted({period for layers in self.periods for period in layers if period}))

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, C."""
        return self.distinct[0]

    def bptt(self, level: int) -> int | None:
        """See ``Writes.bptt``."""
        return self.writes.bptt[level] if level < len(self.writes.bptt) else None

    def due(self, at: Int[Array, ""] | int) -> list[Array]:
        """For every level, whether a period ends at token ``at``: of all layers alike, [], or of each, [L]."""
        return [self.written(i) & (at % jnp.maximum(_each(periods), 1) == 0) for i, periods in enumerate(self.periods)]

    def written(self, level: int) -> Array:
        """Whether the level is ever written: [] or [L], as in ``due``."""
        return jnp.asarray(_each(self.periods[level]) > 0)


def _each(periods: tuple[int, ...]) -> np.ndarray:
    """Periods of the layers, or the one that all of them have."""
    return np.array(periods[0] if len(set(periods)) == 1 else periods)


def schedule_of(model: Any, *, trained: bool) -> Schedule:
    """The schedule of a model: of the levels that training writes in context, or of all that it has.

    Raises UserError where it has none, or their periods are not multiples of one another.
    """
    part = model.config.feed_forward
    if not isinstance(part, LevelsConfig):
        kinds = ", ".join(type(part).__name__ for _, part in model.config.pattern if part is not None) or "none"
        came = f"feed-forward parts: {kinds}"
        raise UserError(f"the model has no levels that can be written in context ({came}); use a hope or stacked model")
    periods = part.periods(model.config.layers)
    return Schedule(periods[: part.trained] if trained else periods, part.nested, part.writes)


def learns_in_context(model: Any) -> bool:
    """Whether training writes some of the model's levels in context. Any model may be asked."""
    part = getattr(model.config, "feed_forward", None)
    return isinstance(part, LevelsConfig) and part.trained > 0
