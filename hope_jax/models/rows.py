"""Every architecture, a function of the size. All have Hope's parameter count within 3% at every size.

===================  ==============================================================================================
hope                 self-modifying Titans + continuum memory system (SPEC 2.8; Eq. 94-97)
hope_attention       softmax attention in place of the self-modifying mixer, same continuum memory system
hope_tnt             hope with shards and a global memory (TNT)
transformer_pp       attention with rotary positions + SwiGLU
transformer_conv     transformer_pp with Hope's short convolutions: what the convolutions alone are worth
linear_attention     the mixer of that rule (``memory.RULES``) + SwiGLU; likewise deltanet, titans (the LMM),
                     titans_linear, dla, yaad, moneta, memora, oja and omega
deltanet_negative    deltanet with rates up to 2: transitions with negative eigenvalues
gated_deltanet       in its published form + SwiGLU; likewise comba, retnet, lstm and srwm
mamba2               two Mamba-2 layers for each Transformer layer, no feed-forward part
ttt_linear, ttt_mlp  a convolution, then the TTT layer + SwiGLU
rwkv7                time mix, then channel mix; LayerNorm, a head of its own
titans_mac, _mag     Titans: memory as context, memory as gate + SwiGLU; _mal, as layer: then attention + SwiGLU
titans_tnt           titans with shards and a global memory (TNT)
memory_caching       titans that also reads what its memory was at the end of every segment
samba                Mamba-2 + SwiGLU, then attention over a window + SwiGLU; the published one has Mamba-1 layers
ttt_e2e              attention over a window, then two SwiGLU parts; in the last quarter of the blocks, the first of
                     them is written while the model reads
gdn_h1               gated_deltanet + SwiGLU, then attention over a window + SwiGLU
===================  ==============================================================================================
"""

import dataclasses
import math

from hope_jax.levels import Level
from hope_jax.memory import RULES, Rule
from hope_jax.memory.objectives import Huber
from hope_jax.models import titans
from hope_jax.models.parts import GENTLE, Row, memory_weights, model, pattern, span, window
from hope_jax.models.sizes import Size
from hope_jax.nn.config import ModelConfig, PartConfig
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.feed_forward.prime import PrimeConfig
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.channel_mix import ChannelMixConfig
from hope_jax.nn.mixers.convolution import ConvolutionConfig
from hope_jax.nn.mixers.gated_deltanet import Form, GatedDeltaNetConfig
from hope_jax.nn.mixers.lstm import LSTMConfig
from hope_jax.nn.mixers.mamba2 import Mamba2Config
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.omega import OmegaMixerConfig
from hope_jax.nn.mixers.retnet import RetNetConfig
from hope_jax.nn.mixers.rwkv7 import RWKV7Config
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.nn.mixers.srwm import SRWMConfig
from hope_jax.nn.mixers.tnt import TNTConfig
from hope_jax.nn.mixers.ttt import Memory, TTTConfig


def _hope_mixer(size: Size) -> tuple[SelfModifyingConfig, float]:
    """The mixer, and its parameters in units of width^2, as everywhere here."""
    mixer = SelfModifyingConfig(size.heads, horizon=4 * size.context)
    # Four projections and the starts of its memories: of memory, keys and values, and the gates' first layers.
    return mixer, 4 + 6 / size.heads + 2 * mixer.gate_hidden / size.width


def _hope(size: Size) -> ModelConfig:
    mixer, weights = _hope_mixer(size)
    return model(size, mixer, size.cms(weights))


def _hope_attention(size: Size) -> ModelConfig:
    return model(size, AttentionConfig(size.heads), size.cms(4))


def _hope_tnt(size: Size) -> ModelConfig:
    mixer, weights = _hope_mixer(size)
    # TNT reads after the write, so that a token that asks for its own key finds it.
    local = dataclasses.replace(mixer, shard=span(size, 512, 8), project_queries=True, read="after")
    # The global memory has a start and maps of its own, for keys and values.
    return model(size, TNTConfig(local, span(size, 2048, 4)), size.cms(weights + 2 + 2 / size.heads))


def _transformer(conv: int) -> Row:
    return lambda size: model(size, AttentionConfig(size.heads, conv=conv), size.swiglu(4))


def _memory(rule: Rule, **gates) -> Row:
    def build(size: Size) -> ModelConfig:
        mixer = MemoryMixerConfig(rule, size.heads, **gates)
        return model(size, mixer, size.swiglu(memory_weights(mixer)))

    return build


def _yaad(size: Size) -> ModelConfig:
    """Errors are bounded where they are as long as a value whose features are 1."""
    rule = dataclasses.replace(RULES["yaad"], objective=Huber((size.width / size.heads) ** 0.5))
    return _memory(rule, rate_max=0.05, horizon=8192, hidden=4)(size)


def _omega(size: Size) -> ModelConfig:
    rule = dataclasses.replace(RULES["titans_linear"], momentum=False)
    mixer = OmegaMixerConfig(rule, size.heads, rate_max=GENTLE / 2, horizon=8192)  # it writes each pair twice
    return model(size, mixer, size.swiglu(memory_weights(mixer)))


