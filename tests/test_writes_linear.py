"""Writes of two levels of a linear model against numpy, chunk by chunk; what training differentiates, unrolled."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references_writes import by_hand

from hope_jax import context
from hope_jax.context.stream import read_without_learning
from hope_jax.context.writes import reading_loss
from hope_jax.nn.feed_forward.fast import BlockState, Writes
from hope_jax.optim import INNER

read = jax.jit(reading_loss, static_argnums=0)


@dataclass(frozen=True)
class Linear:
    """logits of a token x: E[x] (W0 + D0) (W1 + D1); no layer norm, no state."""

    config: Any

    def init_state(self, params, batch, capacity=None):
        return BlockState((), ())

    def apply(self, variables, tokens, state, count=None):
        p = variables["params"]
        first, second = (delta for tree in state.feed_forward for delta in tree["w"])
        h = p["E"][tokens] @ p["W"][0] + jnp.einsum("bti,bij->btj", p["E"][tokens], first)
        return h @ p["W"][1] + jnp.einsum("bti,bij->btj", h, second), state


@dataclass(frozen=True)
class LinearLevels:
    """Two levels of one matrix each; or one tree of Delta, whose two layers have these periods."""

    writes: Writes
    nested: bool = False
    trained: int = 2

    def periods(self, layers):
        return ((3,), (6,)) if layers == 1 else ((3, 6),)

    def blank(self, batch, width, dtype):
        return tuple({"w": jnp.zeros((batch, width, width), jnp.float64)} for _ in range(self.trained))

    def kernels(self, params):
        return ()


@dataclass(frozen=True)
class LinearConfig:
    feed_forward: Any
    layers: int = 1
    width: int = 5
    vocab_size: int = 5
    dtype: Any = jnp.float64


def linear(rates, nested, optimizer="sgd"):
    """A linear model, its parameters, the same in numpy, and tokens of two sequences."""
    draw = np.random.default_rng(0)
    p = {"E": draw.normal(size=(5, 5)), "W": draw.normal(size=(2, 5, 5)) / 2}
    params = jax.tree.map(jnp.asarray, p) | {"blocks": {"feed_forward": {"rate": jnp.asarray(rates)[None]}}}
    model: Any = Linear(LinearConfig(LinearLevels(Writes(optimizer=INNER[optimizer]), nested)))
    return model, params, p, draw.integers(0, 5, (2, 16))


@pytest.mark.parametrize("optimizer", [pytest.param("momentum", marks=pytest.mark.slow), "adam", "muon"])
def test_writes_of_other_optimizers_are_theirs_from_period_to_period(optimizer, x64):
    rates = np.array([0.1, 0.2])
    model, params, p, tokens = linear(rates, True, optimizer)
    found, state = context.surprise(model, params, context.start(model, params, 2), jnp.asarray(tokens))
    for row in range(2):
        losses, deltas = by_hand(p, tokens[row], rates, True, optimizer=optimizer)
        np.testing.assert_allclose(found[row], losses, rtol=1e-7)
        for i in range(2):
            np.testing.assert_allclose(state.levels[i].delta["w"][0, row], deltas[i], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["momentum", pytest.param("adam", marks=pytest.mark.slow)])
def test_what_is_read_without_learning_belongs_to_no_period(optimizer, x64):
    rates = np.array([0.1, 0.2])
    model, params, p, tokens = linear(rates, False, optimizer)
    tokens[:, 12] = tokens[:, 9]  # so that the third chunk has the same labels without the fourth, which is not learned
    _, state = context.surprise(model, params, context.start(model, params, 2), jnp.asarray(tokens[:, :10]))
    _, state = read_without_learning(model, params, state, jnp.asarray(tokens[:, 10:13]))
    _, state = context.surprise(model, params, state, jnp.asarray(tokens[:, 13:]))
    for row, learned in enumerate(np.concatenate([tokens[:, :9], tokens[:, 12:]], axis=1)):
        _, deltas = by_hand(p, learned, rates, False, optimizer=optimizer)
        for i in range(2):
            np.testing.assert_allclose(state.levels[i].delta["w"][0, row], deltas[i], rtol=1e-6, atol=1e-9)
    # Nothing was learned after the writes: moments that are left must not move a level again.
    _, after = read_without_learning(model, params, state, jnp.asarray(tokens[:, :3]))
    after = context.finish(model, params, after)
    for level, before in zip(after.levels, state.levels, strict=True):
        np.testing.assert_array_equal(level.delta["w"], before.delta["w"])


@pytest.mark.parametrize("nested", [False, True], ids=["sequential", "nested"])
def test_two_levels_of_a_linear_model_are_the_equations_chunk_by_chunk(nested, x64):
    rates = np.array([0.7, 0.3])
    model, params, p, tokens = linear(rates, nested)
    state = context.start(model, params, 2)
    found, state = context.surprise(model, params, state, jnp.asarray(tokens))
    for row in range(2):
        losses, deltas = by_hand(p, tokens[row], rates, nested)
        np.testing.assert_allclose(found[row], losses, rtol=1e-10)
        for i in range(2):
            np.testing.assert_allclose(state.levels[i].delta["w"][0, row], deltas[i], rtol=1e-9, atol=1e-12)
    # What is left inside a period is stored by finish: each token for eta / period, as in a full one.
    _, tail = context.surprise(model, params, context.start(model, params, 2), jnp.asarray(tokens[:, :6]))
    done = context.finish(model, params, tail)
    for row in range(2):
        _, (fast, slow) = by_hand(p, tokens[row, :6], rates, nested, ended=True)
        np.testing.assert_allclose(done.levels[0].delta["w"][0, row], fast, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(done.levels[1].delta["w"][0, row], slow, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(read(model, params, tokens[:, :15], tokens[:, 1:]), found, rtol=1e-12)


def test_layers_of_one_tree_are_written_each_at_its_own_period(x64):
    rates = np.array([0.7, 0.3])
    model, params, p, tokens = linear(rates, False)
    layered: Any = Linear(LinearConfig(LinearLevels(Writes(), trained=1), layers=2))
    params = params | {"blocks": {"feed_forward": {"rate": jnp.asarray(rates)[:, None]}}}
    found, state = context.surprise(layered, params, context.start(layered, params, 2), jnp.asarray(tokens))
    (tree,) = state.blocks.feed_forward
    for row in range(2):
        losses, deltas = by_hand(p, tokens[row], rates, False)
        np.testing.assert_allclose(found[row], losses, rtol=1e-10)
        np.testing.assert_allclose(tree["w"][:, row], deltas, rtol=1e-9, atol=1e-12)
    # The gradient of what is read after them goes through one write of each layer.
    layered = Linear(LinearConfig(LinearLevels(Writes(bptt=(1,)), trained=1), layers=2))
    near(*slopes(layered, params, p, rates, tokens[:, :13], (1, 1)))


def slopes(model, params, p, rates, tokens, counts):
    """Gradients (of rates, of weights) of the mean loss: ours, and those of the plain loop."""
    tokens = jnp.asarray(tokens)

    def loss(params):
        return reading_loss(model, params, tokens[:, :-1], tokens[:, 1:]).mean()

    def by_loop(rates, p):
        return jax.vmap(lambda row: unrolled(p, rates, row, counts))(tokens).mean()

    found = jax.jit(jax.grad(loss))(params)
    expected = jax.jit(jax.grad(by_loop, argnums=(0, 1)))(jnp.asarray(rates), jax.tree.map(jnp.asarray, p))
    return (found["blocks"]["feed_forward"]["rate"].ravel(), {name: found[name] for name in p}), expected


def near(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-13), found, expected)


def unrolled(p, rates, tokens, counts):
    """Mean loss of one sequence, chunk by chunk in a plain loop; of every level each ``counts``-th write begins anew.

    That many writes of a level hang together for the derivative; 0: what is written is a constant; None: all do.
    """
    deltas, gathered, losses = [jnp.zeros((5, 5))] * 2, [jnp.zeros((5, 5))] * 2, []
    for start in range(0, len(tokens) - 1, 3):
        inputs, labels = tokens[start : start + 3], tokens[start + 1 : start + 4]

        def loss(deltas, inputs=inputs, labels=labels):
            h = p["E"][inputs] @ (p["W"][0] + deltas[0])
            return -jnp.take_along_axis(jax.nn.log_softmax(h @ (p["W"][1] + deltas[1])), labels[:, None], 1)[:, 0]

        losses.append(loss(deltas))
        slopes = jax.grad(lambda deltas, loss=loss: loss(deltas).mean())(deltas)
        for i, (period, count) in enumerate(zip((3, 6), counts, strict=True)):
            gathered[i] = gathered[i] + (jax.lax.stop_gradient(slopes[i]) if count == 0 else slopes[i])
            if (start + 3) % period == 0:
                number = (start + 3) // period
                before = jax.lax.stop_gradient(deltas[i]) if count and number % count == 0 else deltas[i]
                after = before - rates[i] * gathered[i] * 3 / period
                deltas[i] = jax.lax.stop_gradient(after) if count == 0 else after
                gathered[i] = jnp.zeros((5, 5))
    return jnp.concatenate(losses).mean()


COUNTS = [(None, None), (2, 1), (0, 0)]
COUNTS += [pytest.param(counts, marks=pytest.mark.slow) for counts in ((0, 2), (1, None), (3, 0))]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_gradient_goes_through_so_many_writes_of_each_level(counts, x64):
    rates = np.array([0.7, 0.3])
    _, params, p, tokens = linear(rates, False)
    model: Any = Linear(LinearConfig(LinearLevels(Writes(bptt=counts))))
    tokens = np.concatenate([tokens, tokens[:, ::-1]], axis=1)[:, :19]
    near(*slopes(model, params, p, rates, tokens, counts))
