"""The products of ``products.py`` inside a kernel, where a matrix unit of 128 x 128 numbers does most of the work.

It takes 8 rows at a time, and as long whether they and the matrix on the right are 128 numbers wide or one. So what is
small lies side by side (``Products.joined``), the systems of a chunk are inverted together, and single columns are left
to the vector unit. Gradients are of any order in reverse mode, with the implicit gradient of ``cpu.py``.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax.numpy as jnp
from jax import lax

from hope_jax.memory import products
from hope_jax.memory.kernels.cpu import differentiable, implicit_solve
from hope_jax.memory.products import row_and_column, shifted_sum, transpose
from hope_jax.types import Array, Bool, Float, Int

__all__ = ["gram", "matmul", "matmul_nt", "matmul_tn", "shifted_sum", "solve_unit_lower", "unit_lower_inverse"]

LANES, ROWS = 128, 8  # numbers beside and below each other in what a chip computes with
in_kernel: contextvars.ContextVar[bool] = contextvars.ContextVar("in_kernel", default=False)


@contextlib.contextmanager
def for_kernel() -> Iterator[None]:
    """What is traced in here becomes a kernel: ``impl="chunked"`` has the products of this file."""
    before = in_kernel.set(True)
    try:
        yield
    finally:
        in_kernel.reset(before)


def _matmul(a: Float[Array, "*N M C"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a b, without the matrix unit where it is an outer product or has one column."""
    if a.shape[-1] == 1:
        return a * b
    if b.shape[-1] == 1:
        return jnp.sum(a * transpose(b), axis=-1, keepdims=True)
    return products.matmul(a, b)


matmul = differentiable(_matmul, lambda a, b, g: (matmul_nt(g, b), matmul_tn(a, g)))
matmul_nt = differentiable(lambda a, b: _matmul(a, transpose(b)), lambda a, b, g: (matmul(g, b), matmul_tn(g, a)))
matmul_tn = differentiable(lambda a, b: _matmul(transpose(a), b), lambda a, b, g: (matmul_nt(b, g), matmul(a, g)))
gram = differentiable(products.gram, lambda a, g: (matmul(g + transpose(g), a),))
solve_unit_lower = implicit_solve(matmul, matmul_nt, matmul_tn)


def unit_lower_inverse(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    """``products.unit_lower_inverse`` as a constant, of as many systems side by side as there is room for."""
    systems, count = lower.shape[:2]
    lower = lax.stop_gradient(lower)
    if count < ROWS or count & (count - 1):  # blocks would not fit into each other
        return products.unit_lower_inverse(lower)
    beside = math.gcd(systems, max(1, LANES // count))
    groups = [jnp.concatenate(list(lower[i : i + beside]), axis=1) for i in range(0, systems, beside)]
    found = _inverses(jnp.stack(groups))
    return jnp.stack([group[:, i : i + count] for group in found for i in range(0, beside * count, count)])


def _inverses(lower: Float[Array, "G C V"]) -> Float[Array, "G C V"]:
    """(I + lower)^-1 of V / C systems side by side: neighbouring inverses P, Q become [[P, 0], [-Q L P, Q]].

    All blocks of one size lie side by side, in as few rows as one of them has. On the right of a product they are on
    the diagonal of a matrix [V,V] each.
    """
    count, width = lower.shape[1:]
    rows, columns = row_and_column(width)
    lower = jnp.tile(lower, (1, width // count, 1))
    tiles = jnp.where(_same(rows, columns, ROWS), lower, 0).reshape(-1, width // ROWS, ROWS, width)
    found, size = _inverses_of_tiles(jnp.sum(tiles, axis=1)), ROWS
    while size < count:
        own, pair = _same(rows, columns, size), _same(rows, columns, 2 * size)
        between = jnp.where(pair & (rows > columns) & ~own, lower, 0)
        blocks = jnp.where(own, jnp.tile(found, (1, width // size, 1)), 0)
        corners = _few_rows(_few_rows(found, between), blocks)
        first = columns[:size] & size == 0  # block of each pair
        found = jnp.concatenate([jnp.where(first, found, 0), jnp.where(first, -corners, found)], axis=1)
        size *= 2
    return found


def _same(rows: Int[Array, "R V"], columns: Int[Array, "R V"], size: int) -> Bool[Array, "R V"]:
    """Where row and column are in the same block of that size, a power of 2: no bit from there on differs."""
    return (rows ^ columns) < size


def _inverses_of_tiles(lower: Float[Array, "G R V"]) -> Float[Array, "G R V"]:
    """The inverses of the smallest blocks [R,R], side by side, by substitution of one row after another.

    Each column of a block is first written into all columns of that block, by a product with ones.
    """
    rows, columns = row_and_column(lower.shape[2])
    place = columns[:ROWS] & (ROWS - 1)
    spread = _same(rows, columns, ROWS).astype(lower.dtype)
    each = jnp.concatenate([jnp.where(place == i, lower, 0) for i in range(ROWS - 1)])
    each = _few_rows(each.reshape(-1, lower.shape[2]), spread).reshape(ROWS - 1, *lower.shape)
    found = jnp.broadcast_to((place == rows[:ROWS]).astype(lower.dtype), lower.shape)
    for i in range(ROWS - 1):
        found -= each[i] * found[:, i : i + 1]
    return found


def _few_rows(a: Float[Array, "*N M C"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a b, where most time goes into loading b: it is loaded three times, and six times in a product as it is.

    A float32 number is a sum of three bfloat16 numbers; of the nine products of these the six largest are summed.
    """
    if a.dtype != jnp.float32:
        return products.matmul(a, b)
    parts, total = _parts(a), jnp.zeros((), a.dtype)
    for count, right in zip((1, 2, 3), _parts(b)[::-1], strict=True):  # the smallest products first
        left = jnp.concatenate(parts[:count], axis=-2)
        found = jnp.matmul(left, right, precision=lax.Precision.DEFAULT)
        total += sum(jnp.split(found, count, axis=-2)[::-1])
    return total


def _parts(x: Float[Array, "*N"]) -> list[Float[Array, "*N"]]:
    """Three numbers whose sum is ``x``, each of which a matrix unit takes as it is: those of bfloat16, in float32."""
    parts: list[Array] = []
    for _ in range(2):
        bits = lax.bitcast_convert_type(x, jnp.int32) & -0x10000
        parts.append(lax.bitcast_convert_type(bits, jnp.float32))
        x -= parts[-1]
    return [*parts, x]
