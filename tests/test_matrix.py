"""Gated DeltaNet, Comba, RetNet and Mamba-2 as layers, against numpy token loops and against their own promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_matrix as references

from hope_jax.errors import UserError
from hope_jax.nn import axes as logical
from hope_jax.nn import layers
from hope_jax.nn.mixers import matrix
from hope_jax.nn.mixers.gated_deltanet import GatedDeltaNetConfig
from hope_jax.nn.mixers.mamba2 import Mamba2Config
from hope_jax.nn.mixers.retnet import RetNetConfig

B, T, WIDTH = 2, 40, 12  # more tokens than a block of the chunked form has
# Two in plain products, which compile sooner: with an erase, for which ``test_recurrence.py`` holds both forms against
# the token loop. RetNet's decays alone have the other form here.
PLAIN = dict(impl="chunked")
CASES = {
    "gated_deltanet": (GatedDeltaNetConfig(2, 3, 5, values_per_key=2), references.gated_deltanet),
    "comba": (GatedDeltaNetConfig(2, 3, 5, values_per_key=2, form="comba", **PLAIN), references.gated_deltanet),
    "retnet": (RetNetConfig(heads=2), references.retnet),
    "mamba2": (Mamba2Config(head_size=4, state=3, groups=2, step_limits=(0.0, 1.5), **PLAIN), references.mamba2),
}
MAPS = {
    "gated_deltanet": "query/project key/project value/project out/gate out/down",
    "comba": "query/project key/project value/project out/gate out/down",
    "retnet": "query key value out/gate out/down",
    "mamba2": "inputs/project gate down",
}
cases = pytest.mark.parametrize("name", CASES)


@functools.cache
def drawn(name):
    """Module, input, fresh state, and parameters moved from their starts (zeros and ones would hide mistakes)."""
    module = CASES[name][0].build(WIDTH, jnp.float64)
    u = np.random.default_rng(0).normal(size=(B, T, WIDTH))
    shapes = jax.eval_shape(module.init, jax.random.key(0), u, module.init_state(B, T))["params"]
    draw = np.random.default_rng(1)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape) * (0.5 if x.ndim == 2 else 0.8), shapes)
    return module, u, module.init_state(B, T), params


@functools.cache
def pulled(name):
    """Compiled (parameters, input, cotangent of the output) -> (output, final state, gradients), fresh sequence."""
    module, _, state, _ = drawn(name)

    @jax.jit
    def pulled(params, u, cotangent):
        def run(params, u):
            return module.apply({"params": params}, u, state)

        y, pull, end = jax.vjp(run, params, u, has_aux=True)
        return y, end, pull(cotangent)

    return pulled


@functools.cache
def expected(name):
    """The reference's outputs and final memories of both sequences, each alone."""
    (config, reference), (_, u, _, params) = CASES[name], drawn(name)
    return [np.stack(x) for x in zip(*(reference(params, row, config) for row in u), strict=True)]


@cases
def test_layer_and_memory_are_the_token_loop_of_the_equations(x64, name):
    _, u, _, params = drawn(name)
    y, end, _ = pulled(name)(params, u, np.zeros_like(u))
    assert y.dtype == end.memory.dtype == jnp.float64
    for ours, theirs in zip((y, end.memory), expected(name), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@cases
def test_gradients_are_the_slope_of_the_token_loop(x64, name):
    (config, reference), (_, u, _, params) = CASES[name], drawn(name)
    draw = np.random.default_rng(2)
    cotangent = draw.normal(size=u.shape)
    along = jax.tree.map(lambda x: draw.normal(size=x.shape), (params, u))

    def moved(step):
        moved_params, moved_u = jax.tree.map(lambda x, d: x + step * d, (params, u), along)
        return sum(
            np.vdot(c, reference(moved_params, row, config)[0]) for row, c in zip(moved_u, cotangent, strict=True)
        )

    _, _, gradients = pulled(name)(params, u, cotangent)
    slope = sum(np.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (gradients, along)), strict=True))
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=2e-6)


@cases
def test_outputs_depend_on_the_past_of_their_own_sequence_alone(x64, name):
    _, u, _, params = drawn(name)
    t, cotangent = 13, np.zeros_like(u)
    cotangent[0, t] = 1
    _, _, (_, gradient) = pulled(name)(params, u, cotangent)
    seen = np.any(np.asarray(gradient) != 0, axis=-1)
    assert seen[0, : t + 1].all() and not seen[0, t + 1 :].any() and not seen[1].any()


@cases
def test_any_cut_is_the_whole_and_padding_leaves_no_trace(x64, name):
    module, u, state, params = drawn(name)
    y, end, _ = pulled(name)(params, u, np.zeros_like(u))
    step = jax.jit(lambda u, state, count: module.apply({"params": params}, u, state, count))
    pieces = []
    for start, stop in ((0, 9), (9, 10), (10, 12), (12, T)):  # of 40 tokens each, as the whole
        padded = np.full_like(u, 7.0)
        padded[:, : stop - start] = u[:, start:stop]
        out, state = step(padded, state, np.int32(stop - start))
        pieces.append(np.asarray(out)[:, : stop - start])
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), y, rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, end)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_retnet_in_float32_reads_a_million_tokens_in_as_at_the_start():
    module = CASES["retnet"][0].build(WIDTH, jnp.float32)
    u, state = np.random.default_rng(1).normal(size=(B, T, WIDTH)).astype(np.float32), module.init_state(B, T)
    shapes = jax.eval_shape(module.init, jax.random.key(0), u, state)
    draw = np.random.default_rng(2)
    variables = jax.tree.map(lambda x: np.float32(0.3 * draw.normal(size=x.shape)), shapes)
    step = jax.jit(lambda u, state: module.apply(variables, u, state)[0])
    late, early = (np.asarray(step(u, state._replace(position=np.int32(at)))) for at in (10**6, 0))
    np.testing.assert_allclose(late, early, rtol=1e-4, atol=2e-5 * np.abs(late).max())


