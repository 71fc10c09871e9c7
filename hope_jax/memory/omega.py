"""The Omega rule: every token writes the last c pairs again, each with a strength of its own (ATLAS, arXiv 2505.23735).

    M_t = alpha_t M_{t-1} - sum_{i < c} gamma_{t,i} gradient of loss(M(k_{t-i}), v_{t-i}) at the anchor

A token with its c pairs is c tokens of the plain rule, of which the first is retained and the others keep everything:
``scan`` of that longer sequence, with a period c times as long, is the Omega rule exactly, for every memory. c = 1 is
the plain rule. A matrix memory with period 1 is the linear form, M_t = M_{t-1} (alpha I - sum gamma k k^T) +
sum gamma v k^T, whose gradients are at M_{t-1}. The functions are for one head of one sequence.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from hope_jax.errors import UserError, whole
from hope_jax.memory import scan as plain
from hope_jax.memory.architectures import Weights
from hope_jax.memory.kernels import Impl
from hope_jax.memory.rule import Fast, Gates, Rule
from hope_jax.types import Array, Count, Float, Int


@dataclass(frozen=True)
class Omega:
    """A rule and its window c, the number of pairs that each token writes.

    Raises:
      UserError: ``window`` below 1, or a rule without an anchor, or with momentum, an erase, a link, shards or
        projected queries.
    """

    rule: Rule
    window: int = 2

    def __post_init__(self) -> None:
        whole("window", self.window, 1, "pairs")
        needed: dict[str, Any] = dict(gradient_at="anchor", dgd_scope="none", momentum=False, link=None)
        needed |= dict(shard=None, project_queries=False)
        wrong = [f"{name}={value!r}" for name, value in needed.items() if getattr(self.rule, name) != value]
        if wrong:
            raise UserError(f"the rule of Omega is plain gradient descent from an anchor; set {', '.join(wrong)}")

    def start(self, weights: Weights, values: int) -> "OmegaState":
        """The state before the first token, of a memory that starts at ``weights`` and gets values of that size."""
        sizes = len(weights[0]), values
        pairs = (jnp.zeros((self.window - 1, size), weights[0].dtype) for size in sizes)
        return OmegaState(self.rule.start(weights), *pairs)


class OmegaState(NamedTuple):
    """The fast weights, and the last c - 1 pairs; those from before the first token are zeros, which write nothing."""

    fast: Fast
    keys: Float[Array, "c K"]
    values: Float[Array, "c V"]

    @property
    def running(self) -> Weights:
        """The weights as they are now."""
        return self.fast.running


def scan(
    omega: Omega,
    initial: Weights,
    state: OmegaState,
    keys: Float[Array, "T K"],
    values: Float[Array, "T V"],
    queries: Float[Array, "T K"],
    strength: Float[Array, "T c"],
    retention: Float[Array, " T"],
    position: Int[Array, ""] | np.ndarray,
    impl: Impl = "auto",
    count: Count = None,
) -> tuple[OmegaState, Float[Array, "T V"]]:
    """Read and write T tokens; returns the state after them, and the reads.

    ``strength`` is gamma_{t,i} of the pair i tokens ago; the rest is as in ``memory.scan.scan``. Any cut of the T
    tokens into calls gives the same result. Raises UserError unless there is a strength for each pair of the window.
    """
    length, c = strength.shape
    if c != omega.window:
        raise UserError(f"strength has {c} numbers per token; expected one for each of window={omega.window} pairs")
    pairs = (state.keys, keys), (state.values, values)
    seen = [jnp.concatenate([old, new.astype(old.dtype)]) for old, new in pairs]
    shared = jnp.concatenate([retention[:, None], jnp.ones((length, c - 1), retention.dtype)], axis=1)
    gates = Gates(strength.reshape(-1), shared.reshape(-1), None)
    rule, real = replace(omega.rule, period=c * omega.rule.period), None if count is None else c * count
    place = np.asarray(c * position) if isinstance(position, np.ndarray) else c * position  # numpy stays numpy
    (k, v), q = (_windows(x, c) for x in seen), jnp.repeat(queries, c, axis=0)
    fast, reads = plain.scan(rule, initial, state.fast, k, v, q, gates, place, impl, real)
    kept = [_last(x, c - 1, length if count is None else count) for x in seen]
    return OmegaState(fast, *kept), reads[c - 1 :: c] if rule.read == "after" else reads[::c]


def _windows(seen: Float[Array, "seen F"], c: int) -> Float[Array, "T F"]:
    """For every token but the first c - 1: itself, the one before it, and so on, c of them."""
    length = len(seen) - c + 1
    lagged = [seen[c - 1 - i : c - 1 - i + length] for i in range(c)]
    return jnp.stack(lagged, axis=1).reshape(length * c, -1)


def _last(seen: Float[Array, "seen F"], kept: int, count: Array | int) -> Float[Array, "c F"]:
    """The pairs that stay after ``count`` new ones."""
    return lax.dynamic_slice_in_dim(seen, count, kept)
