"""Which steps are taken: one whose loss or gradient is not finite, or whose gradient is far too long, changes nothing.

``optax.apply_if_finite`` would look at the gradient alone, and would accept what is not finite after some steps.
"""

from typing import Any

import jax.numpy as jnp

from hope_jax.optim.checks import check
from hope_jax.types import Array, Bool, Scalar

RECENT = 0.05
"""Weight of the last step in the usual norm: that of n steps before is (1 - RECENT)^n times as large."""


def check_spike(spike: float | None) -> None:
    """Raise UserError where ``spike`` of ``is_sound`` is no number above 1."""
    if spike is not None:
        check("spike", spike, 1, open_low=True)


def is_sound(loss: Scalar, norm: Scalar, usual: Any, spike: float | None) -> Bool[Array, ""]:
    """Whether a step may be taken whose gradient has this norm.

    ``usual``: norm of the gradients before it, 0 where there are none. ``spike``: how many times as long a gradient may
    be; None: as long as it likes, and ``usual`` is not looked at.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    return finite if spike is None else finite & ((usual == 0) | (norm <= spike * usual))


def usual_norm(usual: Any, norm: Scalar, spike: float | None) -> Scalar:
    """The moving mean of the norms of gradients up to this one; ``spike`` as in ``is_sound``.

    One that is longer than ``spike`` allows counts as long as it may be, so that a rise that lasts becomes usual; one
    that is not finite does not count.
    """
    most = jnp.inf if spike is None else spike * usual
    counted = jnp.where(usual == 0, norm, jnp.minimum(norm, most))
    mean = jnp.where(usual == 0, norm, (1 - RECENT) * usual + RECENT * counted)
    return jnp.where(jnp.isfinite(norm), mean, usual).astype(jnp.float32)  # where gradients are float64, too
