"""Stable and strong, side by side (SPEC 2.6, 2.7): a memory that stores nothing would be perfectly stable."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.errors import UserError
from hope_jax.memory import architectures
from hope_jax.memory.rule import Gates, Rule
from hope_jax.memory.scan import scan as scan_rule
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig


def fresh_call(module, u):
    """A call on a fresh sequence."""
    return module(u, module.init_state(u.shape[0], u.shape[1]))


@pytest.mark.slow
def test_at_initialisation_4096_tokens_of_three_streams_stay_bounded():
    width, length = 64, 4096
    module, rng = SelfModifyingConfig(heads=1).build(width, jnp.float32), np.random.default_rng(0)
    table = rng.normal(size=(32, width))
    streams = rng.normal(size=(length, width)), table[rng.integers(32, size=length)], np.tile(table[0], (length, 1))
    u = jnp.asarray(np.stack(streams), jnp.float32)
    params = jax.jit(functools.partial(module.init, method=fresh_call))(jax.random.key(0), u[:, :1])
    y, state = jax.jit(functools.partial(module.apply, method=fresh_call))(params, u)
    assert np.all(np.isfinite(y))
    assert max(float(jnp.max(jnp.abs(w))) for w in jax.tree.leaves(state.fast)) < 5


def newest_error(rule, gates, hidden, size=64, pairs=64):
    """Error at the newest 16 of 64 random pairs, after writing them all relative to before; 1: nothing is stored."""

    @jax.jit
    def one(key):
        first, second, third = jax.random.split(key, 3)
        weights = rule.architecture.init(first, size, size, hidden)
        k, v = (architectures.unit(jax.random.normal(x, (pairs, size))) for x in (second, third))
        of_tokens = jax.tree.map(lambda g: g * jnp.ones(pairs), gates)
        fast, _ = scan_rule(rule, weights, rule.start(weights), k, v, k, of_tokens, np.zeros((), np.int32))

        def error(w):
            return jnp.mean(jnp.linalg.norm(rule.architecture.apply(w, k) - v, axis=-1)[-16:])

        return error(fast.running) / error(weights)

    return np.mean([one(jax.random.key(i)) for i in range(4)])


def test_a_bold_memory_stores_what_it_is_told():
    rule = Rule(architectures.residual_mlp, dgd_scope="per_layer", period=16)
    assert newest_error(rule, Gates(1.0, 1.0, None), hidden=256) < 0.65


def test_the_memory_that_ships_stores_less_than_a_bold_one_but_not_nothing():
    """Rates are bounded, for stable gradients (docs/defaults.md). The largest stores over 1.7 times as much."""
    config = SelfModifyingConfig(heads=1)
    rule, expit = dataclasses.replace(config.spec().rules.memory, self_values=False), jax.nn.sigmoid
    gates = Gates(config.rate_max * expit(config.rate_bias), 1 - 1 / config.horizon, expit(config.momentum_bias))
    first = 1 - newest_error(rule, gates, hidden=64 * config.hidden)
    largest = 1 - newest_error(rule, gates._replace(rate=config.rate_max), hidden=64 * config.hidden)
    assert first > 0.06 and largest > 1.7 * first


@pytest.mark.parametrize("momentum", [True, False])
def test_a_momentum_decay_belongs_to_a_rule_with_momentum(momentum):
    rule, tokens, gate = Rule(architectures.matrix, momentum=momentum), jnp.ones((2, 3)), jnp.ones(2)
    fast, gates = rule.start((jnp.zeros((3, 3)),)), Gates(gate, gate, None if momentum else gate)
    with pytest.raises(UserError, match=f"momentum_decay is {'None' if momentum else 'given'}"):
        scan_rule(rule, fast.running, fast, tokens, tokens, tokens, gates, np.zeros((), np.int32))


# (erases, momentum decay or None, damped) -> factor at rate 0.05, 0.1, 0.5; a linear memory with period 16.
FACTORS = {
    "delta, no momentum": (True, None, True, (0.08, 0.57, 0.997)),
    "delta, damped momentum": (True, 0.9, True, (0.46, 0.43, 0.46)),
    "delta, undamped momentum": (True, 0.9, False, (1.8, 4.2, 7.4)),
    "gradient descent": (False, None, True, (0.20, 0.60, 7.0)),
}


@functools.partial(jax.jit, static_argnames=("erases", "momentum", "damped"))
def one_period(rate, erases, momentum, damped):
    """What a period of 16 equal tokens does to (deviation of the memory, momentum): a linear map."""
    scope, momentum_on = "per_layer" if erases else "none", momentum is not None
    rule = Rule(architectures.matrix, dgd_scope=scope, momentum=momentum_on, damped=damped)
    one = jnp.ones(16)
    gates = Gates(rate * one, one, momentum * one if momentum_on else None)

    def after(m, s):
        fast = rule.start((m * jnp.ones((1, 1)),))
        fast = fast._replace(momentum=(s * jnp.ones((1, 1)),)) if momentum_on else fast
        streams = (one[:, None], 0 * one[:, None], one[:, None])
        fast, _ = scan_rule(rule, (jnp.zeros((1, 1)),), fast, *streams, gates, np.zeros((), np.int32))
        return jnp.concatenate([w.ravel() for w in (*fast.running, *fast.momentum)])

    columns = [after(1.0, 0.0), after(0.0, 1.0)] if momentum_on else [after(1.0, 0.0)]
    return jnp.stack(columns, axis=1)


@pytest.mark.parametrize("row", FACTORS.values(), ids=FACTORS)
def test_the_error_on_one_repeated_token_shrinks_or_grows_by_the_published_factor(x64, row):
    *setting, factors = row
    for rate, factor in zip((0.05, 0.1, 0.5), factors, strict=True):
        found = np.max(np.abs(np.linalg.eigvals(one_period(rate, *setting))))
        assert found == pytest.approx(factor, rel=0.02, abs=0.006)
