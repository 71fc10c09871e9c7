"""What the arguments of the momentum optimizers do, the same for all; mistakes in ``test_optimizer_mistakes.py``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references_momentum import newton_schulz
from test_momentum_optimizers import draw, once

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.optim import MomentumScale

ALIASES = {
    "m3": optim.m3,
    "delta_momentum": optim.delta_momentum,
    "preconditioned_momentum": optim.preconditioned_momentum,
    "generalized_momentum": optim.generalized_momentum,
    "dmgd": optim.dmgd,
}
aliases = pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
# What ``recipe`` and ``by_level`` do is the same for these and for the others, some of whose leaves have a fallback.
ALIKE = ("preconditioned_momentum", "generalized_momentum", "dmgd")
several = pytest.mark.parametrize(
    "alias", [pytest.param(a, marks=pytest.mark.slow if n in ALIKE else (), id=n) for n, a in ALIASES.items()]
)


PARAMS = {"kernel": draw(3, 4).astype(np.float32), "bias": draw(4).astype(np.float32)}
GRADIENTS = jax.tree.map(np.sin, PARAMS)


@functools.partial(jax.jit, static_argnums=0)
def stepped(alias, rate, decay, gradients, state, params):
    """Updates and state of one step, in one program per optimizer, whatever its learning rate and weight decay."""
    return alias(rate, weight_decay=decay).update(gradients, state, params)


def start(alias, params=PARAMS):
    """The state of an optimizer that decays, at whatever rate."""
    return alias(0.1, weight_decay=0.1).init(params)


def first(alias, rate, decay, params=PARAMS):
    """Updates of the first step by ``GRADIENTS``."""
    return stepped(alias, rate, decay, GRADIENTS, start(alias, params), params)[0]


def near(found, expected, rtol=1e-4):
    """All leaves, in float32."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), found, expected)


@aliases
def test_all_numbers_of_an_alias_can_be_injected(alias):
    injected = optax.inject_hyperparams(alias)(0.1, weight_decay=0.2)
    state = injected.init(PARAMS)
    assert {"learning_rate", "weight_decay"} <= state.hyperparams.keys()
    found, _ = jax.jit(injected.update)(GRADIENTS, state, PARAMS)
    near(found, first(alias, 0.1, 0.2), rtol=1e-5)


@aliases
def test_weight_decay_is_decoupled_masked_and_needs_the_parameters(alias):
    plain, decayed = first(alias, 0.1, 0.0), first(alias, 0.1, 0.5)
    near(decayed, {name: plain[name] - 0.05 * PARAMS[name] for name in PARAMS})
    masked = once(alias(0.1, weight_decay=0.5, mask={"kernel": False, "bias": True}), GRADIENTS, params=PARAMS)
    near(masked, {"kernel": plain["kernel"], "bias": decayed["bias"]})
    with pytest.raises(UserError, match="weight_decay needs the parameters"):
        jax.eval_shape(alias(0.1, weight_decay=0.5).update, GRADIENTS, start(alias))
    found, _ = jax.eval_shape(alias(0.1).update, GRADIENTS, jax.eval_shape(alias(0.1).init, PARAMS))
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, PARAMS), "without decay it can do without them"


def test_without_decay_the_parameters_change_nothing():
    tx = optim.delta_momentum(0.1)
    near(once(tx, GRADIENTS, tx.init(PARAMS)), first(optim.delta_momentum, 0.1, 0.0))


