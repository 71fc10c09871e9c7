"""The products of ``products.py`` made of bfloat16 numbers and summed in float32, which matrix units compute fastest.

A float32 number is a sum of bfloat16 numbers of falling size. One pass multiplies the first of each operand: every
number is rounded to 8 bits. Three passes take the first two, about 16 bits, and leave out the product of the second
ones. Gradients are products of the same kind. Inverses of triangular systems are computed in float32.
Three passes turn infinite numbers into NaN: the rest after the first part is inf - inf.

Derivatives are of any order in reverse mode; there is no forward mode.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from hope_jax.memory import products
from hope_jax.memory.kernels.cpu import differentiable
from hope_jax.memory.products import transpose
from hope_jax.types import Array, Float


def rounded(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """The nearest bfloat16 numbers, as float32; of two equally near ones the larger in size. NaN stays NaN.

    Computed from the bits, because compilers may drop a conversion to bfloat16 and back.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    nearest = lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)
    return jnp.where(jnp.isnan(x), x, nearest)  # adding to the bits of a NaN may carry into its sign


def _one_pass(a: Array, b: Array) -> Array:
    narrow = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jnp.matmul(*narrow, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _product(passes: int, a: Float[Array, "*N M C"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a b, in one pass or in three."""
    dtype, a, b = a.dtype, a.astype(jnp.float32), b.astype(jnp.float32)
    first_a, first_b = rounded(a), rounded(b)
    product = _one_pass(first_a, first_b)
    if passes == 3:
        product += _one_pass(first_a, rounded(b - first_b)) + _one_pass(rounded(a - first_a), first_b)
    return product.astype(dtype)


Function = Callable[..., Array]


def functions(passes: int) -> tuple[Function, Function, Function, Function, Function, Function]:
    """``matmul``, ``matmul_nt``, ``matmul_tn``, ``gram``, ``unit_lower_inverse`` and ``solve_unit_lower``."""
    plain = functools.partial(_product, passes)
    matmul = differentiable(plain, lambda a, b, g: (matmul_nt(g, b), matmul_tn(a, g)))
    matmul_nt = differentiable(lambda a, b: plain(a, transpose(b)), lambda a, b, g: (matmul(g, b), matmul_tn(g, a)))
    matmul_tn = differentiable(lambda a, b: plain(transpose(a), b), lambda a, b, g: (matmul_nt(b, g), matmul(a, g)))
    gram = differentiable(lambda a: plain(a, transpose(a)), lambda a, g: (matmul(g + transpose(g), a),))

    def solve(lower: Array, weights: Array, right: Array, inverse: Array) -> Array:
        del lower, weights
        return matmul(inverse, right)

    return matmul, matmul_nt, matmul_tn, gram, products.unit_lower_inverse, solve
