"""Self-modifying Titans against a token-by-token numpy head, its layer, and whether it stays finite and stores."""

import functools
import itertools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from drawn import drawn

from hope_jax.errors import UserError
from hope_jax.memory import architectures, objectives
from hope_jax.memory.architectures import Architecture
from hope_jax.memory.packing import Boxes, unpack
from hope_jax.memory.self_modifying import Streams, Tuning, scan
from hope_jax.nn.mixers.self_modifying import SelfModifyingConfig

D, H, T = 4, 6, 21
SMALL = dict(heads=1, c_memory=8, c_projections=4, hidden=2, rate_max=2.0, rate_bias=-2.5)
# Every choice of the configuration occurs in some row that is quick, but for architectures of projections and gates.
ONE_PERIOD, MATRIX = dict(c_memory=8, c_projections=8), dict(memory=architectures.full_rank_matrix)
KEY = dict(inner_projection=("k",), dgd_scope="input_only")
QUICK = {
    "all projections, periods 8 8": dict(hidden=1, inner_projection=("v", "k", "q"), **ONE_PERIOD),
    "a matrix as main memory, no momentum": dict(MATRIX, impl="chunked", momentum="none", inner_projection=("v",)),
    "key only, input_only, to init, constant undamped momentum, read after": dict(
        KEY, impl="chunked", retain_to="init", momentum="const", damped=False, read="after"
    ),
    "periods 4 16, no DGD, to init": dict(c_memory=4, c_projections=16, dgd_scope="none", retain_to="init"),
    "no projections, dot, read anchor, no retention, literal rate": dict(
        inner_projection=(), objective=objectives.dot, read="anchor", retention=False, rate_form="literal", rate_max=0.8
    ),
}
ROWS = QUICK | {
    "periods 16 16": dict(c_memory=16, c_projections=16),
    "periods 16 4, all projections": dict(c_memory=16, c_projections=4, inner_projection=("k", "v", "q")),
    "constant undamped momentum, read after": dict(momentum="const", damped=False, read="after"),
    "value only, input_only, to init": dict(inner_projection=("v",), dgd_scope="input_only", retain_to="init"),
    "a matrix as main memory, periods 8 8": dict(MATRIX, momentum="none", retain_to="init", **ONE_PERIOD),
}


def config_of(row):
    return SelfModifyingConfig(**SMALL | row)


def draw_head(config):
    """Streams, starts, log rates and biases of one head, in numpy and in the library's containers."""
    rng, names = np.random.default_rng(0), config.inner_projection
    streams = {
        n: x / np.linalg.norm(x, axis=1, keepdims=True) for n, x in zip("xkvq", rng.normal(size=(4, T, D)), strict=True)
    }
    decay = {"none": None, "const": np.full(T, 0.4), "gated": rng.uniform(0.05, 0.6, T)}[config.momentum]
    starts = {n: [0.5 * rng.normal(size=(D, D)), 0.5 * rng.normal(size=(D, D))] for n in names}
    starts |= {n: [0.5 * rng.normal(size=(3, D)), 0.5 * rng.normal(size=(1, 3))] for n in ("eta", "alpha")}
    hidden = D if config.hidden == 1 else H
    sizes = (D, hidden, D) if config.memory.layers > 1 else (D, D)
    starts["memory"] = [0.5 * rng.normal(size=(m, n)) for n, m in itertools.pairwise(sizes)]
    log_rates, biases = (0.1, -0.7, -0.4), (-0.3, 2.0)

    def stacked(boxes, *shapes):
        return tuple(np.reshape([starts[n][i].T for n in boxes], (-1, *shape[::-1])) for i, shape in enumerate(shapes))

    memory = tuple(w.T for w in starts["memory"])  # kernels, the transposes of the equations' W
    initial = Boxes(memory, stacked(names, (D, D), (D, D)), stacked(("eta", "alpha"), (3, D), (1, 3)))
    tuning = Tuning(Boxes(*map(np.asarray, log_rates)), *map(np.asarray, biases))
    ours = Streams(*(streams[n] for n in "xkvq"), decay)
    return (streams | dict(decay=decay), starts, log_rates, biases), (initial, tuning, ours)


