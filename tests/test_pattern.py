"""Models of different blocks that repeat themselves over the layers: hybrids, and blocks without feed-forward part."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from hope_jax import config as configs
from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.memory import RULES
from hope_jax.models import LanguageModel, ModelConfig, without_writes
from hope_jax.nn.axes import flat, of_parameters
from hope_jax.nn.config import PartConfig
from hope_jax.nn.feed_forward.cms import CMSConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.language_model import LOGIT_GAIN
from hope_jax.nn.layers import RMSNorm
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig

B, T, WIDTH, VOCAB, LAYERS = 2, 12, 8, 16, 4
MEMORY = MemoryMixerConfig(RULES["deltanet"], 2, impl="chunked")  # plain products compile sooner
WINDOW, SWIGLU = AttentionConfig(2, window=5), SwiGLUConfig(16)
HYBRID = ModelConfig((MEMORY, WINDOW), (None, SWIGLU), WIDTH, LAYERS, VOCAB, context=64, dtype=jnp.float64)


@pytest.fixture(scope="module")
def hybrid():
    """Model, parameters, tokens, and the compiled (parameters, tokens, state) -> (logits, state)."""
    with jax.enable_x64(True):
        model, tokens = LanguageModel(HYBRID), np.random.default_rng(1).integers(0, VOCAB, (B, T))
        params = drawn(model.init, tokens[:, :1])
        run = jax.jit(lambda params, tokens, state: model.apply({"params": params}, tokens, state))
        return model, params, tokens, run


def test_blocks_follow_each_other_in_the_order_of_the_pattern(x64, hybrid):
    model, params, tokens, run = hybrid

    def part(config: PartConfig, params, *inputs):
        return config.build(WIDTH, jnp.float64).apply({"params": params}, *inputs)

    def norm(params, x) -> Any:
        return RMSNorm(jnp.float64).apply({"params": params}, x)

    @jax.jit
    def by_hand(params):
        x = params["embedding"][tokens] * WIDTH**0.5
        for layer in range(LAYERS // 2):
            for place, (mixer, feed_forward) in enumerate(HYBRID.pattern):
                own = jax.tree.map(lambda p, i=layer: p[i], params["blocks"][f"parts_{place}"])
                module = mixer.build(WIDTH, jnp.float64)
                start = module.apply({"params": own["mixer"]}, B, T, method="init_state")
                x = x + part(mixer, own["mixer"], norm(own["norm"], x), start)[0]
                x = x if feed_forward is None else part(feed_forward, own["feed_forward"], x, ())
        return LOGIT_GAIN * norm(params["norm"], x) @ params["embedding"].T

    found, _ = run(params, tokens, model.init_state(params, B))
    np.testing.assert_allclose(found, by_hand(params), rtol=1e-9, atol=1e-12)


def test_any_cut_gives_the_same_logits_and_state(x64, hybrid):
    model, params, tokens, run = hybrid
    state = model.init_state(params, B)
    (whole, end), pieces = run(params, tokens, state), []
    for piece in np.split(tokens, [1, 6, 11], axis=1):
        logits, state = run(params, piece, state)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-9, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), state, end)


def test_every_parameter_of_a_pattern_has_named_axes(hybrid):
    model, params, *_ = hybrid
    names = of_parameters(model.axes(), len)(params)
    assert jax.tree.leaves(names) == [x.ndim for x in jax.tree.leaves(params)]
    assert len(flat(model.axes())) == len(jax.tree.leaves(params))


def test_a_pattern_is_written_and_read_back():
    assert configs.from_json(configs.to_json(HYBRID), ModelConfig) == HYBRID


def test_the_memories_of_a_pattern_stop_writing():
    silent = without_writes(HYBRID)
    assert silent.mixer == (replace(MEMORY, rate_max=0.0), WINDOW)
    with pytest.raises(UserError, match="only memories with a setting rate_max"):
        without_writes(replace(HYBRID, mixer=(MEMORY, GatedDeltaNetConfig(2, 4, 4))))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(layers=5), "multiple"),
        (dict(feed_forward=(SWIGLU,)), "2 mixers and 1 feed-forward"),
        (dict(mixer=(), feed_forward=()), "0 mixers"),
        (dict(feed_forward=SWIGLU), "2 mixers and 1 feed-forward"),
        (dict(mixer=(MEMORY, SWIGLU)), "mixer is SwiGLUConfig; expected a mixer"),
        (dict(feed_forward=(MEMORY, SWIGLU)), "feed_forward is MemoryMixerConfig; expected a feed-forward part"),
        (dict(feed_forward=(None, CMSConfig((Level(16),), 4, in_context=1))), "in_context is above 0"),
        (dict(feed_forward=(CMSConfig((Level(16),), 4), CMSConfig((Level(32),), 4))), "different levels"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        replace(HYBRID, **change)
