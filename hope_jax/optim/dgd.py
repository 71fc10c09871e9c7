"""Delta gradient descent: gradient descent whose step minimises the L2 objective, not the dot product (Eq. 56-60).

One linear layer ``y = x K`` with a Flax kernel ``K [in, out]``; the paper's ``W [out, in]`` is ``K^T``. The step
regresses the output onto the local surprise ``u = -grad_y L``: *minus* the gradient, and not ``y - grad_y L``, so that
it lets ``K`` decay along its inputs whatever the loss is. SPEC 5.4.

An optimizer never sees a layer's inputs, which the step needs. A layer does: ``delta_dense`` adds
``strength / N * X^T (X K)`` to the gradient of its kernel on the way back, so that any optimizer performs DGD on it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from hope_jax.errors import UserError, check_word, whole
from hope_jax.optim.checks import check
from hope_jax.types import Array, Float

Form = Literal["exact", "cheap", "spectral"]


def dgd_update(
    kernel: Float[Array, "K V"],
    inputs: Float[Array, "*rows K"],
    output_gradients: Float[Array, "*rows V"],
    rate: float | Float[Array, ""],
    form: Form = "exact",
) -> Float[Array, "K V"]:
    """The kernel after one step of delta gradient descent on one batch, in its dtype; computed in at least float32.

    With the N rows ``X [N, in]``, ``U = -output_gradients [N, out]`` and ``||.||`` the Frobenius norm,

    * ``exact``: ``argmin_K 1/2 ||X K - U||^2 + ||K - K_t||^2 / (2 rate)``
      = ``K_t + rate X^T (I_N + rate X X^T)^-1 (U - X K_t)``  (Woodbury; a QR factorisation with min(N, in) columns),
    * ``cheap``: ``K_t + r X^T (U - X K_t)``, ``r = rate / (1 + rate ||X||^2)``: one gradient step of the objective, two
      products, short enough to contract, for ``||X||^2`` is at least the largest eigenvalue of ``X X^T``,
    * ``spectral``: the same with that eigenvalue itself, a longer step that contracts as well.

    All are Eq. 57 where N = 1. The printed ``r = rate / (1 + rate)`` holds for unit inputs only.

    Args:
      kernel, inputs: as Flax has them; all leading axes of the inputs are rows.
      output_gradients: gradients of the *summed* loss at the layer's outputs; multiply those of a mean loss by the
        number of rows.
      rate: eta >= 0.
      form: see above.
    """
    _check(kernel, inputs, output_gradients, rate, form)
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    old, rate = kernel.astype(dtype), jnp.asarray(rate, dtype)
    rows = inputs.reshape(-1, inputs.shape[-1]).astype(dtype)
    error = -output_gradients.reshape(-1, output_gradients.shape[-1]).astype(dtype) - rows @ old
    if form == "exact":
        return (old + _exact_step(rows, error, rate)).astype(kernel.dtype)
    size = jnp.sum(jnp.square(rows)) if form == "cheap" else _largest_eigenvalue(rows)
    return (old + rate * rows.T @ error / (1 + rate * size)).astype(kernel.dtype)


def _exact_step(
    x: Float[Array, "rows K"], error: Float[Array, "rows V"], rate: Float[Array, ""]
) -> Float[Array, "K V"]:
    """rate (I + rate X^T X)^-1 X^T error, in the smaller of the two spaces.

    By QR of [sqrt(rate) X; I]: the Gram matrix would square the condition, and equal rows make it singular in float32.
    """
    root, tall = jnp.sqrt(rate), x if x.shape[0] >= x.shape[1] else x.T
    q, r = jnp.linalg.qr(jnp.concatenate([root * tall, jnp.eye(tall.shape[1], dtype=x.dtype)]))
    if tall is x:
        return solve_triangular(r, q[: x.shape[0]].T @ (root * error))
    return rate * x.T @ solve_triangular(r, solve_triangular(r, error, trans=1))


def _largest_eigenvalue(x: Float[Array, "rows K"]) -> Float[Array, ""]:
    if 0 in x.shape:
        return jnp.zeros((), x.dtype)
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    return jnp.linalg.eigvalsh(gram)[-1]


def _check(kernel: Array, inputs: Array, output_gradients: Array, rate: Any, form: str) -> None:
    check_word("form", form, Form)
    check("rate", rate, 0)
    for name, array in (("kernel", kernel), ("inputs", inputs), ("output_gradients", output_gradients)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name} has dtype {array.dtype}; expected a real floating type")
    if kernel.ndim != 2:
        raise UserError(f"kernel has shape {kernel.shape}; expected [in, out] of one linear layer")
    expected = (*inputs.shape[:-1], kernel.shape[1])
    if inputs.shape[-1:] != kernel.shape[:1]:
        raise UserError(f"inputs have shape {inputs.shape}; expected [..., {kernel.shape[0]}] for this kernel")
    if output_gradients.shape != expected:
        raise UserError(f"output_gradients have shape {output_gradients.shape}; expected {expected}")


def ggd_step(
    weights: Any,
    x: Any,
    surprise: Callable[[Any, Any], Any],
    loss: Callable[[Any, Any, Any], Array],
    retention: Callable[[Any, Any], Array],
    rate: float,
    steps: int,
) -> Any:
    """Generalized gradient descent (Eq. 59-60): ``argmin_W loss(W; x, u) + retention(W, W_t)``.

    The target ``u = surprise(W_t, x)`` is frozen at the old weights, which makes the step self-referential: the model
    writes its own target. The minimum is sought by ``steps`` gradient steps of length ``rate`` from ``W_t``. With
    ``retention = ||W - W_t||^2 / (2 eta)`` a ``loss`` of ``-<W x, u>`` is gradient descent (Eq. 58) and
    ``1/2 ||W x - u||^2`` is delta gradient descent; more steps come closer to its closed form, ``dgd_update``.

    Args:
      weights: any pytree of arrays.
      x: the data, handed to ``surprise`` and ``loss`` as it is.
      surprise: ``(weights, x) -> u``, usually minus the gradient of the task's loss at the output.
      loss: ``(weights, x, u) -> scalar``.
      retention: ``(weights, old weights) -> scalar``.
      rate, steps: length of an inner step, above 0, and their number, 1 or more; UserError for others.
    """
    check("rate", rate, 0, open_low=True)
    whole("steps", steps, 1, "inner steps")
    u = surprise(weights, x)

    def descend(current: Any, _: None) -> tuple[Any, None]:
        slope = jax.grad(lambda w: loss(w, x, u) + retention(w, weights))(current)
        return jax.tree.map(lambda w, g: w - rate * g, current, slope), None

    return jax.lax.scan(descend, weights, None, length=steps)[0]


@dataclass(frozen=True)
class DeltaDot:
    """``jax.lax.dot_general`` whose right factor, the kernel, has the delta term in its gradient; see ``delta_dense``.

    The gradient is that of the loss plus ``strength / (2 N) ||stop_gradient(X) K||^2``, without the loss being any
    larger. No product is added, as ``dK = X^T (dY + strength / N * Y)``: the outputs Y are kept for the way back. Fits
    the ``dot_general`` field of linen's layers. No forward-mode derivative.
    """

    strength: float = 1.0
    rows: int | None = None

    def __post_init__(self) -> None:
        check("strength", self.strength, 0)
        if self.rows is not None:
            whole("rows", self.rows, 1, "rows; None: all leading axes")
        object.__setattr__(self, "strength", float(self.strength))  # a module's field must be hashable

    def __call__(self, x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
        """The product; arguments as those of ``jax.lax.dot_general``. Raises UserError for batched kernels."""
        if dimension_numbers[1][1]:
            raise UserError("the kernel has batch axes; expected one kernel for all rows (use vmap for several)")
        scale = self.strength / (self.rows or rows_of(x.shape, dimension_numbers[0][0]))

        def dot(x: Array, kernel: Array) -> Array:
            return jax.lax.dot_general(x, kernel, dimension_numbers, **options)

        def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            y = dot(x, kernel)
            return y, (x, kernel, y)

        def backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array]:
            x, kernel, y = kept
            (dx,) = jax.vjp(lambda x: dot(x, kernel), x)[1](dy)
            (dk,) = jax.vjp(lambda kernel: dot(x, kernel), kernel)[1](dy + scale * y.conj())
            return dx, dk

        delta = jax.custom_vjp(dot)
        delta.defvjp(forward, backward)
        return delta(x, kernel)


def rows_of(shape: Sequence[int], contracted: Sequence[int]) -> int:
    """Number of rows of an array of that shape: the product of its axes that are not contracted, at least 1."""
    inner = {axis % len(shape) for axis in contracted}
    return max(1, math.prod(size for axis, size in enumerate(shape) if axis not in inner))


def delta_dense(features: int, strength: float = 1.0, rows: int | None = None, **dense: Any) -> nn.Dense:
    """A ``flax.linen.Dense`` whose kernel gradient carries the delta term of delta gradient descent.

    ``dK = X^T dY + strength / N * X^T (X K)``; all else is that of ``Dense``, names and initial values included. Plain
    gradient descent at ``lr`` on a mean loss is then ``dgd_update(..., form="cheap")`` with the coefficient lr / N in
    the place of ``rate / (1 + rate ||X||^2)``; keep ``lr / N ||X||^2`` below 2 or it diverges along the inputs.

    >>> import jax, jax.numpy as jnp, optax
    >>> from hope_jax import optim
    >>> layer = optim.delta_dense(3, strength=0.1, use_bias=False)
    >>> x, target = jnp.ones((8, 4)), jnp.zeros((8, 3))
    >>> params = layer.init(jax.random.key(0), x)
    >>> tx = optax.adamw(1e-3)  # any optimizer: the delta term is part of the gradient
    >>> loss = lambda params: jnp.mean(jnp.sum((layer.apply(params, x) - target) ** 2, axis=-1))
    >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)

    Args:
      features: outputs.
      strength: 0 is ``Dense`` to the bit, 1 the literal rule. The rule decays the kernel along its inputs whatever the
        loss is, so as an outer optimizer this must be tuned.
      rows: N, the number of rows that the loss averages over; 1 for a summed loss. By default the product of all axes
        of the input but the last. Give it where the layer does not see all rows at once (under ``vmap``, ``shard_map``,
        accumulated gradients) or where the loss leaves some out.
      dense: fields of ``flax.linen.Dense`` except ``dot_general`` (``use_bias``, ``dtype``, ``kernel_init``, ...).
    """
    if taken := {"dot_general", "dot_general_cls"} & dense.keys():
        raise UserError(f"delta_dense sets dot_general itself; leave out {sorted(taken)} or use flax.linen.Dense")
    return nn.Dense(features, dot_general=DeltaDot(strength, rows), **dense)
