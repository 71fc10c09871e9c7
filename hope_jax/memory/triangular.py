"""A unit lower triangular solve in matrix products only.

A LAPACK ``triangular_solve`` is a custom call on CPU (two at once can wait
for each other's thread pool) and a slow batched call on GPU; a Neumann series is wrong in float32 as soon
as keys repeat (SPEC 1.2). Read next: ``chunked.py``, which uses it.
"""

import jax.numpy as jnp

from hope_jax.memory.products import matmul, row_and_column
from hope_jax.types import Array, Float


def solve_unit_lower(
    lower: Float[Array, "C C"], weights: Float[Array, " C"], right: Float[Array, "C V"], inverse: Float[Array, "C C"]
) -> Float[Array, "C V"]:
    """X with (I + lower diag(weights)) X = right, for strictly lower triangular ``lower``.

    ``inverse`` is ``unit_lower_inverse`` of lower diag(weights): all systems of a chunk are inverted in the same calls.
    """
    del lower, weights
    return matmul(inverse, right)


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
    corner = -matmul(matmul(second, lower[:, half:, :half]), first)
    top = jnp.concatenate([first, jnp.zeros_like(corner.swapaxes(1, 2))], axis=2)
    return jnp.concatenate([top, jnp.concatenate([corner, second], axis=2)], axis=1)


def _merge_in_place(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    (rows, columns), size = row_and_column(lower.shape[1]), 1
    inverse = jnp.broadcast_to((rows == columns).astype(lower.dtype), lower.shape)
    while size < lower.shape[1]:
        pairs = (rows // (2 * size) == columns // (2 * size)) & (rows // size > columns // size)
        corners = lower * pairs[None].astype(lower.dtype)
        inverse -= corners if size == 1 else matmul(matmul(inverse, corners), inverse)
        size *= 2
    return inverse
