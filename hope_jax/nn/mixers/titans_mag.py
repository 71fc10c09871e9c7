"""Titans, memory as gate (MAG): sliding-window attention, gated by a memory that reads the same tokens.

    x = [P | u];  y = attention(x);  m = M(x);  o = W_o(norm(y) * sigmoid(norm(m)))

(arXiv 2501.00663, Eq. 26-28; the norms, of learned scale, and the sigmoid are a choice, as the paper names neither.)
P are learned vectors in front of every sequence: every token attends to them, whatever the window, and the memory reads
them first. Attention and memory are complete layers without their output maps, which W_o replaces.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from hope_jax.errors import UserError, whole
from hope_jax.nn import layers
from hope_jax.nn.axes import Axes, dense_axes, norm_axes
from hope_jax.nn.mixers.attention import AttentionConfig, AttentionState
from hope_jax.nn.mixers.memory import MemoryMixerConfig, MemoryMixerState
from hope_jax.types import Count, Stream


@dataclass(frozen=True)
class TitansMAGConfig:
    """Attention and memory, side by side.

    Attributes:
      attention, memory: the two parts, without persistent vectors of their own.
      persistent: learned vectors in front of every sequence; 0: none.
    """

    attention: AttentionConfig
    memory: MemoryMixerConfig
    persistent: int = 16

    def __post_init__(self) -> None:
        check_parts(self)

    def build(self, width: int, dtype: DTypeLike) -> "TitansMAG":
        """The mixer for a model of ``width`` features. Raises UserError where the heads of a part do not divide it."""
        return built(TitansMAG(self, width, dtype))


def check_parts(config: Any) -> None:
    """Raise UserError for a wrong number of persistent vectors, for parts that have their own, and for a shard."""
    whole("persistent", config.persistent, 0, "vectors in front of every sequence; 0: none")
    for name in ("attention", "memory"):
        if count := getattr(config, name).persistent:
            raise UserError(f"{name}.persistent is {count}; set it to 0, both parts see the vectors of the whole mixer")
    if config.memory.rule.shard is not None:
        raise UserError(f"the memory's shard is {config.memory.rule.shard}; set it to None, this mixer carries it on")


def built(module: Any) -> Any:
    """The module, after its parts were built once, which checks its width."""
    for part in (module.config.attention, module.config.memory):
        part.build(module.width, module.dtype)
    return module


class GatedOutput(nn.Module):
    """``W_o(norm(y) * sigmoid(norm(m)))`` of the results of attention and memory, each with heads side by side."""

    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.norm_attention, self.norm_memory = layers.RMSNorm(self.dtype), layers.RMSNorm(self.dtype)
        self.down = layers.dense(self.width, self.dtype)

    @nn.nowrap
    def axes(self) -> Axes:
        norms = {"norm_attention": norm_axes(), "norm_memory": norm_axes()}
        return {**norms, "down": dense_axes("all_heads", "embed")}

    @layers.light
    def __call__(self, y: Stream, m: Stream) -> Stream:
        return self.down(self.norm_attention(y) * jax.nn.sigmoid(self.norm_memory(m)))


class AttentionAndMemory(nn.Module):
    """The parts of MAG and MAC: attention and memory without their output maps, persistent vectors, one output map."""

    config: Any
    width: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.attention = c.attention.build(self.width, self.dtype)
        self.memory = c.memory.build(self.width, self.dtype)
        self.persistent = layers.persistent_vectors(self, c.persistent)
        self.out = GatedOutput(self.width, self.dtype)

    @nn.nowrap
    def axes(self) -> Axes:
        axes: Axes = {"out": GatedOutput(self.width, self.dtype, parent=None).axes()}
        if self.config.persistent:
            axes["persistent"] = ("persistent", "embed")
        for name in ("attention", "memory"):
            part = getattr(self.config, name).build(self.width, self.dtype).axes()
            axes[name] = {key: names for key, names in part.items() if key != "out"}
        return axes


class TitansMAGState(NamedTuple):
    """The states of the two parts."""

    attention: AttentionState
    memory: MemoryMixerState


class TitansMAG(AttentionAndMemory):
    """``(u[B,T,D], state) -> (y[B,T,D], state)``; see the module docstring."""

    config: TitansMAGConfig

    def init_state(self, batch: int, capacity: int) -> TitansMAGState:
        """A fresh sequence: the memory has read the persistent vectors. ``capacity`` is that of full attention."""
        return TitansMAGState(self.attention.init_state(batch, capacity), self.memory.started(batch, self.persistent))

    def __call__(self, u: Stream, state: TitansMAGState, count: Count = None) -> tuple[Stream, TitansMAGState]:
        y, attention = self.attention.mix(u, state.attention, count, self.persistent)
        found, memory = self.memory.read(u, state.memory, count)
        return self.out(y, layers.merge_heads(found.reads)), TitansMAGState(attention, memory)
