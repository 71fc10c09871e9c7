"""Miras, Omega and Oja: their limits, what a link means inside a period, and the layers around them.

Values and gradients of the rows against the literature, any cut and causality: ``test_rules.py``.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_miras as ref
from drawn import drawn

from hope_jax.errors import UserError
from hope_jax.memory import RULES, architectures, objectives, omega
from hope_jax.memory.kernels import PLAIN as PLAIN_PRODUCTS
from hope_jax.memory.linked import NormLink, SoftmaxLink
from hope_jax.memory.rule import Gates, Rule
from hope_jax.memory.scan import scan
from hope_jax.nn.mixers.attention import AttentionConfig
from hope_jax.nn.mixers.memory import MemoryMixerConfig
from hope_jax.nn.mixers.omega import OmegaMixerConfig
from hope_jax.nn.mixers.titans_mac import TitansMACConfig

D, H, T, PERIOD, C = 4, 6, 11, 4, 3
RNG = np.random.default_rng(0)
PLAIN = Rule(architectures.normed_mlp, read="after", period=PERIOD)


def of_length_one(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


K, V, Q = of_length_one(RNG.normal(size=(T, D))), RNG.normal(size=(T, D)), RNG.normal(size=(T, D))
RATE, KEEP = RNG.uniform(0.1, 0.9, T), RNG.uniform(0.5, 1, T)
STRENGTH = RNG.uniform(0.1, 0.6, (T, C))
WEIGHTS = [0.5 * RNG.normal(size=(H, D)), 0.5 * RNG.normal(size=(D, H))]
KERNELS = [w.T for w in WEIGHTS]
GIVEN = K, V, Q, RATE, KEEP, None, WEIGHTS, PERIOD


def arrays(*tree):
    return jax.tree.map(jnp.asarray, tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def reads_of(rule, impl, kernels, k, v, q, rate, keep):
    """The fast weights after a fresh sequence, and the reads."""
    return scan(rule, kernels, rule.start(kernels), k, v, q, Gates(rate, keep, None), np.zeros((), np.int32), impl)


def reads(rule, impl="auto", rate=RATE, kernels=KERNELS):
    return reads_of(rule, impl, *arrays(tuple(kernels), K, V, Q, rate, KEEP))[1]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- objectives and links


@pytest.mark.parametrize(
    ("objective", "by_hand"),
    [(objectives.Lp(p), functools.partial(ref.lp_error, p=p)) for p in (1.5, 3.0)]
    + [(objectives.Huber(d, b), functools.partial(ref.huber_error, delta=d, beyond=b))
       for d, b in ((2.0, "sign"), (2.0, "direction"))],
    ids=["Lp 1.5", "Lp 3", "Huber, sign", "Huber, direction"],
)  # fmt: skip
def test_an_error_is_its_formula_on_both_sides_of_its_bound_and_has_a_finite_slope_at_zero(x64, objective, by_hand):
    errors = of_length_one(RNG.normal(size=(4, D))) * np.array([[0.0], [0.5], [1.9], [3.0]])

    @jax.jit
    def error_and_slope(*given):
        error = functools.partial(objectives.error, objective)
        return error(*given), jax.jacobian(error)(*given)

    found, slope = error_and_slope(V[:4] + errors, V[:4])
    np.testing.assert_allclose(found, [by_hand(e) for e in errors], rtol=1e-9, atol=1e-12)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("beyond", ["direction", "sign"])
def test_yaad_bounds_some_of_the_errors(x64, beyond):
    bound = functools.partial(ref.huber_error, delta=2.5, beyond=beyond)
    met = []

    def error(e):
        met.append(np.linalg.norm(e) <= 2.5)
        return bound(e)

    expected, _ = ref.miras(*GIVEN, error=error)
    assert 2 < sum(met) < T - 2
    close(reads(replace(RULES["yaad"], period=PERIOD, objective=objectives.Huber(2.5, beyond))), expected)


def test_the_limits_are_plain_gradient_descent(x64):
    plain = reads(PLAIN)
    close(plain, ref.miras(*GIVEN)[0])
    for beyond in ("sign", "direction"):
        close(reads(replace(RULES["yaad"], period=PERIOD, objective=objectives.Huber(float("inf"), beyond))), plain)
    squares = replace(RULES["moneta"], period=PERIOD, objective=objectives.Lp(2.0), link=NormLink(2.0))
    close(reads(squares, rate=RATE / 2), plain)


def test_a_softmax_of_sums_is_the_published_product_of_weights(x64):
    ours = reads(replace(RULES["memora"], period=PERIOD))
    close(ours, ref.memora_as_published(K, V, Q, RATE, KEEP, WEIGHTS, PERIOD))
    shifted = [w + 0.3 * np.arange(w.shape[1])[None] for w in KERNELS]  # a constant per output
    close(reads(replace(RULES["memora"], period=PERIOD), kernels=shifted), ours)


@pytest.mark.parametrize("read", ["before", "anchor"])
def test_every_token_reads_through_the_link_of_its_own_time(x64, read):
    """Read after the write: ``test_rules.py``."""
    expected, _ = ref.miras(*GIVEN, error=ref.lp_error, link=ref.norm_link, read=read)
    for impl in ("chunked", "sequential"):
        close(reads(replace(RULES["moneta"], period=PERIOD, read=read), impl), expected)


def test_weights_of_a_softmax_are_positive_and_sum_to_the_scale(x64):
    w = SoftmaxLink(0.5)(jnp.asarray(np.stack(KERNELS[:1] * 2)))
    w = np.asarray(w)
    assert np.all(w > 0)
    np.testing.assert_allclose(np.sum(w, axis=-2), 0.5 * D**0.5)


@pytest.mark.parametrize("name", ["moneta", "oja"])
def test_written_weights_answer_as_the_last_read(x64, name):
    rule = replace(RULES[name], period=PERIOD)
    weights = arrays(*(KERNELS if rule.learned_start else [np.zeros((D, D))]))
    fast, found = reads_of(rule, "auto", weights, *arrays(K, V, Q, RATE, KEEP))
    answer = jax.jit(lambda weights, query: rule.apply(weights, query, PLAIN_PRODUCTS))
    close(answer(fast.running, Q[-1:])[0], found[-1])


# ---------------------------------------------------------------- Omega


@functools.partial(jax.jit, static_argnums=0)
def omega_of(rule, kernels, state, tokens, position, count=None):
    return omega.scan(rule, kernels, state, *tokens, position, "chunked", count)


OMEGA = omega.Omega(Rule(architectures.residual_mlp, read="after", period=PERIOD), C)
STREAMS = K, V, Q, STRENGTH, KEEP


@pytest.mark.parametrize("read", ["before", "after"])
def test_every_token_writes_the_last_pairs_again(x64, read):
    rule, (kernels, tokens) = replace(OMEGA, rule=replace(OMEGA.rule, read=read)), arrays(tuple(KERNELS), STREAMS)
    state, found = omega_of(rule, kernels, rule.start(kernels, D), tokens, jnp.zeros((), jnp.int32))
    expected, weights = ref.omega(*STREAMS, WEIGHTS, PERIOD, read)
    close(found, expected)
    for ours, theirs in zip(state.fast.running, weights, strict=True):
        close(ours.T, theirs)


def test_cuts_and_padding_leave_no_trace_in_omega(x64):
    """One program reads 5, 1 and 5 tokens, padded to 5, in the place of 11."""
    kernels, tokens = arrays(tuple(KERNELS), STREAMS)
    end, whole = omega_of(OMEGA, kernels, OMEGA.start(kernels, D), tokens, jnp.zeros((), jnp.int32))
    state, at, found = OMEGA.start(kernels, D), 0, []
    for count in (5, 1, 5):
        piece = [np.concatenate([x[at : at + count], 9 + 0 * x[: 5 - count]]) for x in STREAMS]
        state, out = omega_of(OMEGA, kernels, state, piece, np.array(at), np.array(count))
        found.append(np.asarray(out)[:count])
        at += count
    close(np.concatenate(found), whole)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, end)), strict=True):
        close(ours, theirs)


def test_omega_with_a_window_of_one_is_the_plain_rule_and_with_period_one_the_linear_form(x64):
    one, kernels = replace(OMEGA, window=1), arrays(*KERNELS)
    tokens = arrays(K, V, Q, RATE[:, None], KEEP)
    _, found = omega_of(one, kernels, one.start(kernels, D), tokens, jnp.zeros((), jnp.int32))
    close(found, reads(OMEGA.rule))
    linear = omega.Omega(Rule(architectures.matrix, read="after", period=1), C)
    (zero, tokens) = arrays((np.zeros((D, D)),), STREAMS)
    _, found = omega_of(linear, zero, linear.start(zero, D), tokens, jnp.zeros((), jnp.int32))
    close(found, ref.omega_linear(*STREAMS))


# ---------------------------------------------------------------- mixers


HOW = dict(horizon=16, rate_max=0.5, unit_values=True)
MIXERS = {
    "memora": MemoryMixerConfig(RULES["memora"], 2, hidden=2, **HOW),
    "omega": OmegaMixerConfig(OMEGA.rule, 2, window=3, **HOW),
}


def call(m, u, state, count=None):
    return m(u, m.init_state(len(u), u.shape[1]) if state is None else state, count)


@pytest.mark.parametrize("name", MIXERS)
def test_a_layer_reads_pieces_and_padding_as_the_whole_and_no_other_sequence(x64, name):
    """One program reads 11 tokens, and 5, 1 and 5 of them, padded to 11; another is not told how many they are."""
    module, u = MIXERS[name].build(2 * D, jnp.float64), RNG.normal(size=(2, T, 2 * D))
    params = drawn(lambda key, u: module.init(key, u, None, method=call), u[:, :1])
    step = jax.jit(lambda *given: module.apply({"params": params}, *given, method=call))
    fresh = jax.jit(lambda: module.apply({"params": params}, 2, T, method="init_state"))()
    y, end = step(u, fresh, np.int32(T))
    state, pieces = fresh, []
    for at, count in ((0, 5), (5, 1), (6, 5)):
        piece = np.concatenate([u[:, at : at + count], np.full((2, T - count, 2 * D), 9.0)], axis=1)
        out, state = step(piece, state, np.int32(count))
        pieces.append(np.asarray(out)[:, :count])
    close(np.concatenate(pieces, axis=1), y)
    for ours, theirs in zip(*map(jax.tree.leaves, (state, end)), strict=True):
        close(ours, theirs)
    close(step(np.stack([0 * u[0], u[1]]), fresh, np.int32(T))[0][1], y[1])
    if name == "memora":
        close(step(u[:, :5], fresh)[0], y[:, :5])


def test_memory_as_context_may_be_omega():
    parts = AttentionConfig(2), replace(MIXERS["omega"], unit_values=False)
    module, u = TitansMACConfig(*parts, segment=16).build(2 * D, jnp.float32), jnp.zeros((1, 20, 2 * D))
    out = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), u, method=lambda m, u: call(m, u, None)))
    assert out[0][0].shape == u.shape


# ---------------------------------------------------------------- mistakes

WRONG = {
    "p is 0.5": lambda: objectives.Lp(0.5),
    "delta is 0": lambda: objectives.Huber(0.0),
    "beyond is 'root'": lambda: objectives.Huber(1.0, "root"),  # pyright: ignore[reportArgumentType]
    "q is 1": lambda: NormLink(1.0),
    "scale is 0": lambda: SoftmaxLink(0.0),
    "set dgd_scope='none', momentum=False": lambda: replace(RULES["hope"], link=NormLink()),
    "no anchor, which link needs": lambda: replace(RULES["deltanet"], link=NormLink()),
    "needs a matrix memory": lambda: replace(
        RULES["deltanet"], architecture=replace(architectures.matrix, output=architectures.layer_norm)
    ),
    "transposed=True has no anchor": lambda: replace(RULES["titans_linear"], transposed=True),
    "values have norm 1; set unit_values=True": lambda: MemoryMixerConfig(RULES["oja"], 2),
    "window is 0": lambda: OmegaMixerConfig(OMEGA.rule, 2, window=0),
    "Omega is plain gradient .* momentum=False": lambda: omega.Omega(RULES["titans"]),
}


@pytest.mark.parametrize(("message", "build"), WRONG.items(), ids=WRONG)
def test_a_wrong_setting_says_what_is_wrong(untyped, message, build):
    with pytest.raises(UserError, match=message):
        build()


def test_another_number_of_strengths_than_the_window_is_refused():
    kernels, tokens = arrays(tuple(KERNELS), STREAMS)
    with pytest.raises(UserError, match="3 numbers per token; expected one for each of window=2"):
        omega.scan(replace(OMEGA, window=2), kernels, OMEGA.start(kernels, D), *tokens, np.zeros((), np.int32))
