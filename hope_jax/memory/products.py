"""Batched matrix products of small matrices, in full float32, with gradients that are fast on CPU.

The gradient of a product contains ``a^T b``. XLA folds that transpose into the product and on CPU then leaves its
fast kernel for one two to three times slower, so here the transposed operand is written out first on CPU
(``benchmark.py products`` shows the ratio). Accelerators whose default product is narrower are asked for float32.
Letters say which operands are transposed: ``nn`` is a b, ``nt`` is a b^T, ``tn`` is a^T b. They have gradients of any
order but no forward mode (``jax.jvp``), and so has everything built on them.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.types import Array, Float


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _flip(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _flipped(x: Array) -> Array:
    """The transpose, as an array of its own on CPU."""
    return lax.platform_dependent(x, cpu=lambda x: lax.optimization_barrier(_flip(x)), default=_flip)


@jax.custom_vjp
def nn(a: Float[Array, "M C"], b: Float[Array, "C N"]) -> Float[Array, "M N"]:
    """a b."""
    return _product(a, b)


@jax.custom_vjp
def nt(a: Float[Array, "M C"], b: Float[Array, "N C"]) -> Float[Array, "M N"]:
    """a b^T."""
    return _product(a, _flip(b))


@jax.custom_vjp
def tn(a: Float[Array, "C M"], b: Float[Array, "C N"]) -> Float[Array, "M N"]:
    """a^T b."""
    return _product(_flipped(a), b)


def _kept(product: Callable[[Array, Array], Array]) -> Callable[[Array, Array], tuple[Array, tuple[Array, Array]]]:
    """The product, and its operands with one axis more.

    jax (0.10.2) takes residuals that are the arguments themselves past the program, and then cannot differentiate
    twice through vmap and scan (IndexError in batching): what trains through the writes of its levels has to.
    """
    return lambda a, b: (product(a, b), (a[None], b[None]))


nn.defvjp(_kept(nn), lambda ab, g: (nt(g, ab[1][0]), tn(ab[0][0], g)))
nt.defvjp(_kept(nt), lambda ab, g: (nn(g, ab[1][0]), tn(g, ab[0][0])))
tn.defvjp(_kept(tn), lambda ab, g: (nt(ab[1][0], g), nn(ab[0][0], g)))


def by_rows(function: Callable[[Array], Array], x: Float[Array, "*batch D"]) -> Float[Array, "*batch N"]:
    """A function of rows, [R,D] -> [R,N], over all leading axes of ``x`` as one.

    The same arithmetic, but XLA on CPU is slow at sums over rows or features where an axis of length 1 leads, and at
    the weight gradient of a linear map where there is a second leading axis.
    """
    y = function(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def split(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    """Parts of so many rows. The gradient is one concatenation; that of slices is a sum of padded arrays, and slow."""
    return list(lax.split(x, tuple(sizes), axis=axis)) if len(sizes) > 1 else [x]
