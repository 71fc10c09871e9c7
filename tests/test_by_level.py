"""Outer-mode levels: when their parameters move, and by which gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.errors import UserError
from hope_jax.optim import by_level

EVERY = {"static": 1, "level_0": 2, "level_1": 4}


def parameters():
    return {"embedding": jnp.ones(3), "ffn": {"level_0": {"up": jnp.ones((2, 3))}, "level_1": {"up": jnp.ones(2)}}}


def gradients(steps):
    keys = jax.random.split(jax.random.key(0), steps)
    return [jax.tree.map(lambda p, k=k: jax.random.normal(k, p.shape), parameters()) for k in keys]


def trajectory(tx, steps=8):
    """Updates of every step; parameters move along."""
    params = parameters()
    state, update, updates = tx.init(params), jax.jit(tx.update), []
    for g in gradients(steps):
        u, state = update(g, state, params)
        params = optax.apply_updates(params, u)
        updates.append(u)
    return updates


def test_levels_move_only_every_nth_step_and_then_by_the_mean_gradient():
    updates, given = trajectory(by_level(lambda n: optax.sgd(0.1), EVERY)), gradients(8)
    for label, n in EVERY.items():
        for step, update in enumerate(updates, 1):
            if step % n:
                np.testing.assert_array_equal(leaf_of(label, update), 0)
            else:
                mean = np.mean([leaf_of(label, g) for g in given[step - n : step]], axis=0)
                np.testing.assert_allclose(leaf_of(label, update), -0.1 * mean, rtol=1e-5, atol=1e-7)


def leaf_of(label, tree):
    """The parameter of a level."""
    return tree["embedding"] if label == "static" else tree["ffn"][label]["up"]


def test_a_level_stepped_every_time_is_the_plain_optimizer():
    ones = trajectory(by_level(lambda n: optax.adamw(1e-2), dict.fromkeys(EVERY, 1)))
    for ours, plain in zip(ones, trajectory(optax.adamw(1e-2)), strict=True):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_maker_is_told_the_stretch_of_each_level():
    def make(n):
        return optax.sgd(lambda count: 0.1 * (count * n + n))  # the last of the n steps it stands for

    updates, given = trajectory(by_level(make, EVERY), 4), gradients(4)
    mean = np.mean([g["ffn"]["level_1"]["up"] for g in given], axis=0)
    np.testing.assert_allclose(updates[3]["ffn"]["level_1"]["up"], -0.4 * mean, rtol=1e-5)
    np.testing.assert_allclose(updates[3]["embedding"], -0.4 * given[3]["embedding"], rtol=1e-5)


def test_a_level_without_a_row_is_static():
    updates = trajectory(by_level(lambda n: optax.sgd(0.1), {"static": 1, "level_0": 2}), 1)
    assert np.all(updates[0]["ffn"]["level_1"]["up"] != 0)
    assert np.all(updates[0]["ffn"]["level_0"]["up"] == 0)


def test_a_label_that_is_on_no_path_is_named_with_the_closest_name_that_is():
    tx = by_level(lambda n: optax.sgd(0.1), {"static": 1, "levle_1": 4, "level_0": 2})
    for init in (tx.init, lambda params: jax.eval_shape(tx.init, params)):
        with pytest.raises(UserError, match=r"\['levle_1'\] on its path; did you mean 'level_1'"):
            init(parameters())


@pytest.mark.parametrize("every", [{"static": 1, "level_0": 0}, {"level_0": 2}, {"static": -1}], ids=str)
def test_wrong_periods_are_refused(every):
    with pytest.raises(UserError, match="every is"):
        by_level(lambda n: optax.sgd(0.1), every)
