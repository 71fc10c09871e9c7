"""The whole RWKV-7, as the row builds it: logits and derivatives against numpy, token by token too."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_rwkv7 as reference
from drawn import drawn

from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, LanguageModel, Size
from hope_jax.nn.language_model import LOGIT_GAIN

B, T, WIDTH, HEADS, VOCAB, LAYERS = 2, 21, 16, 2, 24, 3
ROW = ARCHITECTURES["rwkv7"](Size(WIDTH, LAYERS, HEADS, VOCAB, T, (Level(8),)))
TIME, CHANNEL = ROW.mixer
# Token by token: the layer's own tests have the chunks, which take long to compile.
SMALL = replace(TIME, head_dim=WIDTH // HEADS, impl="sequential")
CONFIG = replace(ROW, mixer=(SMALL, CHANNEL), dtype=jnp.float64)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (B, T))


@functools.cache
def made():
    """Model and parameters; ``share`` is far from 0 and 1 in every channel."""
    model = LanguageModel(CONFIG)
    return model, drawn(model.init, TOKENS[:, :1])


def numbers(params):
    """The parameters as the reference has them: three layers, not one stack, and no factor of embedding and logits."""
    params, layers = jax.tree.map(np.asarray, params), []
    for i in range(LAYERS):
        time, channel = (jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"][f"parts_{n}"]) for n in (0, 1))
        names = {"time_norm": time["norm"], "time": time["mixer"], "channel_norm": channel["norm"]}
        layers.append(names | {"channel": channel["mixer"]})
    return {
        "embedding": WIDTH**0.5 * params["embedding"],
        "first_norm": params["embedding_norm"],
        "layers": layers,
        "last_norm": jax.tree.map(lambda leaf: LOGIT_GAIN * leaf, params["norm"]),
        "head": params["head"],
    }


def expected(params):
    """The reference's logits [B,T,vocab]."""
    return np.stack([reference.model(numbers(params), row, HEADS) for row in TOKENS])


def test_logits_and_derivatives_are_those_of_the_reference(x64):
    """Derivatives along a direction, by differences; they go through the values of the first layer."""
    model, params = made()
    draw, tokens = np.random.default_rng(2), jnp.asarray(TOKENS)
    weights = draw.normal(size=(B, T, VOCAB))
    direction = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), params)

    @jax.jit
    def pulled(params):
        logits, pull = jax.vjp(lambda p: model.apply({"params": p}, tokens)[0], params)
        return logits, pull(jnp.asarray(weights))[0]

    logits, slopes = pulled(params)
    np.testing.assert_allclose(logits, expected(params), rtol=1e-9, atol=1e-9)
    moved = (jax.tree.map(lambda p, d, s=step: p + s * d, params, direction) for step in (1e-6, -1e-6))
    up, down = (np.sum(expected(p) * weights) for p in moved)
    along = sum(np.sum(np.asarray(s) * d) for s, d in zip(*map(jax.tree.leaves, (slopes, direction)), strict=True))
    np.testing.assert_allclose(along, (up - down) / 2e-6, rtol=1e-5)
    for slope in map(np.asarray, jax.tree.leaves(slopes["blocks"]["parts_0"]["mixer"]["share"])):
        assert [bool(np.any(of_layer)) for of_layer in slope] == [False, True, True]


def test_decoding_is_training_with_a_state_that_does_not_grow(x64):
    """What goes from layer to layer is no part of the state: two inputs and the memories are."""
    model, params = made()
    step = jax.jit(lambda params, tokens, state: model.apply({"params": params}, tokens, state))
    state = model.init_state(params, B)
    kinds, logits = jax.tree.map(jnp.shape, state), []
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == LAYERS * B * (2 * WIDTH + WIDTH * WIDTH // HEADS)
    for t in range(T):
        ours, state = step(params, TOKENS[:, t : t + 1], state)
        logits.append(ours)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected(params), rtol=1e-9, atol=1e-9)
    assert jax.tree.map(jnp.shape, state) == kinds


def test_the_row_is_the_published_model(untyped):
    assert (ROW.norm, ROW.embedding_norm, ROW.tied) == ("layer", True, False)
    with pytest.raises(UserError, match="norm is 'batch'; expected one of"):
        replace(ROW, norm="batch")