def reference(config, numpy_head):
    how = {n: getattr(config, n) for n in ("c_memory", "c_projections", "read", "rate_max", "retention", "dgd_scope")}
    how |= {n: getattr(config, n) for n in ("rate_form", "damped", "retain_to")}
    how["objective"] = "dot" if config.objective is objectives.dot else "l2"
    return references.self_modifying(*numpy_head, names=config.inner_projection, **how)


GRADIENT_ROWS = (*list(QUICK)[:3:2], "constant undamped momentum, read after", "a matrix as main memory, periods 8 8")


@functools.cache
def compiled(row, whole, impl=None):
    """(point, weight) -> ((loss, (fast, reading)), gradients of the loss), of some rows only: None for the others.

    The loss is the weighted sum of the reads. ``whole``: the position is known to be a start.
    """
    config, position = config_of(ROWS[row]), (np if whole else jnp).zeros((), np.int32)
    spec, impl = config.spec(), impl or config.impl

    def loss(point, weight):
        initial, tuning, streams = point
        fast, reading = scan(spec, initial, tuning, spec.start(initial), streams, position, impl)
        return jnp.sum(weight * reading.reads), (fast, reading)

    if row in GRADIENT_ROWS:
        return jax.jit(jax.value_and_grad(loss, has_aux=True))
    return jax.jit(lambda *arguments: (loss(*arguments), None))


def start_of(row, whole):
    """The row's head in both forms, cut to whole periods or not, weights of a loss and a direction."""
    (streams, *others), point = draw_head(config_of(ROWS[row]))
    time, rng = 16 if whole else T, np.random.default_rng(5)
    point = point[:2] + (jax.tree.map(lambda x: x[:time], point[2]),)
    numpy_head = ({n: None if x is None else x[:time] for n, x in streams.items()}, *others)
    return numpy_head, point, rng.normal(size=(time, D)), jax.tree.map(lambda x: rng.normal(size=x.shape), point)


def moved(config, numpy_head, direction, step=1e-25j):
    """The numpy head a complex step along the direction of everything."""
    (streams, starts, log_rates, biases), (weights, tuning, inputs) = numpy_head, direction
    along = {n: [w[i] for w in weights.projections] for i, n in enumerate(config.inner_projection)}
    along |= {n: [w[i] for w in weights.gates] for i, n in enumerate(("eta", "alpha"))} | dict(memory=weights.memory)
    starts = {n: [w + step * d.T for w, d in zip(starts[n], along[n], strict=True)] for n in starts}
    ends = {**{n: getattr(inputs, n) for n in "xkvq"}, "decay": inputs.momentum_decay}
    streams = {n: None if d is None else streams[n] + step * d for n, d in ends.items()}
    scales = [x + step * d for x, d in zip(log_rates, tuning.log_rate, strict=True)]
    return streams, starts, scales, [x + step * d for x, d in zip(biases, tuning[1:], strict=True)]


SLOW = (pytest.mark.slow,)
WHOLE = tuple(QUICK)[:2]  # of the others the end of the text lies inside a period
CASES = [
    pytest.param(row, whole, id=f"{row}, {way}", marks=SLOW * (row not in QUICK or whole != (row in WHOLE)))
    for row in ROWS
    for whole, way in ((False, "any time"), (True, "whole periods"))
]


