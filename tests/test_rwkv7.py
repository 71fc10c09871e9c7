"""Time mix and channel mix of RWKV-7: against numpy, in any cut, with padding, by gradients, and at their start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_rwkv7 as reference
from references import sigmoid

from hope_jax.errors import UserError
from hope_jax.nn.axes import decays, flat
from hope_jax.nn.config import PassesOn
from hope_jax.nn.mixers.channel_mix import ChannelMixConfig
from hope_jax.nn.mixers.rwkv7 import RWKV7Config

B, T, D, HEADS = 2, 21, 8, 2
MIXERS = {
    "time mix": RWKV7Config(D // HEADS, decay_rank=2, rate_rank=3, share_rank=2, gate_rank=2, impl="chunked"),
    "channel mix": ChannelMixConfig(hidden=12),
}


def drawn(config):
    """The layer, parameters all over the place (zeros would hide mistakes), and inputs."""
    module, rng = config.build(D, jnp.float64), np.random.default_rng(0)
    u = jnp.zeros((1, 1, D), jnp.float64)
    given = u, module.init_state(1, 1), None, *passed(config, u)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    return module, jax.tree.map(lambda x: 0.6 * rng.normal(size=x.shape), shapes), rng.normal(size=(B, T, D))


def passed(config, u):
    """What a layer that is the first is given beside its input and its state."""
    return [config.nothing_passed(u)] if isinstance(config, PassesOn) else []


def expected(name, params, u):
    """Outputs of each sequence alone, and the final memories where there are some."""
    if name == "channel mix":
        return np.stack([reference.channel_mix(params, x) for x in u]), None
    return (np.stack(parts) for parts in list(zip(*(reference.time_mix(params, x, HEADS) for x in u), strict=True))[:2])


@pytest.mark.parametrize("name", MIXERS)
def test_the_layer_is_its_equations_in_any_cut_and_padding_leaves_no_trace(x64, name):
    module, params, u = drawn(MIXERS[name])
    outputs, memory = expected(name, params, u)
    call = jax.jit(lambda u, *given: module.apply({"params": params}, u, *given, *passed(MIXERS[name], u))[:2])
    state, at = module.init_state(B, T), 0
    for count in (7, 1, 0, 8, 5):
        padded = np.full((B, 8, D), 7.0)
        padded[:, :count] = u[:, at : at + count]
        y, state = call(padded, state, np.int32(count))
        np.testing.assert_allclose(y[:, :count], outputs[:, at : at + count], rtol=1e-9, atol=1e-9)
        at += count
    np.testing.assert_array_equal(state.last[:, 0], u[:, -1])
    if memory is not None:
        np.testing.assert_allclose(state.memory, memory, rtol=1e-9, atol=1e-9)


@functools.cache
def pulled(name):
    """Compiled (parameters, input, weights of the outputs) -> (outputs, gradient of the input), fresh sequences."""
    module = drawn(MIXERS[name])[0]

    @jax.jit
    def pulled(params, u, weights):
        fresh = module.init_state(*u.shape[:2]), None, *passed(MIXERS[name], u)
        y, pull = jax.vjp(lambda u: module.apply({"params": params}, u, *fresh)[0], u)
        return y, pull(weights)[0]

    return pulled


@pytest.mark.parametrize("name", MIXERS)
def test_an_output_depends_on_its_own_past_alone_by_gradients(x64, name):
    _, params, u = drawn(MIXERS[name])
    t, u, weights = 5, u[:, :8], np.zeros((B, 8, D))
    weights[0, t] = np.arange(1.0, D + 1)
    outputs, gradient = pulled(name)(params, u, weights)
    np.testing.assert_allclose(outputs, next(iter(expected(name, params, u))), rtol=1e-9, atol=1e-9)
    reach = np.max(np.abs(np.asarray(gradient)), axis=2)
    first = t - 1 if name == "channel mix" else 0
    assert np.all(reach[0, first : t + 1] > 1e-9)
    assert np.all(reach[0, t + 1 :] == 0) and np.all(reach[0, :first] == 0) and np.all(reach[1] == 0)


def test_without_rate_it_is_gated_linear_attention(x64):
    """a = 0 erases nothing; then every read is a plain sum over the past."""
    _, params, u = drawn(MIXERS["time mix"])
    u = u[:, :8]
    params["rate"]["offset"] = np.full(D, -1e9)
    params["bonus"], params["out"]["kernel"] = np.zeros((HEADS, D // HEADS)), np.eye(D)
    y, _ = pulled("time mix")(params, u, np.zeros_like(u))
    x = {n: u[1] + (reference.shifted(u[1]) - u[1]) * params[f"mix_{n}"] for n in ("receptance", "key", "value")}
    q, k, v = (x[n] @ params[n]["kernel"] for n in x)
    decayed = u[1] + (reference.shifted(u[1]) - u[1]) * params["mix_decay"]
    w = np.exp(-np.exp(-0.5) * sigmoid(reference.low_rank(params["decay"], decayed, np.tanh)))
    heads = zip(*(np.split(z, HEADS, axis=1) for z in (k * (1 - params["key_scale"]), v, q, w)), strict=True)
    reads = np.stack([reference.gated_linear_attention(*head) for head in heads], axis=1)
    normed = (reads - reads.mean(2, keepdims=True)) / np.sqrt(reads.var(2, keepdims=True) + 64e-5)
    normed = normed.reshape(8, D) * params["norm"]["scale"] + params["norm"]["bias"]
    g = reference.low_rank(params["gate"], u[1] + (reference.shifted(u[1]) - u[1]) * params["mix_gate"], sigmoid)
    np.testing.assert_allclose(y[1], normed * g, rtol=1e-9, atol=1e-9)


def started(config):
    """The layer in bfloat16, and its parameters at their start."""
    module = config.build(D, jnp.bfloat16)
    u, fresh = jnp.ones((1, 2, D), jnp.bfloat16), module.init_state(1, 2)
    given = u, fresh, None, *passed(config, u)
    (outputs, state, *_), variables = jax.jit(module.init_with_output)(jax.random.key(0), *given)
    assert [(x.shape, x.dtype) for x in state] == [(x.shape, x.dtype) for x in fresh]
    assert outputs.dtype == jnp.bfloat16 and not np.any(np.asarray(outputs, np.float32))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
    return module, variables["params"]


def decayed(module, params):
    """Names of the parameters that weight decay takes; every name of an axis is known."""
    flat(module.axes())
    leaves = jax.tree_util.tree_leaves_with_path(decays(module.axes())(params))
    return [path[0].key for path, on in leaves if on]


def test_the_time_mix_starts_as_published_and_only_its_maps_decay():
    module, params = started(MIXERS["time mix"])
    assert decayed(module, params) == ["key", "out", "receptance", "value"]
    ramp, wave = np.arange(D) / (D - 1), np.tile([-1, -1 / 9, 1 / 9, 1], HEADS)
    expected = 6 * ramp ** (1 + 0.5**0.3) - 5.5 + 2.5 * wave
    np.testing.assert_allclose(params["decay"]["offset"], expected, rtol=1e-5)
    np.testing.assert_allclose(params["rate"]["offset"], 0.3 * wave + 0.4 * ramp - 0.39, rtol=1e-5)
    np.testing.assert_allclose(params["share"]["offset"], 0.93 - 0.4 * ramp, rtol=1e-5)
    np.testing.assert_allclose(params["mix_decay"], 1 - (np.arange(D) / D) ** 0.45, rtol=1e-5)
    strengths = np.linalg.svd(params["receptance"]["kernel"], compute_uv=False)
    assert np.all((strengths > 0.3) & (strengths < 1.3))


def test_the_channel_mix_starts_as_published_and_only_its_maps_decay():
    module, params = started(MIXERS["channel mix"])
    assert decayed(module, params) == ["key", "value"]
    np.testing.assert_allclose(params["mix"], 1 - (np.arange(D) / D) ** 0.0625, rtol=1e-5)


def test_ranks_are_those_of_the_older_releases():
    ranks = {width: tuple(RWKV7Config().ranks(width).values()) for width in (192, 768, 1024, 2048)}
    assert ranks == {192: (32,) * 4, 768: (64, 64, 32, 128), 1024: (64, 64, 32, 160), 2048: (96, 96, 64, 256)}
    assert RWKV7Config(gate_rank=128).ranks(1024)["gate"] == 128


WRONG = {
    "head_dim=64 does not divide width 100": lambda: RWKV7Config().build(100, jnp.float32),
    "head_dim is 1": lambda: RWKV7Config(head_dim=1),
    "gate_rank is 0": lambda: RWKV7Config(gate_rank=0),
    "impl is 'fast'": lambda: RWKV7Config(impl="fast"),
    "hidden is 0": lambda: ChannelMixConfig(0),
}


@pytest.mark.parametrize(("message", "make"), WRONG.items(), ids=WRONG)
def test_wrong_configurations_say_what_came(untyped, message, make):
    with pytest.raises(UserError, match=message):
        make()
