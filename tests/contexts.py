"""A small model whose levels are written in context, and streams for it."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from hope_jax import context
from hope_jax.levels import Level
from hope_jax.memory.architectures import Architecture, matrix
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.language_model import LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.optim import INNER

WIDTH, VOCAB = 8, 11


HOPE = SelfModifyingConfig(2, conv=2, c_memory=4, c_projections=4, rate_max=2.0, rate_bias=-2.5)
# Compiles fast.
LIGHT = replace(HOPE, inner_projection=(), momentum="none", dgd_scope="none", rate_max=1.5)
LIGHTER = replace(LIGHT, memory=matrix, gate=Architecture(1, residual=False, scales=(1.0,)))
MIXERS = [pytest.param(HOPE, marks=pytest.mark.slow, id="hope"), pytest.param(LIGHTER, id="light")]


def config(periods=(4, 8), in_context=2, dtype=jnp.float64, mixer=None, layers=1, **cms):
    """A small model with levels that are written in context; attention compiles in a tenth of Hope's time."""
    rate = cms.pop("rate", 0.5)
    optimizer = INNER[cms.pop("optimizer", "sgd")]
    writes = Writes(rate, optimizer, **{name: cms.pop(name) for name in ("bptt", "rank") if name in cms})
    part = CMSConfig(tuple(map(Level, periods)), 12, in_context=in_context, writes=writes, **cms)
    return ModelConfig(mixer or AttentionConfig(2), part, WIDTH, layers, VOCAB, 64, dtype)


def made(*args: Any, seed: int = 0, **kwargs: Any):
    """A model, random parameters, and 37 tokens of two sequences."""
    model = LanguageModel(config(*args, **kwargs))
    draw = np.random.default_rng(seed)
    tokens = jnp.asarray(draw.integers(0, VOCAB, (2, 37)))
    part: Any = model.config.feed_forward
    return model, drawn(model.init, tokens[:, :1], seed=seed, rate=part.writes.rate), tokens


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, tokens, state):
    """Logits and state after ``tokens``, nothing written."""
    return model.apply({"params": params}, tokens, state)


def stream(model, params, tokens, cuts, state=None):
    """Losses of all tokens but the first, and the state, of a stream read in pieces."""
    state = context.start(model, params, tokens.shape[0]) if state is None else state
    losses, at = [], 0
    for size in cuts:
        nats, state = context.surprise(model, params, state, tokens[:, at : at + size])
        losses.append(nats)
        at += size
    assert at == tokens.shape[1]
    return np.concatenate(losses, axis=1), state


def close(found, expected, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected)
