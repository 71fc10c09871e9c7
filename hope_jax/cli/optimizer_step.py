"""The cost of a step of an optimizer, compiled; parameters serve as gradients."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hope_jax import LanguageModel, model_named
from hope_jax import train as training
from hope_jax.cli.results import Row
from hope_jax.optim import M3

BLOCK = M3().slow_period or 1
"""Steps of M3 between two blocks of its slow momentum."""


class Stepper:
    """One optimizer's compiled step, with a state at the start of a block and one inside it."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        def step(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.params, self.start = params, jax.jit(tx.init)(params)
        lowered, since = jax.jit(step).lower(params, self.start, params), time.perf_counter()
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - since
        self.inside = self(self.start)[1]

    def __call__(self, state: Any) -> tuple[Any, Any]:
        """Parameters and state after a step from ``state``; the parameters serve as gradients."""
        return self._step(self.params, state, self.params)

    def row(self, seconds_start: float, seconds: float, parameters: int) -> Row:
        """The row of results for steps that take so long."""
        mean = (seconds_start + (BLOCK - 1) * seconds) / BLOCK
        times = {"step_ms": 1e3 * mean, "inside_ms": 1e3 * seconds, "start_ms": 1e3 * seconds_start}
        size = {"state_bytes_per_parameter": sum(leaf.nbytes for leaf in jax.tree.leaves(self.start)) / parameters}
        rounded = {name: round(value, 2) for name, value in (times | size).items()}
        return rounded | {"compile_seconds": round(self.compile_seconds, 1)}


def random_parameters(model: str) -> Any:
    """Normal numbers in the shapes of the model's parameters."""
    shapes = training.abstract_params(LanguageModel(model_named(model)))
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes))))
    return jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape, jnp.float32), shapes)
