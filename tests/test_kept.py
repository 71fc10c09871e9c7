"""States kept in bfloat16 for the backward pass: the same outputs, the gradient at rounded states, fewer bytes."""

import contextlib
import functools
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax import train as training
from hope_jax.cli.compile import CompileConfig
from hope_jax.cli.pretrain import PretrainConfig
from hope_jax.errors import UserError
from hope_jax.kept import keeping, pieces_of_inner_loop, scan_pieces
from hope_jax.levels import Level, scan_periods
from hope_jax.models import ARCHITECTURES, LanguageModel, Size, with_impl, with_in_context

SIZE = Size(width=64, layers=1, heads=2, vocab_size=32, context=512, levels=(Level(1024),))


def rounded(x):
    """In bfloat16, as the format that went in."""
    return np.asarray(x).astype(jnp.bfloat16).astype(x.dtype)


def sines(weight, start, inputs):
    """s_t = sin(w s_(t-1)) + x_t and the sum of t s_t^2, in a loop whose states are kept."""

    def step(state, piece):
        time, x = piece
        state = jnp.sin(weight * state) + x
        return state, time * jnp.sum(state**2)

    _, outputs = scan_pieces(step, start, (jnp.arange(1, len(inputs) + 1), inputs))
    return jnp.sum(outputs)


def gradient_of_sines(weight, start, inputs):
    """Its gradient by hand, each state before a piece rounded."""
    states = [start]
    for x in inputs:
        states.append(np.sin(weight * states[-1]) + x)
    of_weight, of_inputs, g = 0.0, [], np.zeros_like(start)
    for time in range(len(inputs), 0, -1):
        before = rounded(states[time - 1])
        g = g + 2 * time * (np.sin(weight * before) + inputs[time - 1])
        of_inputs.append(g)
        of_weight += np.sum(g * np.cos(weight * before) * before)
        g = g * np.cos(weight * before) * weight
    return of_weight, g, np.stack(of_inputs[::-1])


def test_the_gradient_is_that_at_rounded_states_and_the_value_the_exact_one(x64):
    draw = np.random.default_rng(0)
    given = 0.9, draw.normal(size=3), draw.normal(size=(5, 3))
    exact = jax.jit(jax.value_and_grad(sines, argnums=(0, 1, 2)))(*given)
    with keeping("bfloat16"):
        value, found = jax.jit(jax.value_and_grad(lambda *given: sines(*given), argnums=(0, 1, 2)))(*given)
    assert value == exact[0]
    for ours, expected, before in zip(found, gradient_of_sines(*given), exact[1], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)
        assert np.max(np.abs(ours - before)) > 1e-4 * np.max(np.abs(before))  # it was rounded, once a piece
        np.testing.assert_allclose(ours, before, rtol=0.05, atol=0.01 * np.max(np.abs(before)))


def test_states_that_stay_exact_are_kept_by_what_kept_them_before(untyped):
    def step(state, piece):
        return state + piece, state

    def remat(function):
        assert function is step
        return lambda state, piece: (state - piece, state)

    for loop in (contextlib.nullcontext(), keeping("exact")):
        with loop:
            assert scan_pieces(step, jnp.zeros(()), jnp.ones(3), remat)[0] == -3
    with pytest.raises(UserError, match="remat_states is 'float16'; expected one of"), keeping(cast(Any, "float16")):
        pass


def test_nested_loops_give_the_same_and_nearly_so_from_rounded_states(x64):
    draw = np.random.default_rng(0)
    given = 0.9, draw.normal(size=3), draw.normal(size=(18, 1))  # states are larger than pieces
    gradients = []
    for states in ("exact", "bfloat16"):
        for nested in (False, True):
            with keeping(states, nested):
                of_sines = jax.jit(jax.value_and_grad(lambda *given: sines(*given), argnums=(0, 1, 2)))
                gradients.append(of_sines(*given))
                loops = str(jax.make_jaxpr(lambda *given: sines(*given))(*given)).count("length=")
            assert loops == (2 if nested else 1)
    close, value = np.testing.assert_allclose, gradients[0][0]
    jax.tree.map(functools.partial(close, rtol=1e-12), gradients[0], gradients[1])
    for found in gradients[1:]:
        assert found[0] == value
        jax.tree.map(functools.partial(close, rtol=0.05), found, gradients[0])


def test_nested_loops_keep_fewer_states():
    """Of 64 states 8, and 8 at a time of the inner loops."""

    def loss(nested, weight, start):
        with keeping("exact", nested):
            return jnp.sum(scan_pieces(lambda s, x: (jnp.sin(s @ weight), x * jnp.sum(s)), start, jnp.ones(64))[1])

    shape, used = jax.ShapeDtypeStruct((256, 256), jnp.float32), []
    for nested in (False, True):
        gradient: Any = jax.jit(jax.grad(functools.partial(loss, nested), argnums=(0, 1)))
        used.append(gradient.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes)
    assert used[0] > 64 * 4 * 256**2 and used[1] < 0.5 * used[0]


