"""The small layers against numpy, and the two promises of everything with a state: causal, and any cut is the whole."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.errors import UserError
from hope_jax.memory.architectures import unit
from hope_jax.memory.kernels import cpu
from hope_jax.memory.products import shifted_sum
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig
from hope_jax.nn.layers import RMSNorm, ShortConv, taps_at
from hope_jax.nn.rotary import apply_rope


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_unit_has_length_one_keeps_zero_with_a_finite_gradient_and_widens_bfloat16(x64):
    z = drawn(3, 5)
    z[1] = 0
    found, pull = jax.vjp(jax.jit(unit), z)
    np.testing.assert_allclose(found, z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6), rtol=1e-12)
    assert np.isfinite(pull(np.ones((3, 5)))[0]).all()
    assert jax.eval_shape(unit, jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)).dtype == jnp.float32


def test_rms_norm_equals_its_formula_with_a_learned_scale(x64):
    x, scale = drawn(2, 3, 8), np.arange(1.0, 9.0)
    out = jax.jit(RMSNorm(jnp.float64).apply)({"params": {"scale": scale}}, x)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_rms_norm_of_bfloat16_takes_its_statistics_in_float32():
    """300 squared ones summed in bfloat16 would stop at 256."""
    scale = np.ones(300, np.float32)
    out = jax.jit(RMSNorm(jnp.bfloat16).apply)({"params": {"scale": scale}}, np.ones((1, 300), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.array(out, np.float32), 1.0, atol=4e-3)


@functools.cache
def _conv(width, channels=5):
    conv, kernel = ShortConv(width, jnp.float64), drawn(width, channels)
    return jax.jit(lambda x, tail: conv.apply({"params": {"kernel": kernel}}, x, tail)), kernel


@pytest.mark.parametrize("width", [1, 4])
def test_short_conv_equals_numpy_convolution_per_channel(x64, width):
    (run, kernel), x = _conv(width), drawn(2, 7, 5)
    y, _ = run(x, np.zeros((2, width - 1, 5)))
    for b, d in np.ndindex(2, 5):
        expected = np.convolve(x[b, :, d], kernel[::-1, d])[:7]
        np.testing.assert_allclose(y[b, :, d], expected, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 5, 6])
def test_short_conv_cut_anywhere_equals_the_whole(x64, cut):
    (run, _), x, tail = _conv(4), drawn(2, 7, 5), ShortConv(4, jnp.float64).init_state(2, 5)
    whole, end = run(x, tail)
    left, middle = run(x[:, :cut], tail)
    right, last = run(x[:, cut:], middle)
    np.testing.assert_allclose(np.concatenate([left, right], 1), whole, atol=1e-12)
    np.testing.assert_array_equal(last, end)


@pytest.mark.parametrize("width", [1, 4])
def test_the_gradient_of_a_shifted_sum_is_that_of_the_sum_of_slices(x64, width):
    inputs = drawn(2, 7, 3), drawn(width, 3)

    def by_slices(x, kernel):
        return sum(x[:, i : i + 8 - width] * tap[None, None, :] for i, tap in enumerate(kernel))

    @jax.jit
    def derivatives(*inputs):
        def of(function):
            once = jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1))
            return once(*inputs), jax.grad(lambda *x: sum(jnp.sum(y**2) for y in once(*x)), (0, 1))(*inputs)

        return [of(function) for function in (by_slices, shifted_sum, cpu.shifted_sum)]

    expected, *forms = derivatives(*inputs)
    for found in forms:
        chex.assert_trees_all_close(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("width", "lag", "start"), [(4, 0, [0, 0, 0, 1]), (4, 1, [0, 0, 1, 0]), (1, 1, [1])])
def test_short_conv_starts_as_one_token_and_taps_of_three_tenths(key, width, lag, start):
    conv, x = ShortConv(width, start=taps_at(lag)), np.ones((1, 9, 4096), np.float32)
    kernel = np.asarray(jax.jit(conv.init)(key, x, conv.init_state(1, 4096))["params"]["kernel"])
    np.testing.assert_allclose(kernel.mean(axis=1), start, atol=0.02)
    np.testing.assert_allclose(kernel.std(axis=1), 0.3, rtol=0.05)


def test_swiglu_is_its_formula_with_norm_and_residual_inside(x64, key):
    x = drawn(2, 3, 4)
    layer = SwiGLUConfig(hidden=6).build(4, jnp.float64)
    params = jax.jit(layer.init)(key, x, ())["params"]
    y = jax.jit(layer.apply)({"params": params}, x, ())
    u = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    gate, up, down = (np.array(params[name]["kernel"]) for name in ("gate", "up", "down"))
    assert gate.dtype == np.float64
    swish = u @ gate / (1 + np.exp(-u @ gate))
    np.testing.assert_allclose(y, x + (swish * (u @ up)) @ down, atol=1e-12)


def test_swiglu_without_features_is_refused():
    with pytest.raises(UserError, match="hidden is 0"):
        SwiGLUConfig(hidden=0)


def test_rope_turns_pairs_by_position_times_speed(x64):
    """As multiplication of complex numbers: (left + i right) e^(i angle)."""
    x = drawn(2, 5, 3, 8)
    at = np.array([0, 1, 7, 100, 5000])
    angle = (at[:, None] * 10_000.0 ** (-np.arange(4) / 4))[None, :, None]
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    out = jax.jit(apply_rope)(x, at)
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=1e-11)


def test_rope_scores_depend_on_the_distance_only(x64):
    q, k = jnp.asarray(drawn(2, 1, 1, 1, 16))

    @jax.jit
    def score(i, j):
        return (apply_rope(q, i[None]) * apply_rope(k, j[None])).sum()

    near, far, other = (float(score(*np.array(at))) for at in ((9, 4), (1009, 1004), (9, 5)))
    assert near == pytest.approx(far, abs=1e-10) and abs(near - other) > 1e-3


def test_parameters_stay_float32_in_a_bfloat16_model(key):
    x = jax.ShapeDtypeStruct((1, 2, 4), jnp.bfloat16)
    layer = SwiGLUConfig(hidden=6).build(4, jnp.bfloat16)
    y, params = jax.eval_shape(lambda key, x: layer.init_with_output(key, x, ()), key, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert y.dtype == jnp.bfloat16
