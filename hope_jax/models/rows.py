"""The named models: rows of architecture x size. Baselines have Hope's parameter count within 3% at every size.

===================  ==============================================================================================
hope                 self-modifying Titans + continuum memory system (SPEC 2.8; Eq. 94-97)
hope_attention       softmax attention in place of the self-modifying mixer, same continuum memory system
transformer_pp       attention with rotary positions + SwiGLU
transformer_conv     transformer_pp with Hope's short convolutions: what the convolutions alone are worth
titans, deltanet     the mixer of that rule (``memory.RULES``) + SwiGLU; likewise gated_deltanet, linear_attention
===================  ==============================================================================================
"""

from collections.abc import Callable

from hope_jax.memory import RULES
from hope_jax.models.sizes import Size
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig


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
