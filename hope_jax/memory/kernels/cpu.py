"""The functions of ``products.py`` with gradients that are fast on CPU, and a layout for heads that is fast there.

The gradient of a product contains ``a^T b``. XLA folds that transpose into the product and on CPU then leaves its
fast kernel for one two to three times slower, so here the transposed operand is written out first on CPU
(``hope-jax benchmark products`` shows the ratio). On other platforms the same derivatives are plain products. They are
of any order but have no forward mode (``jax.jvp``), nor has anything built on them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.levels import save_for_backward
from hope_jax.memory import products
from hope_jax.memory.products import transpose
from hope_jax.types import Array, Float

Product = Callable[[Array, Array], Array]


def save_residuals(*residuals: Array) -> tuple[Array, ...]:
    """The residuals of a ``jax.custom_vjp`` with one axis more; ``load_residuals`` removes it.

    jax (0.10.2) hands residuals that are arguments around the program, and then cannot differentiate twice through
    vmap and scan (IndexError in batching). Training through the writes of levels needs that.
    """
    return tuple(x[None] for x in residuals)


def load_residuals(residuals: tuple[Array, ...]) -> tuple[Array, ...]:
    """The reverse of ``save_residuals``."""
    return tuple(x[0] for x in residuals)


def differentiable(function: Callable[..., Array], backward: Callable[..., tuple[Array, ...]]) -> Any:
    """``function`` with a gradient: ``backward`` maps operands and the cotangent of the result to cotangents."""
    product = jax.custom_vjp(function)

    def forward(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
        return product(*operands), save_residuals(*operands)

    product.defvjp(forward, lambda residuals, g: backward(*load_residuals(residuals), g))
    return product


def _matmul_tn(a: Float[Array, "*N C M"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a^T b; on CPU the transpose is an array of its own."""
    written = lax.platform_dependent(a, cpu=lambda a: lax.optimization_barrier(transpose(a)), default=transpose)
    return products.matmul(written, b)


matmul = differentiable(products.matmul, lambda a, b, g: (matmul_nt(g, b), matmul_tn(a, g)))
matmul_nt = differentiable(products.matmul_nt, lambda a, b, g: (matmul(g, b), matmul_tn(g, a)))
matmul_tn = differentiable(_matmul_tn, lambda a, b, g: (matmul_nt(b, g), matmul(a, g)))
# One product where the gradient of matmul_nt(a, a) is two.
gram = differentiable(products.gram, lambda a, g: (matmul(g + transpose(g), a),))


def unit_lower_inverse(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    """``products.unit_lower_inverse`` as a constant: ``solve_unit_lower`` has the derivatives.

    It is saved for the backward pass: a twentieth more memory at 16 tokens, a tenth at 64.
    """
    return save_for_backward(products.unit_lower_inverse(lax.stop_gradient(lower)))


def implicit_solve(matmul: Product, matmul_nt: Product, matmul_tn: Product) -> Callable[..., Float[Array, "C V"]]:
    """``products.solve_unit_lower`` with an implicit gradient: one more product with the same inverse."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def solve(transposed: bool, lower: Array, weights: Array, right: Array, inverse: Array) -> Array:
        return (matmul_tn if transposed else matmul)(inverse, right)

    def forward(transposed: bool, lower: Array, weights: Array, right: Array, inverse: Array):
        solution: Array = solve(transposed, lower, weights, right, inverse)
        return solution, save_residuals(lower, weights, inverse, solution)

    def backward(transposed: bool, residuals: tuple[Array, ...], g: Array):
        """With A = I + L diag(w) and A X = B: the cotangent of B is R = A^-T g, that of L diag(w) is -R X^T."""
        lower, weights, inverse, solution = load_residuals(residuals)
        of_right: Array = solve(not transposed, lower, weights, g, inverse)
        left, x = (solution, of_right) if transposed else (of_right, solution)
        of_lower = -matmul_nt(left, weights[:, None] * x)
        return of_lower, -jnp.sum(matmul_tn(lower, left) * x, axis=1), of_right, None

    solve.defvjp(forward, backward)
    return lambda lower, weights, right, inverse: solve(False, lower, weights, right, lax.stop_gradient(inverse))


solve_unit_lower = implicit_solve(matmul, matmul_nt, matmul_tn)


def _shifted_sum_backward(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
    """The gradient of ``shifted_sum``, which is a sum of the same kind."""
    more, time = len(kernel) - 1, g.shape[1]
    of_x = shifted_sum(jnp.pad(g, ((0, 0), (more, more), (0, 0))), kernel[::-1])
    of_taps = [jnp.sum((x[:, i : i + time] * g).reshape(-1, g.shape[-1]), axis=0) for i in range(len(kernel))]
    return of_x, jnp.stack(of_taps)


# Without this the gradient, of a sum of slices, would be a sum of padded arrays, which is slow.
shifted_sum = differentiable(products.shifted_sum, _shifted_sum_backward)


def batch_and_heads_as_one(head: Callable[..., Any], shared: tuple[Any, ...], own: tuple[Any, ...]) -> Any:
    """``nn.heads.over_heads`` with batch and heads as one axis: an axis of length 1 would be slow (``by_rows``)."""
    batch, heads = jax.tree.leaves(own)[0].shape[:2]
    shared = jax.tree.map(lambda x: jnp.tile(x, (batch, *[1] * (x.ndim - 1))), shared)
    own = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), own)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), jax.vmap(head)(*shared, *own))
