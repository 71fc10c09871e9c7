"""The rows whose memory is that of Titans (arXiv 2501.00663): beside attention, with shards, with cached segments."""

import dataclasses
from typing import Any

from hope_jax.memory import RULES
from hope_jax.models.parts import GENTLE, memory_weights, model, pattern, span, window
from hope_jax.models.sizes import Size
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.memory_caching import MemoryCachingConfig
from hope_jax.nn.mixers.titans_mac import TitansMACConfig
from hope_jax.nn.mixers.titans_mag import TitansMAGConfig
from hope_jax.nn.mixers.tnt import TNTConfig

PERSISTENT = 16  # learned vectors in front of the sequences of the hybrids; the paper has no number
TITANS: dict[str, Any] = dict(rate_max=GENTLE, horizon=8192, unit_values=True)


def memory(size: Size) -> MemoryMixerConfig:
    """The mixer of the memory alone (LMM)."""
    return MemoryMixerConfig(RULES["titans"], size.heads, **TITANS)


def mac(size: Size) -> ModelConfig:
    """Memory as context."""
    mixer = TitansMACConfig(AttentionConfig(size.heads), memory(size), PERSISTENT, span(size, 512, 8))
    # Six maps to queries, keys and values, one output map, and the start of the memory.
    return model(size, mixer, size.swiglu(7 + 2 / size.heads))


def mag(size: Size) -> ModelConfig:
    """Memory as gate."""
    mixer = TitansMAGConfig(window(size), memory(size), PERSISTENT)
    return model(size, mixer, size.swiglu(7 + 2 / size.heads))


def mal(size: Size) -> ModelConfig:
    """Memory as layer."""
    first = dataclasses.replace(memory(size), persistent=PERSISTENT)
    weights = memory_weights(first) + 4
    return pattern(size, (first, None), (window(size, PERSISTENT), size.swiglu(weights)))


def tnt(size: Size) -> ModelConfig:
    """Shards and a global memory."""
    rule = dataclasses.replace(RULES["titans"], shard=span(size, 512, 8), project_queries=True)
    local = dataclasses.replace(memory(size), rule=rule)
    return model(size, TNTConfig(local, span(size, 2048, 4)), size.swiglu(memory_weights(local) + 2 / size.heads))


def memory_caching(size: Size) -> ModelConfig:
    """Segments whose ends are kept; the paper's are of 256 tokens in a context of 4,096."""
    mixer = MemoryCachingConfig(memory(size), span(size, 256, 16))
    return model(size, mixer, size.swiglu(memory_weights(mixer.memory) + 1))  # and the map of what is looked for
