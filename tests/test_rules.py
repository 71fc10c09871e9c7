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
rows = pytest.mark.parametrize("name", RULES)
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
    return tuple(jnp.swapaxes(w, -1, -2) for w in weights)


def fresh(rule, weights):
    return rule.start(kernels(weights)), np.zeros((), np.int32)


@functools.cache
def whole(name, impl):
    """Compiled: (inputs, cotangents) -> ((reads, final weights), final state, gradients); no gradients in sequence."""
    rule = rule_of(name)

    def run(inputs):
        reads, state = scanned(rule, inputs, fresh(rule, inputs["weights"]), impl)
        return (reads, list(kernels(state[0].running))), state

    @jax.jit
    def pulled(inputs, cotangents):
        if impl == "sequential":
            return *run(inputs), None
        out, pull, state = jax.vjp(run, inputs, has_aux=True)
        return out, state, pull(cotangents)[0]

    return pulled


@functools.cache
def step(name):
    """Compiled: (inputs of any length, state) -> (reads, state)."""
    return jax.jit(functools.partial(scanned, rule_of(name)))


def ones_like(inputs, reads):
    return reads, [jnp.ones_like(jnp.asarray(w)) for w in inputs["weights"]]


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
    inputs = jax.tree.map(jnp.asarray, inputs_of(name))
    (expected, _), state, _ = whole(name, "chunked")(inputs, ones_like(inputs, inputs["queries"]))
    now, reads = jax.tree.map(jnp.asarray, fresh(rule_of(name), inputs["weights"])), []
    for start, stop in ((0, 1), (1, 2), (2, T - 1), (T - 1, T)):
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
    cotangents = ones_like(inputs, jnp.asarray(inputs["queries"]))
    (_, weights), _, _ = whole(name, "chunked")(inputs, cotangents)
    for ours, start in zip(weights, inputs["weights"], strict=True):
        np.testing.assert_allclose(ours, start, atol=1e-14)


@rows
def test_the_state_is_a_fixed_point_and_bfloat16_stays_finite(name):
    rule, inputs = rule_of(name), {}
    for n, x in inputs_of(name).items():
        inputs[n] = [jnp.asarray(w, jnp.float32) for w in x] if n == "weights" else jnp.asarray(x, jnp.bfloat16)
    before = jax.tree.map(jnp.asarray, fresh(rule, inputs["weights"]))
    reads, after = step(name)(inputs, before)
    assert kinds(after) == kinds(before)
    assert all(np.all(np.isfinite(np.array(x, np.float32))) for x in jax.tree.leaves((reads, after)))


def test_every_row_has_a_literature_recurrence():
    assert set(LITERATURE) == set(RULES)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("objective", [objectives.l2, objectives.dot])
def test_an_objectives_error_is_its_gradient_by_hand(x64, objective):
    prediction, value = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, D)))
    by_hand = {objectives.l2: prediction - value, objectives.dot: -value}[objective]
    np.testing.assert_allclose(objectives.error(objective, prediction, value), by_hand, atol=1e-14)


@functools.partial(jax.jit, static_argnums=0)
def one_token(rule, weights, k, v, rate, retention=1.0, decay=0.0):
    """The weights after a single token."""
    gates = Gates(jnp.full(1, rate), jnp.full(1, retention), jnp.full(1, decay) if rule.momentum else None)
    weights = tuple(map(jnp.asarray, weights))
    fast, position = fresh(rule, weights)
    fast, _ = scan(rule, kernels(weights), fast, k[None], v[None], k[None], gates, position)
    return kernels(fast.running)


def test_gated_deltanet_is_one_gradient_step_at_the_retained_memory(x64):
    m, (k, v) = jax.random.normal(jax.random.key(0), (D, D)), jax.random.normal(jax.random.key(1), (2, D))
    (new,) = one_token(RULES["gated_deltanet"], (m,), k, v, 0.3, 0.8)
    gradient = jax.grad(lambda m: objectives.l2(m @ k, v))(0.8 * m)
    np.testing.assert_allclose(new, 0.8 * m - 0.3 * gradient, atol=1e-12)


