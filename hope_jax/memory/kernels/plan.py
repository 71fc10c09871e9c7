"""The plan of a kernel: what is known before it runs, and which states it saves."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hope_jax.errors import UserError

Step = Callable[..., tuple[Any, Any]]

BYTES_ON_CHIP = 8 * 2**20  # for the chunks that the backward kernel computes again: states, tokens, cotangents


@dataclass(frozen=True)
class Plan:
    """What is known before a kernel runs: the step, the shapes of what it takes and returns, the number of chunks.

    ``step(state, tokens, *held) -> (state, outputs)``.
    """

    step: Step
    held: Any
    state: Any
    tokens: Any
    outputs: Any
    chunks: int

    @property
    def save_every(self) -> int:
        """Chunks between two saved states: at most 8, fewer where their states and tokens would not fit on the chip."""
        of_tokens = _bytes((self.tokens, self.tokens, self.outputs))
        each = _bytes(self.state) + 2 * of_tokens  # twice, as the next group is loaded while this one is computed
        most = max(1, min(8, BYTES_ON_CHIP // each))
        return -(-self.chunks // -(-self.chunks // most))

    @property
    def groups(self) -> int:
        """Saved states, one for every ``save_every`` chunks; the last group may have fewer chunks."""
        return -(-self.chunks // self.save_every)


def check(plan: Plan) -> None:
    """Raise UserError for arrays that the layout has no place for."""
    for x in jax.tree.leaves(plan.state):
        if len(x.shape) < 2:
            raise UserError(f"impl='pallas': a state of shape {x.shape}; expected two axes or more, use impl='chunked'")
    for x in jax.tree.leaves((plan.tokens, plan.outputs)):
        if len(x.shape) not in (1, 2):
            expected = "numbers [C] or features [C,F] per token"
            raise UserError(f"impl='pallas': tokens of shape {x.shape}; expected {expected}, use impl='chunked'")
    for x in jax.tree.leaves(plan.held):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UserError(f"impl='pallas': the step uses an array of {x.dtype}; expected floats, use impl='chunked'")


def _bytes(shapes: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
