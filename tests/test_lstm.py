"""LSTM and SRWM against numpy, values and gradients; cuts, padding, causality, examples by hand, start values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_lstm
from references import derivative

from hope_jax.errors import UserError
from hope_jax.nn import axes as logical
from hope_jax.nn import token_scan
from hope_jax.nn.mixers.lstm import LSTMConfig
from hope_jax.nn.mixers.srwm import SRWMConfig

WIDTH, HEADS, B, T = 8, 2, 2, 21
CONFIGS = {"lstm": LSTMConfig(), "srwm": SRWMConfig(HEADS)}
mixers = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Sequences of the tests have several blocks, the last of them not full."""
    monkeypatch.setattr(token_scan, "BLOCK", 8)


def fresh_call(module, u):
    """A call on a fresh sequence."""
    return module(u, module.init_state(*u.shape[:2]))


@functools.partial(jax.jit, static_argnums=0)
def started(module, u):
    """The variables that the module starts with."""
    return module.init(jax.random.key(0), u, method=fresh_call)


@functools.cache
def made(name):
    """A mixer, parameters away from their starts, and inputs."""
    module, rng = CONFIGS[name].build(WIDTH, jnp.float64), np.random.default_rng(1)
    u = rng.normal(size=(B, T, WIDTH))
    shapes = jax.eval_shape(functools.partial(module.init, method=fresh_call), jax.random.key(0), u[:, :1])
    return module, jax.tree.map(lambda x: 0.4 * rng.normal(size=x.shape), shapes), u


@functools.cache
def pulled(name):
    """Compiled (params, u, cotangent of the outputs) -> (outputs, gradients of params and u, final state)."""
    module = made(name)[0]

    @jax.jit
    def pulled(params, u, cotangent):
        call = functools.partial(module.apply, method=fresh_call)
        y, pull, state = jax.vjp(call, params, u, has_aux=True)
        return y, *pull(cotangent), state

    return pulled


def reference(name, params, x):
    """Outputs and state of one sequence; the state as a list of the leaves of ours."""
    if name == "srwm":
        y, end = references_lstm.srwm(params, x)
        return y, [end]
    y, *end = references_lstm.lstm(params, x, np.zeros(WIDTH), np.zeros(WIDTH))
    return y, end


@mixers
def test_outputs_state_and_gradients_are_those_of_the_equations(x64, name):
    _, variables, u = made(name)
    cotangent, *direction = (np.random.default_rng(10 + i).normal(size=u.shape) for i in range(2))
    y, of_params, of_u, state = pulled(name)(variables, u, cotangent)
    params = jax.tree.map(np.asarray, variables["params"])
    for b in range(B):
        expected, end = reference(name, params, np.asarray(u[b]))
        np.testing.assert_allclose(y[b], expected, rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(jax.tree.leaves(state), end, strict=True):
            np.testing.assert_allclose(ours[b], theirs, rtol=1e-9, atol=1e-12)

    leaves, tree = jax.tree.flatten(params)
    steps = [np.random.default_rng(20 + i).normal(size=w.shape) for i, w in enumerate(leaves)]
    flat = {str(i): w for i, w in enumerate(leaves)} | {"u": np.asarray(u)}

    def loss(u, **leaves):
        tree_of = jax.tree.unflatten(tree, [leaves[str(i)] for i in range(len(leaves))])
        return sum(np.sum(cotangent[b] * reference(name, tree_of, u[b])[0]) for b in range(B))

    found = sum(np.sum(g * s) for g, s in zip(jax.tree.leaves(of_params), steps, strict=True))
    found += np.sum(of_u * direction[0])
    moved = {str(i): s for i, s in enumerate(steps)} | {"u": direction[0]}
    np.testing.assert_allclose(found, derivative(loss, flat, moved), rtol=1e-9)


@mixers
def test_any_cut_is_the_whole_and_padding_leaves_no_trace(x64, name):
    module, variables, u = made(name)
    whole, *_, end = pulled(name)(variables, u, np.zeros_like(u))
    call = jax.jit(module.apply)
    state = module.apply(variables, B, T, method="init_state")
    outputs, at = [], 0
    for count, padding in ((10, 3), (1, 12), (8, 5), (1, None), (1, None)):
        piece, real = u[:, at : at + count], None
        if padding is not None:
            piece, real = np.concatenate([piece, u[:, :padding]], axis=1), np.int32(count)
        y, state = call(variables, piece, state, real)
        outputs.append(y[:, :count])
        at += count
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, end)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@mixers
def test_outputs_depend_on_their_own_past_alone_by_gradients(x64, name):
    _, variables, u = made(name)
    cotangent = np.zeros(u.shape)
    cotangent[0, 13] = 1
    _, _, of_u, _ = pulled(name)(variables, u, cotangent)
    moved = np.max(np.abs(of_u), axis=-1)
    assert np.all(moved[0, :14] > 0)
    assert np.all(moved[0, 14:] == 0) and np.all(moved[1] == 0)


