"""The products of the memories with gradients that are fast on CPU, and two layout rules that serve the same end.

The gradient of a product contains ``a^T b``. XLA folds that transpose into the product and on CPU then leaves its
fast kernel for one two to three times slower, so here the transposed operand is written out first on CPU
(``benchmark.py products`` shows the ratio). On other platforms the same derivatives are plain products. They are of any
order but have no forward mode (``jax.jvp``), nor has anything built on them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hope_jax.levels import save_for_backward
from hope_jax.memory import products, triangular
from hope_jax.memory.products import transpose
from hope_jax.types import Array, Float


def _written_transpose(x: Array) -> Array:
    """The transpose, as an array of its own on CPU."""
    return lax.platform_dependent(x, cpu=_behind_barrier, default=transpose)


def _behind_barrier(x: Array) -> Array:
    return lax.optimization_barrier(transpose(x))


def save_residuals(*residuals: Array) -> tuple[Array, ...]:
    """The residuals of a ``jax.custom_vjp``, with one axis more; ``load_residuals`` takes it off.

    jax (0.10.2) takes residuals that are the arguments themselves past the program, and then cannot differentiate
    twice through vmap and scan (IndexError in batching). A model that trains through the writes of its levels does so.
    """
    return tuple(x[None] for x in residuals)


def load_residuals(residuals: tuple[Array, ...]) -> tuple[Array, ...]:
    """The reverse of ``save_residuals``."""
    return tuple(x[0] for x in residuals)


# ---------------------------------------------------------------- products


@jax.custom_vjp
def matmul(a: Float[Array, "*N M C"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a b."""
    return products.matmul(a, b)


@jax.custom_vjp
def matmul_nt(a: Float[Array, "*N M C"], b: Float[Array, "*N V C"]) -> Float[Array, "*N M V"]:
    """a b^T."""
    return products.matmul_nt(a, b)


@jax.custom_vjp
def matmul_tn(a: Float[Array, "*N C M"], b: Float[Array, "*N C V"]) -> Float[Array, "*N M V"]:
    """a^T b."""
    return products.matmul(_written_transpose(a), b)


@jax.custom_vjp
def gram(a: Float[Array, "*N M C"]) -> Float[Array, "*N M M"]:
    """a a^T; its gradient is one product where that of ``matmul_nt(a, a)`` is two."""
    return products.gram(a)


def _matmul_backward(a: Array, b: Array, g: Array) -> tuple[Array, Array]:
    return matmul_nt(g, b), matmul_tn(a, g)


def _matmul_nt_backward(a: Array, b: Array, g: Array) -> tuple[Array, Array]:
    return matmul(g, b), matmul_tn(g, a)


def _matmul_tn_backward(a: Array, b: Array, g: Array) -> tuple[Array, Array]:
    return matmul_nt(b, g), matmul(a, g)


def _gram_backward(a: Array, g: Array) -> tuple[Array]:
    return (matmul(g + transpose(g), a),)


def _differentiable(function: Any, backward: Callable[..., tuple[Array, ...]]) -> None:
    """``backward`` maps the operands and the cotangent of the result to the operands' cotangents."""

    def forward(*operands: Array) -> tuple[Array, tuple[Array, ...]]:
        return function(*operands), save_residuals(*operands)

    def pull_back(residuals: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
        return backward(*load_residuals(residuals), g)

    function.defvjp(forward, pull_back)


_differentiable(matmul, _matmul_backward)
_differentiable(matmul_nt, _matmul_nt_backward)
_differentiable(matmul_tn, _matmul_tn_backward)
_differentiable(gram, _gram_backward)


# ---------------------------------------------------------------- the triangular solve


def unit_lower_inverse(lower: Float[Array, "S C C"]) -> Float[Array, "S C C"]:
    """``triangular.unit_lower_inverse`` as a constant: ``solve_unit_lower`` has the derivatives.

    It is saved for the backward pass: a twentieth more memory at 16 tokens, a tenth at 64.
    """
    return save_for_backward(triangular.unit_lower_inverse(lax.stop_gradient(lower)))


def solve_unit_lower(
    lower: Float[Array, "C C"], weights: Float[Array, " C"], right: Float[Array, "C V"], inverse: Float[Array, "C C"]
) -> Float[Array, "C V"]:
    """``triangular.solve_unit_lower`` with an implicit gradient: one more product with the same inverse."""
    return _solve(False, lower, weights, right, lax.stop_gradient(inverse))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(transposed: bool, lower: Array, weights: Array, right: Array, inverse: Array) -> Array:
    return (matmul_tn if transposed else matmul)(inverse, right)


def _solve_forward(transposed: bool, lower: Array, weights: Array, right: Array, inverse: Array):
    solution: Array = _solve(transposed, lower, weights, right, inverse)
    return solution, save_residuals(lower, weights, inverse, solution)


def _solve_backward(transposed: bool, residuals: tuple[Array, ...], g: Array):
    """With A = I + L diag(w) and A X = B: the cotangent of B is R = A^-T g, that of L diag(w) is -R X^T."""
    lower, weights, inverse, solution = load_residuals(residuals)
    of_right: Array = _solve(not transposed, lower, weights, g, inverse)
    left, x = (solution, of_right) if transposed else (of_right, solution)
    of_lower = -matmul_nt(left, weights[:, None] * x)
    return of_lower, -jnp.sum(matmul_tn(lower, left) * x, axis=1), of_right, None


_solve.defvjp(_solve_forward, _solve_backward)


# ---------------------------------------------------------------- layers


def by_rows(function: Callable[[Array], Array], x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """A function of rows, [R,D] -> [R,V], over all leading axes of ``x`` as one.

    The same arithmetic, but XLA on CPU is slow at sums over rows or features where an axis of length 1 leads, and at
    the weight gradient of a linear map where there is a second leading axis.
    """
    y = function(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def shifted_sum(x: Float[Array, "B seen D"], kernel: Float[Array, "width D"]) -> Float[Array, "B T D"]:
    """``sum_i kernel_i * x_(t + i)`` at every t that has all terms, T = seen - width + 1.

    Its gradient is a sum of the same kind; that of slices is a sum of padded arrays, and slow.
    """
    time = x.shape[1] - len(kernel) + 1
    terms = [by_rows(lambda rows, tap=tap: rows * tap[None], x[:, i : i + time]) for i, tap in enumerate(kernel)]
    return functools.reduce(jnp.add, terms)


def _shifted_sum_backward(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
    more, time = len(kernel) - 1, g.shape[1]
    of_x = shifted_sum(jnp.pad(g, ((0, 0), (more, more), (0, 0))), kernel[::-1])
    of_taps = [jnp.sum((x[:, i : i + time] * g).reshape(-1, g.shape[-1]), axis=0) for i in range(len(kernel))]
    return of_x, jnp.stack(of_taps)


_differentiable(shifted_sum, _shifted_sum_backward)


def batch_and_heads_as_one(head: Callable[..., Any], shared: tuple[Any, ...], own: tuple[Any, ...]) -> Any:
    """``nn.layers.over_heads`` with batch and heads as one axis: an axis of length 1 would be slow (``by_rows``).

    The price on a mesh: sequences may be spread over devices, but where heads are too, XLA gathers them first.
    """
    batch, heads = jax.tree.leaves(own)[0].shape[:2]
    shared = jax.tree.map(lambda x: jnp.tile(x, (batch, *[1] * (x.ndim - 1))), shared)
    own = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), own)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), jax.vmap(head)(*shared, *own))
