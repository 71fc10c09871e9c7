"""What the rows of ``rows.py`` and ``titans.py`` are made with: models of a size, their windows, what a mixer costs."""

from collections.abc import Callable

from hope_jax.models.sizes import Size
from hope_jax.nn.config import ModelConfig, PartConfig
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig

Row = Callable[[Size], ModelConfig]

# Plain gradient descent over a period of 16 equal keys diverges above a rate of 2/16 (SPEC 2.6).
GENTLE = 0.1


def model(size: Size, mixer: PartConfig, feed_forward: PartConfig | None, layers: int = 1) -> ModelConfig:
    """A model of equal blocks, ``layers`` of them for each layer of the size."""
    return ModelConfig(mixer, feed_forward, size.width, layers * size.layers, size.vocab_size, size.context)


def pattern(size: Size, *blocks: tuple[PartConfig, PartConfig | None], layers: int = 2) -> ModelConfig:
    """A model of different blocks, a hybrid; ``layers`` as in ``model``."""
    mixers, parts = zip(*blocks, strict=True)
    return ModelConfig(mixers, parts, size.width, layers * size.layers, size.vocab_size, size.context)


def memory_weights(mixer: MemoryMixerConfig) -> float:
    """Parameters of the mixer in units of width^2, as everywhere in the rows.

    Queries, keys, values, the output gate, and W_o, which has two inputs where the memory returns its query too.
    """
    one = mixer.rule
    starts = one.architecture.layers * mixer.hidden if one.architecture.layers > 1 else 1
    return 5 + one.architecture.keeps_query + one.learned_start * starts / mixer.heads


def span(size: Size, most: int, share: int) -> int:
    """Tokens of a window, segment or shard: a share of the context, so that training sees several; whole periods."""
    return max(16, min(most, size.context // share) // 16 * 16)


def window(size: Size, persistent: int = 0) -> AttentionConfig:
    """Attention over a window."""
    return AttentionConfig(size.heads, window=span(size, 2048, 2), persistent=persistent)
