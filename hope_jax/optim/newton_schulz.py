"""Newton-Schulz: the nearest orthogonal matrix by matrix products alone (Eq. 42-44; SPEC 5.1).

For ``x = U S V^H`` it tends to ``U V^H``: every singular value to 1, nothing turned. ``cubic`` gets there (15 steps:
1 within 1e-3 unless x is badly conditioned); ``quintic`` is tuned to be near, about 0.7 to 1.2, within 5 steps.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Inexact

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.optim.checks import check_dtype
from hope_jax.optim.matrices import by_largest, squared_norm
from hope_jax.types import Array

Method = Literal["quintic", "cubic"]
METHODS = {"quintic": (5, (3.4445, -4.7750, 2.0315)), "cubic": (15, (1.5, -0.5, 0.0))}
"""Number of steps, and the coefficients of an iteration."""


@dataclass(frozen=True)
class NewtonSchulz:
    """Settings of ``orthogonalize`` for an optimizer to hold; not callable, so that it is never taken for a schedule.

    Attributes:
      steps: iterations; None for the method's own number, quintic 5 and cubic 15.
      method: "quintic" X <- a X + (b A + c A^2) X or "cubic" X <- 1.5 X - 0.5 A X, with A = X X^H.
      dtype: of the iteration, such as jnp.bfloat16; None for that of the matrix.
    """

    steps: int | None = None
    method: Method = "quintic"
    dtype: Any = None

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps is not None:
            whole("steps", self.steps, 1, "iterations")
        check_dtype("dtype", self.dtype)

    def orthogonalize(self, x: Array) -> Array:
        """See the function ``orthogonalize``."""
        if x.ndim < 2:
            raise UserError(f"x has shape {x.shape}; expected [..., rows, columns]. A vector has no orthogonal factor")
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise UserError(f"x has dtype {x.dtype}; expected a real or complex floating type")
        if x.shape[-2] > x.shape[-1]:
            return self.orthogonalize(x.mT).mT
        own = self.dtype is None or jnp.iscomplexobj(x)
        y, largest = by_largest(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        # Divided by ||x||_F + 1e-7, also where the squares of the entries would not be finite.
        y = (y / (jnp.sqrt(squared_norm(y)) + 1e-7 / largest)).astype(x.dtype if own else self.dtype)
        steps, (a, b, c) = METHODS[self.method]
        for _ in range(self.steps or steps):
            gram = y @ y.mT.conj()
            y = a * y + (b * gram + c * gram @ gram if c else b * gram) @ y
        return y.astype(x.dtype)


def orthogonalize(
    x: Inexact[Array, "*batch rows columns"], steps: int | None = None, method: Method = "quintic", dtype: Any = None
) -> Inexact[Array, "*batch rows columns"]:
    """The orthogonal factor of every matrix in a stack, by Newton-Schulz from ``x / (||x||_F + 1e-7)``.

    Zero stays zero, and the transpose of x gives the transpose: the iteration runs on the side with fewer rows. One
    step costs ``4 r^2 c + 2 r^3`` FLOPs (cubic ``4 r^2 c``), r = min(rows, columns), c = max. Complex matrices too.

    Args:
      x: matrices; leading axes count them.
      steps, method, dtype: as of ``NewtonSchulz``; a complex x is iterated in its own type.
    """
    return NewtonSchulz(steps, method, dtype).orthogonalize(x)


def muon_step(x: Inexact[Array, "*batch rows columns"]) -> Inexact[Array, "*batch rows columns"]:
    """``0.2 sqrt(max(rows, columns)) NS(x)``: Muon's step at the size of Adam's (SPEC 5.1)."""
    return 0.2 * max(x.shape[-2:]) ** 0.5 * orthogonalize(x)
