"""A model on a mesh of eight devices, "data" by "model": the same numbers as on one."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.levels import Level
from hope_jax.models import ARCHITECTURES, LanguageModel, Size

HEADS, VOCAB, B, T = 2, 48, 8, 8
SIZE = Size(width=32, layers=1, heads=HEADS, vocab_size=VOCAB, context=64, levels=(Level(16), Level(32)))
PERIODS = {"hope": {"c_memory": 4, "c_projections": 4}, "titans": {}}


@functools.cache
def on_one_device(name):
    """A small model's loss with gradient and logits, what it is applied to, and what comes out."""
    config = replace(ARCHITECTURES[name](SIZE), dtype=jnp.float64)
    model = LanguageModel(replace(config, mixer=replace(config.mixer, **PERIODS[name])))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)
    params = drawn(model.init, tokens[:, :1], spread=0.18)

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens)[0]
        return jnp.mean(logits**2), logits

    quick = {"xla_backend_optimization_level": 0}  # to compile
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=quick)
    return gradient, params, tokens, gradient(params, tokens)


@pytest.mark.parametrize("heads_over", [pytest.param(None, marks=pytest.mark.slow), "model"])
@pytest.mark.parametrize("name", [pytest.param("hope", marks=pytest.mark.slow), "titans"])
def test_a_sharded_model_equals_the_unsharded_one(x64, name, heads_over):
    """Sequences over "data", and parameters by heads over "model" as well; the first alone needs no gathering."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    gradient, params, tokens, expected = on_one_device(name)
    placed = functools.partial(NamedSharding, mesh)
    by_heads, by_data, whole = (placed(PartitionSpec(*axes)) for axes in ((None, heads_over), ("data",), ()))
    params = jax.tree.map(lambda x: jax.device_put(x, by_heads if x.shape[1:2] == (HEADS,) else whole), params)
    tokens = jax.device_put(tokens, by_data)
    compiled = gradient.lower(params, tokens).compile()
    found = compiled(params, tokens)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-9, atol=1e-12)
    assert found[0][1].sharding.is_equivalent_to(by_data, 3)
    assert heads_over or "all-gather" not in str(compiled.as_text())
