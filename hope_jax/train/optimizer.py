"""AdamW or M3 with warmup and cosine decay, one copy per update level, behind one global-norm clip.

The levels are ``optim.by_level``: parameters of a slow level are stepped every n-th batch with the mean gradient
(SPEC.md section 3), and their schedule is stretched by n so that every level steps with the learning rate of the batch
at which it steps. Read ``state.py`` next: it holds the optimizer's state.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax
from jax.tree_util import tree_map_with_path

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.types import Scalar

Schedule = Callable[[Any], Scalar]
Method = Literal["adamw", "m3"]

MATRICES = optim.matrix_labels(
    batch_axes={"blocks": 1, "start_*": 1, "start_projections_*": 1, "start_gates_*": 1},
    exclude=("embedding", "head", "conv*", "gate_*", "scale*", "momentum_kernel"),
)
"""Blocks are stacked over layers, initial memories over heads, those of projections and gates over memories too."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning-rate schedule and the gradient clip."""

    method: Method = "adamw"
    """m3 orthogonalises the momenta of all matrices, at two time scales (Eq. 75); the rest is AdamW's as well."""
    learning_rate: float = 2e-3
    """Peak learning rate, reached after the warmup; greater than 0."""
    warmup: int = 20
    """Batches over which the learning rate grows linearly to its peak; 0 starts at the peak."""
    final_fraction: float = 0.1
    """Learning rate of the last batch as a fraction of the peak (cosine in between), 0 to 1."""
    weight_decay: float = 0.1
    """Decoupled decay of weight matrices; norms, biases, gates and initial memories are never decayed. 0 or more."""
    b1: float = 0.9
    """Decay of the first moment (of m3's fast one), from 0 up to but not including 1."""
    b2: float = 0.95
    """Decay of the second moment, from 0 up to but not including 1."""
    clip: float = 1.0
    """Largest global norm of a gradient; a longer one is scaled down to it. Greater than 0."""

    def __post_init__(self):
        legal = {
            "method": self.method in get_args(Method),
            "learning_rate": 0 < self.learning_rate < math.inf,
            "warmup": self.warmup >= 0,
            "final_fraction": 0 <= self.final_fraction <= 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "b1": 0 <= self.b1 < 1,
            "b2": 0 <= self.b2 < 1,
            "clip": self.clip > 0,
        }
        for field, holds in legal.items():
            if not holds:
                raise UserError(f"The optimizer got {field}={getattr(self, field)}, which is outside its range.")


def schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Learning rate of batch 0, 1, ...: linear warmup, then a cosine that ends at ``final_fraction`` on ``steps``."""

    def rate(count: Any) -> Scalar:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (count + 1) / max(1, config.warmup))
        progress = jnp.clip((count - config.warmup) / max(1, steps - config.warmup), 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * warm * (config.final_fraction + (1 - config.final_fraction) * cosine)

    return rate


def decays(path: tuple[Any, ...], value: Any) -> bool:
    """Whether weight decay applies to the parameter (or its shape) at ``path``: the large matrices, by their name.

    Rates and gates of the memories (``gate_rate``, ...) and the taps of convolutions (``conv_k``, ...) are left alone.
    The rank alone does not tell: parameters stacked over layers have one axis more, so a norm's scale has two.
    """
    names = [str(getattr(entry, "key", entry)) for entry in path]
    special = any(name.startswith(("gate_", "conv")) for name in names)
    return value.ndim >= 2 and names[-1] in ("kernel", "embedding", "head") and not special


def optimizer(config: OptimizerConfig, steps: int, every: Mapping[str, int]) -> optax.GradientTransformation:
    """The training optimizer for a run of ``steps`` batches.

    ``every`` maps a level's label to the number of batches between its updates, see ``optim.by_level``.
    """
    peak = schedule(config, steps)

    def level(period: int) -> optax.GradientTransformation:
        return _method(config, lambda count: peak(count * period + period - 1))

    return optax.chain(optax.clip_by_global_norm(config.clip), optim.by_level(level, dict(every)))


def _method(config: OptimizerConfig, rate: Schedule) -> optax.GradientTransformation:
    """The optimizer of one level."""
    decay = {"weight_decay": config.weight_decay, "mask": lambda params: tree_map_with_path(decays, params)}
    adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, **decay)
    if config.method == "adamw":
        return adamw
    scales = (optim.MomentumScale(1, config.b1), optim.MomentumScale(100, 0.9))
    return optim.m3(rate, scales, config.b2, matrices=MATRICES, fallback=adamw, **decay)
