"""What a trained model can do, beyond its loss: one file per evaluation, each for any model. Read needle.py next."""

from hope_jax.evals import needle

__all__ = ["needle"]
