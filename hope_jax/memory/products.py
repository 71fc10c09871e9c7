"""Batched matrix products of small matrices, in full float32, with gradients that are fast on CPU.

The gradient of a product contains ``a^T b``. XLA folds that transpose into the product and on CPU then leaves its
fast kernel for one two to three times slower, so here the transposed operand is written out first on CPU
(``benchmark.py products`` shows the ratio). ``a b^T`` is slower than ``a b``, too: weights that many inputs go through
are stored the way that makes that ``a b``. Accelerators whose default product is narrower are asked for float32.
Letters say which operands are transposed: ``nn`` is a b, ``nt`` is a b^T, ``tn`` is a^T b. They have gradients of any
order but no forward mode (``jax.jvp``), and so has everything built on them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.types import Array, Float


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def flip(x: Array) -> Array:
    """The transpose of each matrix, which XLA takes into a product."""
    return jnp.swapaxes(x, -1, -2)


def _flipped(x: Array) -> Array:
    """The transpose, as an array of its own on CPU."""
    return lax.platform_dependent(x, cpu=lambda x: lax.optimization_barrier(flip(x)), default=flip)


@jax.custom_vjp
def nn(a: Float[Array, "M C"], b: Float[Array, "C N"]) -> Float[Array, "M N"]:
    """a b."""
    return _product(a, b)


@jax.custom_vjp
def nt(a: Float[Array, "M C"], b: Float[Array, "N C"]) -> Float[Array, "M N"]:
    """a b^T."""
    return _product(a, flip(b))


@jax.custom_vjp
def tn(a: Float[Array, "C M"], b: Float[Array, "C N"]) -> Float[Array, "M N"]:
    """a^T b."""
    return _product(_flipped(a), b)


def keep(*residuals: Array) -> tuple[Array, ...]:
    """What a ``jax.custom_vjp`` keeps for its backward pass (``given`` takes it out): with one axis more.

    jax (0.10.2) takes residuals that are the arguments themselves past the program, and then cannot differentiate
    twice through vmap and scan (IndexError in batching): what trains through the writes of its levels has to.
    """
    return tuple(x[None] for x in residuals)


def given(kept: tuple[Array, ...]) -> tuple[Array, ...]:
    """The reverse of ``keep``."""
    return tuple(x[0] for x in kept)


def _differentiable(product, backward: Callable[[Array, Array, Array], tuple[Array, Array]]) -> None:
    """``backward`` maps the two operands and the cotangent to the operands' cotangents."""

    def of_operands(kept: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
        a, b = given(kept)
        return backward(a, b, g)

    product.defvjp(lambda a, b: (product(a, b), keep(a, b)), of_operands)


_differentiable(nn, lambda a, b, g: (nt(g, b), tn(a, g)))
_differentiable(nt, lambda a, b, g: (nn(g, b), tn(g, a)))
_differentiable(tn, lambda a, b, g: (nt(b, g), nn(a, g)))


@jax.custom_vjp
def gram(a: Float[Array, "M C"]) -> Float[Array, "M M"]:
    """a a^T; its gradient is one product where that of ``nt(a, a)`` is two."""
    return nt(a, a)


def _gram_backward(kept: tuple[Array, ...], g: Array) -> tuple[Array]:
    (a,) = given(kept)
    return (nn(g + flip(g), a),)


gram.defvjp(lambda a: (gram(a), keep(a)), _gram_backward)


def by_rows(function: Callable[[Array], Array], x: Float[Array, "*batch D"]) -> Float[Array, "*batch N"]:
    """A function of rows, [R,D] -> [R,N], over all leading axes of ``x`` as one.

    The same arithmetic, but XLA on CPU is slow at sums over rows or features where an axis of length 1 leads, and at
    the weight gradient of a linear map where there is a second leading axis.
    """
    y = function(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])
