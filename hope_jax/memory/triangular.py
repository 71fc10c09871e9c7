"""The two small triangular pieces of the block form: products of decays, and a unit lower triangular solve.

Both use matrix products only. A LAPACK ``triangular_solve`` is a custom call on CPU (two at once can wait
for each other's thread pool) and a slow batched call on GPU; a Neumann series is wrong in float32 as soon
as keys repeat (SPEC 1.2). Read next: ``block.py``, which uses both.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from hope_jax.memory.products import nn, tn
from hope_jax.types import Array, Float

# Smallest factor told apart from 0 in log space; a normal float32, so 1 / (0 + FLOOR) is finite too.
FLOOR = 1e-30


def decay_products(factors: Float[Array, " C"]) -> Float[Array, "T T"]:
    """P[t, s] = product of ``factors`` s+1..t for 0 <= s <= t <= C (T = C + 1), and 0 above the diagonal.

    Each log product is a sum of its own terms (a masked triangular matrix product, not a difference of
    cumulative sums), so nothing cancels: factors down to 0 and their gradients are exact to rounding.
    """
    count = factors.shape[0]
    times, tokens = np.arange(count + 1), np.arange(1, count + 1)
    up_to = (tokens[None, :] <= times[:, None]).astype(factors.dtype)
    after = (tokens[:, None] > times[None, :]).astype(factors.dtype)
    terms = jnp.log(factors + FLOOR)[:, None] * after
    logs = jnp.matmul(up_to, terms, precision=lax.Precision.HIGHEST)
    return jnp.exp(logs) * np.tri(count + 1, dtype=factors.dtype)


def solve_unit_lower(
    lower: Float[Array, "C C"], right: Float[Array, "C V"], inverse: Float[Array, "C C"] | None = None
) -> Float[Array, "C V"]:
    """X with (I + lower) X = right, for strictly lower triangular ``lower``.

    ``inverse`` is ``unit_lower_inverse(lower)`` where the caller has it already. The gradient is implicit: one more
    product with the same inverse.
    """
    if inverse is None:
        inverse = unit_lower_inverse(lax.stop_gradient(lower))

    def apply(x):
        return x + jnp.matmul(lower, x, precision=lax.Precision.HIGHEST)

    def solve(_, b):
        return jnp.matmul(inverse, b, precision=lax.Precision.HIGHEST)

    def solve_transposed(_, b):
        return tn(inverse, b)

    return lax.custom_linear_solve(apply, right, solve, solve_transposed)


def unit_lower_inverse(lower: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """(I + lower)^-1 by block forward substitution: neighbouring inverses P, Q become [[P, 0], [-Q L P, Q]].

    Up to 16 tokens all pairs of a size are merged at once by products of the whole matrix, with a mask that picks
    the blocks L: more arithmetic than needed, but few and large calls. Above, the two halves are merged.
    """
    count = lower.shape[0]
    if count <= 16:
        return _merge_in_place(lower)
    half = count // 2
    first, second = unit_lower_inverse(lower[:half, :half]), unit_lower_inverse(lower[half:, half:])
    corner = -nn(nn(second, lower[half:, :half]), first)
    top = jnp.concatenate([first, jnp.zeros_like(corner.T)], axis=1)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=1)], axis=0)


def _merge_in_place(lower: Float[Array, "C C"]) -> Float[Array, "C C"]:
    rows, columns = np.indices(lower.shape)
    inverse, size = jnp.eye(lower.shape[0], dtype=lower.dtype), 1
    while size < lower.shape[0]:
        pairs = (rows // (2 * size) == columns // (2 * size)) & (rows // size > columns // size)
        corners = lower * pairs.astype(lower.dtype)
        inverse -= corners if size == 1 else nn(nn(inverse, corners), inverse)
        size *= 2
    return inverse
