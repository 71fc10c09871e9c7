"""Attention against numpy, causality by gradients, any cut against the whole, and what happens when a cache is full."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn

from hope_jax.errors import UserError
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.room import room_left

B, T, D, HEADS = 2, 11, 12, 3
ROWS = {
    "full": AttentionConfig(HEADS),
    "full with convolutions": AttentionConfig(HEADS, conv=4),
    "window": AttentionConfig(HEADS, window=4),
    "window of one": AttentionConfig(HEADS, window=1),
    "window with convolutions": AttentionConfig(HEADS, window=5, conv=3),
    "shared keys": AttentionConfig(6, key_heads=2),
    "window with one key head": AttentionConfig(6, window=4, key_heads=1),
}
rows = pytest.mark.parametrize("config", ROWS.values(), ids=ROWS)


def make(config, dtype=jnp.float64, capacity=T, time=T):
    """A compiled layer with random parameters, an input and a fresh state."""
    run, params = layer(config, dtype)
    x = np.random.default_rng(0).normal(size=(B, time, D)).astype(dtype)
    return run, params, x, config.build(D, dtype).init_state(B, capacity)


@functools.cache
def layer(config, dtype):
    """A compiled layer and its parameters."""
    module, x = config.build(D, dtype), jnp.zeros((B, 1, D), dtype)
    return jax.jit(module.apply), {"params": drawn(module.init, x, module.init_state(B, 1))}


def numpy_attention(config, params, x):
    """Token by token, head by head, straight from the formula."""
    (batch, time, width) = x.shape
    size = width // config.heads
    kernels = {name: np.array(p["kernel"]) for name, p in params["params"].items()}
    streams = {}
    for i, name in enumerate(("query", "key", "value")):
        source = _numpy_conv(x, kernels[f"convs_{i}"]) if config.conv else x
        made = (source @ kernels[name]).reshape(batch, time, -1, size)
        streams[name] = np.repeat(made, config.heads // made.shape[2], axis=2)
    out = np.zeros((batch, time, config.heads, size))
    for b, t, h in np.ndindex(batch, time, config.heads):
        past = range(0 if config.window is None else max(0, t - config.window + 1), t + 1)
        q = _turn(streams["query"][b, t, h], t)
        scores = np.array([q @ _turn(streams["key"][b, s, h], s) for s in past]) / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = (weights / weights.sum()) @ streams["value"][b, list(past), h]
    return out.reshape(batch, time, width) @ kernels["out"]


def _turn(z, at):
    half = len(z) // 2
    turned = (z[:half] + 1j * z[half:]) * np.exp(1j * at * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


def _numpy_conv(x, kernel):
    width = len(kernel)
    padded = np.concatenate([np.zeros((len(x), width - 1, x.shape[2])), x], axis=1)
    return np.stack([(padded[:, t : t + width] * kernel).sum(1) for t in range(x.shape[1])], axis=1)


@rows
def test_equals_numpy(x64, config):
    run, params, x, state = make(config)
    np.testing.assert_allclose(run(params, x, state)[0], numpy_attention(config, params, x), atol=1e-12)


@rows
def test_any_cut_equals_the_whole_in_outputs_and_state(x64, config):
    """Pieces of five tokens and of one are longer and shorter than the windows."""
    run, params, x, state = make(config)
    whole, end = run(params, x, state)
    for cuts in ([5, 10], [1, 6], range(1, T)):
        pieces, carried = [], state
        for piece in np.split(x, list(cuts), axis=1):
            y, carried = run(params, piece, carried)
            pieces.append(y)
        np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), carried, end)


@pytest.mark.parametrize("window", [None, 150], ids=["full", "window"])
def test_a_sequence_of_several_query_blocks_equals_short_pieces(x64, window):
    """300 tokens are three blocks inside one call; pieces of 50 never need a second block."""
    config = AttentionConfig(HEADS, window=window)
    run, params, x, state = make(config, capacity=320, time=300)
    whole, _ = run(params, x, state)
    carried, pieces = state, []
    for piece in np.split(x, 6, axis=1):
        y, carried = run(params, piece, carried)
        pieces.append(y)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-12)


@rows
def test_gradients_prove_causality_and_the_reach_of_the_window(x64, config):
    run, params, x, state = make(config)
    size = np.asarray(jax.jit(jax.jacobian(lambda x: run(params, x, state)[0][0].sum(-1)))(x))
    reach = np.abs(size[:, 0]).max(-1)
    t, s = np.indices((T, T))
    seen = (s <= t) & (t - s < (config.window or T) + max(config.conv - 1, 0))
    assert (reach[~seen] == 0).all() and (reach[seen] > 0).all()
    assert (size[:, 1] == 0).all(), "one sequence of the batch looked at another"


def test_a_window_as_long_as_the_text_is_full_attention(x64):
    run, params, x, state = make(AttentionConfig(HEADS))
    wide = AttentionConfig(HEADS, window=T).build(D, jnp.float64)
    expected, _ = run(params, x, state)
    y, _ = jax.jit(wide.apply)(params, x, wide.init_state(B, T))
    np.testing.assert_allclose(y, expected, atol=1e-12)


def test_a_window_keeps_window_minus_one_tokens_however_many_it_read(x64):
    run, params, x, state = make(AttentionConfig(HEADS, window=4), capacity=2)
    _, end = run(params, x, state)
    assert end.cache.keys.shape == state.cache.keys.shape == (B, HEADS, 3, D // HEADS)
    assert room_left(end) is None


@rows
def test_state_keeps_its_shapes_and_dtypes(config):
    for dtype in (jnp.float32, jnp.bfloat16):
        run, params, x, state = make(config, dtype)
        y, end = jax.eval_shape(run, params, x, state)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), end) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
        assert y.dtype == dtype


@pytest.mark.parametrize("row", ["full", "window with convolutions"])
def test_bfloat16_follows_float32(row):
    run, params, x, state = make(ROWS[row], jnp.float32)
    low = ROWS[row].build(D, jnp.bfloat16)
    y, _ = jax.jit(low.apply)(params, x.astype(jnp.bfloat16), low.init_state(B, T))
    np.testing.assert_allclose(np.array(y, np.float32), run(params, x, state)[0], atol=0.05)


def test_plain_convolutions_can_be_differentiated_forward(x64):
    _, params, x, state = make(AttentionConfig(HEADS, conv=3), time=4)
    layer = AttentionConfig(HEADS, conv=3, impl="chunked").build(D, jnp.float64)

    @jax.jit
    def slopes(x, direction):
        def loss(x):
            return jnp.sum(jnp.sin(layer.apply(params, x, state)[0]))

        return jax.jvp(loss, (x,), (direction,))[1], jnp.vdot(jax.grad(loss)(x), direction)

    forward, backward = slopes(x, np.cos(x))
    assert abs(forward) > 1e-3
    np.testing.assert_allclose(forward, backward, rtol=1e-9)


def test_huge_scores_stay_finite_forward_and_backward():
    run, params, x, state = make(AttentionConfig(HEADS), jnp.float32)
    loss, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(run(params, x, state)[0] ** 2)))(1e4 * x)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_a_full_cache_gives_nan_and_says_beforehand_how_much_room_is_left(x64):
    """In states that are stacked over layers, too. The programs are those of the pieces above."""
    run, params, x, state = make(AttentionConfig(HEADS))
    assert room_left({"layers": [state, ()]}) == T
    for size, left in ((5, T - 5), (5, T - 10), (1, 0)):
        y, state = run(params, x[:, :size], state)
        assert room_left(state) == left and np.isfinite(y).all()
        assert room_left(jax.tree.map(lambda a: np.stack([a, a]), state)) == left
    y, state = run(params, x[:, :1], state)
    assert np.isnan(y).all()


def test_more_tokens_than_slots_is_an_error_that_names_both():
    run, params, x, _ = make(AttentionConfig(HEADS), jnp.float32)
    with pytest.raises(UserError, match="11 tokens and a cache of 5"):
        run(params, x, AttentionConfig(HEADS).build(D, jnp.float32).init_state(B, 5))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"heads": 0}, "heads is 0; give a whole number of at least 1"),
        ({"heads": 2, "window": 0}, "window is 0; .* None: all"),
        ({"heads": 2, "conv": -1}, "conv is -1; .* 0: no convolutions"),
        ({"heads": 2, "impl": "quick"}, "impl is 'quick'"),
        ({"heads": 2, "rope_base": 0.0}, "rope_base"),
        ({"heads": 2, "key_heads": 0}, "key_heads is 0"),
        ({"heads": 6, "key_heads": 4}, "key_heads is 4; expected a divisor of the 6 heads"),
        ({"heads": 5}, "multiple of 10"),
        ({"heads": 4}, "multiple of 8"),
    ],
)
def test_wrong_settings_are_refused_before_any_array_exists(untyped, arguments, word):
    with pytest.raises(UserError, match=word):
        AttentionConfig(**arguments).build(D, jnp.float32)
