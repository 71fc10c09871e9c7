"""Momentum, AdaGrad and Adam as what they are in nested learning: least-squares memories of gradients (Eq. 100-111).

Plain functions of all gradients seen so far, to be read and run; for training use optax, which computes the same
step by step. The derivation, for one weight with the gradients ``g_1 .. g_t`` as keys and one value ``P`` for all:

    m = argmin_m  sum_i b^(t-i) (m g_i - P)^2 + ridge m^2
    0 = sum_i b^(t-i) g_i (m g_i - P) + ridge m            its derivative, over 2
    m = P sum_i b^(t-i) g_i / (sum_i b^(t-i) g_i^2 + ridge)

so ``m`` maps every gradient as nearly as it can to ``P``, and the choice of P names the optimizer:

    P = sum g^2             m = sum g                               momentum (of decay b where b < 1)
    P = sqrt(sum g^2)       m = sum g / sqrt(sum g^2)               AdaGrad on summed momentum
    P = sqrt(mean g^2)      m = mean g / sqrt(mean g^2)             Adam with one decay b for both moments

with means weighted by ``b^(t-i)``; optax's bias correction is that weighting. Two decays (Adam's usual 0.9 and 0.999)
solve no such problem, they relax it. Everything is odd in g: with the gradients of a loss the step is ``W - rate m``,
with ``g = -gradient``, as the paper writes, ``W + rate m``. SPEC 5.6, which also lists what the paper misprints here.
"""

import jax.numpy as jnp

from hope_jax.errors import UserError
from hope_jax.optim.checks import check
from hope_jax.types import Array, Float


def least_squares_memory(
    gradients: Float[Array, "T *weights"], value: Float[Array, "*weights"], ridge: float = 0.0, decay: float = 1.0
) -> Float[Array, "*weights"]:
    """``argmin_m sum_i decay^(T-i) (m g_i - value)^2 + ridge m^2``, for every weight on its own.

    Args:
      gradients: g_1 .. g_T, the oldest first.
      value: P, what every gradient shall be mapped to.
      ridge: lambda >= 0. At 0 a weight whose gradients are all 0 has no minimiser and gives NaN.
      decay: b in (0, 1], the weight of a term relative to the one after it.
    """
    check("ridge", ridge, 0)
    first, second = (weighted_sum(moment, decay) for moment in (gradients, jnp.square(gradients)))
    return value * first / (second + ridge)


def weighted_sum(terms: Float[Array, "T *weights"], decay: float) -> Float[Array, "*weights"]:
    """``sum_i decay^(T-i) terms_i``, of at least one real term."""
    check("decay", decay, 0, 1, open_low=True, open_high=False)
    _check_gradients(terms, "[T, ...] with at least one gradient", terms.ndim > 0)
    age = jnp.arange(terms.shape[0] - 1, -1, -1, dtype=terms.dtype)
    return jnp.tensordot(jnp.asarray(decay, terms.dtype) ** age, terms, axes=1)


def momentum_memory(gradients: Float[Array, "T *weights"], decay: float = 1.0) -> Float[Array, "*weights"]:
    """``sum_i decay^(T-i) g_i``: the memory of value ``sum g^2``."""
    return least_squares_memory(gradients, weighted_sum(jnp.square(gradients), decay), decay=decay)


def adagrad_memory(gradients: Float[Array, "T *weights"], decay: float = 1.0) -> Float[Array, "*weights"]:
    """``sum g / sqrt(sum g^2)``: the memory of value ``sqrt(sum g^2)``."""
    return least_squares_memory(gradients, jnp.sqrt(weighted_sum(jnp.square(gradients), decay)), decay=decay)


def adam_memory(gradients: Float[Array, "T *weights"], decay: float) -> Float[Array, "*weights"]:
    """``mean g / sqrt(mean g^2)``: the memory of value ``sqrt(mean g^2)``."""
    total = weighted_sum(jnp.ones(gradients.shape[:1], gradients.dtype), decay)
    value = jnp.sqrt(weighted_sum(jnp.square(gradients), decay) / total)
    return least_squares_memory(gradients, value, decay=decay)


def matrix_memory(gradients: Float[Array, "T rows cols"], ridge: float = 0.0) -> Float[Array, "rows cols"]:
    """``argmin_N sum_i ||G_i^T N - I||^2 + ridge ||N||^2 = (H + ridge I)^-1 sum_i G_i``, ``H = sum_i G_i G_i^T``.

    The type-correct form of Eq. 106-111. Whole matrices are keys here, and their correlations count: H is [rows, rows].
    At ridge 0 H must have full rank (T cols >= rows, gradients in general position) or the result is not finite.
    """
    gram = _gram(gradients)
    check("ridge", ridge, 0)
    return jnp.linalg.solve(gram + ridge * jnp.eye(gram.shape[0], dtype=gram.dtype), gradients.sum(0))


def matrix_adagrad(gradients: Float[Array, "T rows cols"]) -> Float[Array, "rows cols"]:
    """``H^(1/2) matrix_memory = H^(-1/2) sum_i G_i``: full-matrix AdaGrad on one side, with summed momentum.

    As AdaGrad follows from the elementwise memory by the value ``sqrt(sum g^2)``.
    """
    values, vectors = jnp.linalg.eigh(_gram(gradients))
    return (vectors * jnp.sqrt(values)[None, :]) @ vectors.T @ matrix_memory(gradients)


def _gram(gradients: Array) -> Array:
    _check_gradients(gradients, "[T, rows, cols] with at least one matrix", gradients.ndim == 3)
    return jnp.einsum("tmn,tkn->mk", gradients, gradients)


def _check_gradients(gradients: Array, expected: str, fits: bool) -> None:
    if not fits or gradients.shape[0] == 0:
        raise UserError(f"gradients have shape {gradients.shape}; expected {expected}")
    if not jnp.issubdtype(gradients.dtype, jnp.floating):
        raise UserError(f"gradients have dtype {gradients.dtype}; expected a real floating type")
