"""Optimizers as optax transformations."""

from hope_jax.optim.by_level import by_level

__all__ = ["by_level"]
