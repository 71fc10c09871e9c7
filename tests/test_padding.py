"""Padding: a call that is told how many of its tokens are real reads as if the others were not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import HOPE, close, config
from drawn import drawn

from hope_jax.memory import RULES
from hope_jax.nn.language_model import LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.memory_caching import MemoryCachingConfig

MIXERS = {
    "attention": AttentionConfig(2),
    "window": AttentionConfig(2, window=3, conv=3),
    "linear memory": MemoryMixerConfig(RULES["gated_deltanet"], 2, horizon=16),
    "memory with anchors": MemoryMixerConfig(RULES["titans"], 2, horizon=16, rate_max=0.5, unit_values=True),
    "memory with cached segments": MemoryCachingConfig(MemoryMixerConfig(RULES["deltanet"], 2), segment=4),
    "hope": HOPE,
}


# For the others ``test_models.py`` has a fast test.
QUICK = ("window", "linear memory", "memory with anchors")


@pytest.mark.parametrize("mixer", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MIXERS])
def test_padding_is_not_read(mixer, x64):
    """One program reads 3, 6 and 1 tokens, as others do that know how many they are."""
    model = LanguageModel(config(mixer=MIXERS[mixer], in_context=0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 10)))
    params = drawn(model.init, tokens[:, :1])

    @jax.jit
    def padded(tokens, state, count):
        return model.apply({"params": params}, tokens, state, count)

    whole, end = jax.jit(functools.partial(model.apply, {"params": params}))(tokens, model.init_state(params, 2, 10))
    state, at = model.init_state(params, 2, 10), 0
    for count in (3, 6, 1):
        piece = jnp.concatenate([tokens[:, at : at + count], jnp.full((2, 6 - count), 7)], axis=1)
        logits, state = padded(piece, state, jnp.asarray(count, jnp.int32))
        np.testing.assert_allclose(logits[:, :count], whole[:, at : at + count], rtol=1e-9, atol=1e-12)
        at += count
    close(state, end, rtol=1e-9, atol=1e-12)
