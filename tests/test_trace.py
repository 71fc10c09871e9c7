"""What ``inspect`` sees is what happens: losses and states of a stream, writes at their periods, gates by equation."""

import functools
import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import LIGHT, LIGHTER, VOCAB, close, config, made, stream
from drawn import drawn
from jax.interpreters.partial_eval import dce_jaxpr
from references import initial, sigmoid

from hope_jax import context
from hope_jax import trace as tracing
from hope_jax.errors import UserError
from hope_jax.models import MODELS
from hope_jax.nn.feed_forward.fast import sizes
from hope_jax.nn.language_model import LanguageModel

# ---------------------------------------------------------------- losses, states, writes


def before(model, params, tokens, how):
    """A state that has read a little, and how many tokens that were."""
    if how in ("new", "started"):
        return (model.init_state(params, 2) if how == "new" else context.start(model, params, 2)), 0
    read = 8 if how == "a whole chunk" else 7
    _, state = stream(model, params, tokens[:, :read], (read,))
    if how == "finished":
        return context.finish(model, params, state), read
    return (model.apply({"params": params}, tokens[:, 7:10], state)[1], 10) if how == "interrupted" else (state, read)


@pytest.mark.parametrize(
    ("how", "first", "starts", "written"),
    [
        ("new", 1, [0, 4, 8], [4, 8]),
        ("started", 1, [0, 4, 8], [4, 8]),
        ("inside a chunk", 0, [0, 1, 5, 9], [1, 5, 9]),
        ("a whole chunk", 0, [0, 4, 8], [0, 4, 8]),
        ("interrupted", 1, [0, 4, 8], [0, 4, 8]),
        ("finished", 1, [0, 4, 8], [4, 8]),
    ],
)
def test_watching_is_learning_with_the_same_losses_and_the_same_state(how, first, starts, written, x64):
    model, params, tokens = made()
    state, read = before(model, params, tokens, how)
    kept, document = jax.tree.map(np.array, state), tokens[:, read : read + 10]
    expected, end = context.surprise(model, params, state, document)
    trace, after = tracing.watch(model, params, state, document)
    np.testing.assert_allclose(trace.surprise, expected, rtol=1e-9)
    close(after, end, rtol=1e-7, atol=1e-9)
    jax.tree.map(np.testing.assert_array_equal, state, kept)
    np.testing.assert_allclose(trace.drift[:, -1], [sizes(fast) for fast in after.blocks.feed_forward], rtol=1e-9)
    assert (trace.first, trace.tokens, trace.rate, trace.retention) == (first, 10, None, None)
    assert trace.starts.tolist() == starts and trace.starts[trace.written[0, :, 0, 0] > 0].tolist() == written


def test_writes_are_where_periods_end_and_have_the_size_of_what_changed(x64):
    model, params, tokens = made()
    trace, _ = tracing.watch(model, params, context.start(model, params, 2), tokens[:, :18])
    assert trace.starts.tolist() == [0, 4, 8, 12, 16] and trace.written.shape == trace.drift.shape == (2, 5, 1, 2)
    assert [trace.starts[level[:, 0, 1] > 0].tolist() for level in trace.written] == [[4, 8, 12, 16], [8, 16]]
    fast = [stream(model, params, tokens[:, :n], (n,))[1].blocks.feed_forward[0] for n in (8, 10)]
    moved = [(new - old)[0].reshape(2, -1) for old, new in zip(*map(jax.tree.leaves, fast), strict=True)]
    root = np.sqrt(np.mean(np.concatenate(moved, axis=1) ** 2, axis=1))
    np.testing.assert_allclose(trace.written[0, 2, 0], root, rtol=1e-9)
    np.testing.assert_allclose(trace.drift[0, :2, 0], [[0, 0], trace.written[0, 1, 0]])


def test_levels_are_the_layers_of_a_period_and_numbers_are_their_means():
    trace = drawn_trace(gates=True, periods=((4, 8, 8, 0), (4, 4, 4, 4)))
    found = list(trace.levels())
    assert [period for period, _, _ in found] == [4, 4, 8]
    np.testing.assert_allclose(found[2][1], trace.written[0][:, 1:3].mean(axis=(1, 2)))
    np.testing.assert_allclose(found[1][2], trace.drift[1].mean(axis=(1, 2)))
    numbers = json.loads(json.dumps(trace.numbers()))
    assert numbers["levels"][2] == {"period": 8, "written": found[2][1].tolist(), "drift": found[2][2].tolist()}
    np.testing.assert_allclose(numbers["rate"][3][5], trace.rate[3, :, :, 5].mean())
    assert (numbers["first"], len(numbers["surprise"]), numbers["starts"]) == (1, 119, trace.starts.tolist())


# ---------------------------------------------------------------- gates


