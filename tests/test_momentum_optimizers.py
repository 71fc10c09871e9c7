"""Every momentum optimizer against its equations in numpy; their arguments are in ``test_optimizer_arguments.py``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references_momentum import delta_momentum, learned_preconditioner, m3_average, m3_literal, newton_schulz

from hope_jax import optim
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
    """Updates of one gradient, in one compiled program."""
    return jax.jit(tx.update)(gradients, tx.init(params) if state is None else state, params)[0]


SLOWS = ((2, 0.7, 0.8), (3, 0.4, -0.5))


@pytest.mark.parametrize(("shape", "slows"), [((3, 5), SLOWS), ((5, 3), SLOWS), ((5, 3), ())], ids=str)
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
    np.testing.assert_allclose(slow[3], newton_schulz(gradients[:3].sum(0)), atol=1e-4)
    assert np.any(slow[3] != slow[6])


def test_the_default_step_of_m3_has_the_size_of_adams_and_nothing_moves_without_a_gradient():
    tx, params = optim.scale_by_m3(), {"w": jnp.ones((6, 4))}
    start, update = tx.init(params), jax.jit(tx.update)
    for size in (1e-6, 1.0, 1e6):
        updates, _ = update({"w": np.float32(size * draw(6, 4))}, start, params)
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(updates["w"]))), 0.2, rtol=1e-4)
    updates, state = update({"w": np.zeros((6, 4), np.float32)}, start, params)
    np.testing.assert_array_equal(jax.tree.leaves(updates)[0], 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_an_entry_without_gradients_moves_no_more_than_the_others_under_m3():
    """A pair of units that are never active together; NS fills its place in the momentum."""
    gradients = draw(30, 16, 16).astype(np.float32)
    gradients[:, 3, 5] = 0
    tx = optim.scale_by_m3()
    state, params, update = tx.init({"w": jnp.ones((16, 16))}), {"w": jnp.ones((16, 16))}, jax.jit(tx.update)
    for g in gradients:
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        sizes = np.abs(jax.tree.leaves(updates)[0])
        others = np.delete(sizes.ravel(), 3 * 16 + 5)
        assert 0 < sizes[3, 5] < 2.5 * others.max()
        assert np.median(sizes) > 0.05, "nobody takes the whole step"


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

    def loss(m):  # m is a kernel: its transpose acts
        return 0.5 * jnp.sum((m.T @ g + jnp.eye(3)) ** 2)

    tx = optim.scale_by_delta_momentum(1.0, e, precondition=optax.scale(small))
    state = tx.init({"w": jnp.array(m)})._replace(memory={"w": jnp.array(m)})
    updates = once(tx, {"w": jnp.array(g)}, state)
    expected = m - small * jax.jit(jax.grad(loss))(m)
    np.testing.assert_allclose(-np.asarray(updates["w"]), expected, rtol=1e-12)
    keyed = optim.scale_by_generalized_momentum(optim.l2, optim.KeyedMemory(), retention=1.0, rate=small)
    updates = once(keyed, {"w": jnp.array(g)}, state._replace(precondition=optax.EmptyState()))
    np.testing.assert_allclose(-np.asarray(updates["w"]), expected, rtol=1e-12)


def test_the_gram_retention_never_expands_however_large_the_gradient(x64):
    view = optim.matrix_views({"w": np.ones((4, 6))}, optim.matrix_labels())["w"]
    basis = np.eye(4)[:, :, None] * np.ones((1, 1, 6))  # one column of the map per basis vector
    retain = optim.delta_retention(0.9, 1.0)
    columns = jax.jit(lambda g: jax.vmap(lambda b: retain(b, g, view)[:, 0])(basis))
    for size in (1e-3, 1.0, 1e3, 1e9):
        values = np.linalg.eigvalsh(np.asarray(columns(size * draw(4, 6))).T)
        assert np.all((values >= 0.9 - 1 - 1e-9) & (values <= 0.9 + 1e-9))


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
    features = optax.stateless_with_tree_map(lambda g, _: jnp.tanh(g))
    precondition = optax.chain(features, optax.scale_by_rms(0.9, eps=1e-3))
    tx = optim.preconditioned_momentum(0.1, 0.8, precondition)
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

    def loss(p, g):
        return 0.5 * (p * jnp.sign(g) - g) ** 2

    tx, g = optim.learned_preconditioner(0.2), gradients[0]
    update, slope = jax.jit(tx.update), jax.jit(jax.vmap(jax.vmap(jax.grad(loss))))
    _, one = update(g, tx.init(np.zeros((3, 4))))
    np.testing.assert_allclose(one.preconditioner, np.abs(g), rtol=1e-12)
    _, two = update(gradients[1], one)
    expected = one.preconditioner - 0.2 * slope(one.preconditioner, gradients[1])
    np.testing.assert_allclose(two.preconditioner, expected, rtol=1e-12)


def test_a_rare_gradient_is_preconditioned_by_its_own_size():
    tx = optim.learned_preconditioner(0.01)
    state, update = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for _ in range(500):
        updates, state = update(jnp.array([1.0, 0.0]), state)
    np.testing.assert_allclose(updates, [1.0, 0.0], atol=1e-6)
    for _ in range(3):
        updates, state = update(jnp.array([1.0, 5.0]), state)
        np.testing.assert_allclose(updates, [1.0, 1.0], rtol=1e-5)


def test_half_precision_gradients_are_preconditioned_in_float32():
    tx, g = optim.learned_preconditioner(0.01), jnp.full((3, 4), 1.5, jnp.bfloat16)
    update = jax.jit(tx.update)
    updates, state = update(g, tx.init(g))
    assert (updates.dtype, state.preconditioner.dtype) == (jnp.bfloat16, jnp.float32)
    for _ in range(3):
        _, state = update(2 * g, state)
    np.testing.assert_allclose(state.preconditioner, 3 - 1.5 * 0.99**3, rtol=1e-6)


def test_momentum_without_decay_is_gradient_descent_on_the_likeness_to_the_gradients(x64):
    """Eq. 34: its memory m descends <m, G> for the gradients in turn."""
    m, gradients, tx = np.zeros((3, 4)), draw(5, 3, 4), optim.scale_by_generalized_momentum(retention=1.0)
    state, update, slope = tx.init(np.zeros((3, 4))), jax.jit(tx.update), jax.jit(jax.grad(lambda m, g: jnp.sum(m * g)))
    for g in gradients:
        updates, state = update(g, state)
        m = m - slope(m, g)
        np.testing.assert_allclose(state.memory, m, rtol=1e-12)
        np.testing.assert_allclose(-np.asarray(updates), m, rtol=1e-12)


def test_at_decay_0_9_the_last_43_gradients_are_99_percent_of_an_average(x64):
    """SPEC 5.7: 6 / 7 gradients hold 46.9 / 52.2 percent, 43 / 44 hold 98.92 / 99.03."""
    steps = 200
    tx = optim.scale_by_generalized_momentum(optim.l2, retention=1.0, rate=0.1)
    state, _ = jax.lax.scan(lambda state, g: (tx.update(g, state)[1], None), tx.init(jnp.zeros(steps)), jnp.eye(steps))
    held = np.cumsum(-np.asarray(state.memory)[::-1])
    np.testing.assert_allclose(held[[5, 6, 42, 43]], [0.469, 0.522, 0.9892, 0.9903], atol=6e-4)


def test_momentum_takes_any_objective_and_any_memory(x64):
    gradients = draw(6, 3, 4)
    average = optim.generalized_momentum(0.1, optim.l2, retention=1.0, rate=0.2)
    known = optax.chain(optax.ema(0.8, debias=False), optax.scale(-0.1))
    np.testing.assert_allclose(path(average, draw(3, 4), gradients), path(known, draw(3, 4), gradients), rtol=1e-10)

    class Scaled(optim.LinearMemory):
        """A memory that answers with three times what it holds."""

        def read(self, state, gradient, view):
            return 3 * state

    def distance(prediction, value):
        return jnp.sum(jnp.abs(prediction - value))

    m, theta = 0.0, np.zeros((3, 4))
    found = path(optim.generalized_momentum(0.1, distance, Scaled(), rate=0.5), theta, gradients)
    for g, now in zip(gradients, found, strict=True):
        m = 0.9 * m - 0.5 * np.sign(m + g)
        theta = theta + 0.3 * m
        np.testing.assert_allclose(now, theta, rtol=1e-10)


def test_size_of_the_step_floor_and_iteration_of_m3_are_what_is_asked_for(x64):
    start, gradients, scales = draw(3, 5), draw(5, 3, 5, seed=1), (MomentumScale(1, 0.9),)
    found = path(optim.m3(0.1, scales, 0.99, update_rms=0.5, eps=0.3), start, gradients)
    expected = m3_average(start, gradients, 0.1 * 2.5, (0.9, 1.0), (), 0.99, eps=0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)
    ns = optim.NewtonSchulz(3, "cubic")
    tx, g = optim.scale_by_m3(scales, second_moment="none", update_rms=None, newton_schulz=ns), gradients[0]
    np.testing.assert_allclose(
        once(tx, {"w": jnp.array(g)}, params={"w": g})["w"], newton_schulz(g, 3, "cubic"), rtol=1e-9
    )


HUGE = {
    "m3": lambda: optim.m3(0.1),
    "delta": lambda: optim.delta_momentum(0.1),
    "delta that erases nothing": lambda: optim.delta_momentum(0.1, erase=0.0),
    "delta, scalar, that erases nothing": lambda: optim.delta_momentum(0.1, erase=0.0, form="scalar"),
    "dmgd, momentum": lambda: optim.dmgd(0.1, target="momentum"),
    "muon": lambda: optim.generalized_momentum(0.1, output=optim.muon_step),
}


@pytest.mark.parametrize("make", HUGE.values(), ids=HUGE)
def test_a_huge_but_finite_gradient_leaves_the_state_finite(make):
    tx, params, gradients = make(), {"w": jnp.ones((3, 5))}, draw(4, 3, 5).astype(np.float32)
    start, update = tx.init(params), jax.jit(tx.update)
    for size in (1e20, 1e30):
        state = start
        for scale in (1.0, size, 1.0, 1.0):
            updates, state = update({"w": np.float32(scale) * gradients[0]}, state, params)
            for leaf in jax.tree.leaves((updates, state)):
                assert np.all(np.isfinite(leaf))
