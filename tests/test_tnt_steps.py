"""TNT on Hope's memories, compiled: shards side by side leave fewer rounds of the loops over chunks."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from test_mixers import HEADS, WIDTH
from test_tnt import fresh

from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig
from hope_jax.nn.mixers.tnt import TNTConfig
from hope_jax.train.work import work

PERIOD, SHARD, TIME = 16, 512, 2048
PLAIN = SelfModifyingConfig(HEADS, c_memory=PERIOD, c_projections=PERIOD, rate_max=2.0)
SHARDS = TNTConfig(replace(PLAIN, shard=SHARD, project_queries=True), global_period=TIME)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "tokens"), [(PLAIN, TIME), (SHARDS, SHARD)], ids=["plain", "shards"])
def test_a_compiled_gradient_takes_the_steps_of_one_shard(config, tokens):
    """A forward and a backward pass over four shards; the global memory is written once, which needs no loop."""
    module, u = config.build(WIDTH, jnp.float32), jax.ShapeDtypeStruct((1, TIME, WIDTH), jnp.float32)
    params = jax.eval_shape(functools.partial(module.init, method=fresh), jax.random.key(0), u)

    def loss(params, u):
        return jnp.sum(jnp.square(module.apply(params, u, method=fresh)[0]))

    found = work(jax.jit(jax.grad(loss)).lower(params, u).compile().as_text())
    assert (found.rounds, found.unknown) == (2 * tokens // PERIOD, 0)