@several
def test_half_precision_parameters_decay_with_the_digits_of_float32(alias):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    plain, decayed = first(alias, 1.0, 0.0, params), first(alias, 1.0, 0.3, params)
    for name, p in params.items():
        difference = plain[name] - decayed[name]
        np.testing.assert_allclose(difference, 0.3 * np.asarray(p, np.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alias", [a for name, a in ALIASES.items() if name != "preconditioned_momentum"])
def test_a_fallback_has_the_leaves_that_are_no_matrices_whole(alias):
    found = once(alias(0.1, weight_decay=0.5, fallback=optax.sgd(0.3)), GRADIENTS, params=PARAMS)
    np.testing.assert_allclose(found["bias"], -0.3 * GRADIENTS["bias"], rtol=1e-6)
    near(found["kernel"], first(alias, 0.1, 0.5)["kernel"])


@aliases
def test_learning_rate_and_weight_decay_may_be_schedules(alias):
    fading, rising = optax.linear_schedule(0.2, 0.0, 4), optax.linear_schedule(0.0, 0.4, 2)
    state, update = (tx := alias(fading, weight_decay=rising)).init(PARAMS), jax.jit(tx.update)
    for step in range(3):
        updates, state = update(GRADIENTS, state, PARAMS)
        now = float(fading(step)), float(rising(step))
        before = start(alias)
        for _ in range(step + 1):
            expected, before = stepped(alias, *now, GRADIENTS, before, PARAMS)
        near(updates, expected)


@several
def test_every_optimizer_can_be_that_of_a_level(alias):
    kernels, given = {"fast": PARAMS, "slow": PARAMS}, draw(4, 3, 4, seed=1).astype(np.float32)
    tx = optim.by_level(lambda n: alias(0.1 * n, weight_decay=0.1), {"static": 1, "slow": 2})
    state, update, params = tx.init(kernels), jax.jit(tx.update), kernels
    for g in given:
        g = PARAMS | {"kernel": g}
        updates, state = update({"fast": g, "slow": g}, state, params)
        params = optax.apply_updates(params, updates)
    slow = alone(alias, 0.2, given.reshape(2, 2, 3, 4).mean(1))
    near(params, {"fast": alone(alias, 0.1, given), "slow": slow})


def alone(alias, rate, given):
    """Parameters after a step by each of these gradients of the kernel."""
    params, state = PARAMS, start(alias)
    for g in given:
        updates, state = stepped(alias, rate, 0.1, PARAMS | {"kernel": g}, state, params)
        params = optax.apply_updates(params, updates)
    return params


WIDE = {"m3": ("second", "momenta[1]", "nu"), "dmgd": ("precondition",)}
"""What keeps its digits in a state of half precision: moments that take up shares of a thousandth or so."""


@pytest.mark.parametrize("name", ALIASES)
def test_state_can_be_stored_in_half_precision(name):
    tx = ALIASES[name](0.1, state_dtype=jnp.bfloat16)
    updates, state = jax.eval_shape(tx.update, GRADIENTS, jax.eval_shape(tx.init, PARAMS), PARAMS)
    kinds = {False: set(), True: set()}
    for where, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            kinds[any(part in jax.tree_util.keystr(where) for part in WIDE.get(name, ()))].add(leaf.dtype.name)
    assert kinds == {False: {"bfloat16"}, True: {"float32"} if name in WIDE else set()}
    assert all(u.dtype == jnp.float32 for u in jax.tree.leaves(updates))


def test_slow_moments_in_a_half_precision_state_go_on_as_in_float32():
    gradients = 1 + 0.1 * draw(600, 8, 6)
    params = {"w": jnp.zeros((8, 6))}
    moments = []
    for dtype in (None, jnp.bfloat16):
        tx = optim.scale_by_m3(state_dtype=dtype)

        def run(state, g, tx=tx):
            return tx.update({"w": g}, state, params)[1], None

        state, _ = jax.lax.scan(run, tx.init(params), jnp.asarray(gradients, jnp.float32))
        moments.append((state.second["w"], state.momenta[1]["w"]))
    for exact, stored in zip(*moments, strict=True):
        np.testing.assert_allclose(stored, exact, rtol=1e-5)


def test_whole_numbers_and_rates_may_be_numpys(untyped):
    params = {"w": jnp.asarray(draw(3, 4), jnp.float32)}
    for given, plain in (
        (optim.m3(0.1, (MomentumScale(np.int64(1), np.float32(0.75)),)), optim.m3(0.1, (MomentumScale(1, 0.75),))),
        (optim.delta_momentum(np.float32(0.125), jnp.float32(0.75)), optim.delta_momentum(0.125, 0.75)),
    ):
        found, expected = (once(tx, params, params=params)["w"] for tx in (given, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_linear_memory_is_the_linear_one_whichever_way_it_is_asked_for():
    params = {"w": draw(3, 4).astype(np.float32)}
    named, given = (once(optim.dmgd(0.1, memory), params, params=params) for memory in ("linear", optim.LinearMemory()))
    np.testing.assert_array_equal(named["w"], given["w"])
    np.testing.assert_allclose(named["w"], -0.1 * params["w"], rtol=1e-6)


def test_m3_without_its_adamw_says_which_leaf_is_no_matrix():
    with pytest.raises(UserError, match=r"\['norm'\] of shape \(3,\), which is no matrix; declare its axes"):
        optim.scale_by_m3().init({"norm": jnp.ones(3)})


STACKED = {
    "m3": lambda labels: optim.m3(0.1, matrices=labels),
    "muon": lambda labels: optim.generalized_momentum(0.1, output=optim.muon_step, matrices=labels),
    "delta": lambda labels: optim.delta_momentum(0.1, erase=0.3, matrices=labels),
    "delta, scalar": lambda labels: optim.delta_momentum(0.1, erase=0.01, form="scalar", matrices=labels),
    "keyed": lambda labels: optim.generalized_momentum(0.1, optim.l2, optim.KeyedMemory(), rate=0.1, matrices=labels),
}


@pytest.mark.parametrize("make", STACKED.values(), ids=STACKED)
def test_stacked_layers_are_stepped_as_each_alone_whatever_the_optimizer(make):
    kernels, slopes = (draw(3, 3, 5, seed=seed).astype(np.float32) for seed in (0, 1))
    tx, params = make(optim.matrix_labels({"blocks": 1})), {"blocks": {"kernel": kernels}}
    state, update = tx.init(params), jax.jit(tx.update)
    for size in (1.0, -0.5):
        together, state = update({"blocks": {"kernel": size * slopes}}, state, params)
    tx = make(None)
    update = jax.jit(tx.update)
    for i in range(3):
        params = {"kernel": kernels[i]}
        state = tx.init(params)
        for size in (1.0, -0.5):
            alone, state = update({"kernel": size * slopes[i]}, state, params)
        np.testing.assert_allclose(together["blocks"]["kernel"][i], alone["kernel"], rtol=1e-4, atol=1e-6)


def test_embeddings_are_matrices_for_delta_momentum_and_not_for_m3():
    params = {"embedding": draw(4, 3).astype(np.float32)}
    as_kernel = {"kernel": params["embedding"]}
    tx = optim.delta_momentum(0.1, erase=0.3)
    twice = jax.jit(lambda p: tx.update(p, tx.update(p, tx.init(p), p)[1], p)[0])
    found, expected = map(twice, (params, as_kernel))
    np.testing.assert_array_equal(*map(jax.tree.leaves, (found, expected)))
    adam = once(optim.m3(0.1), params, params=params)["embedding"]
    np.testing.assert_allclose(adam, -0.1 * np.sign(params["embedding"]), rtol=1e-4)


def test_a_preconditioner_gets_the_parameters_and_extra_arguments():
    def update(updates, state, params=None, *, factor, **extra):
        del extra
        return jax.tree.map(lambda g, p: factor * (g + p), updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params = optim.generalized_momentum(1.0, precondition=inner), {"w": np.ones((2, 3), np.float32)}
    gradients = jax.tree.map(lambda p: 2 * p, params)
    found, _ = jax.jit(tx.update)(gradients, tx.init(params), params, factor=5.0)
    np.testing.assert_allclose(jax.tree.leaves(found)[0], -15.0)


def test_an_averaged_second_moment_is_corrected_for_its_start_where_the_step_is_divided_by_it():
    g = draw(3, 4).astype(np.float32)
    tx = optim.scale_by_m3((MomentumScale(1, 0.9),), second_moment="literal")
    np.testing.assert_allclose(once(tx, {"w": g}, params={"w": g})["w"], newton_schulz(g) / np.abs(g), rtol=1e-4)


def test_functions_that_change_the_shape_are_refused():
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(UserError, match=r"output makes \(4, 3\) of matrices \(3, 4\)"):
        once(optim.generalized_momentum(1.0, output=lambda x: x.mT), params, params=params)
