"""The named models: rows of architecture x size. Baselines have Hope's parameter count within 3% at every size.

===================  ==============================================================================================
hope                 self-modifying Titans + continuum memory system (SPEC 2.8; Eq. 94-97)
hope_attention       softmax attention in place of the self-modifying mixer, same continuum memory system
transformer_pp       attention with rotary positions + SwiGLU
transformer_conv     transformer_pp with Hope's short convolutions: what the convolutions alone are worth
titans, deltanet     the mixer of that rule (``memory.RULES``) + SwiGLU; likewise gated_deltanet, linear_attention
===================  ==============================================================================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hope_jax.errors import UserError, closest
from hope_jax.levels import Level, check_multiples
from hope_jax.memory import RULES
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.cms import CMSConfig, Wiring
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LanguageModel as LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig


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
        """Levels whose MLPs (2 matrices each) fill the block up to the size of Hope's."""
        return CMSConfig(self.levels, self._hidden(mixer, 2 * len(self.levels)))

    def swiglu(self, mixer: float) -> SwiGLUConfig:
        """A SwiGLU layer (3 matrices) that fills the block up to the size of Hope's."""
        return SwiGLUConfig(self._hidden(mixer, 3))

    def _hidden(self, mixer: float, matrices: int) -> int:
        """Hidden features of a feed-forward part beside a mixer of ``mixer`` x width^2 parameters.

        Everybody's block has the size of four projections, one Transformer MLP, 8 width^2 (SPEC 3.1), and four
        memories of two matrices per head, as wide as the head.
        """
        hidden = (4 + 8 + 8 / self.heads - mixer) * self.width / matrices
        return 16 * round(hidden / 16)


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


def _hope(size: Size) -> ModelConfig:
    mixer = SelfModifyingConfig(size.heads, horizon=4 * size.context)
    # Four projections and the starts of its memories: of memory, keys and values, and the gates' first layers.
    weights = 4 + 6 / size.heads + 2 * mixer.gate_hidden / size.width
    return _model(size, mixer, size.cms(weights))


def _hope_attention(size: Size) -> ModelConfig:
    return _model(size, AttentionConfig(size.heads), size.cms(4))


def _transformer(conv: int) -> Callable[[Size], ModelConfig]:
    return lambda size: _model(size, AttentionConfig(size.heads, conv=conv), size.swiglu(4))


def _memory(rule: str, **gates) -> Callable[[Size], ModelConfig]:
    def build(size: Size) -> ModelConfig:
        one = RULES[rule]
        # q, k, v, the output gate, and W_o, which has two inputs where the memory returns its query too.
        weights = 5 + one.architecture.residual + one.learned_start * one.architecture.layers / size.heads
        return _model(size, MemoryMixerConfig(one, size.heads, **gates), size.swiglu(weights))

    return build


def _model(size: Size, mixer, feed_forward) -> ModelConfig:
    return ModelConfig(mixer, feed_forward, size.width, size.layers, size.vocab_size, size.context)


ARCHITECTURES: dict[str, Callable[[Size], ModelConfig]] = {
    "hope": _hope,
    "hope_attention": _hope_attention,
    "transformer_pp": _transformer(conv=0),
    "transformer_conv": _transformer(conv=4),
    # Plain gradient descent over a period of 16 equal keys diverges above a rate of 2/16 (SPEC 2.6).
    "titans": _memory("titans", rate_max=0.1, horizon=8192, unit_values=True),
    "deltanet": _memory("deltanet"),
    "gated_deltanet": _memory("gated_deltanet", horizon=64),
    "linear_attention": _memory("linear_attention", rate_bias=None),
}

MODELS: dict[str, ModelConfig] = {
    f"{architecture}-{size}": build(SIZES[size]) for architecture, build in ARCHITECTURES.items() for size in SIZES
}


def with_in_context(
    config: ModelConfig, periods: Sequence[int], wiring: Wiring = "sequential", writes: Writes | None = None
) -> ModelConfig:
    """A model whose fastest levels are written while it reads (SPEC 3.1), of the same size within rounding.

    Args:
      config: a model with a continuum memory system.
      periods: of those levels in tokens, fastest first, each a multiple of the one before. The model's own levels that
        are slower stay, as outer levels; all levels together keep the hidden features that there were.
      wiring, writes: as in ``CMSConfig``; None: the defaults.

    Raises:
      UserError: the model has no such system, or the periods do not fit.
    """
    part = config.feed_forward
    if not isinstance(part, CMSConfig) or not periods:
        raise UserError("levels in context need periods, and a model with such levels: hope or hope_attention")
    slower = [level for level in part.levels if level.period > max(periods)]
    levels = (*map(Level, periods), *slower)
    check_multiples([level.period for level in levels])  # of all: after training every level can be written
    hidden = max(1, round(part.hidden * len(part.levels) / len(levels)))
    cms = CMSConfig(levels, hidden, wiring, len(periods), Writes() if writes is None else writes)
    return replace(config, feed_forward=cms)


def without_writes(config: ModelConfig) -> ModelConfig:
    """The same model, parameters included, whose memories never write: the inner learning rate is 0.

    Retention goes on: Hope's memories then fade from their learned start, at first by 1/horizon per token. Raises
    UserError where no mixer is a memory with an inner rate.
    """
    mixers: list[Any] = [mixer for mixer, _ in config.pattern]
    if not any(hasattr(mixer, "rate_max") for mixer in mixers):
        kinds = ", ".join(type(mixer).__name__ for mixer in mixers)
        raise UserError(f"{kinds} has no inner learning rate; only memories can stop writing.")
    silent = [replace(mixer, rate_max=0.0) if hasattr(mixer, "rate_max") else mixer for mixer in mixers]
    return replace(config, mixer=tuple(silent) if isinstance(config.mixer, tuple) else silent[0])


def model_named(name: str) -> ModelConfig:
    """The row of that name; UserError with the closest names otherwise."""
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}; {closest(name, MODELS)}")
    return MODELS[name]
