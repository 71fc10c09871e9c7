"""The configuration of a language model: its parts and a few sizes. ``models.MODELS`` holds the named ones."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, check_choices, whole
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.types import Stream


@runtime_checkable
class PartConfig(Protocol):
    """A mixer or feed-forward part: a frozen dataclass that builds its module."""

    def build(self, width: int, dtype: DTypeLike) -> nn.Module:
        """The module for a model of ``width`` features."""
        ...


@runtime_checkable
class PassesOn(Protocol):
    """A mixer that hands something to the mixers of its kind in later layers, within one pass through the depth.

    Its module takes what the layer before handed on, and returns what it hands on itself:
    ``(u[B,T,D], state, count, passed) -> (y[B,T,D], state, passed)``. That belongs to these tokens and is no state.
    """

    def nothing_passed(self, x: Stream) -> Any:
        """What the first layer takes, for the residual stream ``x``; later layers take the same shapes."""
        ...


@dataclass(frozen=True)
class ModelConfig:
    """A language model.

    Attributes:
      mixer: what mixes tokens: a configuration of ``nn/mixers``, such as ``SelfModifyingConfig``. A tuple of them is a
        pattern, the mixers of the first blocks in their order, that is repeated over all blocks (a hybrid).
      feed_forward: ``CMSConfig`` or ``SwiGLUConfig``; for a pattern a tuple, one for each mixer. None: the block has a
        mixer alone.
      width: model features D.
      layers: blocks, a multiple of the length of the pattern.
      vocab_size: token ids; 256 for bytes.
      context: tokens that growing caches have room for, unless a capacity is given.
      dtype: of activations and matrix products; parameters, norms and memories are at least float32.
      tied: the output projection is the embedding; False: it has a matrix of its own.
      norm: before every mixer and after the last block: "rms" is ``layers.RMSNorm``, "layer" is ``layers.LayerNorm``.
        Feed-forward parts have norms of their own.
      embedding_norm: whether the embedding is normed, too, before the first block.
    """

    mixer: PartConfig | tuple[PartConfig, ...]
    feed_forward: PartConfig | None | tuple[PartConfig | None, ...]
    width: int
    layers: int
    vocab_size: int = 256
    context: int = 2048
    dtype: DTypeLike = jnp.float32
    tied: bool = True
    norm: Literal["rms", "layer"] = "rms"
    embedding_norm: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("width", "layers", "vocab_size", "context"):
            whole(name, getattr(self, name))
        for mixer, part in self.pattern:
            self._check_kind("mixer", mixer, stateful=True)
            if part is not None:
                self._check_kind("feed_forward", part, stateful=False)
        if self.layers % (length := len(self.pattern)):
            raise UserError(f"layers is {self.layers}; a pattern of {length} blocks needs a multiple of {length}")
        systems = [part for _, part in self.pattern if isinstance(part, CMSConfig)]
        if len({part.levels for part in systems}) > 1:
            raise UserError("the continuum memory systems of a pattern have different levels; give all the same levels")
        if length > 1 and any(part.in_context for part in systems):
            raise UserError("in_context is above 0; the levels of a pattern are not written in context, set it to 0")

    def _check_kind(self, name: str, part: PartConfig, stateful: bool) -> None:
        """Raise UserError for a part in the place of the other kind, and where a part does not fit the width."""
        module = part.build(self.width, self.dtype)
        if hasattr(module, "init_state") != stateful:
            kind = "a mixer, which has a state" if stateful else "a feed-forward part, which has no state"
            raise UserError(f"{name} is {type(part).__name__}; expected {kind}")

    @property
    def pattern(self) -> tuple[tuple[PartConfig, PartConfig | None], ...]:
        """Mixer and feed-forward part of each block of the pattern. Raises UserError where their numbers differ."""
        if not isinstance(self.mixer, tuple) and not isinstance(self.feed_forward, tuple):
            return ((self.mixer, self.feed_forward),)
        mixers = self.mixer if isinstance(self.mixer, tuple) else (self.mixer,)
        parts = self.feed_forward if isinstance(self.feed_forward, tuple) else (self.feed_forward,)
        if not mixers or len(parts) != len(mixers):
            expected = "a tuple of mixers, and a tuple with one feed-forward part (or None) for each"
            came = f"{len(mixers)} mixers and {len(parts)} feed-forward parts"
            raise UserError(f"the pattern has {came}; give {expected}")
        return tuple(zip(mixers, parts, strict=True))

    def update_every(self, tokens_per_batch: int) -> dict[str, int]:
        """Batches between two updates, by parameter label: "static" and one "level_<i>" per CMS level."""
        systems = [part for _, part in self.pattern if isinstance(part, CMSConfig)]
        levels = systems[0].update_every(tokens_per_batch) if systems else {}
        return {"static": 1, **levels}
