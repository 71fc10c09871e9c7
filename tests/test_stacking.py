"""A Transformer whose MLPs are called levels: the same model while nothing is written, and what is written where."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import read
from drawn import drawn

from hope_jax import context
from hope_jax.errors import UserError
from hope_jax.models import MODELS
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LanguageModel
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.stacking import stack_levels
from hope_jax.train.step import next_token_loss


def transformer(layers=3):
    """A small Transformer, its parameters, and 25 tokens of two sequences."""
    config = ModelConfig(AttentionConfig(2), SwiGLUConfig(12), 8, layers, vocab_size=11, context=64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 25)))
    return config, drawn(LanguageModel(config).init, tokens[:, :1]), tokens


def test_rate_0_is_the_transformer_to_the_bit():
    config, params, tokens = transformer()
    tokens = tokens[:1, :9]
    stacked, theirs = stack_levels(config, params, (4, 8), Writes(rate=0.25))
    rates = theirs["blocks"]["feed_forward"]["rate"]
    assert rates.shape == (3, 1) and np.all(rates == 0.25)
    theirs["blocks"]["feed_forward"]["rate"] = 0 * rates
    model, before = LanguageModel(stacked), LanguageModel(config)
    _, state = context.learn(model, theirs, context.start(model, theirs, 1), tokens)
    expected, plain = read(before, params, tokens, before.init_state(params, 1))
    for ours, original in zip(jax.tree.leaves(state.blocks.mixer), jax.tree.leaves(plain.mixer), strict=True):
        assert ours.shape == original.shape
    logits, _ = read(model, theirs, tokens, context.start(model, theirs, 1))
    np.testing.assert_array_equal(logits, expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.blocks.feed_forward))


def test_early_layers_are_written_often_later_ones_seldom_the_last_never():
    config, params, tokens = transformer()
    stacked, params = stack_levels(config, params, (4, 8))
    part: Any = stacked.feed_forward
    assert part.periods(3) == ((4, 8, 0),)
    model, written = LanguageModel(stacked), {}
    state = context.start(model, params, 1)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        _, state = context.learn(model, params, state, tokens[:1, start:stop])
        sizes = [np.abs(leaf).max(axis=(1, 2, 3)) for leaf in state.levels[0].delta.values()]
        written[stop] = tuple(bool(size) for size in np.max(sizes, axis=0))
    assert written == {4: (False,) * 3, 5: (True, False, False), 9: (True, True, False)}


def test_merged_layers_read_as_the_written_ones_did():
    config, params, tokens = transformer()
    stacked, params = stack_levels(config, params, (4, 8))
    model = LanguageModel(stacked)
    state = context.start(model, params, 1)
    for start, stop in ((0, 4), (4, 5), (5, 9), (9, 13), (13, 16)):
        _, state = context.learn(model, params, state, tokens[:1, start:stop])
    state = context.finish(model, params, state)
    logits, _ = read(model, params, tokens[:1, 16:25], state)
    merged, emptied = context.merge(model, params, state)
    again, _ = read(model, merged, tokens[:1, 16:25], emptied)
    np.testing.assert_allclose(again, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_continual_training_goes_through_the_writes():
    """For each layer at its own period; the gradient itself is tested in ``test_writes_linear.py``."""
    config, params, tokens = transformer()
    stacked, params = stack_levels(config, params, (4, 8), Writes(bptt=(1,)))
    loss = next_token_loss(LanguageModel(stacked), np.ones(11))
    slope = jax.jit(jax.grad(lambda p: loss(p, tokens)[0]))(params)["blocks"]["feed_forward"]
    assert slope["rate"].shape == (3, 1) and np.all(slope["rate"][:2] != 0) and slope["rate"][2] == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        ((4, 6), "do not nest; make 6 a multiple of 4"),
        ((), "there are 0 periods for 3 layers; expected 1 to 2"),
        ((4, 8, 16), "there are 3 periods for 3 layers"),
    ],
)
def test_periods_that_do_not_fit_are_refused(periods, message):
    config, params, _ = transformer()
    with pytest.raises(UserError, match=message):
        stack_levels(config, params, periods)


def test_of_several_bptt_none_is_left_unread():
    config, params, _ = transformer()
    with pytest.raises(UserError, match="bptt is \\(0, 1\\); all SwiGLU layers have one"):
        stack_levels(config, params, (4, 8), Writes(bptt=(0, 1)))


def test_only_transformers_are_stacked():
    with pytest.raises(UserError, match="stacking needs a model with SwiGLU layers"):
        stack_levels(MODELS["hope-tiny"], {}, (4,))