@pytest.mark.parametrize(("row", "whole"), CASES)
def test_a_head_equals_the_token_by_token_equations(x64, row, whole):
    """The gradient, too, in some rows: along one random direction, by a complex step; any stop-gradient shows."""
    config = config_of(ROWS[row])
    numpy_head, point, weight, direction = start_of(row, whole)
    (_, (fast, reading)), gradient = compiled(row, whole)(point, weight)
    expected, boxes, asked = reference(config, numpy_head)
    np.testing.assert_allclose(reading.reads, expected, rtol=1e-9, atol=1e-9)
    assert (reading.queries is None) == ("q" not in config.inner_projection)
    np.testing.assert_allclose(point[2].q if reading.queries is None else reading.queries, asked, rtol=1e-9, atol=1e-9)
    for kind in ("running", "anchor", "momentum") if config.momentum != "none" else ("running", "anchor"):
        found = unpack(config.spec().stacks(point[0]), getattr(fast, kind))
        for name, box in zip(("memory", *config.inner_projection, "eta", "alpha"), found, strict=True):
            for i, (layer, right) in enumerate(zip(box, getattr(boxes[name], kind), strict=True)):
                np.testing.assert_allclose(layer, right.T, rtol=1e-9, atol=1e-9, err_msg=f"{name} {kind} {i}")
    if gradient is not None:
        pairs = zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
        reads, _, _ = reference(config, moved(config, numpy_head, direction))
        slope = np.imag(np.sum(weight * reads)) / 1e-25
        assert sum(np.sum(np.asarray(g) * d) for g, d in pairs) == pytest.approx(slope, rel=1e-9)


FORMS = itertools.product(GRADIENT_ROWS, ("sequential", "chunked", "auto"))


@pytest.mark.parametrize(
    ("row", "impl"), [pytest.param(*form, marks=SLOW * (form != (WHOLE[0], "sequential"))) for form in FORMS]
)
def test_every_form_has_the_same_values_and_gradients(x64, row, impl):
    _, point, weight, _ = start_of(row, True)
    expected, found = compiled(row, True)(point, weight), compiled(row, True, impl)(point, weight)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)


def test_in_float32_a_head_is_within_two_ten_thousandths():
    row = WHOLE[1]
    numpy_head, point, weight, _ = start_of(row, True)
    (_, (_, reading)), _ = compiled(row, True)(jax.tree.map(np.float32, point), np.float32(weight))
    expected, _, _ = reference(config_of(ROWS[row]), numpy_head)
    assert reading.reads.dtype == jnp.float32
    np.testing.assert_allclose(reading.reads, expected, atol=2e-4 * np.max(np.abs(expected)))


def test_with_period_one_reading_the_anchor_is_reading_before(x64):
    config = config_of(dict(c_memory=1, c_projections=1, read="anchor", hidden=1, inner_projection=()))
    numpy_head, (initial, tuning, streams) = draw_head(config)
    spec = config.spec()

    @jax.jit
    def reads(initial, tuning, streams):
        return scan(spec, initial, tuning, spec.start(initial), streams, jnp.zeros((), int))[1].reads

    expected, _, _ = reference(replace(config, read="before"), numpy_head)
    np.testing.assert_allclose(reads(initial, tuning, streams), expected, atol=1e-12)


# ---------------------------------------------------------------- the layer

LAYER = dict(heads=2, c_memory=8, c_projections=4, horizon=32, projection_rate=0.5, rate_max=2.0, rate_bias=-2.5)
# Plain products and boxes of one layer compile sooner.
SHALLOW = dict(projection=Architecture(1, True, (0.5,)), gate=Architecture(1, False, (1.0,)), impl="chunked")
OTHER = dict(inner_projection=("v", "q"), retain_to="init", **SHALLOW)


def fresh_call(module, u):
    """A call on a fresh sequence."""
    return module(u, module.init_state(u.shape[0], T))


@functools.cache
def layer(**row):
    """A module, parameters, an input [2,T,8] and the fresh state."""
    module = SelfModifyingConfig(**LAYER | row).build(8, "float64")
    u = np.random.default_rng(1).normal(size=(2, T, 8))
    params = {"params": drawn(functools.partial(module.init, method=fresh_call), u[:, :1], retention_bias=3.4)}
    start = functools.partial(module.apply, method=lambda module: module.init_state(2, T))
    return module, params, u, jax.jit(start)(params)


@functools.cache
def pulled(**row):
    """Compiled: (parameters, input, cotangent) -> (output, gradients of both, state) of a fresh sequence."""

    @jax.jit
    def pulled(params, u, cotangent):
        call = functools.partial(layer(**row)[0].apply, method=fresh_call)
        out, pull, state = jax.vjp(call, params, u, has_aux=True)
        return out, pull(cotangent), state

    return pulled