def _gated_deltanet(form: Form) -> Row:
    return lambda size: model(size, GatedDeltaNetConfig.published(size.width, form), size.swiglu(6))


def _retnet(size: Size) -> ModelConfig:
    return model(size, RetNetConfig.published(size.width), size.swiglu(8))


def _mamba2_mixer(size: Size, depth: int) -> tuple[Mamba2Config, float]:
    """With the published state of 128 features where two layers then have the size of others' blocks, else 64."""
    state = 128 if size.width >= 768 else 64
    mixer = Mamba2Config(math.gcd(64, 2 * size.width), state, depth=depth)
    return mixer, 6 + (2 * state + 2 * size.width / mixer.head_size) / size.width


def _mamba2(size: Size) -> ModelConfig:
    return model(size, _mamba2_mixer(size, 2 * size.layers)[0], None, layers=2)


def _hybrid(size: Size, mixer: PartConfig, weights: float) -> ModelConfig:
    """That mixer and attention over a window in turn, each with a feed-forward part."""
    feed_forward = size.swiglu((weights + 4) / 2)
    return pattern(size, (mixer, feed_forward), (window(size), feed_forward), layers=1)


def _samba(size: Size) -> ModelConfig:
    return _hybrid(size, *_mamba2_mixer(size, 2 * size.layers))


def _gdn_h1(size: Size) -> ModelConfig:
    return _hybrid(size, GatedDeltaNetConfig.published(size.width), 6)


def _ttt(memory: Memory, rate_max: float, starts: int) -> Row:
    """``starts``: weights of an inner model, in squares of the head's features."""

    def build(size: Size) -> ModelConfig:
        mixer = TTTConfig(size.heads, memory, rate_max)
        return pattern(size, (ConvolutionConfig(), None), (mixer, size.swiglu(4 + starts / size.heads)))

    return build


def _rwkv7(size: Size) -> ModelConfig:
    mixer = RWKV7Config(math.gcd(64, size.width))
    ranks, head = sum(mixer.ranks(size.width).values()), size.vocab_size / size.layers
    hidden = size.hidden(4 + (2 * ranks + head) / size.width, matrices=2)
    hybrid = pattern(size, (mixer, None), (ChannelMixConfig(hidden), None))
    return dataclasses.replace(hybrid, tied=False, norm="layer", embedding_norm=True)


def _ttt_e2e(size: Size) -> ModelConfig:
    """The paper writes every 1,024 tokens of 8,192, and has the first part in the last quarter alone."""
    written = max(1, size.layers // 4)
    levels = (*[None] * (size.layers - written), *[Level(span(size, 1024, 8))] * written)
    hidden = size.hidden(4, matrices=6)
    return model(size, window(size), PrimeConfig(hidden, levels, Writes(clip=1.0), static=hidden))


def _lstm(size: Size) -> ModelConfig:
    return model(size, LSTMConfig(), size.swiglu(8))


def _srwm(size: Size) -> ModelConfig:
    return model(size, SRWMConfig(size.heads), size.swiglu(1 + 3 / size.heads))


ARCHITECTURES: dict[str, Row] = {
    "hope": _hope,
    "hope_attention": _hope_attention,
    "hope_tnt": _hope_tnt,
    "transformer_pp": _transformer(conv=0),
    "transformer_conv": _transformer(conv=4),
    "titans": _memory(RULES["titans"], **titans.TITANS),
    "titans_linear": _memory(RULES["titans_linear"], **titans.TITANS),
    "titans_mac": titans.mac,
    "titans_mag": titans.mag,
    "titans_mal": titans.mal,
    "titans_tnt": titans.tnt,
    "memory_caching": titans.memory_caching,
    "deltanet": _memory(RULES["deltanet"]),
    "deltanet_negative": _memory(RULES["deltanet"], rate_max=2.0),
    "gated_deltanet": _gated_deltanet("gated_deltanet"),
    "comba": _gated_deltanet("comba"),
    "linear_attention": _memory(RULES["linear_attention"], rate_bias=None),
    "retnet": _retnet,
    "mamba2": _mamba2,
    "samba": _samba,
    "gdn_h1": _gdn_h1,
    "ttt_linear": _ttt("linear", 1.0, starts=1),
    "ttt_mlp": _ttt("mlp", 0.1, starts=8),
    "ttt_e2e": _ttt_e2e,
    "rwkv7": _rwkv7,
    # docs/defaults.md has what these rates come from.
    "dla": _memory(RULES["dla"], rate_max=0.1, horizon=256, hidden=4),
    "yaad": _yaad,
    "moneta": _memory(RULES["moneta"], rate_max=0.02, horizon=8192, hidden=4),
    "memora": _memory(RULES["memora"], rate_max=0.02, horizon=8192, hidden=4),
    "oja": _memory(RULES["oja"], horizon=64, unit_values=True),
    "omega": _omega,
    "lstm": _lstm,
    "srwm": _srwm,
}
