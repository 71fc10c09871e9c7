"""The one recurrence: its evaluators against numpy in values and gradients, and inputs that break naive versions."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from hope_jax.errors import UserError
from hope_jax.memory.kernels import AUTO, PLAIN
from hope_jax.memory.recurrence import gated_delta

V, K = 3, 4
FEATURES = ("erase", "momentum", "base")
ALL = frozenset(FEATURES)
SUBSETS = [frozenset(f for i, f in enumerate(FEATURES) if bits >> i & 1) for bits in range(8)]
# (features, tokens, block, read): every subset of features where the last block is short; other shapes with all.
CASES = [(s, 33, 13, ("before", "after")[i % 2]) for i, s in enumerate(SUBSETS)]
CASES += [(ALL, *c) for c in ((1, 16, "after"), (7, 1, "before"), (33, 16, "before"))]
cases = pytest.mark.parametrize(
    ("features", "time", "block", "read"),
    [
        pytest.param(
            s, t, b, r, id="+".join(sorted(s)) + f" {t}/{b} {r}", marks=pytest.mark.slow if len(s) == 2 else ()
        )
        for s, t, b, r in CASES
    ],
)


def draw(features, time, seed=0):
    """Random inputs as float64 numpy arrays: keys are not unit, gates inside (0, 1)."""
    rng = np.random.default_rng(seed)
    normal, gate = lambda *s: 0.7 * rng.normal(size=s), lambda: rng.uniform(0.05, 0.95, time)
    inputs = dict(memory=normal(V, K), keys=normal(time, K), writes=normal(time, V), queries=normal(time, K))
    inputs["retention"] = gate()
    if "erase" in features:
        inputs["erase"] = gate() / np.sum(inputs["keys"] ** 2, axis=1)
    if "momentum" in features:
        inputs |= dict(momentum=normal(V, K), momentum_decay=gate())
    if "base" in features:
        inputs["base"] = normal(V, K)
    return inputs


@functools.partial(jax.jit, static_argnames=("impl", "read", "block"))
def run(inputs, **how):
    """``gated_delta`` on a dict of inputs."""
    given = dict(erase=None) | inputs
    return gated_delta(
        given.pop("memory"), given.pop("keys"), given.pop("writes"), given.pop("queries"), **given, **how
    )


def outputs(inputs, **how):
    """Everything that comes out, as one list."""
    return [x for x in run(inputs, **how) if x is not None]


def reference(weights, read, **inputs):
    """A scalar of everything the numpy loop gives."""
    out = [x for x in references.gated_delta(**inputs, read=read) if x is not None]
    return sum(np.sum(w * x) for w, x in zip(weights, out, strict=True))


@functools.partial(jax.jit, static_argnames=("block", "read"))
def every_form(inputs, weights, block, read):
    """{impl: (outputs, gradients of their weighted sum)}; "chunked", the plain products, with all features only."""

    def one(impl):
        out, pull = jax.vjp(lambda x: outputs(x, impl=impl, read=read, block=block), inputs)
        return out, pull(weights)[0]

    plain = ("chunked",) * ("base" in inputs and "momentum" in inputs and "erase" in inputs)
    return {impl: one(impl) for impl in ("auto", "sequential", *plain)}


@cases
def test_every_form_equals_the_numpy_loop_in_values_and_gradients(x64, features, time, block, read):
    inputs, rng = draw(features, time), np.random.default_rng(1)
    direction = {name: rng.normal(size=x.shape) for name, x in inputs.items()}
    expected = [x for x in references.gated_delta(**inputs, read=read) if x is not None]
    weights = [rng.normal(size=x.shape) for x in expected]
    slope = references.derivative(functools.partial(reference, weights, read), inputs, direction)
    found = every_form(inputs, [jnp.asarray(w) for w in weights], block, read)
    for impl, (values, gradients) in found.items():
        for value, right in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, right, rtol=1e-10, atol=1e-10, err_msg=impl)
        along = sum(np.sum(direction[leaf] * np.array(g)) for leaf, g in gradients.items())
        np.testing.assert_allclose(along, slope, rtol=1e-9, atol=1e-9, err_msg=impl)
        for leaf, gradient in gradients.items():
            np.testing.assert_allclose(gradient, found["sequential"][1][leaf], rtol=1e-9, atol=1e-9, err_msg=leaf)


def test_the_plain_form_has_derivatives_in_every_mode(x64):
    inputs = draw(ALL, 9)
    gates, gate_names = {}, ("retention", "erase", "momentum_decay")
    gates = {name: jnp.asarray(inputs.pop(name)) for name in gate_names}

    def loss(gates, impl):
        return sum(jnp.sum(jnp.sin(x)) for x in outputs(inputs | gates, impl=impl, block=4))

    @functools.partial(jax.jit, static_argnames="impl")
    def derivatives(gates, direction, impl):
        of = functools.partial(loss, impl=impl)
        _, linear = jax.linearize(of, gates)
        return jax.grad(of)(gates), jax.jvp(of, (gates,), (direction,))[1], linear(direction), jax.hessian(of)(gates)

    rng = np.random.default_rng(2)
    direction = {name: jnp.asarray(rng.normal(size=9)) for name in gates}
    gradient, *found, curvature = derivatives(gates, direction, "chunked")
    for slope in found:
        np.testing.assert_allclose(slope, sum(jnp.vdot(gradient[n], direction[n]) for n in gates), rtol=1e-10)
    expected = derivatives(gates, direction, "sequential")
    chex.assert_trees_all_close((gradient, curvature), (expected[0], expected[-1]), rtol=1e-9, atol=1e-9)


def test_any_cut_of_the_tokens_equals_the_whole(x64):
    inputs = jax.tree.map(jnp.asarray, draw(ALL, 9))
    whole = run(inputs, block=4)
    once, reads = dict(inputs), []
    per_token = ("keys", "writes", "queries", "retention", "erase", "momentum_decay")
    for start, stop in ((0, 1), (1, 6), (6, 9)):
        part = once | {name: inputs[name][start:stop] for name in per_token}
        out = run(part, block=4)
        once |= dict(memory=out.memory, momentum=out.momentum)
        reads.append(out.reads)
    np.testing.assert_allclose(np.concatenate(reads), whole.reads, atol=1e-12)
    np.testing.assert_allclose(once["memory"], whole.memory, atol=1e-12)
    np.testing.assert_allclose(once["momentum"], whole.momentum, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "sequential"])
def test_inactive_tokens_change_nothing_wherever_they_stand(x64, impl):
    inputs = jax.tree.map(jnp.asarray, draw(ALL, 9))
    on = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0.0])
    out = run(inputs, active=jnp.asarray(on), impl=impl, block=4)
    picked = {n: x[on > 0] if n not in ("memory", "momentum", "base") else x for n, x in inputs.items()}
    alone = run(picked, impl=impl, block=4)
    np.testing.assert_allclose(out.memory, alone.memory, atol=1e-12)
    np.testing.assert_allclose(out.momentum, alone.momentum, atol=1e-12)
    np.testing.assert_allclose(np.array(out.reads)[on > 0], alone.reads, atol=1e-12)


def test_without_writes_and_erase_the_memory_is_kept_exactly():
    inputs = {n: jnp.asarray(x, jnp.float32) for n, x in draw({"erase"}, 6).items()}
    idle = inputs | dict(writes=jnp.zeros((6, V)), erase=jnp.zeros(6), retention=jnp.ones(6))
    np.testing.assert_array_equal(run(idle).memory, inputs["memory"])
    np.testing.assert_array_equal(run(idle | dict(erase=None)).memory, inputs["memory"])


def test_momentum_decay_zero_is_no_momentum_and_no_erase_is_erase_zero(x64):
    inputs = jax.tree.map(jnp.asarray, draw({"erase"}, 8))
    plain = run(inputs)
    with_momentum = run(inputs | dict(momentum=jnp.zeros((V, K)), momentum_decay=jnp.zeros(8)))
    np.testing.assert_allclose(with_momentum.reads, plain.reads, atol=1e-12)
    np.testing.assert_allclose(with_momentum.memory, plain.memory, atol=1e-12)
    erase_zero, without = run(inputs | dict(erase=jnp.zeros(8))), run(inputs | dict(erase=None))
    np.testing.assert_allclose(erase_zero.reads, without.reads, atol=1e-13)


def test_no_queries_gives_the_same_state_and_no_reads(x64):
    inputs = jax.tree.map(jnp.asarray, draw(ALL, 5))
    out, silent = run(inputs), run(inputs | dict(queries=None))
    assert silent.reads is None
    np.testing.assert_allclose(silent.memory, out.memory, atol=1e-13)


# ---------------------------------------------------------------- inputs that break naive versions


def test_identical_keys_with_full_erase_stay_exact_in_float32():
    time = 64
    rng = np.random.default_rng(0)
    key = np.eye(K)[0]
    inputs = dict(memory=rng.normal(size=(V, K)), keys=np.tile(key, (time, 1)), writes=rng.normal(size=(time, V)))
    inputs |= dict(queries=np.tile(key, (time, 1)), retention=np.ones(time), erase=np.ones(time))
    expected = references.gated_delta(**inputs)
    out = run({n: jnp.asarray(x, jnp.float32) for n, x in inputs.items()}, block=64)
    assert out.reads.dtype == jnp.float32
    np.testing.assert_allclose(out.reads, expected[0], atol=1e-4)
    np.testing.assert_allclose(out.memory, expected[1], atol=1e-4)


EXTREME = {
    "one token almost cleared": dict(retention=1e-6),
    "one token cleared": dict(retention=1e-30),
    "no momentum at one token": dict(momentum_decay=0.0),
    "momentum almost kept": dict(momentum_decay=0.999),
}


@pytest.mark.parametrize("gates", EXTREME.values(), ids=EXTREME)
def test_extreme_gates_are_finite_and_right_in_values_and_gradients(x64, gates):
    inputs = draw(ALL, 7)
    for name, value in gates.items():
        inputs[name][3] = value
    inputs = jax.tree.map(jnp.asarray, inputs)
    weights = [jnp.ones((7, V)), jnp.ones((V, K)), jnp.ones((V, K))]
    found = every_form(inputs, weights, 16, "after")
    for form in ("auto", "chunked"):
        for ours, sequential in zip(*(jax.tree.leaves(found[i]) for i in (form, "sequential")), strict=True):
            assert np.all(np.isfinite(ours))
            np.testing.assert_allclose(ours, sequential, rtol=1e-8, atol=1e-8)


def test_zero_gates_have_finite_gradients_in_float32():
    inputs = {n: jnp.asarray(x, jnp.float32) for n, x in draw(ALL, 7).items()}
    inputs |= dict(retention=jnp.zeros(7), momentum_decay=jnp.zeros(7))
    gradients = jax.jit(jax.grad(lambda x: sum(jnp.sum(y) for y in outputs(x))))(inputs)
    assert all(np.all(np.isfinite(g)) for g in gradients.values())


def test_bfloat16_inputs_are_computed_in_float32():
    narrow = {n: jnp.asarray(x, jnp.bfloat16) for n, x in draw(ALL, 33).items()}
    wide = {n: np.array(x, np.float64) for n, x in narrow.items()}
    out, expected = run(narrow, block=16), references.gated_delta(**wide)
    assert out.reads.dtype == out.memory.dtype == jnp.float32
    np.testing.assert_allclose(out.reads, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.memory, expected[1], rtol=1e-4, atol=1e-4)


def test_the_compiled_program_and_its_gradient_call_no_lapack():
    inputs = {n: jnp.asarray(x, jnp.float32) for n, x in draw(ALL, 33).items()}
    step = jax.jit(jax.value_and_grad(lambda x: sum(jnp.sum(y) for y in outputs(x, block=16))))
    text = str(step.lower(inputs).compile().as_text()).lower()
    calls = [line for line in text.splitlines() if "custom-call" in line]
    assert not any(word in line for line in calls for word in ("lapack", "triangular", "trsm", "blas"))
    assert "triangular-solve" not in text


@pytest.mark.parametrize("count", [1, 2, 17, 40])
@pytest.mark.parametrize("products", [AUTO, PLAIN], ids=["auto", "chunked"])
def test_the_triangular_solve_is_exact_for_any_size(x64, count, products):
    rng = np.random.default_rng(count)
    lower = np.tril(rng.normal(size=(count, count)), -1) * 0.5
    weights, right = rng.normal(size=count), rng.normal(size=(count, 2))

    def solve(lower, weights, right):
        lower = jnp.tril(lower, -1)
        return products.solve(lower, weights, right, products.inverse((lower * weights[None, :])[None])[0])

    def by_lapack(lower, weights, right):
        return jnp.linalg.solve(jnp.eye(count) + jnp.tril(lower, -1) * weights[None, :], right)

    def derivatives(function):
        once = jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2))
        twice = jax.grad(lambda *x: sum(jnp.sum(y**2) for y in once(*x)), (0, 1, 2))
        return jax.jit(lambda *x: (function(*x), once(*x), twice(*x)))

    inputs = tuple(map(jnp.asarray, (lower, weights, right)))
    found, expected = (derivatives(function)(*inputs) for function in (solve, by_lapack))
    chex.assert_trees_all_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-8, atol=1e-9)
    chex.assert_trees_all_close(found[2], expected[2], rtol=1e-7, atol=1e-8)


WRONG = {
    "momentum is None": dict(momentum=None),
    "momentum_decay is None": dict(momentum_decay=None),
    "read is 'behind'": dict(read="behind"),
    "impl is 'fast'": dict(impl="fast"),
    "block is 0": dict(block=0),
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=WRONG)
def test_wrong_arguments_say_what_came(untyped, message, change):
    inputs = dict(erase=None) | {n: jnp.asarray(x, jnp.float32) for n, x in draw(ALL, 3).items()} | change
    positional = [inputs.pop(n) for n in ("memory", "keys", "writes", "queries")]
    with pytest.raises(UserError, match=message):
        gated_delta(*positional, **inputs)
