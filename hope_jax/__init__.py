"""hope_jax: Hope and Nested Learning in JAX. Start with ``memory/recurrence.py``; the README has the map.

Public names and submodules are imported when they are first used, so that ``import hope_jax`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hope_jax import config, context, data, evals, generate, interop, memory, optim, stacking, trace, train
    from hope_jax.models import MODELS, LanguageModel, ModelConfig, model_named

__all__ = [
    "MODELS", "LanguageModel", "ModelConfig", "config", "context", "data", "evals", "generate", "interop", "memory",
    "model_named", "optim", "stacking", "trace", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("MODELS", "LanguageModel", "ModelConfig", "model_named"):
        return getattr(importlib.import_module("hope_jax.models"), name)
    if name in __all__:
        return importlib.import_module(f"hope_jax.{name}")
    raise AttributeError(f"module 'hope_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
