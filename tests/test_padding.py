"""Padding: a call that is told how many of its tokens are real reads as if the others were not there."""

import functools

import jax
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


# Anchors: ``test_miras.py``. For the others ``test_models.py`` has a fast test.
QUICK = ("window", "linear memory")


@pytest.mark.parametrize("mixer", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MIXERS])
def test_padding_is_not_read(mixer, x64):
    """One program reads 10 tokens, and 3, 6 and 1 of them, padded to 10."""
    model = LanguageModel(config(mixer=MIXERS[mixer], in_context=0))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 10))
    params = drawn(model.init, tokens[:, :1])
    read = jax.jit(functools.partial(model.apply, {"params": params}))
    fresh = jax.jit(lambda: model.init_state(params, 2, 10))()
    whole, end = read(tokens, fresh, np.int32(10))
    state, at = fresh, 0
    for count in (3, 6, 1):
        piece = np.concatenate([tokens[:, at : at + count], np.full((2, 10 - count), 7)], axis=1)
        logits, state = read(piece, state, np.int32(count))
        np.testing.assert_allclose(logits[:, :count], whole[:, at : at + count], rtol=1e-9, atol=1e-12)
        at += count
    close(state, end, rtol=1e-9, atol=1e-12)
