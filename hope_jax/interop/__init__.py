"""Weights of other libraries, in and out of the models of this one. Read loading.py next, then llama.py."""

from hope_jax.errors import extra

with extra("train"):
    from hope_jax.interop.hugging_face import save_llama
    from hope_jax.interop.llama import load_llama
    from hope_jax.interop.loading import load
    from hope_jax.interop.qwen3_next import load_qwen3_next_layer

__all__ = ["load", "load_llama", "load_qwen3_next_layer", "save_llama"]
