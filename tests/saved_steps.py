"""A small state and a run folder with two saved steps of it: what the tests of checkpoints share."""

import jax
import jax.numpy as jnp

from hope_jax import train as training


def make_state(step, extra=0.0):
    """A state with every kind of leaf a run has: several dtypes, scalars, empty containers, odd bit patterns."""
    noise = jax.random.normal(jax.random.key(step), (64, 33))
    params = {
        "kernel": noise.at[0, 0].set(-0.0).at[0, 1].set(jnp.nan) + extra,
        "half": noise[0].astype(jnp.bfloat16),
        "empty": {},
    }
    return training.TrainState.first(params, (jnp.int32(7), ())).replace(step=jnp.int32(step))


def like(state):
    """The shapes and placement of ``state``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def filled(folder):
    """The run folder with steps 3 and 6."""
    for step in (3, 6):
        training.save(folder, make_state(step), {"position": step}, {}, keep=2)
    return folder
