"""What the arguments of the momentum optimizers do, the same for all of them, and mistakes in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_momentum_optimizers import draw, once, path

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


@aliases
def test_all_numbers_of_an_alias_can_be_injected(alias):
    params = {"w": jnp.asarray(draw(3, 4), jnp.float32), "b": jnp.ones(3)}
    plain, injected = alias(0.1, weight_decay=0.2), optax.inject_hyperparams(alias)(0.1, weight_decay=0.2)
    state = injected.init(params)
    assert {"learning_rate", "weight_decay"} <= state.hyperparams.keys()
    found, _ = jax.jit(injected.update)(params, state, params)
    expected, _ = plain.update(params, plain.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@aliases
def test_weight_decay_is_decoupled_masked_and_needs_the_parameters(alias):
    kernels = [jnp.asarray(draw(3, 4, seed=seed), jnp.float32) for seed in range(4)]
    params = {"kernel": kernels[0], "other": kernels[1], "bias": kernels[2][0], "free": kernels[3][0]}
    grads = jax.tree.map(jnp.sin, params)
    mask = {"kernel": True, "other": False, "bias": True, "free": False}
    both = (alias(0.1), alias(0.1, weight_decay=0.5, mask=mask))
    plain, decayed = (once(tx, grads, params=params) for tx in both)
    for name, decays in mask.items():
        expected = plain[name] - (0.05 * params[name] if decays else 0)
        np.testing.assert_allclose(decayed[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
    with pytest.raises(UserError, match="weight_decay needs the parameters"):
        tx = alias(0.1, weight_decay=0.5)
        tx.update(grads, tx.init(params))
    found, _ = alias(0.1).update(grads, alias(0.1).init(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, plain)


@aliases
def test_half_precision_parameters_decay_with_the_digits_of_float32(alias):
    params = {"kernel": jnp.asarray(draw(3, 4), jnp.bfloat16), "bias": jnp.asarray(draw(4), jnp.bfloat16)}
    grads = jax.tree.map(lambda p: jnp.sin(p.astype(jnp.float32)), params)
    plain, decayed = (once(alias(1.0, weight_decay=decay), grads, params=params) for decay in (0.0, 0.3))
    for name, p in params.items():
        difference = plain[name] - decayed[name]
        np.testing.assert_allclose(difference, 0.3 * p.astype(jnp.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alias", [a for name, a in ALIASES.items() if name != "preconditioned_momentum"])
def test_a_fallback_has_the_leaves_that_are_no_matrices_whole(alias):
    params = {"kernel": jnp.asarray(draw(3, 4), jnp.float32), "bias": jnp.asarray(draw(4), jnp.float32)}
    grads = jax.tree.map(jnp.sin, params)
    found = once(alias(0.1, weight_decay=0.5, fallback=optax.sgd(0.3)), grads, params=params)
    np.testing.assert_allclose(found["bias"], -0.3 * grads["bias"], rtol=1e-6)
    alone = once(alias(0.1, weight_decay=0.5), {"kernel": grads["kernel"]}, params={"kernel": params["kernel"]})
    np.testing.assert_allclose(found["kernel"], alone["kernel"], rtol=1e-5, atol=1e-6)


@aliases
def test_learning_rate_and_weight_decay_may_be_schedules(alias):
    params = {"kernel": jnp.asarray(draw(3, 4), jnp.float32), "bias": jnp.ones(4)}
    fading, rising = optax.linear_schedule(0.2, 0.0, 4), optax.linear_schedule(0.0, 0.4, 2)
    state = (tx := alias(fading, weight_decay=rising)).init(params)
    for step in range(3):
        updates, state = tx.update(params, state, params)
        fixed, before = alias(float(fading(step)), weight_decay=float(rising(step))), None
        before = fixed.init(params)
        for _ in range(step + 1):
            expected, before = fixed.update(params, before, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected)


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


WIDE = {"m3": ("second", "momenta[1]", "nu"), "dmgd": ("precondition",)}
"""What keeps its digits in a state of half precision: moments that take up shares of a thousandth or so."""


@pytest.mark.parametrize("name", ALIASES)
def test_state_can_be_stored_in_half_precision(name):
    params = {"w": jnp.asarray(draw(3, 4), jnp.float32), "b": jnp.ones(3)}
    tx = ALIASES[name](0.1, state_dtype=jnp.bfloat16)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
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


@aliases
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(learning_rate=-0.1), "learning_rate is -0.1"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(learning_rate=0.1, weight_decay="0.1"), "weight_decay is '0.1'; expected a number"),
        (dict(learning_rate=0.1, weight_decay=None), "weight_decay is None; expected a number"),
        (dict(weight_decay=-1.0), "weight_decay is -1"),
        (dict(weight_decay=1j), "weight_decay is 1j; expected a number or a schedule"),
        (dict(learning_rate=float("inf")), "learning_rate is inf; expected 0 or more and finite"),
        (dict(state_dtype=jnp.int32), "state_dtype is"),
        (dict(state_dtype="bf16"), "state_dtype is 'bf16'"),
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
        (lambda: optim.m3(0.1, (MomentumScale(1, 1.0),)), "decay of scale 1 is 1"),
        (lambda: optim.m3(0.1, second_decay=1.0), "second_decay is 1; expected 0 or more and below 1"),
        (lambda: optim.m3(0.1, (MomentumScale(1, 0.999),), state_dtype=jnp.bfloat16), "fast scale is 0.999"),
        (lambda: optim.m3(0.1, (0.9, 0.99)), "scales is"),
        (lambda: optim.m3(0.1, MomentumScale(1, 0.9)), "scales is MomentumScale"),
        (lambda: optim.m3(0.1, second_decay=lambda _: 0.9), "second_decay is <function"),
        (lambda: optim.m3(0.1, newton_schulz=optim.orthogonalize), "newton_schulz is <function"),
        (lambda: optim.m3(0.1, fallback=1e-3), "fallback is 0.001; expected an optax transformation"),
        (lambda: MomentumScale(True, 0.9), "period is True"),
        (lambda: MomentumScale(1, 0.9, -float("inf")), "weight is -inf; expected any number and finite"),
        (lambda: optim.m3(0.1, accumulate="mean"), "accumulate is 'mean'"),
        (lambda: optim.m3(0.1, second_moment="adam"), "second_moment is 'adam'"),
        (lambda: optim.m3(0.1, update_rms=-1.0), "update_rms is -1"),
        (lambda: optim.m3(0.1, eps=0.0), "eps is 0; expected above 0"),
        (lambda: optim.learned_preconditioner(eps=0.0), "eps is 0; expected above 0"),
        (lambda: optim.delta_momentum(0.1, decay=1.1), "decay is 1.1"),
        (lambda: optim.learned_preconditioner(0.0), "rate is 0; expected above 0 and up to 1"),
        (lambda: optim.delta_momentum(0.1, erase=-1.0), "erase is -1"),
        (lambda: optim.delta_momentum(0.1, form="grams"), "form is 'grams'"),
        (lambda: optim.preconditioned_momentum(0.1, -0.1), "decay is -0.1"),
        (lambda: optim.learned_preconditioner(2.0), "rate is 2"),
        (lambda: optim.generalized_momentum(0.1, retention=1.1), "retention is 1.1"),
        (lambda: optim.generalized_momentum(0.1, rate=-1.0), "rate is -1"),
        (lambda: optim.generalized_momentum(0.1, rate=lambda _: 1.0), "rate is <function"),
        (lambda: optim.generalized_momentum(0.1, "l2"), "objective is 'l2'; expected a function"),
        (lambda: optim.generalized_momentum(0.1, memory="linear"), "memory is 'linear'; expected an object"),
        (lambda: optim.generalized_momentum(0.1, memory=optim.LinearMemory), "memory is <class"),
        (lambda: optim.generalized_momentum(0.1, output="muon"), "output is 'muon'; expected a function"),
        (lambda: optim.generalized_momentum(0.1, precondition=jnp.sign), "precondition is <"),
        (lambda: optim.delta_momentum(0.1, 0.999, state_dtype=jnp.bfloat16), "decay is 0.999, which bfloat16 cannot"),
        (lambda: optim.dmgd(0.1, target=jnp.sign), "target is <"),
        (lambda: optim.dmgd(0.1, memory=None), "memory is None; expected an object"),
        (lambda: optim.delta_momentum(0.1, jnp.float32(0.999), state_dtype=jnp.bfloat16), "bfloat16 cannot hold"),
        (lambda: optim.dmgd(0.1, memory=optim.KeyedMemory()), "KeyedMemory's values"),
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
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(UserError, match=r"gradient \['w'\] of type int32"):
        alias(0.1).update({"w": jnp.ones((2, 2), int)}, alias(0.1).init(params), params)


def test_whole_numbers_and_rates_may_be_numpys(untyped):
    params = {"w": jnp.asarray(draw(3, 4), jnp.float32)}
    for given, plain in (
        (optim.m3(0.1, (MomentumScale(np.int64(1), np.float32(0.75)),)), optim.m3(0.1, (MomentumScale(1, 0.75),))),
        (optim.delta_momentum(np.float32(0.125), jnp.float32(0.75)), optim.delta_momentum(0.125, 0.75)),
    ):
        found, expected = (once(tx, params, params=params)["w"] for tx in (given, plain))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_linear_memory_is_the_linear_one_whichever_way_it_is_asked_for():
    params = {"w": jnp.asarray(draw(3, 4), jnp.float32)}
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
    kernels, slopes = (jnp.asarray(draw(7, 3, 5, seed=seed), jnp.float32) for seed in (0, 1))
    tx, params = make(optim.matrix_labels({"blocks": 1})), {"blocks": {"kernel": kernels}}
    state, update = tx.init(params), jax.jit(tx.update)
    for size in (1.0, -0.5):
        together, state = update({"blocks": {"kernel": size * slopes}}, state, params)
    tx = make(None)
    update = jax.jit(tx.update)
    for i in range(7):
        params = {"kernel": kernels[i]}
        state = tx.init(params)
        for size in (1.0, -0.5):
            alone, state = update({"kernel": size * slopes[i]}, state, params)
        np.testing.assert_allclose(together["blocks"]["kernel"][i], alone["kernel"], rtol=1e-4, atol=1e-6)


def test_embeddings_are_matrices_for_delta_momentum_and_not_for_m3():
    params = {"embedding": jnp.asarray(draw(4, 3), jnp.float32)}
    as_kernel = {"kernel": params["embedding"]}
    tx = optim.delta_momentum(0.1, erase=0.3)
    found, expected = (tx.update(p, tx.update(p, tx.init(p), p)[1], p)[0] for p in (params, as_kernel))
    np.testing.assert_array_equal(*map(jax.tree.leaves, (found, expected)))
    adam = once(optim.m3(0.1), params, params=params)["embedding"]
    np.testing.assert_allclose(adam, -0.1 * jnp.sign(params["embedding"]), rtol=1e-4)


def test_a_preconditioner_gets_the_parameters_and_extra_arguments():
    def update(updates, state, params=None, *, factor, **extra):
        del extra
        return jax.tree.map(lambda g, p: factor * (g + p), updates, params), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params = optim.generalized_momentum(1.0, precondition=inner), {"w": jnp.ones((2, 3))}
    found, _ = tx.update({"w": 2 * jnp.ones((2, 3))}, tx.init(params), params, factor=5.0)
    np.testing.assert_allclose(jax.tree.leaves(found)[0], -15.0)


def test_an_averaged_second_moment_is_corrected_for_its_start_where_the_step_is_divided_by_it():
    g = jnp.asarray(draw(3, 4), jnp.float32)
    tx = optim.scale_by_m3((MomentumScale(1, 0.9),), second_moment="literal")
    np.testing.assert_allclose(once(tx, {"w": g}, params={"w": g})["w"], optim.orthogonalize(g) / jnp.abs(g), rtol=1e-4)


def test_functions_that_change_the_shape_are_refused():
    params = {"w": jnp.ones((3, 4))}
    with pytest.raises(UserError, match=r"output makes \(4, 3\) of matrices \(3, 4\)"):
        once(optim.generalized_momentum(1.0, output=lambda x: x.mT), params, params=params)