def test_inner_loops_are_divisors_that_halve_what_is_kept():
    assert [pieces_of_inner_loop(count) for count in (1, 8, 12, 16, 18, 127, 128, 129)] == [1, 1, 1, 4, 3, 1, 8, 3]


def test_half_the_bytes_are_kept_also_in_nested_loops():
    """Of 64 states, 16 of which the loop of the slow level keeps, and 4 at a time that of the fast one."""

    def loss(states, weight, start):
        def run_chunk(state, tokens, active, due):
            return jnp.sin(state @ weight), jnp.sum(state) * tokens

        with keeping(states):
            how: dict[str, Any] = {"position": 0, "periods": (1, 4)}
            return jnp.sum(scan_periods(run_chunk, start, jnp.ones(64), **how)[1])

    shape, used = jax.ShapeDtypeStruct((256, 256), jnp.float32), []
    for states in ("exact", "bfloat16"):
        gradient: Any = jax.jit(jax.grad(lambda *given, states=states: loss(states, *given), argnums=(0, 1)))
        used.append(gradient.lower(shape, shape).compile().memory_analysis().temp_size_in_bytes)
    assert used[0] > (16 + 4) * 4 * 256**2 and used[1] < 0.75 * used[0]


def gradient(config, length, states, remat_every=None):
    """Loss and gradient of 2 sequences, and the bytes that the program needs."""
    model = LanguageModel(config, remat_states=states)
    batch = np.random.default_rng(0).integers(0, 32, (2, length + 1)).astype(np.int32)
    params = training.init_params(model, jax.random.key(0))
    loss = training.next_token_loss(model, np.ones(32), remat_every)
    of_loss: Any = jax.jit(jax.value_and_grad(loss, has_aux=True))
    program = of_loss.lower(params, batch).compile()
    (value, _), found = jax.device_get(program(params, batch))
    return value, found, program.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat_every"), [("hope", None), ("titans", None), ("titans", 128), ("lstm", None)])
def test_a_model_gives_the_same_loss_and_nearly_the_gradient_from_fewer_bytes(name, remat_every):
    exact, ours = (gradient(ARCHITECTURES[name](SIZE), 512, states, remat_every) for states in ("exact", "bfloat16"))
    assert ours[0] == pytest.approx(exact[0], rel=1e-6)
    pairs = list(zip(*map(jax.tree.leaves, (ours[1], exact[1])), strict=True))
    for found, expected in pairs:
        assert np.linalg.norm(found - expected) <= 0.02 * np.linalg.norm(expected) + 1e-6
    assert any(np.any(found != expected) for found, expected in pairs)
    if name in ("hope", "titans"):  # of an LSTM the states of 8 blocks of tokens are nothing beside the rest
        assert ours[2] < exact[2]


def test_the_choice_reaches_the_loss_that_is_trained():
    """Rounded states are kept as integers of 16 bits."""
    optimizer = training.OptimizerConfig(learning_rate=1e-3)
    run = training.TextRun(ARCHITECTURES["deltanet"](SIZE), optimizer, 2, 64, 0, "", "")

    def program(states):
        setup = training.text_setup(run, 10, np.ones(32), remat_states=states)
        windows = jax.ShapeDtypeStruct((2, 65), jnp.int32)
        return str(jax.make_jaxpr(jax.grad(setup.loss, has_aux=True))(setup.shapes().params, windows))

    assert "u16[" in program("bfloat16") and "u16[" not in program("exact")


def test_states_cannot_be_rounded_where_none_are_kept():
    with pytest.raises(UserError, match="no mixer of the model keeps states of a memory; leave it out"):
        PretrainConfig(Path("run"), model="transformer_pp-tiny", remat_states="bfloat16")
    training.check_states("bfloat16", ARCHITECTURES["transformer_pp"](SIZE), remat_every=128)  # those of the cache
    with pytest.raises(UserError, match="kernels .impl 'pallas'. keep states on their own; drop one"):
        training.check_states("bfloat16", with_impl(ARCHITECTURES["titans"](SIZE), "pallas"), None)
    with pytest.raises(UserError, match="impl 'sequential' keeps the state of every token; drop one"):
        training.check_states("bfloat16", with_impl(ARCHITECTURES["titans"](SIZE), "sequential"), None)


def test_states_cannot_be_rounded_where_gradients_are_differentiated():
    levels = with_in_context(ARCHITECTURES["hope"](SIZE), (16, 32))
    with pytest.raises(UserError, match="training differentiates their writes twice, rounded states only once"):
        training.check_states("bfloat16", levels, None)
    with pytest.raises(UserError, match="no mixer of the model keeps states"):
        CompileConfig("cpu:1", model="transformer_pp-tiny", remat_states="bfloat16")