def inner_problem(v, objective):
    """A two-layer memory, a key, and the gradients at each layer's output by autodiff, with the target frozen."""
    rng = np.random.default_rng(2)
    w2, w1, k = (jnp.asarray(rng.normal(size=s)) for s in ((H, D), (D, H), (D,)))

    def sig(z):
        return architectures.unit(jax.nn.gelu(z))

    target = v + w1 @ sig(w2 @ v)
    gradients = jax.jit(jax.grad(lambda w: objective(k + w[1] @ sig(w[0] @ k), target)))
    return (w2, w1), k, sig(w2 @ k), gradients((w2, w1))


@pytest.mark.parametrize("objective", [objectives.l2, objectives.dot], ids=["l2", "dot"])
@pytest.mark.parametrize("scope", ["per_layer", "input_only", "none"])
def test_one_dgd_token_is_the_proximal_minimiser_on_every_layer_in_scope(x64, scope, objective):
    v, eta = jnp.asarray(np.random.default_rng(3).normal(size=D)), 0.7
    weights, k, h, gradients = inner_problem(v, objective)
    rule = replace(RULES["hope"], dgd_scope=scope, objective=objective, momentum=False, period=1)
    new = one_token(rule, weights, k, v, eta)
    erased = {"per_layer": (True, True), "input_only": (True, False), "none": (False, False)}[scope]
    for after, w, x, g, proximal in zip(new, weights, (k, h), gradients, erased, strict=True):
        u = -g @ x / (x @ x)  # g is the outer product of the gradient at the output and the input
        # argmin 1/2 ||W x - u||^2 + ||W - w||^2 / (2 eta), solved as a linear system (SPEC 5.4)
        system = jnp.eye(x.size) + eta * jnp.outer(x, x)
        expected = (w + eta * jnp.outer(u, x)) @ jnp.linalg.inv(system) if proximal else w - eta * g
        np.testing.assert_allclose(after, expected, rtol=1e-9, atol=1e-9)


def test_undamped_momentum_without_erase_and_self_values_is_titans(x64):
    inputs = jax.tree.map(jnp.asarray, inputs_of("titans"))
    how = dict(dgd_scope="none", self_values=False, damped=False, read="after", period=PERIOD)
    reads, _ = jax.jit(lambda i: scanned(rule := replace(RULES["hope"], **how), i, fresh(rule, i["weights"])))(inputs)
    np.testing.assert_allclose(reads, literature("titans", **inputs_of("titans"))[0], atol=1e-9)


def test_retain_to_init_pulls_towards_the_start_and_not_towards_zero(x64):
    inputs = inputs_of("hope") | dict(rate=np.zeros(T))
    jnp_inputs, ends = jax.tree.map(jnp.asarray, inputs), {}
    for target in ("zero", "init"):
        rule = replace(rule_of("hope"), retain_to=target)
        _, (fast, _) = jax.jit(functools.partial(scanned, rule))(jnp_inputs, fresh(rule, jnp_inputs["weights"]))
        ends[target] = kernels(fast.running)[0]
    np.testing.assert_allclose(ends["init"], inputs["weights"][0], atol=1e-12)
    np.testing.assert_allclose(ends["zero"], np.prod(inputs["retention"]) * inputs["weights"][0], atol=1e-12)


@pytest.mark.parametrize("name", ["hope", "hope_linear"])
def test_retention_to_the_start_is_its_equation_with_writes_and_erases(x64, name):
    inputs, rule = inputs_of(name), replace(rule_of(name), retain_to="init")
    run = jax.jit(lambda i: scanned(rule, i, fresh(rule, i["weights"])))
    reads, (fast, _) = run(jax.tree.map(jnp.asarray, inputs))
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