def test_srwm_of_two_tokens_by_hand(x64):
    """q = (1/2, 1/2), k = (3/4, 1/4), eta = 1/2: W_y moves by (q - k) k^T / 2 and is read before it moves."""
    module, by_hand = SRWMConfig(1).build(2, jnp.float64), np.array([[np.log(3), 0], [0, 0]])
    starts = {"start_y": np.eye(2), "start_q": np.zeros((2, 2)), "start_k": by_hand, "start_rates": np.zeros((2, 4))}
    params = {name: w[None] for name, w in starts.items()} | {"out": {"kernel": np.eye(2)}}
    call = jax.jit(functools.partial(module.apply, method=fresh_call))
    y, _ = call({"params": params}, np.array([[[1.0, 0], [1, 0]]]))
    np.testing.assert_allclose(y[0], [[1, 0], [1 - 3 / 32, 3 / 32]], rtol=1e-12)


def test_srwm_without_rates_is_a_linear_map(x64):
    _, variables, u = made("srwm")
    u, rates = u.copy(), np.zeros((HEADS, WIDTH // HEADS, 4))
    u[..., :: WIDTH // HEADS], rates[:, 0] = 1, -800  # the first feature of every head switches the rates off
    params = variables["params"] | {"start_rates": rates}
    y, *_ = pulled("srwm")({"params": params}, u, np.zeros_like(u))
    reads = np.einsum("bthk,hkv->bthv", u.reshape(B, T, HEADS, -1), params["start_y"]).reshape(u.shape)
    np.testing.assert_allclose(y, reads @ params["out"]["kernel"], rtol=1e-12)


def test_start_values_are_the_published_ones():
    width, heads = 256, 4
    u = jnp.zeros((1, 1, width), jnp.bfloat16)
    lstm = started(LSTMConfig().build(width, jnp.bfloat16), u)["params"]
    for name, w in lstm.items():
        assert np.abs(w).max() == pytest.approx(1 / 16, rel=0.02) and np.std(w) == pytest.approx(3**-0.5 / 16, rel=0.06)
        assert w.dtype == jnp.float32, name
    srwm = started(SRWMConfig(heads).build(width, jnp.bfloat16), u)["params"]
    for name, mean, std in (("y", 0, 1), ("q", 0, 0.01), ("k", 0, 1), ("rates", -1, 1)):
        w = np.asarray(srwm[f"start_{name}"])
        assert w.dtype == np.float32
        assert np.mean(w) == pytest.approx(mean, abs=0.02) and np.std(w) == pytest.approx(std / 8, rel=0.06), name
    assert np.abs(srwm["out"]["kernel"]).max() == pytest.approx(1 / 16, rel=0.01)


@mixers
def test_states_are_float32_and_stay_bounded_in_a_bfloat16_model(name):
    module, length = CONFIGS[name].build(WIDTH, jnp.bfloat16), 8_192
    u = np.random.default_rng(1).normal(size=(3, length, WIDTH)).astype(jnp.bfloat16)
    u[1], u[2] = u[1, :1], u[2, np.arange(length) % 5]  # noise, one token, five tokens in turn
    variables = started(module, u[:, :1])
    y, state = jax.jit(functools.partial(module.apply, method=fresh_call))(variables, u)
    assert y.dtype == jnp.bfloat16 and {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert max(np.max(np.abs(x)) for x in jax.tree.leaves(state)) < 100


@mixers
def test_every_parameter_has_axis_names_and_layers_alone_decay(x64, name):
    module, variables, _ = made(name)
    decayed = logical.decays(module.axes())(variables["params"])
    kernels = {"kernel_input": True, "kernel_hidden": True, "bias_input": False, "bias_hidden": False}
    starts = dict.fromkeys(("start_y", "start_q", "start_k", "start_rates"), False)
    assert decayed == (kernels if name == "lstm" else {**starts, "out": {"kernel": True}})


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="heads is 0; give a whole number of at least 1"):
        SRWMConfig(0)
    with pytest.raises(UserError, match="3 heads do not divide width 8; choose a divisor"):
        SRWMConfig(3).build(8, jnp.float32)
