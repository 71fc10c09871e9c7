"""Which steps are taken: one whose loss or gradient is not finite, or whose gradient is far too long, changes nothing.

``optax.apply_if_finite`` would look at the gradient alone, and after some such steps it would accept them.
"""

from typing import Any

import jax.numpy as jnp

from hope_jax.optim.checks import check
from hope_jax.types import Array, Bool, Scalar

RECENT = 0.05
"""Weight of the last step in the usual norm; the weight of n steps before is (1 - RECENT)^n times that."""


def check_spike(spike: float | None) -> None:
    """Raise UserError where ``spike``, as in ``is_sound``, is no number above 1."""
    if spike is not None:
        check("spike", spike, 1, open_low=True)


def is_sound(loss: Scalar, norm: Scalar, usual: Any, spike: float | None) -> Bool[Array, ""]:
    """Whether a step may be taken whose gradient has this norm.

    ``usual``: norm of the gradients before it, 0 where there are none. ``spike``: how many times as long a gradient may
    be; None: of any length, and ``usual`` plays no part.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    return finite if spike is None else finite & ((usual == 0) | (norm <= spike * usual))


def usual_norm(usual: Any, norm: Scalar, spike: float | None) -> Scalar:
    """The moving mean of the norms of gradients up to this one; ``spike`` as in ``is_sound``.

    A norm above ``spike * usual`` counts as that, so that a rise that lasts becomes usual. A norm that is not finite
    does not count.
    """
    most = jnp.inf if spike is None else spike * usual
    counted = jnp.where(usual == 0, norm, jnp.minimum(norm, most))
    mean = jnp.where(usual == 0, norm, (1 - RECENT) * usual + RECENT * counted)
    return jnp.where(jnp.isfinite(norm), mean, usual).astype(jnp.float32)  # also where gradients are float64
