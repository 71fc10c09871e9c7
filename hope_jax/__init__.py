"""hope_jax: Hope and Nested Learning in JAX. Start with ``memory/recurrence.py``; the README has the map."""

from hope_jax.models import MODELS, LanguageModel, ModelConfig, model_named

__all__ = ["MODELS", "LanguageModel", "ModelConfig", "model_named"]
