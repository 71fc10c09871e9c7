"""Every momentum optimizer against its equations in numpy, and mistakes in their arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references_momentum import delta_momentum, learned_preconditioner, m3_average, m3_literal

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.optim import MomentumScale


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def path(tx, start, gradients):
    """Parameters after every update of one parameter named w."""
    params, found = {"w": jnp.asarray(start)}, []
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        found.append(jax.tree.leaves(params)[0])
    return found


def once(tx: Any, gradients: Any, state: Any = None, params: Any = None) -> Any:
    """Updates of one gradient."""
    return tx.update(gradients, tx.init(params) if state is None else state, params)[0]


TWO = ((2, 0.7, 0.8),)
THREE = ((2, 0.7, 0.8), (3, 0.4, -0.5))


@pytest.mark.parametrize("slows", [(), TWO, THREE], ids=["fast alone", "two scales", "three scales"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_m3_is_algorithm_1_and_its_averaging_form(slows, shape, x64):
    start, gradients = draw(*shape), draw(8, *shape, seed=1)
    scales = (MomentumScale(1, 0.9, 1.5), *(MomentumScale(*s) for s in slows))
    literal = optim.m3(0.1, scales, 0.99, "sum", "literal")
    expected = m3_literal(start, gradients, 0.1, (0.9, 1.5), slows, 0.99)
    np.testing.assert_allclose(path(literal, start, gradients), expected, rtol=1e-8, atol=1e-9)
    default = optim.m3(0.1, scales, 0.99, weight_decay=0.3)
    expected = m3_average(start, gradients, 0.1, (0.9, 1.5), slows, 0.99, decay=0.3)
    np.testing.assert_allclose(path(default, start, gradients), expected, rtol=1e-8, atol=1e-9)


def test_the_slow_direction_of_m3_turns_once_per_block_by_the_gradients_before_it():
    tx = optim.scale_by_m3((MomentumScale(1, 0.9), MomentumScale(3, 0.9)))
    params, gradients, slow = {"w": jnp.ones((3, 4))}, draw(8, 3, 4), []
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        _, state = update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        slow.append(np.array(state.directions[1]["w"]))
    for t in range(8):
        np.testing.assert_array_equal(slow[t], slow[t - t % 3])
    np.testing.assert_array_equal(slow[0], 0)
    first = jnp.asarray(gradients[:3].sum(0), jnp.float32)
    np.testing.assert_allclose(slow[3], optim.orthogonalize(first), atol=1e-4)
    assert np.any(slow[3] != slow[6])


def test_the_default_step_of_m3_has_the_size_of_adams_and_nothing_moves_without_a_gradient():
    tx = optim.scale_by_m3()
    params = {"w": jnp.ones((6, 4))}
    for size in (1e-6, 1.0, 1e6):
        updates = once(tx, {"w": jnp.asarray(size * draw(6, 4), jnp.float32)}, params=params)
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["w"] ** 2)), 0.2, rtol=1e-4)
    updates, state = tx.update({"w": jnp.zeros((6, 4))}, tx.init(params), params)
    np.testing.assert_array_equal(jax.tree.leaves(updates)[0], 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("form", ["gram", "scalar", "raw"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4,)], ids=str)
def test_delta_momentum_is_its_equation_transposed_to_a_kernel(form, shape, x64):
    gradients = 0.5 * draw(6, *shape)
    found = path(optim.delta_momentum(1.0, 0.9, 0.3, form), np.zeros(shape), gradients)
    m, theta = np.zeros(shape).reshape(shape[0], -1).T, 0.0
    for g, now in zip(gradients, found, strict=True):
        m = delta_momentum(m, g.reshape(shape[0], -1).T, form, 0.9, 0.3)
        theta = theta + m
        np.testing.assert_allclose(now, theta.T.reshape(shape), rtol=1e-10)


def test_a_gram_step_is_a_gradient_step_of_the_regression(x64):
    m, g, e = draw(5, 3), draw(5, 3, seed=1), 0.2
    small = e / (1 + e * np.sum(g**2))
    loss = lambda m: 0.5 * jnp.sum((m.T @ g + jnp.eye(3)) ** 2)  # noqa: E731  m is a kernel: its transpose acts
    tx = optim.scale_by_delta_momentum(1.0, e, precondition=optax.scale(small))
    state = tx.init({"w": jnp.array(m)})._replace(memory={"w": jnp.array(m)})
    updates = once(tx, {"w": jnp.array(g)}, state)
    np.testing.assert_allclose(-updates["w"], m - small * jax.grad(loss)(m), rtol=1e-12)
    keyed = optim.scale_by_generalized_momentum(optim.l2, optim.KeyedMemory(), retention=1.0, rate=small)
    updates = once(keyed, {"w": jnp.array(g)}, state._replace(precondition=optax.EmptyState()))
    np.testing.assert_allclose(-updates["w"], m - small * jax.grad(loss)(m), rtol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e9])
def test_the_gram_retention_never_expands_however_large_the_gradient(size, x64):
    retain = optim.delta_retention(0.9, 1.0)
    view = optim.matrix_views({"w": jnp.ones((4, 6))}, optim.matrix_labels())["w"]
    basis = jnp.eye(4)[:, :, None] * jnp.ones((1, 1, 6))  # one column of the map per basis vector
    factors = jnp.stack([retain(b, jnp.array(size * draw(4, 6)), view)[:, 0] for b in basis], axis=1)
    values = jnp.linalg.eigvalsh(factors)
    assert jnp.all((values >= 0.9 - 1 - 1e-9) & (values <= 0.9 + 1e-9))


def test_huge_gradients_leave_delta_momentum_bounded_where_the_printed_form_explodes():
    gradients = np.concatenate([1e3 * draw(40, 4, 6), np.zeros((1, 4, 6))]).astype(np.float32)
    steps = {form: path(optim.delta_momentum(1.0, 0.9, 1.0, form), np.zeros((4, 6), np.float32), gradients[:6])
             for form in ("gram", "raw")}  # fmt: skip
    assert np.max(np.abs(steps["raw"][-1])) > 1e20
    gram = path(optim.delta_momentum(1.0), np.zeros((4, 6), np.float32), gradients)
    largest = max(np.linalg.norm(b - a) for a, b in zip(gram, gram[1:], strict=False))
    assert largest < max(np.linalg.norm(g) for g in gradients) / (1 - 0.9)


def test_a_preconditioner_and_a_feature_map_act_on_the_gradient_before_the_momentum(x64):
    gradients = draw(6, 3, 4)
    tx = optim.preconditioned_momentum(0.1, 0.8, optax.scale_by_rms(0.9, eps=1e-3), jnp.tanh)
    m, v, theta = 0.0, 0.0, np.zeros((3, 4))
    for g, now in zip(gradients, path(tx, theta, gradients), strict=True):
        v = 0.9 * v + 0.1 * np.tanh(g) ** 2
        m = 0.8 * m - np.tanh(g) / np.sqrt(v + 1e-3)
        theta = theta + 0.1 * m
        np.testing.assert_allclose(now, theta, rtol=1e-10)


def test_the_learned_preconditioner_is_gradient_descent_on_its_regression(x64):
    gradients = draw(6, 3, 4)
    expected = -np.cumsum(learned_preconditioner(gradients, 0.2), axis=0)
    tx = optax.chain(optim.learned_preconditioner(0.2), optax.scale(-1.0))
    np.testing.assert_allclose(path(tx, np.zeros((3, 4)), gradients), expected, rtol=1e-10)
    loss = lambda p, g: 0.5 * (p * jnp.sign(g) - g) ** 2  # noqa: E731
    tx, g = optim.learned_preconditioner(0.2), gradients[0]
    _, one = tx.update(jnp.array(g), tx.init(jnp.zeros((3, 4))))
    slope = jax.vmap(jax.vmap(jax.grad(loss)))(jnp.zeros((3, 4)), jnp.array(g))
    np.testing.assert_allclose(one.preconditioner, -0.2 * slope, rtol=1e-12)


def test_momentum_takes_any_objective_and_any_memory(x64):
    gradients = draw(6, 3, 4)
    average = optim.generalized_momentum(0.1, optim.l2, retention=1.0, rate=0.2)
    known = optax.chain(optax.ema(0.8, debias=False), optax.scale(-0.1))
    np.testing.assert_allclose(path(average, draw(3, 4), gradients), path(known, draw(3, 4), gradients), rtol=1e-10)

    class Scaled(optim.LinearMemory):
        """A memory that answers with three times what it holds."""

        def read(self, state, gradient, view):
            return 3 * state

    signs = lambda prediction, value: jnp.sum(jnp.abs(prediction - value))  # noqa: E731
    m, theta = 0.0, np.zeros((3, 4))
    found = path(optim.generalized_momentum(0.1, signs, Scaled(), rate=0.5), theta, gradients)
    for g, now in zip(gradients, found, strict=True):
        m = 0.9 * m - 0.5 * np.sign(m + g)
        theta = theta + 0.3 * m
        np.testing.assert_allclose(now, theta, rtol=1e-10)


ALIASES = {
    "m3": optim.m3,
    "delta_momentum": optim.delta_momentum,
    "preconditioned_momentum": optim.preconditioned_momentum,
    "generalized_momentum": optim.generalized_momentum,
}
aliases = pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)


@aliases
def test_all_numbers_of_an_alias_can_be_injected(alias):
    params = {"w": jnp.asarray(draw(3, 4), jnp.float32), "b": jnp.ones(3)}
    plain, injected = alias(0.1, weight_decay=0.2), optax.inject_hyperparams(alias)(0.1, weight_decay=0.2)
    state = injected.init(params)
    assert {"learning_rate", "weight_decay"} < state.hyperparams.keys()
    found, _ = jax.jit(injected.update)(params, state, params)
    expected, _ = plain.update(params, plain.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@aliases
def test_weight_decay_is_decoupled_masked_and_needs_the_parameters(alias):
    params = {"kernel": jnp.asarray(draw(3, 4), jnp.float32), "other": jnp.asarray(draw(3, 4), jnp.float32)}
    grads = jax.tree.map(jnp.sin, params)
    step = lambda tx: once(tx, grads, params=params)  # noqa: E731
    plain, decayed = step(alias(0.1)), step(alias(0.1, weight_decay=0.5, mask={"kernel": True, "other": False}))
    np.testing.assert_allclose(decayed["kernel"], plain["kernel"] - 0.05 * params["kernel"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(decayed["other"], plain["other"], rtol=1e-6)
    with pytest.raises(UserError, match="weight_decay needs the parameters"):
        tx = alias(0.1, weight_decay=0.5)
        tx.update(grads, tx.init(params))
    found, _ = alias(0.1).update(grads, alias(0.1).init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, plain)


@aliases
def test_every_optimizer_can_be_that_of_a_level(alias):
    kernels = {name: {"kernel": jnp.asarray(draw(3, 4), jnp.float32)} for name in ("fast", "slow")}
    tx = optim.by_level(lambda n: alias(0.1 * n, weight_decay=0.1), {"static": 1, "slow": 2})
    state, update, params, given = tx.init(kernels), jax.jit(tx.update), kernels, draw(4, 3, 4, seed=1)
    for g in given:
        g = jnp.asarray(g, jnp.float32)
        updates, state = update({"fast": {"kernel": g}, "slow": {"kernel": g}}, state, params)
        params = optax.apply_updates(params, updates)
    start = kernels["fast"]["kernel"]
    fast = path(alias(0.1, weight_decay=0.1), start, given.astype(np.float32))[-1]
    slow = path(alias(0.2, weight_decay=0.1), start, given.reshape(2, 2, 3, 4).mean(1).astype(np.float32))[-1]
    for found, expected in zip(jax.tree.leaves(params), (fast, slow), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@aliases
def test_state_can_be_stored_in_half_precision(alias):
    params = {"w": jnp.asarray(draw(3, 4), jnp.float32), "b": jnp.ones(3)}
    tx = alias(0.1, state_dtype=jnp.bfloat16)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and all(leaf.dtype == jnp.bfloat16 for leaf in floats)
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(updates))


@aliases
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(learning_rate=-0.1), "learning_rate is -0.1"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(learning_rate=0.1, weight_decay="0.1"), "weight_decay is '0.1'; expected a number"),
        (dict(learning_rate=0.1, weight_decay=None), "weight_decay is None; expected a number"),
        (dict(weight_decay=-1.0), "weight_decay is -1"),
        (dict(state_dtype=jnp.int32), "state_dtype is"),
    ],
    ids=str,
)
def test_wrong_arguments_of_any_optimizer_are_refused(alias, arguments, message):
    with pytest.raises(UserError, match=message):
        alias(**{"learning_rate": 0.1, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.m3(0.1, ()), "scales is"),
        (lambda: optim.m3(0.1, (MomentumScale(0, 0.9),)), "period is 0"),
        (lambda: MomentumScale(2.5, 0.9), "period is 2.5"),
        (lambda: MomentumScale(1, 1.5), "decay is 1.5"),
        (lambda: optim.m3(0.1, (MomentumScale(1, 1.0),)), "decay is 1"),
        (lambda: optim.m3(0.1, second_decay=1.0), "decay is 1"),
        (lambda: optim.m3(0.1, accumulate="mean"), "accumulate is 'mean'"),
        (lambda: optim.m3(0.1, second_moment="adam"), "second_moment is 'adam'"),
        (lambda: optim.m3(0.1, update_rms=-1.0), "update_rms is -1"),
        (lambda: optim.m3(0.1, eps=-1.0), "eps is -1"),
        (lambda: optim.delta_momentum(0.1, decay=1.1), "decay is 1.1"),
        (lambda: optim.learned_preconditioner(0.0), "rate is 0; expected above 0 and up to 1"),
        (lambda: optim.delta_momentum(0.1, erase=-1.0), "erase is -1"),
        (lambda: optim.delta_momentum(0.1, form="grams"), "form is 'grams'"),
        (lambda: optim.preconditioned_momentum(0.1, -0.1), "decay is -0.1"),
        (lambda: optim.learned_preconditioner(2.0), "rate is 2"),
        (lambda: optim.generalized_momentum(0.1, retention=1.1), "retention is 1.1"),
        (lambda: optim.generalized_momentum(0.1, rate=-1.0), "rate is -1"),
        (
            lambda: optim.generalized_momentum(0.1, memory=optim.KeyedMemory(), precondition=optax.scale_by_rms()),
            "KeyedMemory's values",
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(make, message, untyped):
    with pytest.raises(UserError, match=message):
        make()


@aliases
def test_parameters_that_cannot_be_optimized_are_named(alias):
    for bad in (jnp.arange(6).reshape(2, 3), jnp.array([True])):
        with pytest.raises(UserError, match=rf"\['layer'\]\['ids'\] of type {bad.dtype}"):
            alias(0.1).init({"layer": {"ids": bad, "w": jnp.ones(2)}})
    assert alias(0.1).update({}, alias(0.1).init({}), {})[0] == {}


def test_m3_without_its_adamw_says_which_leaf_is_no_matrix():
    with pytest.raises(UserError, match=r"\['norm'\] of shape \(3,\), which is no matrix; use m3"):
        optim.scale_by_m3().init({"norm": jnp.ones(3)})
