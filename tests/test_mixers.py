"""The mixers as layers against numpy: projections, convolutions, unit norms, gates, memory, head norm, output gate."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from drawn import drawn
from references import initial, sigmoid
from references_miras import omega

from hope_jax.memory import RULES
from hope_jax.memory.architectures import Architecture, residual_mlp
from hope_jax.memory.rule import Rule
from hope_jax.models import LanguageModel, ModelConfig
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.omega import OmegaMixerConfig
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig

WIDTH, HEADS, T = 8, 2, 11
SIZE = WIDTH // HEADS


def silu(x):
    return x * sigmoid(x)


def units(x):
    """Every head of every token with norm 1: [T,D] -> [H,T,K]."""
    heads = np.moveaxis(x.reshape(len(x), HEADS, SIZE), 1, 0)
    return heads / np.sqrt(np.sum(heads * heads, axis=-1, keepdims=True) + 1e-6)


def conv(x, kernel):
    """y_t = sum_i kernel_i x_(t - width + 1 + i), nothing before the first token."""
    padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
    return sum(kernel[i] * padded[i : i + len(x)] for i in range(len(kernel)))


def answer_output(params, u, q, answers):
    """W_o applied to s q * silu(W_g u), and to s' (M(q) - q) beside it; everything [H,T,K]."""

    def merge(z):
        return np.moveaxis(z, 0, 1).reshape(len(u), WIDTH)

    asked = merge(q * params["scale_query"][:, None]) * silu(u @ params["gate"]["kernel"])
    found = merge(answers * params["scale_answer"][:, None])
    return np.concatenate([asked, found], axis=1) @ params["down"]["kernel"]


def output(params, u, reads):
    """W_o(RMSNorm_head(reads) * silu(W_g u)) for reads [H,T,K]."""
    normed = reads / np.sqrt(np.mean(reads * reads, axis=-1, keepdims=True) + 1e-6) * params["scale"][:, None]
    merged = np.moveaxis(normed, 0, 1).reshape(len(u), WIDTH)
    return (merged * silu(u @ params["gate"]["kernel"])) @ params["down"]["kernel"]


def drawn_layer(config):
    """A layer, random parameters (their starts, zeros and ones, would hide mistakes), input and output.

    Of two sequences together, each as it is alone, the second; heads differ in every parameter.
    """
    module, u = config.build(WIDTH, jnp.float64), np.random.default_rng(1).normal(size=(2, T, WIDTH))

    def run(m, u):
        return m(u, m.init_state(len(u), T))[0]

    params = drawn(functools.partial(module.init, method=run), u[:, :1])
    call = jax.jit(lambda u: module.apply({"params": params}, u, method=run))
    together, alone = np.asarray(call(u)), np.stack([np.asarray(call(u[[i, i]]))[0] for i in (0, 1)])
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-12)
    return jax.tree.map(np.asarray, params), u[1], together[1]


@pytest.mark.parametrize("names", ["kv", "q", pytest.param("kvq", marks=pytest.mark.slow)])
def test_the_self_modifying_layer_is_its_equations(x64, names):
    """Each of keys, values and queries from memories, and each from a static projection."""
    how, rates = dict(c_memory=4, c_projections=4), dict(rate_max=2.0, rate_bias=-2.5, projection_rate=0.5)
    config = SelfModifyingConfig(heads=HEADS, inner_projection=tuple(names), horizon=32, **rates, **how)
    params, u, y = drawn_layer(config)
    x = units(u)
    streams = {n: units(silu(conv(u, params[f"conv_{n}"]["kernel"]))) for n in "qkv"}
    for n in set("qkv") - set(names):
        streams[n] = units(np.moveaxis(streams[n], 0, 1).reshape(T, WIDTH) @ params[f"project_{n}"]["kernel"])
    decay = sigmoid(np.einsum("htk,hk->ht", x, params["momentum_kernel"]) + params["momentum_bias"][:, None])

    def head(h):
        start = {n: [initial(params, "projections", i)[h, b].T for i in (0, 1)] for b, n in enumerate(names)}
        start |= {n: [initial(params, "gates", i)[h, b].T for i in (0, 1)] for b, n in enumerate(("eta", "alpha"))}
        start["memory"] = [initial(params, "memory", i)[h].T for i in (0, 1)]
        of_head = {n: stream[h] for n, stream in streams.items()} | dict(x=x[h], decay=decay[h])
        rates = [params[f"log_rate_{n}"][h] for n in ("memory", "projections", "gates")]
        biases = params["rate_bias"][h], params["retention_bias"][h]
        more = dict(names=tuple(names), read="before", rate_max=config.rate_max, retention=True)
        reads, _, queries = references.self_modifying(of_head, start, rates, biases, **how, **more)
        return reads, queries

    reads, q = map(np.stack, zip(*map(head, range(HEADS)), strict=True))
    np.testing.assert_allclose(y, answer_output(params["out"], u, q, reads - q), rtol=1e-9)


