"""Optimizers as optax transformations."""

from hope_jax.optim.by_level import by_level
from hope_jax.optim.delta_dense import delta_dense
from hope_jax.optim.dgd import dgd_update, ggd_step

__all__ = ["by_level", "delta_dense", "dgd_update", "ggd_step"]
