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


def test_unit_has_length_one_keeps_zero_and_widens_bfloat16(x64, key):
    z = np.array(jax.random.normal(key, (3, 5)))
    z[1] = 0
    np.testing.assert_allclose(unit(jnp.array(z)), z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6), rtol=1e-12)
    assert unit(jnp.zeros((2, 4), jnp.bfloat16)).dtype == jnp.float32


def test_unit_of_zero_has_a_finite_gradient():
    assert np.isfinite(jax.grad(lambda z: unit(z).sum())(jnp.zeros(4))).all()


def test_rms_norm_equals_its_formula_with_a_learned_scale(x64, key):
    x, scale = np.array(jax.random.normal(key, (2, 3, 8))), np.arange(1.0, 9.0)
    out = RMSNorm(jnp.float64).apply({"params": {"scale": jnp.array(scale)}}, jnp.array(x))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_rms_norm_of_bfloat16_takes_its_statistics_in_float32(key):
    """300 squared ones summed in bfloat16 would stop at 256."""
    x = jnp.ones((1, 300), jnp.bfloat16)
    norm = RMSNorm(jnp.bfloat16)
    out = norm.apply(norm.init(key, x), x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.array(out, np.float32), 1.0, atol=4e-3)


def _conv(width, key, channels=5):
    conv = ShortConv(width, jnp.float64)
    params = {"params": {"kernel": jax.random.normal(key, (width, channels), jnp.float64)}}
    return (
        jax.jit(lambda x, tail: conv.apply(params, x, tail)),
        conv.init_state(2, channels),
        params["params"]["kernel"],
    )


@pytest.mark.parametrize("width", [1, 2, 4])
def test_short_conv_equals_numpy_convolution_per_channel(x64, key, width):
    run, tail, kernel = _conv(width, key)
    x = jax.random.normal(key, (2, 7, 5))
    y, _ = run(x, tail)
    for b, d in np.ndindex(2, 5):
        expected = np.convolve(np.array(x[b, :, d]), np.array(kernel[::-1, d]))[:7]
        np.testing.assert_allclose(y[b, :, d], expected, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 3, 6])
def test_short_conv_cut_anywhere_equals_the_whole(x64, key, cut):
    run, tail, _ = _conv(4, key)
    x = jax.random.normal(key, (2, 7, 5))
    whole, end = run(x, tail)
    left, middle = run(x[:, :cut], tail)
    right, last = run(x[:, cut:], middle)
    np.testing.assert_allclose(jnp.concatenate([left, right], 1), whole, atol=1e-12)
    np.testing.assert_array_equal(last, end)


@pytest.mark.parametrize("width", [1, 4])
def test_the_gradient_of_a_shifted_sum_is_that_of_the_sum_of_slices(x64, key, width):
    inputs = (jax.random.normal(key, (2, 7, 3)), jax.random.normal(key, (width, 3)))

    def by_slices(x, kernel):
        return sum(x[:, i : i + 8 - width] * tap[None, None, :] for i, tap in enumerate(kernel))

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(function, *inputs):
        once = jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1))
        return once(*inputs), jax.grad(lambda *x: sum(jnp.sum(y**2) for y in once(*x)), (0, 1))(*inputs)

    expected = derivatives(by_slices, *inputs)
    for function in (shifted_sum, cpu.shifted_sum):
        chex.assert_trees_all_close(derivatives(function, *inputs), expected, rtol=1e-12)


@pytest.mark.parametrize(("width", "lag", "start"), [(4, 0, [0, 0, 0, 1]), (4, 1, [0, 0, 1, 0]), (1, 1, [1])])
def test_short_conv_starts_as_one_token_and_taps_of_three_tenths(key, width, lag, start):
    conv, x = ShortConv(width, start=taps_at(lag)), jnp.ones((1, 9, 4096))
    kernel = np.asarray(conv.init(key, x, conv.init_state(1, 4096))["params"]["kernel"])
    np.testing.assert_allclose(kernel.mean(axis=1), start, atol=0.02)
    np.testing.assert_allclose(kernel.std(axis=1), 0.3, rtol=0.05)


def test_swiglu_is_its_formula_with_norm_and_residual_inside(x64, key):
    x = jax.random.normal(key, (2, 3, 4))
    layer = SwiGLUConfig(hidden=6).build(4, jnp.float64)
    params = jax.jit(layer.init)(key, x, ())["params"]
    y = jax.jit(layer.apply)({"params": params}, x, ())
    u = np.array(x) / np.sqrt((np.array(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    gate, up, down = (np.array(params[name]["kernel"]) for name in ("gate", "up", "down"))
    assert gate.dtype == np.float64
    swish = u @ gate / (1 + np.exp(-u @ gate))
    np.testing.assert_allclose(y, x + (swish * (u @ up)) @ down, atol=1e-12)


def test_swiglu_without_features_is_refused():
    with pytest.raises(UserError, match="hidden is 0"):
        SwiGLUConfig(hidden=0)


def test_rope_turns_pairs_by_position_times_speed(x64, key):
    """As multiplication of complex numbers: (left + i right) e^(i angle)."""
    x = np.array(jax.random.normal(key, (2, 5, 3, 8)))
    at = np.array([0, 1, 7, 100, 5000])
    angle = (at[:, None] * 10_000.0 ** (-np.arange(4) / 4))[None, :, None]
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    out = jax.jit(apply_rope)(jnp.array(x), jnp.array(at))
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], -1), atol=1e-11)


def test_rope_scores_depend_on_the_distance_only(x64, key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 16))

    @jax.jit
    def score(i, j):
        return (apply_rope(q, i[None]) * apply_rope(k, j[None])).sum()

    near, far, other = (float(score(jnp.array(i), jnp.array(j))) for i, j in ((9, 4), (1009, 1004), (9, 5)))
    assert near == pytest.approx(far, abs=1e-10) and abs(near - other) > 1e-3


def test_parameters_stay_float32_in_a_bfloat16_model(key):
    x = jnp.ones((1, 2, 4), jnp.bfloat16)
    layer = SwiGLUConfig(hidden=6).build(4, jnp.bfloat16)
    params = jax.jit(layer.init)(key, x, ())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert jax.jit(layer.apply)(params, x, ()).dtype == jnp.bfloat16
