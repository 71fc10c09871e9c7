"""The configuration of a language model: two parts and a few sizes. ``models.MODELS`` holds the named ones."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import whole
from hope_jax.nn.feed_forward.cms import CMSConfig


@runtime_checkable
class PartConfig(Protocol):
    """A mixer or feed-forward part: a frozen dataclass that builds its module."""

    def build(self, width: int, dtype: DTypeLike) -> nn.Module:
        """The module for a model of ``width`` features."""
        ...


@dataclass(frozen=True)
class ModelConfig:
    """A language model.

    Attributes:
      mixer: what mixes tokens: ``SelfModifyingConfig``, ``MemoryMixerConfig`` or ``AttentionConfig``.
      feed_forward: ``CMSConfig`` or ``SwiGLUConfig``.
      width: model features D.
      layers: blocks.
      vocab_size: token ids; 256 for bytes.
      context: tokens an attention cache holds unless asked otherwise.
      dtype: of activations and matrix products; parameters, norms and memories are at least float32.
      tied: logits are scored against the embedding; False gives the head a matrix of its own.
    """

    mixer: PartConfig
    feed_forward: PartConfig
    width: int
    layers: int
    vocab_size: int = 256
    context: int = 2048
    dtype: DTypeLike = jnp.float32
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "layers", "vocab_size", "context"):
            whole(name, getattr(self, name))
        self.mixer.build(self.width, self.dtype)  # the parts check themselves against the width
        self.feed_forward.build(self.width, self.dtype)

    def update_every(self, tokens_per_batch: int) -> dict[str, int]:
        """Batches between two updates, by parameter label: "static" and one "level_<i>" per CMS level."""
        levels = self.feed_forward.update_every(tokens_per_batch) if isinstance(self.feed_forward, CMSConfig) else {}
        return {"static": 1, **levels}
