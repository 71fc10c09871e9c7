"""Titans with attention: MAC and MAG against numpy, any cut, no look ahead; persistent vectors of all mixers."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import references_titans
from drawn import enlarged

from hope_jax.errors import UserError
from hope_jax.memory import RULES
from hope_jax.nn import axes as logical
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.titans_mac import TitansMACConfig
from hope_jax.nn.mixers.titans_mag import TitansMAGConfig
from hope_jax.storage.digests import kinds

WIDTH, HEADS, B, T, SEGMENT, WINDOW, PERIOD, RATE = 8, 2, 2, 24, 8, 5, 4, 0.7
HOW = dict(rate_max=RATE, unit_values=True, impl="chunked")  # plain products compile sooner
MEMORY = MemoryMixerConfig(replace(RULES["titans"], period=PERIOD), HEADS, horizon=16, **HOW)
CONFIGS = {
    "mac": TitansMACConfig(AttentionConfig(HEADS), MEMORY, persistent=3, segment=SEGMENT),
    "mag": TitansMAGConfig(AttentionConfig(HEADS, window=WINDOW), MEMORY, persistent=3),
}
REFERENCES = {
    "mac": functools.partial(references_titans.mac, heads=HEADS, segment=SEGMENT, period=PERIOD, rate_max=RATE),
    "mag": functools.partial(references_titans.mag, heads=HEADS, window=WINDOW, period=PERIOD, rate_max=RATE),
}
both = pytest.mark.parametrize("name", CONFIGS)
# Gradients of MAG, two layers and a product, take as long to compile as those of MAC, but not with a matrix.
SHALLOW = {"mag, matrix": replace(CONFIGS["mag"], memory=MemoryMixerConfig(RULES["deltanet"], HEADS, rate_max=RATE))}
SLOW = pytest.param("mag", marks=pytest.mark.slow)


def fresh(module, u, count=None):
    return module(u, module.init_state(len(u), u.shape[1]), count)


def drawn(config):
    """A float64 layer and parameters away from their starts, where zeros and ones would hide mistakes."""
    module = config.build(WIDTH, jnp.float64)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)), method=fresh))["params"]
    rng = np.random.default_rng(0)
    return module, enlarged(jax.tree.map(lambda x: 0.6 * rng.normal(size=x.shape) + (x.ndim == 1), shapes))


def reader(module):
    """Compiled: (parameters, input) -> (output, state) of a fresh sequence."""
    return jax.jit(lambda params, u: module.apply({"params": params}, u, method=fresh))


@functools.cache
def inputs(time=T):
    return np.random.default_rng(1).normal(size=(B, time, WIDTH))


@functools.cache
def pulled(name):
    """The parameters, and compiled (parameters, input, cotangent) -> (output, gradients, final state)."""
    module, params = drawn((CONFIGS | SHALLOW)[name])

    def run(params, u):
        return module.apply({"params": params}, u, method=fresh)

    @jax.jit
    def pull(params, u, cotangent):
        y, pull, state = jax.vjp(run, params, u, has_aux=True)
        return y, pull(cotangent), state

    return params, pull


def assert_memory(state, expected):
    """The final weights of one sequence's memories are those of the reference."""
    fast = state.memory.fast if hasattr(state, "memory") else state.fast
    for layer, weights in enumerate(zip(*((m.w2.T, m.w1.T) for m in expected), strict=True)):
        np.testing.assert_allclose(fast.running[layer][1], weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mac", SLOW])
def test_values_and_gradients_are_those_of_the_equations(x64, name):
    params, pull = pulled(name)
    rng, u = np.random.default_rng(2), inputs()
    cotangent = np.stack([np.zeros((T, WIDTH)), rng.normal(size=(T, WIDTH))])
    y, gradients, state = pull(params, u, cotangent)
    for row in range(B):
        expected, memory = REFERENCES[name](params, u[row])
        np.testing.assert_allclose(y[row], expected, rtol=1e-9, atol=1e-9)
    assert_memory(state, memory)
    leaves, tree = jax.tree.flatten(params)
    directions = [rng.normal(size=x.shape) for x in (*leaves, u[1])]

    def scalar(**point):
        *leaves, x = point.values()
        return np.sum(cotangent[1] * REFERENCES[name](jax.tree.unflatten(tree, leaves), x)[0])

    names = [str(i) for i in range(len(directions))]
    slope = references.derivative(
        scalar, dict(zip(names, (*leaves, u[1]), strict=True)), dict(zip(names, directions, strict=True))
    )
    found = (*jax.tree.leaves(gradients[0]), gradients[1][1])
    along = sum(np.sum(np.array(g) * d) for g, d in zip(found, directions, strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-9)
    assert np.all(np.asarray(gradients[1][0]) == 0), "a sequence of the batch looked at another"


def test_gradients_of_mag_are_slopes_of_its_outputs(x64):
    params, pull = pulled("mag, matrix")
    rng = np.random.default_rng(4)
    point, weight = (params, inputs()), rng.normal(size=(B, T, WIDTH))
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), point)
    _, gradients, _ = pull(*point, weight)
    along = sum(np.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True))

    def value(step):
        return np.vdot(weight, pull(*jax.tree.map(lambda x, d: x + step * d, point, direction), weight)[0])

    np.testing.assert_allclose(along, (value(1e-6) - value(-1e-6)) / 2e-6, rtol=1e-6)


