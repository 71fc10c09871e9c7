"""Memory caching against numpy: any cut, no look ahead, and what a state that grows with the text has room for."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references_caching import caching
from test_titans import drawn as drawn_layer
from test_titans import fresh, read_in_pieces, reader

from hope_jax.errors import UserError
from hope_jax.memory import RULES
from hope_jax.models import MODELS
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.memory_caching import MemoryCachingConfig
from hope_jax.nn.room import room_left, slots_of, without_empty_slots
from hope_jax.storage.digests import kinds
from hope_jax.train import count_bytes

WIDTH, HEADS, B, T, SEGMENT, PERIOD, RATE = 8, 2, 2, 22, 8, 4, 0.7
HOW = dict(rate_max=RATE, unit_values=True, impl="chunked")  # plain products compile sooner
MEMORY = MemoryMixerConfig(replace(RULES["titans"], period=PERIOD), HEADS, horizon=16, **HOW)
MATRIX = MemoryMixerConfig(replace(RULES["deltanet"], shard=SEGMENT), HEADS, **HOW)
CONFIGS = {"titans": MemoryCachingConfig(MEMORY, SEGMENT), "deltanet": MemoryCachingConfig(MATRIX, SEGMENT)}
SIZES = dict(heads=HEADS, segment=SEGMENT, period=PERIOD, rate_max=RATE)
REFERENCES = {name: functools.partial(caching, **SIZES, anew=name == "deltanet") for name in CONFIGS}
both = pytest.mark.parametrize("name", CONFIGS)
# Gradients of a deep memory take long to compile.
each = pytest.mark.parametrize("name", [pytest.param("titans", marks=pytest.mark.slow), "deltanet"])


@functools.cache
def inputs():
    """Not around zero: the means of segments then differ, and so do the weights of their memories."""
    rng = np.random.default_rng(1)
    return rng.normal(size=(B, T, WIDTH)) + np.repeat(rng.normal(size=(B, 3, WIDTH)), SEGMENT, axis=1)[:, :T]


@functools.cache
def pulled(name):
    """The parameters, and compiled (parameters, input, cotangent) -> (output, gradients, final state)."""
    module, params = drawn_layer(CONFIGS[name])

    @jax.jit
    def pull(params, u, cotangent):
        y, pull, state = jax.vjp(lambda p, u: module.apply({"params": p}, u, method=fresh), params, u, has_aux=True)
        return y, pull(cotangent), state

    return params, pull


def assert_equal(found, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), found, expected)


@functools.cache
def streamed(name):
    """Parameters, outputs and final state of a text that comes in pieces, with padding after them."""
    module, params = drawn_layer(CONFIGS[name])
    one = None if name == "deltanet" else 1
    counts = 5, 0, 10, one, one, 3, 2  # segments end inside and between calls, and with a single token
    y, states, _ = read_in_pieces(module, params, inputs(), counts, 10)
    return params, y, states[T]


@both
def test_outputs_and_state_are_those_of_the_equations_in_any_cut_with_any_padding(x64, name):
    params, y, state = streamed(name)
    for row in range(B):
        expected, ends, means = REFERENCES[name](params, inputs()[row])
        np.testing.assert_allclose(y[row], expected, rtol=1e-9, atol=1e-11)
        assert_equal(state.means[row], np.stack(means))
        for layer, cached in enumerate(state.weights):
            kept = [[weights[layer].T for weights in of_heads] for of_heads in ends]
            assert_equal(cached[row], np.swapaxes(np.array(kept), 0, 1))


@each
def test_a_whole_text_gives_the_same_and_gradients_are_those_of_the_equations(x64, name):
    params, pull = pulled(name)
    rng, u = np.random.default_rng(2), inputs()
    cotangent = np.stack([np.zeros((T, WIDTH)), rng.normal(size=(T, WIDTH))])
    y, gradients, state = pull(params, u, cotangent)
    assert kinds(state) == kinds(streamed(name)[2])
    assert_equal((y, state), streamed(name)[1:])
    leaves, tree = jax.tree.flatten(params)
    points = dict(enumerate((*leaves, u[1])))
    directions = {i: rng.normal(size=x.shape) for i, x in points.items()}

    def scalar(**point):
        *leaves, x = point.values()
        return np.sum(cotangent[1] * REFERENCES[name](jax.tree.unflatten(tree, leaves), x)[0])

    named = [{str(i): x for i, x in values.items()} for values in (points, directions)]
    slope = references.derivative(scalar, *named)
    found = (*jax.tree.leaves(gradients[0]), gradients[1][1])
    along = sum(np.sum(np.array(g) * d) for g, d in zip(found, directions.values(), strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-9)
    assert np.all(np.asarray(gradients[1][0]) == 0), "a sequence of the batch looked at another"


@each
def test_an_output_depends_on_everything_before_it_and_on_nothing_after_it(x64, name):
    params, pull = pulled(name)
    for t in (0, 7, 8, 13):
        cotangent = np.zeros((B, T, WIDTH))
        cotangent[0, t] = np.arange(WIDTH)
        moved = np.abs(pull(params, inputs(), cotangent)[1][1][0]).sum(axis=1)
        assert np.all(moved[: t + 1] > 1e-12) and np.all(moved[t + 1 :] == 0), t


@each
def test_what_comes_later_leaves_nothing_behind_even_if_it_is_nan(x64, name):
    params, pull = pulled(name)
    broken = inputs().copy()
    broken[0, 13] = np.nan
    zero = np.zeros((B, T, WIDTH))
    before = slice(0, 13 // SEGMENT * SEGMENT)
    good, found = (np.asarray(pull(params, u, zero)[0])[0, before] for u in (inputs(), broken))
    np.testing.assert_array_equal(found, good)


@pytest.mark.parametrize("leak", [False, True])
def test_the_reference_looks_ahead_with_the_mean_of_a_whole_segment_and_only_then(x64, leak):
    _, params = drawn_layer(CONFIGS["titans"])
    t, direction = 10, np.zeros((T, WIDTH))
    direction[t + 1 : 2 * SEGMENT] = 1.0
    slope = references.derivative(
        lambda x: np.sum(REFERENCES["titans"](params, x, leak=leak)[0][t]), {"x": inputs()[0]}, {"x": direction}
    )
    assert abs(slope) > 1e-3 if leak else slope == 0


def test_a_text_of_one_segment_is_read_by_the_plain_memory(x64):
    _, params = drawn_layer(CONFIGS["deltanet"])
    plain = replace(MATRIX, rule=RULES["deltanet"])
    found, _ = reader(MemoryCachingConfig(plain, 2 * T).build(WIDTH, jnp.float64))(params, inputs())
    expected, _ = reader(plain.build(WIDTH, jnp.float64))(params["memory"], inputs())
    np.testing.assert_array_equal(found, expected)


@both
def test_a_soup_of_weights_is_the_mixture_of_answers_for_matrices_alone(x64, name):
    params, y, _ = streamed(name)
    soup = REFERENCES[name](params, inputs()[1], soup=True)[0]
    difference = np.abs(y[1] - soup).max()
    assert difference < 1e-10 if name == "deltanet" else difference > 1e-3
    np.testing.assert_allclose(y[1, :SEGMENT], soup[:SEGMENT], rtol=1e-9, atol=1e-11)


def test_a_state_grows_with_the_text_that_it_is_made_for_and_gives_nan_after_it(x64):
    module, params = drawn_layer(CONFIGS["deltanet"])
    step = jax.jit(lambda u, state, count: module.apply({"params": params}, u, state, count))
    run = functools.partial(step, inputs()[:, :9])
    state = module.apply({"params": params}, B, 2 * SEGMENT - 1, method="init_state")
    assert slots_of([state]) == room_left({"layers": (state, None)}) == 2 * SEGMENT  # whole segments
    assert slots_of([module.apply({"params": params}, B, 0, method="init_state")]) == SEGMENT
    y, state = run(state, np.int32(9))
    assert room_left(state) == 7 and np.isfinite(y).all()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    assert room_left(stacked) == 7 and without_empty_slots(stacked).means.shape == (2, B, 1, WIDTH)
    y, state = run(state, np.int32(7))
    assert room_left(state) == 0 and np.isfinite(y[:, :7]).all()
    assert np.isnan(run(state, np.int32(1))[0]).all()
    with pytest.raises(UserError, match="17 tokens and slots for 16; make the state with a larger capacity"):
        step(inputs()[:, :17], state, None)


def test_training_keeps_the_memories_of_the_past_once_and_not_for_every_segment(x64):
    module, params = drawn_layer(CONFIGS["deltanet"])

    def kept(segments):
        """Bytes between the forward and the backward pass."""

        def pull(params, u):
            return jax.vjp(lambda params, u: module.apply({"params": params}, u, method=fresh)[0], params, u)[1]

        u = jax.ShapeDtypeStruct((1, segments * SEGMENT, WIDTH), jnp.float64)
        return count_bytes(jax.eval_shape(pull, params, u))

    few, some, many = map(kept, (2, 4, 8))
    assert many - some == pytest.approx(2 * (some - few), rel=0.01)


def test_the_row_keeps_its_memory_every_sixteenth_of_the_context_and_at_least_every_256_tokens():
    assert MODELS["memory_caching-1.3b"].mixer.segment == 256
    assert MODELS["memory_caching-tiny"].mixer.segment == 128


def test_states_keep_their_types():
    module = CONFIGS["deltanet"].build(WIDTH, jnp.bfloat16)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((B, 1, WIDTH)), method=fresh))["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}

    def run(params):
        state = module.apply({"params": params}, B, T, method="init_state")
        y, end = module.apply({"params": params}, jnp.zeros((B, T - 1, WIDTH), jnp.bfloat16), state)
        return jax.tree.map(jnp.asarray, state), end, y

    state, end, y = jax.eval_shape(run, params)
    assert kinds(state) == kinds(end) and y.dtype == jnp.bfloat16


WRONG = {
    "segment is 0; give a whole number": dict(segment=0),
    "segment is 6; give a multiple of the memory's anchor period, 4": dict(segment=6),
    "the memory's shard is 8; set it to the segment, 16, or to None": dict(memory=MATRIX, segment=16),
    "memory.persistent is 2; set it to 0": dict(memory=replace(MEMORY, persistent=2)),
    "project_queries asks in the span of one": dict(
        memory=replace(MEMORY, rule=replace(MEMORY.rule, project_queries=True))
    ),
    "3 heads do not divide width 8": dict(memory=replace(MEMORY, heads=3)),
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=WRONG)
def test_wrong_settings_are_refused_before_any_array_exists(untyped, message, change):
    with pytest.raises(UserError, match=message):
        replace(CONFIGS["titans"], **change).build(WIDTH, jnp.float32)