@pytest.mark.slow
def test_the_gates_of_a_stream_are_those_of_its_tokens_at_the_weights_they_are_read_with():
    model = LanguageModel(config((4,), in_context=1, dtype=jnp.float32, mixer=LIGHT, layers=2))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 8)))
    params = drawn(model.init, tokens[:, :1])
    params["blocks"]["feed_forward"]["rate"] = jnp.full((2, 1), 100.0)
    _, state = context.surprise(model, params, context.start(model, params, 2), tokens[:, :2])
    trace, after = tracing.watch(model, params, state, tokens[:, 2:])
    assert trace.rate is not None and trace.retention is not None
    assert trace.starts.tolist() == [0, 2] and trace.rate.shape == trace.retention.shape == (2, 2, 2, 6)
    read = jax.jit(lambda t, state: model.apply({"params": params}, t, state, mutable=["intermediates"]))
    (_, middle), early = read(tokens[:, :4], context.start(model, params, 2).blocks)
    late = [read(tokens[:, 4:], middle._replace(feed_forward=f))[1] for f in (middle.feed_forward, after.blocks[1])]
    for name in ("rate", "retention"):
        one, static, two = (found["intermediates"]["blocks"]["mixer"][name][0] for found in (early, *late))
        np.testing.assert_allclose(getattr(trace, name), np.concatenate([one[..., 2:], two], axis=-1), rtol=1e-5)
        np.testing.assert_array_equal(static[0], two[0])  # no level is below
        assert name == "retention" or not np.isclose(static[1], two[1], rtol=1e-4).any()


@functools.partial(jax.jit, static_argnums=0)
def mixed(module, params, u):
    """Output of a mixer of fresh sequences, and what it sows."""

    def read(m, u):
        return m(u, m.init_state(*u.shape[:2]))[0]

    return module.apply({"params": params}, u, method=read, mutable=["intermediates"])


def watched(part):
    """A mixer, its parameters, two sequences of 11 tokens."""
    module, u = part.build(8, jnp.float32), jax.random.normal(jax.random.key(0), (2, 11, 8))
    init = functools.partial(module.init, method=lambda m, u: m(u, m.init_state(2, 11))[0])
    return module, drawn(init, u), u


def sown(module, params, u):
    """eta and alpha, [B,H,T] each."""
    mixer = mixed(module, params, u)[1]["intermediates"]
    return {name: np.asarray(one) for name, (one,) in mixer.items()}


def test_without_writes_and_retention_eta_is_0_and_alpha_1():
    found = sown(*watched(replace(LIGHTER, rate_max=0.0, retention=False)))
    np.testing.assert_array_equal(found["rate"], np.zeros((2, 2, 11)))
    np.testing.assert_array_equal(found["retention"], np.ones((2, 2, 11)))


def test_gates_are_read_from_their_memories_at_the_anchor():
    module, params, u = watched(replace(LIGHT, c_projections=8))
    found, x = sown(module, params, u), np.asarray(u).reshape(2, 11, 2, 4)
    x = x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    for i, (name, size) in enumerate({"rate": 1.5, "retention": 1}.items()):
        up, down = (initial(params, "gates", layer)[:, i] for layer in (0, 1))
        hidden = LIGHT.gate.activation(jnp.einsum("hkf,bthk->bhtf", up, x))
        raw = np.einsum("hf,bhtf->bht", down[..., 0], hidden) + np.asarray(params[f"{name}_bias"])[:, None]
        near = np.all(np.isclose(found[name], size * sigmoid(raw), rtol=1e-5, atol=0), axis=(0, 1))
        assert near[:8].all(), name  # until it moves, the anchor is the initial weights
        assert name == "retention" or not near[8:].any()


def test_gates_of_memories_that_say_0_are_their_biases():
    """The gates' memories start at 0 and are written towards the 0 that they generate: they stay there."""
    module, params, u = watched(replace(LIGHT, c_projections=8))
    blank = {name: jnp.zeros_like(p) for name, p in params.items() if name.startswith("start_gates")}
    found = sown(module, params | blank, u)
    for name, size in (("rate", 1.5), ("retention", 1)):
        expected = size * sigmoid(np.asarray(params[f"{name}_bias"]))
        np.testing.assert_allclose(found[name], np.broadcast_to(expected[:, None], (2, 2, 11)), rtol=1e-6)
        assert expected[0] != expected[1]


def test_the_ordinary_call_sows_nothing_and_scans_no_more():
    model, tokens = LanguageModel(config(mixer=LIGHTER, dtype=jnp.float32)), jnp.zeros((2, 9), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens[:, :1]))
    assert set(shapes) == {"params"}
    module, params, u = watched(LIGHTER)
    read = functools.partial(module.apply, {"params": params}, method=lambda m, u: m(u, m.init_state(2, 11))[0])
    # Layers are a scan, and chunks in a mixer.
    for call, args, without in ((model.apply, (shapes, tokens), [False]), (read, (u,), [False, "another"])):
        outputs = {}
        for mutable in (*without, "intermediates"):
            jaxpr = jax.make_jaxpr(functools.partial(call, mutable=mutable))(*args).jaxpr
            jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # what is not used does not leave a loop
            (outputs[mutable],) = (len(one.outvars) for one in jaxpr.eqns if one.primitive.name == "scan")
        assert {outputs[mutable] for mutable in without} == {outputs["intermediates"] - 2}


