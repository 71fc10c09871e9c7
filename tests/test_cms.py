"""The continuum memory system in outer mode: the chain of Eq. 70-74, and which periods and sizes are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import gelu
from references_matrix import silu

from hope_jax.errors import UserError
from hope_jax.levels import Level
from hope_jax.nn.feed_forward.cms import CMSConfig

WIDTH = 6


def run(config, key):
    module = config.build(WIDTH, jnp.float64)
    x = jax.random.normal(key, (2, 5, WIDTH), jnp.float64)
    params = module.init(key, x, ())["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape, p.dtype), params)
    y = module.apply({"params": params}, x, ())
    return np.asarray(x), jax.tree.map(np.asarray, params), np.asarray(y)


def level(params, x):
    """MLP(RMSNorm(x)) in numpy, SwiGLU where there is a gate."""
    normed = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * params["norm"]["scale"]
    z = normed @ params["up"]["kernel"]
    hidden = silu(normed @ params["gate"]["kernel"]) * z if "gate" in params else gelu(z)
    return hidden @ params["down"]["kernel"]


@pytest.mark.parametrize("gated", [True, False])
def test_sequential_levels_are_a_residual_chain_fastest_first(x64, key, gated):
    x, params, y = run(CMSConfig((Level(16), Level(64)), hidden=8, gated=gated), key)
    assert ("gate" in params["level_0"]) == gated
    first = x + level(params["level_0"], x)
    np.testing.assert_allclose(y, first + level(params["level_1"], first), atol=1e-12)


def test_independent_levels_are_a_learned_sum_over_the_same_input(x64, key):
    x, params, y = run(CMSConfig((Level(16), Level(64)), hidden=8, wiring="independent"), key)
    mixed = sum(s * level(params[f"level_{i}"], x) for i, s in enumerate(params["mixture"]))
    np.testing.assert_allclose(y, x + mixed, atol=1e-12)


@pytest.mark.parametrize("periods", [(), (64, 16)])
def test_levels_come_fastest_first(periods):
    with pytest.raises(UserError, match="fastest first"):
        CMSConfig(tuple(Level(p) for p in periods), hidden=8)


def test_a_level_without_features_is_refused():
    with pytest.raises(UserError, match="hidden is 0; .* at least 1 .features"):
        CMSConfig((Level(16),), hidden=0)