def read_in_pieces(module, params, u, counts, longest):
    """Outputs of a text that comes in pieces, the states by tokens read before, and the compiled step.

    A piece has that many tokens and padding up to ``longest``; None: one token and no padding.
    """

    @jax.jit
    def step(params, u, state, count=None):
        return module.apply({"params": params}, u, state, count)

    state = jax.jit(lambda params: module.apply({"params": params}, *u.shape[:2], method="init_state"))(params)
    at, found, states = 0, [], {}
    for count in counts:
        size = 1 if count is None else count
        piece, real = u[:, at : at + size], () if count is None else (np.int32(count),)
        padding = np.full((len(u), longest - size if real else 0, u.shape[2]), 7.0)
        y, state = step(params, np.concatenate([piece, padding], axis=1), state, *real)
        at, found = at + size, [*found, np.asarray(y)[:, :size]]
        states[at] = state
    return np.concatenate(found, axis=1), states, step


@functools.cache
def streamed(name):
    """Parameters, outputs and final state of a text that comes in pieces, with padding after them."""
    module, params = drawn(CONFIGS[name])
    counts = 5, 0, 11, 6, None, None  # segments end inside, at the end of, and between calls
    y, states, step = read_in_pieces(module, params, inputs(), counts, 11)
    # A segment starts after 16 tokens, and one is unfinished after 22.
    alone = functools.reduce(lambda now, t: step(params, inputs()[:, t : t + 1], now)[1], range(16, 22), states[16])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), states[22], alone)
    return params, y, states[T]


@both
def test_outputs_and_memory_are_those_of_the_equations_in_any_cut_with_any_padding(x64, name):
    params, y, state = streamed(name)
    for row in range(B):
        expected, memory = REFERENCES[name](params, inputs()[row])
        np.testing.assert_allclose(y[row], expected, rtol=1e-9, atol=1e-9)
    assert_memory(state, memory)


