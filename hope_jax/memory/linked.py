"""Memories whose weights are a function of their writes: W = link(A), A the accumulated writes (Miras, 2504.13173).

A follows the recurrence of every rule, A_t = alpha A_{t-1} - eta gradient, with the gradient at W. Inside a period that
is the gradient at the anchor link(A) of its start. A link is not linear, so no product of keys and queries gives its
reads: ``evaluate`` makes A of every token an array and applies the link to it. Thus ``read="after"`` is exact,
y_t = M(q_t) with W_t = link(A_t), the token's own write included, and ``"before"`` is the same with W_{t-1}. For one
period at a time it needs memory for C + 1 copies of the weights. ``read="anchor"`` needs none of this.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.errors import UserError
from hope_jax.memory.chunked import Linear, Tokens, Write
from hope_jax.memory.decays import Shared, decay_products
from hope_jax.memory.kernels import Impl
from hope_jax.memory.recurrence import token_step
from hope_jax.memory.rule import Rule
from hope_jax.types import Array, Float

# A floor of sums of powers: their inverse powers in a gradient then stay finite in float32.
SMALLEST = 1e-20


@dataclass(frozen=True)
class NormLink:
    """Moneta: W = A / norm_q(A)^(q-2), with ``norm_q(A) = (sum |A|^q)^(1/q)`` of all weights of a layer.

    q = 2 is W = A. Raises UserError for q below 2.
    """

    q: float = 4.0

    def __post_init__(self) -> None:
        if not self.q >= 2:
            raise UserError(f"q is {self.q}; expected a power of 2 or more")

    def __call__(self, written: Float[Array, "*N K V"]) -> Float[Array, "*N K V"]:
        total = jnp.sum(jnp.abs(written) ** self.q, axis=(-2, -1), keepdims=True)
        return written * (total + SMALLEST) ** (2 / self.q - 1)


@dataclass(frozen=True)
class SoftmaxLink:
    """Memora: W = c softmax(Z), over the inputs of each output; c = ``scale`` sqrt(inputs), so that W is as large as
    weights usually start. Raises UserError unless ``scale`` is above 0.

    The published step is W_t = c softmax(alpha log W_{t-1} - eta gradient). log W is Z up to a constant per output,
    which the softmax cancels, so that accumulating Z is the same; nothing is linearised.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise UserError(f"scale is {self.scale}; expected a number above 0")

    def __call__(self, written: Float[Array, "*N K V"]) -> Float[Array, "*N K V"]:
        return self.scale * written.shape[-2] ** 0.5 * jax.nn.softmax(written, axis=-2)


def evaluate(rule: Rule, linears: list[Linear], tokens: Tokens, impl: Impl) -> tuple[list[Linear], Array]:
    """``recurrence.evaluate`` for one period of a rule with a link: memories after C tokens, and the reads [C,V]."""
    pairs = zip(linears, tokens.writes, strict=True)
    times = [_at_every_time(linear, write, tokens.shared, impl) for linear, write in pairs]
    seen = slice(1, None) if rule.read_time == "after" else slice(None, -1)
    x = tokens.queries
    for layer, weights in enumerate(rule.acting(tuple(w[seen] for w in times))):
        x = rule.architecture.activation(x) if layer else x
        x = jnp.einsum("tk,tkv->tv", x, weights, precision=lax.Precision.HIGHEST)
    return [Linear(weights[-1]) for weights in times], rule.architecture.answer(x, tokens.queries)


def _at_every_time(linear: Linear, write: Write, shared: Shared, impl: Impl) -> Float[Array, "T K V"]:
    """The written weights before the first token and after each of the C tokens, T = C + 1."""
    retention, on = shared.retention, shared.active
    retention = retention if on is None else on * retention + (1 - on)

    def step(before: Linear, token: tuple[Array, Array, Array]) -> tuple[Linear, Array]:
        keys, writes, retention = token
        after = token_step(before, Write(keys, writes, None), Shared(retention, None))
        return after, after.memory

    if impl == "sequential":
        _, after = lax.scan(step, linear, (write.keys, write.writes, retention))
        return jnp.concatenate([linear.memory[None], after])
    added = write.keys[:, :, None] * write.writes[:, None, :]
    pieces = jnp.concatenate([linear.memory[None], added])
    return jnp.tensordot(decay_products(retention), pieces, axes=1, precision=lax.Precision.HIGHEST)