@pytest.mark.parametrize("name, unit_values", [("titans_linear", False), ("titans", True)])
def test_the_mixer_of_a_rule_is_its_equations(x64, name, unit_values):
    config = MemoryMixerConfig(RULES[name], HEADS, horizon=32, rate_max=0.7, unit_values=unit_values)
    params, u, y = drawn_layer(config)
    streams = [silu(conv(u @ params[f"project_{n}"]["kernel"], params[f"conv_{n}"]["kernel"])) for n in "qkv"]
    q, k = map(units, streams[:2])
    v = units(streams[2]) if unit_values else np.moveaxis(streams[2].reshape(T, HEADS, SIZE), 1, 0)

    def gate(n):
        return sigmoid(u @ params[f"gate_{n}"]["kernel"] + params[f"gate_{n}"]["bias"]).T

    rate, retention, decay = 0.7 * gate("rate"), gate("retention"), gate("momentum")
    layers = sum(key.startswith("start_memory") for key in params)
    starts = [initial(params, "memory", layer).swapaxes(1, 2) for layer in range(layers)]
    rule = getattr(references, name)
    read = np.stack(
        [rule(k[h], v[h], q[h], rate[h], retention[h], decay[h], [w[h] for w in starts], 16)[0] for h in range(HEADS)]
    )
    expected = answer_output(params["out"], u, q, read - q) if name == "titans" else output(params["out"], u, read)
    np.testing.assert_allclose(y, expected, rtol=1e-9)


OMEGA = OmegaMixerConfig(
    Rule(residual_mlp, read="after", period=4),
    HEADS,
    horizon=32,
    rate_max=0.7,
    rate_bias=-1.5,
    unit_values=True,
    window=3,
)


def test_the_omega_mixer_is_its_equations_and_every_pair_of_the_window_has_a_gate_of_its_own(x64):
    params, u, y = drawn_layer(OMEGA)
    streams = [silu(conv(u @ params[f"project_{n}"]["kernel"], params[f"conv_{n}"]["kernel"])) for n in "qkv"]
    q, k, v = map(units, streams)

    def gate(n):
        return sigmoid(u @ params[f"gate_{n}"]["kernel"] + params[f"gate_{n}"]["bias"]).T

    strength, retention = 0.7 * np.stack([gate(f"rate{lag}") for lag in ("", "_1", "_2")], axis=-1), gate("retention")
    starts = [initial(params, "memory", i).swapaxes(1, 2) for i in (0, 1)]
    read = np.stack(
        [omega(k[h], v[h], q[h], strength[h], retention[h], [w[h] for w in starts], 4)[0] for h in range(HEADS)]
    )
    np.testing.assert_allclose(y, answer_output(params["out"], u, q, read - q), rtol=1e-9)


def test_strengths_of_a_window_start_alike_and_are_the_bound_without_a_gate(x64):
    configs, u = (OMEGA, replace(OMEGA, rate_bias=None, horizon=None)), jnp.zeros((1, 2, WIDTH))

    @jax.jit
    def rates(key):
        layers = [config.build(WIDTH, jnp.float64) for config in configs]
        return [layer.init_with_output(key, u, method="_gates_of")[0].rate for layer in layers]

    gated, fixed = rates(jax.random.key(0))
    np.testing.assert_allclose(gated, np.full((1, HEADS, 2, 3), 0.7 * sigmoid(-1.5)), rtol=1e-12)
    np.testing.assert_array_equal(fixed, np.full((1, HEADS, 2, 3), 0.7))


