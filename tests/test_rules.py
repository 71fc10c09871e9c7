"""Every row of the rules against its own paper's recurrence, and the properties each of them must have."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references as ref
import references_miras

from hope_jax.errors import UserError
from hope_jax.memory import RULES, architectures, objectives
from hope_jax.memory.rule import Gates, Rule
from hope_jax.memory.scan import scan
from hope_jax.storage.digests import kinds

D, H, T, PERIOD = 4, 5, 11, 4
# Row -> (keys, values, queries, rate, retention, decay, weights) -> (reads, final weights). No row may be missing.
LITERATURE = {
    "linear_attention": lambda k, v, q, rate, keep, decay, w: ref.linear_attention(k, rate[:, None] * v, q),
    "deltanet": lambda k, v, q, rate, keep, decay, w: ref.deltanet(k, v, q, rate),
    "gated_deltanet": lambda k, v, q, rate, keep, decay, w: ref.gated_deltanet(k, v, q, rate, keep),
    "titans_linear": lambda *a: ref.titans_linear(*a, PERIOD),
    "titans": lambda *a: ref.titans(*a, PERIOD),
    "hope_linear": lambda *a: ref.hope(*a, PERIOD),
    "hope": lambda *a: ref.hope(*a, PERIOD),
    "hope_linear_dot": lambda *a: ref.hope(*a, PERIOD, "dot"),
    "hope_dot": lambda *a: ref.hope(*a, PERIOD, "dot"),
}
LITERATURE |= {name: functools.partial(row, period=PERIOD) for name, row in references_miras.ROWS.items()}
KEEPS_ALL = ("linear_attention", "deltanet")


def slowly(*names):
    """A parameter ``name`` of a test: all rows, of which those with these names are slow."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=pytest.mark.slow) if n in names else n for n in RULES]
    )


# hope_dot differs from hope in the error that is written: ``test_one_dgd_token...`` has it for two layers.
rows = slowly("hope_dot")
ALIKE = "linear_attention deltanet oja titans_linear titans hope_linear hope_linear_dot hope_dot dla yaad"
NAMES = ("keys", "values", "queries", "rate", "retention", "decay", "weights")


def rule_of(name):
    return replace(RULES[name], period=PERIOD)


@functools.cache
def inputs_of(name):
    """Random float64 inputs: unit keys, gates inside (0, 1), weights where the rule learns its start (else zero)."""
    rng, rule = np.random.default_rng(0), rule_of(name)
    k, v, q = rng.normal(size=(3, T, D))
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    keep = np.ones(T) if name in KEEPS_ALL else rng.uniform(0.5, 1, T)
    shapes = [(D, D)] if rule.architecture.layers == 1 else [(H, D), (D, H)]
    weights = [rule.learned_start * 0.5 * rng.normal(size=s) for s in shapes]
    return dict(zip(NAMES, (k, v, q, rng.uniform(0.1, 0.9, T), keep, rng.uniform(0.1, 0.9, T), weights), strict=True))


def scanned(rule, inputs, state, impl="chunked"):
    """The reads, and the state after them: the fast weights, and the position."""
    fast, position = state
    gates = Gates(inputs["rate"], inputs["retention"], inputs["decay"] if rule.momentum else None)
    streams = (inputs["keys"], inputs["values"], inputs["queries"])
    fast, reads = scan(rule, kernels(inputs["weights"]), fast, *streams, gates, position, impl)
    return reads, (fast, position + len(reads))


def kernels(weights):
    """The transposes: the equations' W [out, in] as the library's [in, out], or the reverse."""
    return tuple(w.swapaxes(-1, -2) for w in weights)


def fresh(rule, weights):
    return rule.start(kernels(weights)), np.zeros((), np.int32)


@functools.cache
def whole(name, impl):
    """Compiled: (inputs, cotangents) -> ((reads, weights), (first, last state), gradients; in sequence None)."""
    rule = rule_of(name)

    def run(inputs):
        start = fresh(rule, inputs["weights"])
        reads, end = scanned(rule, inputs, start, impl)
        return (reads, list(kernels(end[0].running))), (start, end)

    @jax.jit
    def pulled(inputs, cotangents):
        if impl == "sequential":
            return *run(inputs), None
        out, pull, states = jax.vjp(run, inputs, has_aux=True)
        return out, states, pull(cotangents)[0]

    return pulled


@functools.cache
def step(name):
    """Compiled: (inputs of any length, state) -> (reads, state)."""
    return jax.jit(functools.partial(scanned, rule_of(name)))


def ones_like(inputs, reads):
    return reads, [np.ones_like(w) for w in inputs["weights"]]


def literature(name, **inputs):
    return LITERATURE[name](*(inputs[n] for n in NAMES))


