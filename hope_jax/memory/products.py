"""Plain forms of products of small matrices, a triangular solve and a convolution; ``kernels`` may be faster.

Products are in full float32, whatever an accelerator's default is. A suffix says which operand is transposed, as in
BLAS: ``matmul_nt`` is a b^T and ``matmul_tn`` is a^T b. Everything has derivatives of any order and mode;
``kernels/cpu.py`` has the same functions with gradients that are fast on CPU, and ``kernels/__init__.py`` chooses.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.memory.mesh import SHARE_HEADS, devices_along, of_context
from hope_jax.types import Array, Float


def transpose(x: Float[Array, "*N M C"]) -> Float[Array, "*N C M"]:
    """The transpose of each matrix."""
    return jnp.swapaxes(x, -1, -2)


def matmul(a: Float[Array, "*N M C"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a b."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def matmul_nt(a: Float[Array, "*N M C"], b: Float[Array, "*N V C"]) -> Float[Array, "*N M V"]:
    """a b^T."""
    return matmul(a, transpose(b))


def matmul_tn(a: Float[Array, "*N C M"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a^T b."""
    return matmul(transpose(a), b)


def gram(a: Float[Array, "*N M C"]) -> Float[Array, "*N M M"]:
    """The Gram matrix of the rows, a a^T."""
    return matmul_nt(a, a)


def row_and_column(count: int) -> tuple[Array, Array]:
    """Row and column number of every entry of a square matrix; computed, as a kernel may hold no constant arrays."""
    shape = (count, count)
    return lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)


def solve_unit_lower(
    lower: Float[Array, "C C"], weights: Float[Array, " C"], right: Float[Array, "C V"], inverse: Float[Array, "C C"]
) -> Float[Array, "C V"]:
    """X with (I + lower diag(weights)) X = right, for strictly lower triangular ``lower``.

    ``inverse`` is ``unit_lower_inverse`` of lower diag(weights): all systems of a chunk are inverted in the same calls.
    LAPACK's solve is a custom call on CPU (two at once can wait for each other's thread pool) and slow in batches on
    GPU; a Neumann series is wrong in float32 as soon as keys repeat (SPEC 1.2).
    """
    del lower, weights
    return matmul(inverse, right)


def unit_lower_inverse(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    """(I + lower)^-1 by block forward substitution: neighbouring inverses P, Q become [[P, 0], [-Q L P, Q]].

    Above 8 tokens two halves are merged. Halves of equal size are inverted in the same calls.
    """
    systems, count = lower.shape[:2]
    if count <= 8:
        return _small_inverse(lower)
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


def _small_inverse(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    """All pairs of a size merged at once by products of the whole matrix, with a mask that picks the blocks L.

    More arithmetic than needed, but few and large calls.
    """
    (rows, columns), size = row_and_column(lower.shape[1]), 1
    inverse = jnp.broadcast_to((rows == columns).astype(lower.dtype), lower.shape)
    while size < lower.shape[1]:
        pairs = (rows // (2 * size) == columns // (2 * size)) & (rows // size > columns // size)
        corners = lower * pairs[None].astype(lower.dtype)
        inverse -= corners if size == 1 else matmul(matmul(inverse, corners), inverse)
        size *= 2
    return inverse


def by_rows(function: Callable[[Array], Array], x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """A function of rows, [R,D] -> [R,V], applied to ``x`` with all leading axes joined: the results are the same.

    XLA on CPU is slow at sums over rows or features where an axis of length 1 leads, and at the weight gradient of a
    linear map where there is a second leading axis: without this the gradient of a norm takes 5 times as long on
    [1, 2048, 512], and that of a map to 512 features 1.6 times on [4, 512, 128] (two cores, jax 0.10.2).
    Leading axes after the first stay apart where devices share them: XLA would gather them to join them.
    """
    if x.ndim > 2 and devices_along(of_context(), SHARE_HEADS) > 1:
        for _ in x.shape[:-2]:
            function = jax.vmap(function)
        return function(x)
    return merged_rows(function, x)


def merged_rows(function: Callable[[Array], Array], x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """``by_rows`` of a function that JAX cannot map over an axis, such as a module: devices gather what they share."""
    y = function(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def shifted_sum(x: Float[Array, "B seen D"], kernel: Float[Array, "width D"]) -> Float[Array, "B T D"]:
    """``sum_i kernel_i * x_(t + i)`` at every t that has all terms, T = seen - width + 1."""
    time = x.shape[1] - len(kernel) + 1
    terms = [by_rows(lambda rows, tap=tap: rows * tap[None], x[:, i : i + time]) for i, tap in enumerate(kernel)]
    return functools.reduce(jnp.add, terms)