@both
def test_a_whole_text_gives_the_outputs_and_the_state_of_its_pieces(x64, name):
    params, y, state = streamed(name)
    if name == "mac":  # by the program that has gradients
        whole = pulled(name)[1](params, inputs(), np.zeros((B, T, WIDTH)))[::2]
    else:
        whole = reader(drawn(CONFIGS[name])[0])(params, inputs())
    assert kinds(state) == kinds(whole[1])
    for ours, theirs in zip(*map(jax.tree.leaves, ((y, state), whole)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mac", *SHALLOW, SLOW])
def test_an_output_depends_on_everything_before_it_and_on_nothing_after_it(x64, name):
    params, pull = pulled(name)
    for t in (0, 4, 7, 8, 13):
        cotangent = np.zeros((B, T, WIDTH))
        cotangent[0, t] = np.arange(WIDTH)
        moved = np.abs(pull(params, inputs(), cotangent)[1][1][0]).sum(axis=1)
        assert np.all(moved[: t + 1] > 1e-12) and np.all(moved[t + 1 :] == 0), t


@pytest.mark.parametrize("leak", [None, "context", "memory"])
def test_the_reference_looks_ahead_with_either_step_as_it_is_printed_and_only_then(x64, leak):
    params, _ = pulled("mac")
    t, direction = 10, np.zeros((T, WIDTH))
    direction[t + 1 : 2 * SEGMENT] = np.random.default_rng(3).normal(size=(2 * SEGMENT - t - 1, WIDTH))

    def output(x):
        return np.sum(REFERENCES["mac"](params, x, leak=leak)[0][t])

    slope = references.derivative(output, {"x": inputs()[0]}, {"x": direction})
    assert slope == 0 if leak is None else abs(slope) > 1e-3


def test_where_nothing_is_written_a_segment_is_a_sequence_of_its_own(x64):
    """Nor do convolutions of one tap carry anything."""
    still = replace(MEMORY, rate_max=0.0, horizon=None, conv=1)
    module, params = drawn(replace(CONFIGS["mac"], memory=still))
    read = reader(module)
    (y, _), (alone, _) = read(params, inputs()), read(params, np.roll(inputs(), -SEGMENT, axis=1))
    np.testing.assert_allclose(y[:, SEGMENT : 2 * SEGMENT], alone[:, :SEGMENT], rtol=1e-9)


def test_a_gate_of_an_empty_memory_leaves_attention_with_persistent_vectors(x64):
    empty = MemoryMixerConfig(RULES["deltanet"], HEADS, rate_max=0.0)
    module, params = drawn(replace(CONFIGS["mag"], memory=empty))
    y, _ = reader(module)(params, inputs())
    attention = AttentionConfig(HEADS, window=WINDOW, persistent=3).build(WIDTH, jnp.float64)
    alone = {**params["attention"], "persistent": params["persistent"], "out": {"kernel": np.eye(WIDTH)}}
    found = np.asarray(reader(attention)(alone, inputs())[0])
    normed = (
        found / np.sqrt(np.mean(found**2, axis=-1, keepdims=True) + 1e-6) * params["out"]["norm_attention"]["scale"]
    )
    np.testing.assert_allclose(y, 0.5 * normed @ params["out"]["down"]["kernel"], rtol=1e-9)


def test_a_memory_with_persistent_vectors_has_read_them_first(x64):
    module, params = drawn(replace(MEMORY, persistent=3))
    y, end = reader(module)(params, inputs())
    plain = MEMORY.build(WIDTH, jnp.float64)
    without = {name: x for name, x in params.items() if name != "persistent"}
    behind = np.concatenate([np.broadcast_to(params["persistent"], (B, 3, WIDTH)), inputs()], axis=1)
    expected, state = reader(plain)(without, behind)
    np.testing.assert_allclose(y, expected[:, 3:], rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(*map(jax.tree.leaves, (end, state)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@both
def test_states_keep_their_types_and_parameters_have_names(name):
    module = CONFIGS[name].build(WIDTH, jnp.bfloat16)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((B, 1, WIDTH)), method=fresh))["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    decays, matrices = logical.decays(module.axes())(params), logical.matrices(module.axes())(params)
    assert not decays["persistent"] and isinstance(matrices["persistent"], str)

    def run(params, time):
        state = module.apply({"params": params}, B, T, method="init_state")
        y, end = module.apply({"params": params}, jnp.zeros((B, time, WIDTH), jnp.bfloat16), state)
        return jax.tree.map(jnp.asarray, state), end, y

    for time in (1, T - 1):
        state, end, y = jax.eval_shape(functools.partial(run, time=time), params)
        assert kinds(state) == kinds(end) and y.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("width", "heads"), [(192, 6), (512, 16), (768, 12), (1024, 16), (1536, 24), (2048, 32)])
def test_every_width_can_be_built(name, width, heads):
    parts = {part: replace(getattr(CONFIGS[name], part), heads=heads) for part in ("attention", "memory")}
    replace(CONFIGS[name], **parts).build(width, jnp.float32)


BEFORE = replace(MEMORY.rule, read="before")
WRONG = {
    "persistent is -1; give a whole number of at least 0": dict(persistent=-1),
    "segment is 0; give a whole number": dict(segment=0),
    "segment is 6; give a multiple of the period of the memory's rule, 4": dict(segment=6),
    "attention.window is 5; set it to None": dict(attention=AttentionConfig(HEADS, window=5)),
    "attention.conv is 4; set it to 0": dict(attention=AttentionConfig(HEADS, conv=4)),
    "attention.persistent is 2; set it to 0": dict(attention=AttentionConfig(HEADS, persistent=2)),
    "read of the memory's rule is 'before'; set it to 'after'": dict(memory=replace(MEMORY, rule=BEFORE)),
    "memory.persistent is 2; set it to 0": dict(memory=replace(MEMORY, persistent=2)),
    "3 heads do not divide width 8": dict(memory=replace(MEMORY, heads=3)),
    "3 heads do not divide width 8 into heads of an even number": dict(attention=AttentionConfig(3)),
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=WRONG)
def test_wrong_settings_are_refused_before_any_array_exists(untyped, message, change):
    with pytest.raises(UserError, match=message):
        replace(CONFIGS["mac"], **change).build(WIDTH, jnp.float32)


@pytest.mark.parametrize("part", [AttentionConfig(HEADS), MEMORY])
def test_a_negative_number_of_persistent_vectors_is_refused(part):
    with pytest.raises(UserError, match="persistent is -1"):
        replace(part, persistent=-1)