@rows
def test_chunked_and_sequential_equal_the_literature_in_values_and_gradients(x64, name):
    inputs, rng = inputs_of(name), np.random.default_rng(1)
    cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), (inputs["queries"], inputs["weights"]))
    # Rules that start at zero keep everything they do not gate: those inputs are no variables of their recurrence.
    fixed = () if RULES[name].learned_start else ("weights",) + ("retention",) * (name in KEEPS_ALL)
    direction = {n: jax.tree.map(lambda a: rng.normal(size=a.shape), x) for n, x in inputs.items() if n not in fixed}
    expected, weights = literature(name, **inputs)

    def scalar(**inputs):
        reads, weights = literature(name, **inputs)
        return sum(np.sum(a * b) for a, b in zip([reads, *weights], [cotangents[0], *cotangents[1]], strict=True))

    for impl in ("chunked", "sequential"):
        (reads, final), _, gradients = whole(name, impl)(inputs, cotangents)
        np.testing.assert_allclose(reads, expected, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(final, weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        if gradients:
            used = {n: gradients[n] for n in direction}
            pairs = zip(jax.tree.leaves(used), jax.tree.leaves(direction), strict=True)
            along = sum(np.sum(np.array(g) * d) for g, d in pairs)
            slope = ref.derivative(scalar, inputs, direction)
            np.testing.assert_allclose(along, slope, rtol=1e-9, atol=1e-9)


@rows
def test_any_cut_gives_the_same_reads_and_the_same_final_state(x64, name):
    """Calls of three tokens, and of one, by which a text is written."""
    inputs = inputs_of(name)
    (expected, _), (now, state), _ = whole(name, "chunked")(inputs, ones_like(inputs, inputs["queries"]))
    reads = []
    for start, stop in ((0, 3), (3, 6), (6, 9), (9, 10), (10, T)):
        part = {n: x if n == "weights" else x[start:stop] for n, x in inputs.items()}
        out, now = step(name)(part, now)
        reads.append(out)
    np.testing.assert_allclose(np.concatenate(reads), expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(*map(jax.tree.leaves, (now, state)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@rows
def test_a_read_depends_on_its_past_and_never_on_its_future(x64, name):
    inputs, t = inputs_of(name), 6
    only = np.zeros((T, D))
    only[t] = np.arange(D)  # the outputs of a norm sum to 0
    _, _, gradients = whole(name, "chunked")(inputs, (only, [np.zeros_like(w) for w in inputs["weights"]]))
    for stream in ("keys", "values", "queries", "rate"):
        moved = np.abs(np.array(gradients[stream])).reshape(T, -1).sum(axis=1)
        assert np.all(moved[t + 1 :] == 0), stream
        assert np.any(moved[: t + 1] > 1e-6), stream
    assert np.all(np.abs(np.array(gradients["keys"][:3])).sum(axis=1) > 1e-9)


@rows
def test_zero_rate_and_full_retention_change_nothing(x64, name):
    inputs = inputs_of(name) | dict(rate=np.zeros(T), retention=np.ones(T))
    cotangents = ones_like(inputs, inputs["queries"])
    (_, weights), _, _ = whole(name, "chunked")(inputs, cotangents)
    for ours, start in zip(weights, inputs["weights"], strict=True):
        np.testing.assert_allclose(ours, start, atol=1e-14)


@slowly(*ALIKE.split())  # a matrix, layers and both links are fast
def test_the_state_is_a_fixed_point_and_bfloat16_stays_finite(name):
    inputs = {n: np.asarray(x, jnp.bfloat16) for n, x in inputs_of(name).items() if n != "weights"}
    inputs["weights"] = [w.astype(np.float32) for w in inputs_of(name)["weights"]]
    before = jax.jit(functools.partial(fresh, rule_of(name)))(inputs["weights"])
    reads, after = step(name)(inputs, before)
    assert kinds(after) == kinds(before)
    assert all(np.all(np.isfinite(np.array(x, np.float32))) for x in jax.tree.leaves((reads, after)))


def test_every_row_has_a_literature_recurrence():
    assert set(LITERATURE) == set(RULES)


# ---------------------------------------------------------------- identities


@functools.partial(jax.jit, static_argnums=0)
def one_token(rule, weights, k, v, rate):
    """The weights after a single token."""
    (fast, position), gates = fresh(rule, weights), Gates(jnp.full(1, rate), jnp.ones(1), None)
    fast, _ = scan(rule, kernels(weights), fast, k[None], v[None], k[None], gates, position)
    return kernels(fast.running)


def gradient_of(function, point):
    """The gradient at a matrix, entry by entry."""
    entries = np.eye(point.size).reshape(-1, *point.shape)
    slopes = [ref.derivative(lambda w: function(w), dict(w=point), dict(w=entry)) for entry in entries]
    return np.reshape(slopes, point.shape)


def inner_problem(v, objective):
    """A two-layer memory, a key, its hidden features, and the gradients of each layer with the target frozen."""
    rng = np.random.default_rng(2)
    w2, w1, k = (rng.normal(size=s) for s in ((H, D), (D, H), (D,)))
    target = v + w1 @ ref.sig(w2 @ v)

    def loss(w2, w1):
        answer = k + w1 @ ref.sig(w2 @ k)
        return 0.5 * np.sum((answer - target) ** 2) if objective == "l2" else -answer @ target

    gradients = gradient_of(lambda w: loss(w, w1), w2), gradient_of(lambda w: loss(w2, w), w1)
    return (w2, w1), k, ref.sig(w2 @ k), gradients


# Every scope and both objectives: the objective is in the gradient alone, the scope is not.
@pytest.mark.parametrize(
    ("scope", "objective"), [("per_layer", "l2"), ("per_layer", "dot"), ("input_only", "l2"), ("none", "l2")]
)
def test_one_dgd_token_is_the_proximal_minimiser_on_every_layer_in_scope(x64, scope, objective):
    v, eta = np.random.default_rng(3).normal(size=D), 0.7
    weights, k, h, gradients = inner_problem(v, objective)
    how = dict(dgd_scope=scope, objective=getattr(objectives, objective), momentum=False, period=1)
    new = one_token(replace(RULES["hope"], **how), weights, k, v, eta)
    erased = {"per_layer": (True, True), "input_only": (True, False), "none": (False, False)}[scope]
    for after, w, x, g, proximal in zip(new, weights, (k, h), gradients, erased, strict=True):
        u = -g @ x / (x @ x)  # g is the outer product of the gradient at the output and the input
        # argmin 1/2 ||W x - u||^2 + ||W - w||^2 / (2 eta), solved as a linear system (SPEC 5.4)
        system = np.eye(x.size) + eta * np.outer(x, x)
        expected = (w + eta * np.outer(u, x)) @ np.linalg.inv(system) if proximal else w - eta * g
        np.testing.assert_allclose(after, expected, rtol=1e-9, atol=1e-9)


@functools.partial(jax.jit, static_argnums=0)
def read_by(rule, inputs):
    """Reads and state of a fresh sequence."""
    return scanned(rule, inputs, fresh(rule, inputs["weights"]))


def test_undamped_momentum_without_erase_and_self_values_is_titans(x64):
    inputs = inputs_of("titans")
    how = dict(dgd_scope="none", self_values=False, damped=False, read="after", period=PERIOD)
    reads, _ = read_by(replace(RULES["hope"], **how), inputs)
    np.testing.assert_allclose(reads, literature("titans", **inputs)[0], atol=1e-9)


@pytest.mark.parametrize("name", ["hope", "hope_linear"])
def test_retention_to_the_start_is_its_equation_with_writes_and_erases(x64, name):
    inputs = inputs_of(name)
    reads, (fast, _) = read_by(replace(rule_of(name), retain_to="init"), inputs)
    expected, weights = ref.hope(*(inputs[n] for n in NAMES), PERIOD, retain_to="init")
    np.testing.assert_allclose(reads, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(kernels(fast.running), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- mistakes

WRONG = {
    "period is 0": dict(period=0),
    "gradient_at is 'end'": dict(gradient_at="end"),
    "read is 'later'": dict(read="later"),
    "dgd_scope is 'all'": dict(dgd_scope="all"),
    "rate_form is 'big'": dict(rate_form="big"),
    "retain_to is 'one'": dict(retain_to="one"),
    "needs a matrix memory": dict(gradient_at="running"),
    "no anchor, which dgd_scope": dict(gradient_at="running", architecture=architectures.matrix, dgd_scope="per_layer"),
    "no anchor, which read": dict(gradient_at="retained", architecture=architectures.matrix, read="anchor"),
    "no anchor, which self_values": dict(gradient_at="running", architecture=architectures.matrix, self_values=True),
    "learned_start=False needs a matrix": dict(learned_start=False),
    "needs the l2 or dot objective": dict(gradient_at="running", architecture=architectures.matrix, objective=jnp.vdot),
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=WRONG)
def test_a_wrong_rule_says_what_is_wrong(untyped, message, change):
    with pytest.raises(UserError, match=message):
        Rule(**dict(architecture=architectures.residual_mlp) | change)


@pytest.mark.parametrize("change", [dict(layers=0, scales=()), dict(layers=2, scales=(1.0,))], ids=str)
def test_a_wrong_architecture_is_refused(change):
    with pytest.raises(UserError, match="layers"):
        architectures.Architecture(**dict(residual=False) | change)


def test_a_residual_memory_between_different_sizes_is_refused(key):
    with pytest.raises(UserError, match="equal"):
        architectures.residual_mlp.init(key, 3, 4, 5)
