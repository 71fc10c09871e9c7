"""Inner optimizers: how a level turns the gradient of a finished period into the step that is written (Eq. 71).

An inner optimizer is an optax transformation, as the outer ones are. A configuration holds the function that makes it
and its arguments, so that it can be compared, hashed and saved:

>>> Writes(optimizer=inner(optax.trace, decay=0.9))
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import optax

from hope_jax.optim.newton_schulz import muon_step


@dataclass(frozen=True)
class InnerOptimizer:
    """``make(**settings)`` is an ``optax.GradientTransformation`` of one matrix; see ``inner``."""

    make: Callable[..., optax.GradientTransformation]
    settings: tuple[tuple[str, float], ...] = ()

    def build(self) -> optax.GradientTransformation:
        """The transformation. It maps the mean gradient to a direction; the level subtracts rate times direction."""
        return self.make(**dict(self.settings))


def inner(make: Callable[..., optax.GradientTransformation], **settings: float) -> InnerOptimizer:
    """The inner optimizer ``make(**settings)``. ``make``: a function of optax, or one at the top of your module."""
    return InnerOptimizer(make, tuple(sorted(settings.items())))


def muon(decay: float) -> optax.GradientTransformation:
    """Momentum whose direction is orthogonalised."""
    return optax.chain(optax.trace(decay), optax.stateless_with_tree_map(lambda u, _: muon_step(jnp.asarray(u))))


SGD = inner(optax.identity)
INNER = {
    "sgd": SGD,
    "momentum": inner(optax.trace, decay=0.9),
    "adam": inner(optax.scale_by_adam, b1=0.9, b2=0.99, eps_root=1e-16),
    "muon": inner(muon, decay=0.9),
}
"""The inner optimizers that the command line knows by name."""
