"""Mistakes in the arguments and parameters of the momentum optimizers are refused by name."""

import jax.numpy as jnp
import optax
import pytest
from test_optimizer_arguments import aliases

from hope_jax import optim
from hope_jax.errors import UserError
from hope_jax.optim import MomentumScale


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
