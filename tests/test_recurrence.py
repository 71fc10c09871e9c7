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
# (features, tokens, block, read): reading before and after, blocks of several tokens of which the last is short, of one
# token, and of more than there are; all of it with all features, too, but slowly.
SHAPES = (33, 13, "after"), (33, 16, "before"), (7, 1, "after"), (5, 16, "after")
QUICK = [(s, *shape) for s, shape in zip([ALL, *(s for s in SUBSETS if len(s) == 1)], SHAPES, strict=True)]
CASES = [*QUICK, *((s, 33, 13, ("before", "after")[i % 2]) for i, s in enumerate(SUBSETS))]
CASES += [(ALL, *shape) for shape in ((33, 13, "before"), (33, 16, "before"), (7, 1, "before"), (1, 16, "after"))]
cases = pytest.mark.parametrize(
    ("features", "time", "block", "read"),
    [
        pytest.param(
            s,
            t,
            b,
            r,
            id="+".join(sorted(s)) + f" {t}/{b} {r}",
            marks=() if (s, t, b, r) in QUICK else pytest.mark.slow,
        )
        for s, t, b, r in dict.fromkeys(CASES)
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
    found = every_form(inputs, weights, block, read)
    for impl, (values, gradients) in found.items():
        for value, right in zip(values, expected, strict=True):
            np.testing.assert_allclose(value, right, rtol=1e-10, atol=1e-10, err_msg=impl)
        along = sum(np.sum(direction[leaf] * np.array(g)) for leaf, g in gradients.items())
        np.testing.assert_allclose(along, slope, rtol=1e-9, atol=1e-9, err_msg=impl)
        for leaf, gradient in gradients.items():
            np.testing.assert_allclose(gradient, found["sequential"][1][leaf], rtol=1e-9, atol=1e-9, err_msg=leaf)


def test_the_plain_form_has_derivatives_in_every_mode(x64):
    """Slope and curvature along a direction of all gates, which ``sequential`` has by the rules of jax alone."""
    inputs, rng = draw(ALL, 9), np.random.default_rng(2)
    direction = {name: rng.normal(size=9) for name in ("retention", "erase", "momentum_decay")}

    @functools.partial(jax.jit, static_argnames="impl")
    def derivatives(step, impl):
        def loss(step):
            moved = inputs | {name: inputs[name] + step * d for name, d in direction.items()}
            return sum(jnp.sum(jnp.sin(x)) for x in outputs(moved, impl=impl, block=4))

        if impl == "sequential":
            return jax.value_and_grad(jax.grad(loss))(step)
        _, linear = jax.linearize(loss, step)
        return jax.jvp(loss, (step,), (1.0,))[1], linear(1.0), jax.hessian(loss)(step)

    slope, curvature = derivatives(0.0, "sequential")
    np.testing.assert_allclose(derivatives(0.0, "chunked"), (slope, slope, curvature), rtol=1e-9)


PER_TOKEN = ("keys", "writes", "queries", "retention", "erase", "momentum_decay")


def test_any_cut_of_the_tokens_equals_the_whole(x64):
    inputs = draw(ALL, 9)
    whole, once, reads = references.gated_delta(**inputs), dict(inputs), []
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        out = run(once | {name: inputs[name][start:stop] for name in PER_TOKEN}, block=3)
        once |= dict(memory=out.memory, momentum=out.momentum)
        reads.append(out.reads)
    found = np.concatenate(reads), once["memory"], once["momentum"]
    chex.assert_trees_all_close(found, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "sequential"])
def test_inactive_tokens_change_nothing_wherever_they_stand(x64, impl):
    inputs, on = draw(ALL, 9), np.array([0, 1, 1, 0, 0, 1, 1, 1, 0.0])
    out = run(inputs, active=on, impl=impl, block=4)
    alone = references.gated_delta(**{n: x[on > 0] if n in PER_TOKEN else x for n, x in inputs.items()})
    found = np.asarray(out.reads)[on > 0], out.memory, out.momentum
    chex.assert_trees_all_close(found, alone, rtol=0, atol=1e-12)


def test_without_writes_and_erase_the_memory_is_kept_exactly():
    inputs = {n: np.float32(x) for n, x in draw({"erase"}, 6).items()}
    idle = inputs | {n: np.zeros_like(inputs[n]) for n in ("writes", "erase")} | dict(retention=np.ones(6, np.float32))
    np.testing.assert_array_equal(run(idle).memory, inputs["memory"])


def test_momentum_decay_zero_is_no_momentum(x64):
    inputs = draw({"erase"}, 8)
    found = run(inputs | dict(momentum=np.zeros((V, K)), momentum_decay=np.zeros(8)))
    reads, memory, _ = references.gated_delta(**inputs)
    chex.assert_trees_all_close((found.reads, found.memory), (reads, memory), rtol=0, atol=1e-12)


def test_no_queries_gives_the_same_state_and_no_reads(x64):
    inputs = draw(ALL, 5)
    silent = run(inputs | dict(queries=None))
    assert silent.reads is None
    np.testing.assert_allclose(silent.memory, references.gated_delta(**inputs)[1], atol=1e-13)


# ---------------------------------------------------------------- inputs that break naive versions


def test_identical_keys_with_full_erase_stay_exact_in_float32():
    time = 64
    rng = np.random.default_rng(0)
    key = np.eye(K)[0]
    inputs = dict(memory=rng.normal(size=(V, K)), keys=np.tile(key, (time, 1)), writes=rng.normal(size=(time, V)))
    inputs |= dict(queries=np.tile(key, (time, 1)), retention=np.ones(time), erase=np.ones(time))
    expected = references.gated_delta(**inputs)
    out = run({n: np.float32(x) for n, x in inputs.items()}, block=64)
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
    weights = [np.ones((7, V)), np.ones((V, K)), np.ones((V, K))]
    found = every_form(inputs, weights, 16, "after")
    for form in ("auto", "chunked"):
        for ours, sequential in zip(*(jax.tree.leaves(found[i]) for i in (form, "sequential")), strict=True):
            assert np.all(np.isfinite(ours))
            np.testing.assert_allclose(ours, sequential, rtol=1e-8, atol=1e-8)


def test_bfloat16_inputs_are_computed_in_float32():
    narrow = {n: np.asarray(x, jnp.bfloat16) for n, x in draw(ALL, 33).items()}
    wide = {n: np.array(x, np.float64) for n, x in narrow.items()}
    out, expected = run(narrow, block=16), references.gated_delta(**wide)
    assert out.reads.dtype == out.memory.dtype == jnp.float32
    np.testing.assert_allclose(out.reads, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out.memory, expected[1], rtol=1e-4, atol=1e-4)


def test_in_float32_no_gradient_calls_lapack_and_zero_gates_have_finite_ones():
    inputs = {n: np.float32(x) for n, x in draw(ALL, 17).items()}
    inputs |= dict(retention=np.zeros(17, np.float32), momentum_decay=np.zeros(17, np.float32))
    step = jax.jit(jax.value_and_grad(lambda x: sum(jnp.sum(y) for y in outputs(x, block=16))))
    program = step.lower(inputs).compile()
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(program(inputs)))
    text = str(program.as_text()).lower()
    calls = [line for line in text.splitlines() if "custom-call" in line]
    assert not any(word in line for line in calls for word in ("lapack", "triangular", "trsm", "blas"))
    assert "triangular-solve" not in text


