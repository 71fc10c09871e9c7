"""Weights of other libraries, in and out of the models of this one. Read llama.py next."""

from hope_jax.errors import extra

with extra("train"):
    from hope_jax.interop.llama import load_llama

__all__ = ["load_llama"]
