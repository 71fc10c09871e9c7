"""Products of small matrices in full float32 (accelerators whose default is narrower are asked for it).

A suffix says which operand is transposed, as in BLAS: ``matmul_nt`` is a b^T and ``matmul_tn`` is a^T b. These are the
plain forms, with derivatives of any order and mode. ``kernels/cpu.py`` has the same products with gradients that are
fast on CPU, and ``kernels/__init__.py`` chooses.
"""

import jax.numpy as jnp
from jax import lax

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