@pytest.mark.parametrize(
    "count", [1, pytest.param(2, marks=pytest.mark.slow), 17, pytest.param(40, marks=pytest.mark.slow)]
)
def test_the_triangular_solve_is_exact_for_any_size(x64, count):
    """17 is odd, then halved until no more than 8 are left, which are inverted at once."""
    rng = np.random.default_rng(count)
    lower = np.tril(rng.normal(size=(count, count)), -1) * 0.5
    inputs = lower, rng.normal(size=count), rng.normal(size=(count, 2))

    def by(products):
        def solve(lower, weights, right):
            lower = jnp.tril(lower, -1)
            return products.solve(lower, weights, right, products.inverse((lower * weights[None, :])[None])[0])

        return solve

    def by_lapack(lower, weights, right):
        return jnp.linalg.solve(jnp.eye(count) + jnp.tril(lower, -1) * weights[None, :], right)

    @jax.jit
    def derivatives(*inputs):
        def of(function):
            once = jax.grad(lambda *x: jnp.sum(jnp.sin(function(*x))), (0, 1, 2))
            twice = jax.grad(lambda *x: sum(jnp.sum(y**2) for y in once(*x)), (0, 1, 2))
            return function(*inputs), once(*inputs), twice(*inputs)

        return [of(function) for function in (by_lapack, by(AUTO), by(PLAIN))]

    expected, *forms = derivatives(*inputs)
    for found in forms:
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
