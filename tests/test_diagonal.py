"""The recurrence with a retention per key channel: against numpy in values and gradients, at any decay, in any form."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references_rwkv7 import vector_delta

from hope_jax.errors import UserError
from hope_jax.memory import Erase, gated_delta

V, K = 3, 4
# (erase, tokens, block, read, forms): the last block is short, or there is only a part of one.
FORMS = ("auto", "sequential")
CASES = [
    ("two keys", 11, 8, "after", (*FORMS, "chunked")),
    ("strength", 11, 3, "before", FORMS),
    ("none", 5, 32, "after", FORMS),
]
MORE = [
    ("two keys", 11, 3, "before", FORMS),
    ("strength", 11, 32, "before", FORMS),
    ("two keys", 1, 32, "after", FORMS),
]
cases = pytest.mark.parametrize(
    ("kind", "time", "block", "read", "forms"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)


def draw(kind, time, seed=0):
    """Random inputs as float64 numpy arrays; keys are not unit, retentions inside (0, 1), erases are contractions."""
    rng = np.random.default_rng(seed)
    inputs = dict(memory=rng.normal(size=(V, K)), keys=rng.normal(size=(time, K)), writes=rng.normal(size=(time, V)))
    inputs |= dict(queries=rng.normal(size=(time, K)), retention=rng.uniform(0.05, 1, (time, K)))
    if kind == "strength":
        inputs["erase"] = rng.uniform(size=time) / np.sum(inputs["keys"] ** 2, axis=1)
    elif kind == "two keys":
        unit = rng.normal(size=(time, K))
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        inputs["erase"] = Erase(unit, unit * rng.uniform(size=(time, K)))
    return inputs


def expected(read, weights, **inputs):
    """A scalar of what the numpy loop gives; without weights, what it gives. Erases of all kinds as two keys."""
    erase = inputs.pop("erase", None)
    if isinstance(erase, list | tuple):
        inputs |= dict(looked_up=erase[0], cleared=erase[1])
    elif erase is not None:
        inputs |= dict(looked_up=erase[:, None] * inputs["keys"], cleared=inputs["keys"])
    out = vector_delta(**inputs, read=read)
    return out if weights is None else sum(np.sum(w * x) for w, x in zip(weights, out, strict=True))


def run(inputs, **how):
    """Reads and memory of ``gated_delta``."""
    given = dict(erase=None) | inputs
    positional = [given.pop(name) for name in ("memory", "keys", "writes", "queries")]
    out = gated_delta(*positional, **given, **how)
    assert out.momentum is None
    return out.reads, out.memory


@functools.partial(jax.jit, static_argnames=("block", "read", "forms"))
def every_form(inputs, weights, block, read, forms):
    """{impl: (outputs, gradients of their weighted sum)}."""

    def one(impl):
        out, pull = jax.vjp(lambda x: run(x, impl=impl, read=read, block=block), inputs)
        return out, pull(weights)[0]

    return {impl: one(impl) for impl in forms}


def drawn_weights(time, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(time, V)), rng.normal(size=(V, K))


@cases
def test_every_form_equals_the_numpy_loop_in_values_and_gradients(x64, kind, time, block, read, forms):
    inputs, rng = draw(kind, time), np.random.default_rng(2)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), inputs)
    right, weights = expected(read, None, **inputs), drawn_weights(time)
    slope = references.derivative(functools.partial(expected, read, weights), inputs, direction)
    found = every_form(inputs, weights, block, read, forms)
    for impl, (values, gradients) in found.items():
        chex.assert_trees_all_close(values, right, rtol=1e-10, atol=1e-10)
        along = sum(map(np.vdot, jax.tree.leaves(direction), jax.tree.leaves(gradients)))
        np.testing.assert_allclose(along, slope, rtol=1e-9, atol=1e-9, err_msg=impl)
        chex.assert_trees_all_close(gradients, found["sequential"][1], rtol=1e-9, atol=1e-9)


def test_equal_channels_are_a_retention_per_token(x64):
    """The program of a case above, against the reference of the other recurrence."""
    inputs = draw("strength", 11)
    inputs["retention"] = inputs["retention"][:, :1] * np.ones(K)
    found, _ = every_form(inputs, drawn_weights(11), 3, "before", FORMS)["auto"]
    reads, memory, _ = references.gated_delta(**inputs | dict(retention=inputs["retention"][:, 0]))
    chex.assert_trees_all_close(found, (reads, memory), rtol=1e-11, atol=1e-11)


def test_float32_is_exact_at_any_decay_in_values_and_gradients(x64):
    """Decays down to 1e-6, and at some tokens channels of 0, 1e-30 and 1: nothing overflows and nothing cancels."""
    time, rng = 48, np.random.default_rng(3)
    inputs = draw("two keys", time)
    fast = rng.uniform(size=(time, K)) < 0.3
    inputs["retention"] = np.where(fast, 10 ** rng.uniform(-6, 0, (time, K)), rng.uniform(0.9, 1, (time, K)))
    for at, value in ((5, 0.0), (6, 0.0), (20, 1e-30), (33, 0.0), (40, 1.0)):
        inputs["retention"][at, rng.permutation(K)[:2]] = value
    inputs["retention"][36] = 0
    unit = inputs["erase"].queries  # diag(r) (I - a k k^T): the memory stays small whatever r is
    inputs["erase"] = Erase(inputs["retention"] * unit, rng.uniform(size=(time, 1)) * unit)
    weights = drawn_weights(time)
    wide = every_form(inputs, weights, 32, "after", ("sequential",))["sequential"]
    narrow, in_float32 = jax.tree.map(np.float32, (inputs, weights))
    form = every_form(narrow, in_float32, 32, "after", ("auto",))["auto"]
    for ours, right in zip(jax.tree.leaves(form), jax.tree.leaves(wide), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, right, rtol=0, atol=2e-6 * np.max(np.abs(right)))


def test_repeated_keys_with_full_erase_stay_exact_in_float32():
    time, rng = 64, np.random.default_rng(0)
    key = np.tile(np.eye(K)[0], (time, 1))
    inputs = dict(memory=rng.normal(size=(V, K)), keys=key, writes=rng.normal(size=(time, V)), queries=key)
    inputs |= dict(retention=np.ones((time, K)), erase=Erase(key, key))
    narrow = jax.tree.map(np.float32, inputs)
    out = jax.jit(functools.partial(run, block=64, read="after"))(narrow)
    chex.assert_trees_all_close(out, expected("after", None, **inputs), atol=1e-5)


def test_the_plain_form_has_derivatives_in_every_mode(x64):
    inputs = jax.tree.map(jnp.asarray, draw("two keys", 3))
    point = {name: inputs.pop(name) for name in ("retention", "erase")}
    direction = jax.tree.map(lambda x: np.random.default_rng(4).normal(size=x.shape), point)

    def loss(step, impl):
        moved = jax.tree.map(lambda x, d: x + step * d, point, direction)
        return sum(jnp.sum(jnp.sin(x)) for x in run(inputs | moved, impl=impl, block=2))

    @functools.partial(jax.jit, static_argnames="impl")
    def derivatives(step, impl):
        of = functools.partial(loss, impl=impl)
        return jax.jvp(of, (step,), (1.0,))[1], jax.hessian(of)(step)

    plain, definition = derivatives(0.0, "chunked"), derivatives(0.0, "sequential")
    np.testing.assert_allclose(plain, definition, rtol=1e-9)


@pytest.mark.parametrize("impl", ["auto", "sequential"])
def test_any_cut_equals_the_whole_and_inactive_tokens_leave_no_trace(x64, impl):
    inputs = draw("two keys", 11)
    start, step = inputs.pop("memory"), jax.jit(functools.partial(run, impl=impl, block=4, read="after"))
    reads, end = expected("after", None, **inputs, memory=start)
    # The tokens in two calls of eleven, the others inactive, and filled with what was there.
    on = np.arange(11) < 6
    first, memory = step(inputs | dict(memory=start, active=on.astype(float)))
    second, memory = step(inputs | dict(memory=memory, active=(~on).astype(float)))
    np.testing.assert_allclose(np.where(on[:, None], first, second), reads, atol=1e-12)
    np.testing.assert_allclose(memory, end, atol=1e-12)
    reads, silent = step(inputs | dict(memory=start, queries=None))
    assert reads is None
    np.testing.assert_allclose(silent, end, atol=1e-12)


KEY = jnp.ones((5, K))
WRONG = {
    "momentum is given with a retention per key channel": dict(momentum=jnp.ones((V, K)), momentum_decay=jnp.ones(5)),
    "base is given with a retention per key channel": dict(base=jnp.ones((V, K))),
    r"retention has shape \(5,\); expected one number per token and key": dict(retention=jnp.ones(5)),
    r"retention has shape \(5, 3\)": dict(retention=jnp.ones((5, 3))),
    r"erase.keys has shape \(5,\)": dict(erase=Erase(KEY, jnp.ones(5))),
    r"erase has shape \(5, 4\).* or an Erase": dict(erase=KEY),
    r"active has shape \(4,\)": dict(active=jnp.ones(4)),
    "block is 0": dict(block=0),
    "impl is 'fast'": dict(impl="fast"),
}


@pytest.mark.parametrize(("message", "change"), WRONG.items(), ids=WRONG)
def test_wrong_arguments_say_what_came(untyped, message, change):
    given = dict(retention=KEY, erase=Erase(KEY, KEY)) | change
    with pytest.raises(UserError, match=message):
        gated_delta(jnp.ones((V, K)), KEY, jnp.ones((5, V)), KEY, **given)