# ---------------------------------------------------------------- the figure, mistakes


def drawn_trace(gates, periods=((4,) * 3, (8,) * 3), tokens=120, written=1.0) -> Any:
    """A trace of made-up numbers."""
    draw, layers = np.random.default_rng(0), len(periods[0])

    def size(*shape):
        return draw.uniform(0.1, 0.9, shape)

    def gate():
        return size(layers, 2, 2, tokens) if gates else None

    starts = np.arange(0, tokens, 4)
    levels = (written * size(len(periods), len(starts), layers, 2) for _ in range(2))
    return tracing.Trace(size(2, tokens - 1), 1, gate(), gate(), starts, *levels, periods)


ALL = ["surprise, nats", "eta", "1 - alpha", "drift, rms", "write, rms"]


@pytest.mark.parametrize(("trace", "panels"), [
    (drawn_trace(gates=True), ALL),
    (drawn_trace(gates=False), [ALL[0], *ALL[3:]]),
    (drawn_trace(gates=True, written=0.0)._replace(retention=np.ones((3, 2, 2, 120))), [*ALL[:2], ALL[3]]),
    (drawn_trace(gates=False, tokens=1, written=0.0), [ALL[3]]),
], ids=["all", "no gates", "no retention and no writes", "one token"])  # fmt: skip
def test_there_is_a_panel_for_whatever_there_is(trace, panels, tmp_path):
    drawn = tracing.figure(trace, "A document")
    assert [axes.get_ylabel() for axes in drawn.axes] == panels
    assert drawn.axes[0].get_title() == "A document" and drawn.axes[-1].get_xlim() == (0, trace.tokens)
    if len(panels) > 1:
        return  # it takes a second to write one
    path = tracing.draw(trace, tmp_path / "new" / "document", "A document")
    assert path == tmp_path / "new" / "document" and path.read_bytes()[:4] == b"\x89PNG"


def test_curves_are_at_their_tokens_and_levels_at_their_writes():
    trace = drawn_trace(gates=True)
    drawn = tracing.figure(trace, "", compare=trace.surprise[:, 20:] + 5)
    lines = [[np.array(line.get_data()) for line in axes.lines] for axes in drawn.axes]
    thin, _, other, _ = lines[0]
    assert [line[0, [0, -1]].tolist() for line in (thin, other)] == [[1, 119], [21, 119]]
    np.testing.assert_allclose(other[1], thin[1, 20:] + 5)
    middle = np.median(trace.rate[1], axis=(0, 1))[10:13].mean()  # a fiftieth of 120 tokens, and one
    np.testing.assert_allclose(lines[1][1][:, 10], [11, middle])
    assert len(lines[3]) == 2 and lines[3][0][0, -1] == 120
    np.testing.assert_allclose(lines[4][1], [trace.starts, trace.written[1].mean(axis=(1, 2))])


def test_mistakes_are_those_of_learning_and_leave_the_state_as_it_was(untyped, x64):
    model, params, tokens = made()
    state, _ = before(model, params, tokens, "inside a chunk")
    kept = jax.tree.map(np.array, state)
    mistakes: list[tuple[Any, Any, Any, str]] = [
        (params, state, tokens[:1], "of another model, batch size or dtype"),
        (params, state, tokens[:, :0], "expected \\[batch, time\\] with at least one token"),
        (params, state, tokens.at[0, 0].set(VOCAB), "the vocabulary has ids 0 to 10"),
        (params, state, jnp.tile(tokens[:, :30], 3), "90 tokens do not fit: the cache has room for 57 more"),
        (params | {"embedding": params["embedding"] * jnp.nan}, state, tokens, "not finite, so nothing was learned"),
        (params, {}, tokens, "the state is a dict"),
    ]
    for weights, start, text, message in mistakes:
        with pytest.raises(UserError, match=message):
            tracing.watch(model, weights, start, text)
    jax.tree.map(np.testing.assert_array_equal, state, kept)
    plain = LanguageModel(MODELS["transformer_pp-tiny"])
    with pytest.raises(UserError, match="no level that can be written in context; use a hope or stacked model"):
        tracing.watch(plain, {}, state.blocks, tokens)
    for shape in ((1, 5), (2, 121), (2, 0), (119,)):
        with pytest.raises(UserError, match="expected nats of these tokens, \\[2, 1 to 120\\]"):
            tracing.figure(drawn_trace(gates=False), "", compare=np.ones(shape))