@pytest.mark.parametrize("row", [pytest.param({}, marks=SLOW), OTHER], ids=["deep", "shallow"])
def test_any_cut_of_a_sequence_gives_the_same_outputs_and_state(x64, row):
    module, params, u, state = layer(**row)
    expected, _, end = pulled(**row)(params, u, np.zeros_like(u))
    apply, now, outputs = jax.jit(module.apply), state, []
    for start, stop in ((0, 9), (9, 18), (18, 19), (19, 20), (20, 21)):
        y, now = apply(params, u[:, start:stop], now)
        outputs.append(y)
    chex.assert_trees_all_close((np.concatenate(outputs, 1), now), (expected, end), rtol=1e-9, atol=1e-9)


def test_rate_zero_keeps_every_memory_at_its_start(x64):
    module, params, u, state = layer(rate_max=0.0, retention=False, momentum="none", **SHALLOW)
    _, end = jax.jit(module.apply)(params, u, state)
    chex.assert_trees_all_close(end.fast, state.fast, rtol=0, atol=1e-13)
    _, params, u, state = layer(**OTHER)
    *_, end = pulled(**OTHER)(params, u, np.zeros_like(u))
    for ours, start in zip(end.fast.running, state.fast.running, strict=True):
        assert np.all(np.max(np.abs(ours - start), axis=(-1, -2)) > 1e-6)


def test_gradients_reach_every_parameter_and_no_output_sees_its_future_or_another_sequence(x64):
    (_, params, u, _), t, cotangent = layer(**OTHER), 14, np.zeros((2, T, 8))
    one, (gradients, _), _ = pulled(**OTHER)(params, u, np.random.default_rng(2).normal(size=u.shape))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        per_row = np.max(np.abs(np.array(gradient)), axis=-1)
        assert np.all(per_row > 1e-12), jax.tree_util.keystr(path)
    cotangent[0, t] = 1
    other, (_, inputs), _ = pulled(**OTHER)(params, np.stack([u[0], -u[1]]), cotangent)
    np.testing.assert_array_equal(one[0], other[0])
    assert np.all(np.any(np.array(one[1] != other[1]), axis=-1)[1:])
    moved = np.sum(np.abs(np.array(inputs)), axis=-1)
    assert np.all(moved[0, t + 1 :] == 0) and np.all(moved[1] == 0)
    assert np.all(moved[0, : t + 1] > 1e-12)


# ---------------------------------------------------------------- mistakes

WRONG = {
    "expected a subset": dict(inner_projection=("k", "x")),
    "each once": dict(inner_projection=("k", "k")),
    "momentum is": dict(momentum="much"),
    "rates must be positive": dict(rate_max=-1.0),
    "conv is 0; give a whole number of at least 1": dict(conv=0),
    "gate_hidden is 0; give a whole number of at least 1": dict(gate_hidden=0),
    "horizon is 1; give a whole number of at least 2": dict(horizon=1),
    "do not nest": dict(c_memory=6, c_projections=4),
    "cannot be residual": dict(gate=architectures.residual_mlp),
    "read is": dict(read="later"),
    "impl is": dict(impl="quick"),
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=WRONG)
def test_a_wrong_configuration_says_what_is_wrong(untyped, message, change):
    with pytest.raises(UserError, match=message):
        SelfModifyingConfig(**SMALL | change)


@pytest.mark.parametrize(
    ("message", "change"),
    [("and self_values=True", dict(self_values=False)), ("in architecture and period only", dict(momentum=False))],
)
def test_rules_that_are_not_those_of_one_head_are_refused(message, change):
    spec = config_of({}).spec()
    rules = spec.rules._replace(memory=replace(spec.rules.memory, **change))
    with pytest.raises(UserError, match=message):
        replace(spec, rules=rules)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UserError, match="3 heads"):
        SelfModifyingConfig(heads=3).build(8, jnp.float32)
