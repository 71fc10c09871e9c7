"""Which steps are taken: one whose loss or gradient is not finite, or whose gradient is far too long, changes nothing.

``optax.apply_if_finite`` would look at the gradient alone, and would accept what is not finite after some steps.
"""

from typing import Any

import jax.numpy as jnp

from hope_jax.optim.checks import check
from hope_jax.types import Array, Bool, Scalar

RECENT = 0.01
"""Weight of the last step in the usual norm."""


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


def usual_norm(usual: Any, norm: Scalar, sound: Bool[Array, ""]) -> Scalar:
    """The mean norm of the gradients up to this one, older ones with less weight; steps not taken do not count."""
    mean = jnp.where(usual == 0, norm, (1 - RECENT) * usual + RECENT * norm)
    return jnp.where(sound, mean, usual)
