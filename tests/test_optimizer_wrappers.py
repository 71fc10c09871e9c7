"""The optimizers x optax's wrappers and jax's transformations: each must be at home in all of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn
from flax import linen as nn
from flax.training.train_state import TrainState
from optimizer_rows import compiled, gradient, parameters, plain_run, program, walk, wrapped

from hope_jax import optim


@wrapped
def test_gradients_that_are_not_finite_never_reach_the_state_under_apply_if_finite(row):
    tx, params = optax.apply_if_finite(row.make(1e-2), 100), parameters()
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(gradient(0, params), state, params)
    for bad in (jnp.nan, jnp.inf):
        broken = gradient(1, params)
        broken["ffn"]["level_0"]["kernel"] = broken["ffn"]["level_0"]["kernel"].at[0, 1].set(bad)
        updates, after = update(broken, state, params)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)


@wrapped
def test_partition_gives_it_its_own_part_of_the_tree_and_no_more(row):
    params = parameters()
    labels = {"embedding": "rest", "ffn": "mine"}
    divided, _ = walk(optax.partition({"mine": compiled(row.make), "rest": optax.sgd(0.1)}, labels), params)
    chex.assert_trees_all_close(divided["ffn"], plain_run(row.make)[0]["ffn"], rtol=1e-6, atol=1e-7)
    moved = params["embedding"] - 0.1 * sum(gradient(step, params)["embedding"] for step in range(8))
    chex.assert_trees_all_close(divided["embedding"], moved, rtol=1e-5, atol=1e-6)


@wrapped
def test_lookahead_moves_the_slow_parameters_halfway_to_where_it_went(row):
    params = parameters()
    tx = optax.with_extra_args_support(optax.lookahead(compiled(row.make), 4, 0.5))
    both = optax.LookaheadParams.init_synced(params)
    state = tx.init(both)
    for step in range(4):
        updates, state = tx.update(gradient(step, params), state, both)
        both = optax.apply_updates(both, updates)
    half = jax.tree.map(lambda a, b: (a + b) / 2, params, plain_run(row.make, 4)[0])
    chex.assert_trees_all_close(both.slow, half, rtol=1e-5, atol=1e-6)


@wrapped
def test_many_at_once_by_vmap_are_each_on_its_own_and_a_scan_is_a_loop(row):
    tx = optax.with_extra_args_support(row.make(1e-2))
    first, second = parameters(), jax.tree.map(lambda p: -2 * p, parameters())
    given = stacked(*(gradient(step, first) for step in range(4)))

    def trained(params, size):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda x: size * x, g), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), given)[0][0]

    both = jax.jit(jax.vmap(trained))(stacked(first, second), jnp.array([1.0, 3.0]))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], both), plain_run(row.make, 4)[0], rtol=1e-5, atol=1e-6)
    alone, _ = walk(compiled(row.make), second, 4, lambda *at: jax.tree.map(lambda x: 3 * x, gradient(*at)))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], both), alone, rtol=1e-5, atol=1e-6)


def stacked(*trees):
    """One tree with a leading axis that counts the trees."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


@wrapped
def test_places_without_a_parameter_stay_empty(row):
    params, tx = parameters(), row.make(1e-2)
    holes = {**params, "nothing": None, "empty": {}}
    assert program(tx, holes) == program(tx, params)
    updates, _ = jax.eval_shape(tx.update, holes, jax.eval_shape(tx.init, holes), holes)
    assert jax.tree.structure(updates) == jax.tree.structure(holes)
    assert updates["nothing"] is None and updates["empty"] == {}


def angles(count, seed):
    """So many complex numbers of size 1."""
    return np.exp(1j * np.random.default_rng(count + seed).uniform(0, 6, count))


@wrapped
def test_complex_gradients_turned_row_by_row_and_column_by_column_turn_the_path(row, x64):
    if not row.complex:
        pytest.skip("defined for real parameters only")
    real = parameters(jnp.float64)
    phase = jax.tree.map(
        lambda p: angles(p.shape[0], 0).reshape(-1, *[1] * (p.ndim - 1)) * angles(p.shape[-1], 1), real
    )
    phase["ffn"]["level_1"]["kernel"] = angles(8, 3)

    def turned(tree):
        return jax.tree.map(jnp.multiply, tree, phase)

    tx = optax.with_extra_args_support(row.make(1e-2))
    update = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    found, _ = walk(update, turned(real), 5, lambda step, _: turned(gradient(step, real)))
    expected, _ = walk(update, real, 5)
    chex.assert_trees_all_close(found, turned(expected), rtol=1e-7, atol=1e-9)


class TwoLayers(nn.Module):
    """A Flax model of which every layer carries the delta term."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(optim.delta_dense(16, strength=0.01, name="hidden")(x))
        return optim.delta_dense(2, strength=0.01, name="out")(hidden)


MAKES = [optim.delta_momentum, *(pytest.param(make, marks=pytest.mark.slow) for make in (optim.m3, optim.dmgd))]


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_a_flax_train_state_takes_them_as_it_takes_adamw(make):
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    y, model = np.sin(x[:, :2]), TwoLayers()
    state = TrainState.create(apply_fn=model.apply, params=drawn(model.init, x), tx=make(1e-2))

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(100):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0] and int(state.step) == 100
