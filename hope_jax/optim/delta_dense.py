"""A dense layer whose kernel gradient carries the delta term, so that any optimizer performs DGD on it (SPEC 5.4).

Delta gradient descent (Eq. 56-57) needs a layer's inputs, which an optimizer never sees. The layer does: it adds
``strength / N * X^T (X K)`` to the gradient of its kernel on the way back. ``dgd.py`` has the step itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from hope_jax.errors import UserError, whole
from hope_jax.optim.checks import check
from hope_jax.types import Array


@dataclass(frozen=True)
class DeltaDot:
    """``jax.lax.dot_general`` whose right factor, the kernel, has the delta term in its gradient; see ``delta_dense``.

    For ``y = x K``, with X and Y the N rows of x and y: ``dK = X^T (dY + strength / N * Y)``, for complex arrays with
    jax's conjugate of Y, and dX as ever. The gradient is that of the loss plus
    ``strength / (2 N) ||stop_gradient(X) K||^2``, without the loss being any larger. No product is added; the outputs
    y are kept for the way back. Fits the ``dot_general`` field of linen's layers. No forward-mode derivative.
    """

    strength: float = 1.0
    rows: int | None = None

    def __post_init__(self) -> None:
        check("strength", self.strength, 0)
        if self.rows is not None:
            whole("rows", self.rows, 1, "rows (None: all leading axes)")
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
      dense: fields of ``flax.linen.Dense`` (``use_bias``, ``dtype``, ``kernel_init``, ``name``, ...).

    Raises:
      UserError: ``strength`` or ``rows`` out of range; a ``dot_general`` of your own beside ours.
    """
    if taken := {"dot_general", "dot_general_cls"} & dense.keys():
        raise UserError(f"delta_dense sets dot_general itself; leave out {sorted(taken)} or use flax.linen.Dense")
    return nn.Dense(features, dot_general=DeltaDot(strength, rows), **dense)
