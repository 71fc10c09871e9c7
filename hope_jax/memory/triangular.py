"""The two small triangular pieces of the block form: products of decays, and a unit lower triangular solve.

Both use matrix products only. A LAPACK ``triangular_solve`` is a custom call on CPU (two at once can wait
for each other's thread pool) and a slow batched call on GPU; a Neumann series is wrong in float32 as soon
as keys repeat (SPEC 1.2). Read next: ``block.py``, which uses both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hope_jax.memory.products import given, keep, nn, nt, tn
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
    # The factor that differs between heads stands on the left: their rows then make one product.
    logs = jnp.matmul(up_to * jnp.log(factors + FLOOR)[None, :], after, precision=lax.Precision.HIGHEST)
    return jnp.exp(logs) * np.tri(count + 1, dtype=factors.dtype)


def solve_unit_lower(
    lower: Float[Array, "C C"],
    weights: Float[Array, " C"],
    right: Float[Array, "C V"],
    inverse: Float[Array, "C C"] | None = None,
) -> Float[Array, "C V"]:
    """X with (I + lower diag(weights)) X = right, for strictly lower triangular ``lower``.

    ``inverse`` is that of I + lower diag(weights), ``unit_lower_inverse``, where the caller has it already; nothing is
    differentiated through it. The gradient is implicit: one more product with the same inverse.
    """
    if inverse is None:
        inverse = unit_lower_inverse((lower * weights[None, :])[None])[0]
    return _solve(False, lower, weights, right, lax.stop_gradient(inverse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(transposed: bool, lower: Array, weights: Array, right: Array, inverse: Array) -> Array:
    return (tn if transposed else nn)(inverse, right)


def _solve_forward(transposed: bool, lower: Array, weights: Array, right: Array, inverse: Array):
    solution: Array = _solve(transposed, lower, weights, right, inverse)
    return solution, keep(lower, weights, inverse, solution)


def _solve_backward(transposed: bool, residuals: tuple[Array, ...], g: Array):
    """With A = I + L diag(w) and A X = B: the cotangent of B is R = A^-T g, that of L diag(w) is -R X^T."""
    lower, weights, inverse, solution = given(residuals)
    of_right: Array = _solve(not transposed, lower, weights, g, inverse)
    left, x = (solution, of_right) if transposed else (of_right, solution)
    return -nt(left, weights[:, None] * x), -jnp.sum(tn(lower, left) * x, axis=1), of_right, None


_solve.defvjp(_solve_forward, _solve_backward)


def unit_lower_inverse(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    """(I + lower)^-1 by block forward substitution: neighbouring inverses P, Q become [[P, 0], [-Q L P, Q]].

    Up to 8 tokens all pairs of a size are merged at once by products of the whole matrix, with a mask that picks
    the blocks L: more arithmetic than needed, but few and large calls. Above, the two halves are merged, which are
    inverted in the same calls if they are of one size.
    """
    systems, count = lower.shape[:2]
    if count <= 8:
        return _merge_in_place(lower)
    half = count // 2
    halves = lower[:, :half, :half], lower[:, half:, half:]
    if count % 2:
        first, second = map(unit_lower_inverse, halves)
    else:
        both = unit_lower_inverse(jnp.concatenate(halves))
        first, second = both[:systems], both[systems:]
    times = jax.vmap(nn)
    corner = -times(times(second, lower[:, half:, :half]), first)
    top = jnp.concatenate([first, jnp.zeros_like(corner.swapaxes(1, 2))], axis=2)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=2)], axis=1)


def _merge_in_place(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    rows, columns, times = *np.indices(lower.shape[1:]), jax.vmap(nn)
    inverse, size = jnp.broadcast_to(jnp.eye(lower.shape[1], dtype=lower.dtype), lower.shape), 1
    while size < lower.shape[1]:
        pairs = (rows // (2 * size) == columns // (2 * size)) & (rows // size > columns // size)
        corners = lower * pairs[None].astype(lower.dtype)
        inverse -= corners if size == 1 else times(times(inverse, corners), inverse)
        size *= 2
    return inverse
