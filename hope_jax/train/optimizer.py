"""The training optimizer: any row of ``optim.OPTIMIZERS`` with a learning-rate schedule, behind one global-norm clip.

Each update level has a copy of the row's optimizer. The levels are ``optim.by_level``: parameters of a slow level are
stepped every n-th batch with the mean gradient (SPEC.md section 3), and their schedule is stretched by n so that every
level steps with the learning rate of the batch at which it steps. Which parameters are matrices and which decay follows
from the model's axis names (``nn/axes.py``). Read ``step.py`` next: it takes the step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jax.numpy as jnp
import optax
import tyro

from hope_jax import optim
from hope_jax.errors import UserError, whole
from hope_jax.nn import axes as logical
from hope_jax.optim.checks import check
from hope_jax.train.schedules import COSINE, Schedule
from hope_jax.types import Scalar

Rate = Callable[[Any], Scalar]
"""Batch number -> learning rate."""
NARROW, NARROW_RATE = 192, 5e-3
"""The default peak learning rate, up to this width. A step of Adam moves all entries by about as much, and in a wider
layer more of them add up."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rate and the gradient clip.

    On the command line ``--optimizer.method NAME`` takes the row of that name, and its settings are flags too.
    """

    method: Annotated[optim.Optimizer, tyro.conf.arg(name="")] = field(
        default=optim.AdamW(), metadata={"rows": optim.OPTIMIZERS}
    )
    """A row of ``optim.OPTIMIZERS``, also with other settings."""
    learning_rate: float | None = None
    """Peak learning rate, reached after the warmup; greater than 0. None: 5e-3 for models up to the width of the
    tiny ones, 192; for wider ones 5e-3 x 192 / width, 4.7e-4 at 2,048."""
    warmup: int = 20
    """Batches over which the learning rate grows linearly to its peak; 0 starts at the peak."""
    final_fraction: float = 0.1
    """Learning rate of the last batch as a fraction of the peak, 0 to 1."""
    clip: float = 1.0
    """Largest global norm of a gradient; a longer one is scaled down to it. Greater than 0."""

    def __post_init__(self):
        if self.learning_rate is not None:
            check("learning_rate", self.learning_rate, 0, open_low=True)
        whole("warmup", self.warmup, 0, "batches")
        check("final_fraction", self.final_fraction, 0, 1, open_high=False)
        if self.clip != math.inf:
            check("clip", self.clip, 0, open_low=True)

    def at_width(self, width: int) -> "OptimizerConfig":
        """The same with the learning rate of a model of that width, unless there is one already."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=NARROW_RATE * NARROW / max(NARROW, width))


def schedule(config: OptimizerConfig, steps: int, shape: Schedule = COSINE) -> Rate:
    """Learning rate of batch 0, 1, ...: linear warmup, then ``shape``, which ends on batch number ``steps``.

    Raises UserError for a configuration without a learning rate (``OptimizerConfig.at_width`` gives one).
    """
    if (peak := config.learning_rate) is None:
        raise UserError(
            "The optimizer has no learning rate; give one, or take that of a width: config.at_width(width)."
        )

    def rate(count: Any) -> Scalar:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (count + 1) / max(1, config.warmup))
        progress = jnp.clip((count - config.warmup) / max(1, steps - config.warmup), 0.0, 1.0)
        return peak * warm * shape.factor(progress, config.final_fraction)

    return rate


def optimizer(
    config: OptimizerConfig,
    steps: int,
    every: Mapping[str, int],
    axes: logical.Axes,
    shape: Schedule = COSINE,
) -> optax.GradientTransformation:
    """The training optimizer for a run of ``steps`` batches, for parameters with these ``model.axes()``.

    ``every``: level's label -> batches between its updates, see ``optim.by_level``. ``shape``: of ``schedule``. Raises
    UserError for levels without parameters, and for parameters without axis names (see ``nn.axes.of_parameters``).
    """
    peak = schedule(config, steps, shape)
    matrices, decays = logical.matrices(axes), logical.decays(axes)

    def level(period: int) -> optax.GradientTransformation:
        return config.method.build(lambda count: peak(count * period + period - 1), matrices, decays)

    return optax.chain(optax.clip_by_global_norm(config.clip), optim.by_level(level, dict(every)))