def test_a_mamba_whose_steps_vanish_is_a_gated_convolution(x64):
    _, u, _, params = drawn("mamba2")
    decay = params["decay"] | {"step_bias": np.full(6, -1e4)}
    y, _, _ = pulled("mamba2")(params | {"decay": decay}, u, np.zeros_like(u))
    x = references.stream(params["inputs"], u[0])[:, : 2 * WIDTH] * np.repeat(params["skip"], 4)
    gated = (x * references.silu(u[0] @ params["gate"]["kernel"])).reshape(T, 2, -1)
    normed = references.rms(gated, 1e-5).reshape(T, -1) * params["scale"]
    np.testing.assert_allclose(y[0], normed @ params["down"]["kernel"], rtol=1e-9)


def test_a_delta_rule_of_rate_one_that_forgets_nothing_reads_what_it_has_just_written(x64):
    _, u, _, params = drawn("gated_deltanet")
    u = np.concatenate([np.ones((B, T, 1)), u[..., 1:]], axis=-1)
    rate = np.concatenate([np.full((1, 4), 1e3), np.zeros((WIDTH - 1, 4))])
    decay = params["decay"] | {"log_decay": np.full(4, -1e4)}
    params = params | {"query": params["key"], "rate": {"kernel": rate}, "decay": decay}
    y, _, _ = pulled("gated_deltanet")(params, u, np.zeros_like(u))
    values = references.stream(params["value"], u[0]).reshape(T, 4, 5)
    # Keys have norm 1 up to the epsilon under the root, and reads are divided by the root of their size.
    direct = references.output(params["out"], u[0], values / np.sqrt(3), references.silu, 1e-6)
    np.testing.assert_allclose(y[0], direct, rtol=1e-3, atol=1e-3)


@cases
def test_maps_decay_and_gates_norms_and_biases_do_not(x64, name):
    module, _, _, params = drawn(name)
    decayed = jax.tree.leaves_with_path(logical.decays(module.axes())(params))
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, on in decayed if on}
    assert names == {f"{map_}/kernel" for map_ in MAPS[name].split()}


@cases
def test_a_bfloat16_layer_has_float32_parameters_and_memories(name):
    module = CASES[name][0].build(WIDTH, jnp.bfloat16)
    u = jax.ShapeDtypeStruct((B, T, WIDTH), jnp.bfloat16)
    (y, state), variables = jax.eval_shape(module.init_with_output, jax.random.key(0), u, module.init_state(B, T))
    assert y.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_decays_start_as_published():
    gate = matrix.DecayGate(4096, layers.TORCH, slowest=1.0)
    params = jax.jit(gate.init)(jax.random.key(0), np.zeros((1, 1, 4)))["params"]
    rates, steps = np.exp(params["log_decay"]), np.asarray(jax.nn.softplus(params["step_bias"]))
    for values, low, high, middle in ((rates, 1, 16, 8.5), (steps, 0.001, 0.1, 0.01)):
        assert low <= values.min() < 1.1 * low and 0.9 * high < values.max() <= high * (1 + 1e-5)
        assert np.median(values) == pytest.approx(middle, rel=0.1)


WIDTHS = {192: (3, 3), 512: (3, 4), 768: (3, 3), 1024: (3, 4), 1536: (6, 6), 2048: (6, 8)}


@pytest.mark.parametrize("width", WIDTHS)
def test_the_published_sizes_build_at_every_width(width):
    delta, retnet = GatedDeltaNetConfig.published(width, "comba"), RetNetConfig.published(width)
    assert (delta.heads, retnet.heads) == WIDTHS[width]
    assert 4 * delta.heads * delta.key_size == 3 * width and delta.value_size == 2 * delta.key_size
    for config in (delta, retnet, Mamba2Config()):
        config.build(width, jnp.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedDeltaNetConfig(0, 4, 4), "heads is 0"),
        (lambda: GatedDeltaNetConfig(2, 4, 4, values_per_key=0), "values_per_key is 0"),
        (lambda: GatedDeltaNetConfig(2, 4, 4, form="gdn"), r"form is 'gdn'.*gated_deltanet.*comba"),
        (lambda: RetNetConfig(2, expand=0), "expand is 0"),
        (
            lambda: RetNetConfig(heads=3).build(16, jnp.float32),
            "3 heads do not divide width 16 into .*even .*multiple of 6",
        ),
        (lambda: Mamba2Config().build(48, jnp.float32), "head_size is 64.* = 96"),
        (lambda: Mamba2Config(groups=4).build(192, jnp.float32), "groups is 4.*6 heads"),
        (lambda: GatedDeltaNetConfig(2, 4, 4, norm_eps=0.0), "norm_eps is 0.0; expected a positive number"),
        (lambda: Mamba2Config(norm_eps=math.nan), "norm_eps is nan; expected a positive number"),
        (lambda: matrix.check_eps(None), "norm_eps is None; expected a positive number"),
        (lambda: matrix.check_eps("a"), "norm_eps is 'a'; expected a positive number"),
        (lambda: Mamba2Config(step_limits=(1.0, 0.5)), r"step_limits is .*low < high"),
        (lambda: Mamba2Config(step_limits=(0.0, math.nan)), r"step_limits is .*low < high"),
    ],
)
def test_what_cannot_work_is_refused_with_its_name(make, message, untyped):
    with pytest.raises(UserError, match=message):
        make()