@functools.cache
def started():
    """A layer of one head and width 128, and its parameters at their start."""
    config = SelfModifyingConfig(heads=1, horizon=100, projection_rate=0.05)

    def run(m, u):
        return m(u, m.init_state(1, 1))

    init = jax.jit(functools.partial(config.build(128, jnp.float64).init, method=run))
    return config, jax.tree.map(np.asarray, init(jax.random.key(0), np.zeros((1, 1, 128)))["params"])


def test_memories_start_as_their_architecture_draws_them():
    """A fresh memory is ``Architecture.init`` of one head, a tenth of its parameters."""
    layer = MemoryMixerConfig(RULES["titans"], 1).build(32, jnp.float32)
    params = jax.jit(lambda key: layer.init(key, 1, 4, method="init_state")["params"])(jax.random.key(0))
    sizes = [np.std(initial(params, "memory", i)) * 32**0.5 for i in (0, 1)]
    np.testing.assert_allclose(sizes, RULES["titans"].architecture.scales, rtol=0.1)


def test_gates_start_where_the_configuration_says(x64):
    config, params = started()
    assert sigmoid(np.asarray(params["retention_bias"])) == pytest.approx(1 - 1 / 100)
    assert np.asarray(params["rate_bias"]) == pytest.approx(config.rate_bias)
    assert np.asarray(params["momentum_bias"]) == pytest.approx(config.momentum_bias)
    for name, size in (("query", 1), ("answer", 4)):
        assert np.asarray(params["out"][f"scale_{name}"]) == pytest.approx(size * 128**0.5)
    rates = [float(np.exp(params[f"log_rate_{n}"][0])) for n in ("memory", "projections", "gates")]
    assert rates == pytest.approx([1, 0.05, 0.05])


def test_keys_start_as_the_token_before_the_stored_value(x64):
    _, params = started()
    for name, lag, size in (("q", 0, 0.5), ("k", 1, 1.0), ("v", 0, 1.0)):
        taps = np.mean(np.asarray(params[f"conv_{name}"]["kernel"]), axis=1)
        np.testing.assert_allclose(taps, size * np.eye(4)[3 - lag], atol=0.08)


@pytest.mark.slow
def test_a_model_of_plain_products_has_derivatives_in_every_mode(x64):
    """Slope and curvature along a direction: forward twice, and the gradient linearized. Small, as compiling costs."""
    linear = Architecture(1, residual=False, scales=(1.0,))
    how = dict(memory=linear, projection=linear, gate=linear, inner_projection=("k",), momentum="none")
    mixer = SelfModifyingConfig(HEADS, c_memory=2, c_projections=2, impl="chunked", **how)
    model = LanguageModel(ModelConfig(mixer, SwiGLUConfig(hidden=8), WIDTH, 1, vocab_size=16, dtype=jnp.float64))
    tokens = jax.random.randint(jax.random.key(0), (1, 4), 0, 16)
    params = drawn(model.init, tokens[:, :1])
    direction = jnp.asarray([[0.3, -1.2]])

    def along(step):
        mixer = {name: params["blocks"]["mixer"][name] + step * direction for name in ("rate_bias", "retention_bias")}
        moved = params | {"blocks": params["blocks"] | {"mixer": params["blocks"]["mixer"] | mixer}}
        return jnp.sum(jnp.sin(model.apply({"params": moved}, tokens)[0]))

    def slope(step):
        return jax.jvp(along, (step,), (1.0,))[1]

    @jax.jit
    def derivatives(step):
        gradient, curve = jax.linearize(jax.grad(along), step)
        return jax.jvp(slope, (step,), (1.0,)), (gradient, curve(1.0))

    forward, backward = derivatives(0.0)
    assert np.all(np.abs(np.asarray(forward)) > 1e-3)
    np.testing.assert_allclose(forward, backward, rtol=1e-9)
