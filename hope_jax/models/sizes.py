"""The sizes of the named models, and how wide a feed-forward part must be for all architectures to be of one size."""

from dataclasses import dataclass

from hope_jax.levels import Level
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig


@dataclass(frozen=True)
class Size:
    """What all architectures of one size share.

    Attributes:
      width, layers, heads, vocab_size, context: as in ``ModelConfig``; heads are the mixers' heads.
      levels: update periods of the continuum memory system in tokens, fastest first.
    """

    width: int
    layers: int
    heads: int
    vocab_size: int
    context: int
    levels: tuple[Level, ...]

    def cms(self, mixer: float) -> CMSConfig:
        """Levels whose MLPs (3 matrices each) fill the block up to the size of Hope's."""
        multiple = 8 if self.width < 512 else 16  # a multiple of 16 would be too coarse for narrow levels
        return CMSConfig(self.levels, self.hidden(mixer, 3 * len(self.levels), multiple))

    def swiglu(self, mixer: float) -> SwiGLUConfig:
        """A SwiGLU layer (3 matrices) that fills the block up to the size of Hope's."""
        return SwiGLUConfig(self.hidden(mixer, 3))

    def hidden(self, mixer: float, matrices: int, multiple: int = 16) -> int:
        """Hidden features of a feed-forward part beside a mixer of ``mixer`` x width^2 parameters, at least 16.

        Everybody's block has the size of four projections, one Transformer MLP, 8 width^2 (SPEC 3.1), and four
        memories of two matrices per head, as wide as the head.
        """
        hidden = (4 + 8 + 8 / self.heads - mixer) * self.width / matrices
        return max(multiple, multiple * round(hidden / multiple))


_TINY_LEVELS = (Level(2_048), Level(8_192))
_LEVELS = (Level(2**19), Level(2**20), Level(2**24))

SIZES: dict[str, Size] = {
    "tiny": Size(192, 2, 6, 256, 2048, _TINY_LEVELS),
    "30m": Size(512, 10, 16, 256, 4096, _TINY_LEVELS),
    "140m": Size(768, 16, 12, 32_000, 4096, _LEVELS),
    "340m": Size(1024, 24, 16, 32_000, 4096, _LEVELS),
    "760m": Size(1536, 24, 24, 32_000, 4096, _LEVELS),
    "1.3b": Size(2048, 24, 32, 32_000, 4096, _LEVELS),
}
