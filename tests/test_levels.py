"""The schedule of levels: when a level is due, and that no cut of a sequence changes what it sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.errors import UserError
from hope_jax.levels import Level, check_multiples, due, save_for_backward, scan_levels, scan_periods

PERIODS = (3, 6)


def python_loop(tokens, start=0, state=None):
    """Two anchors refreshed every 3rd and 6th token; each token is read with both, then written."""
    running, fast, slow = state or (1.0, 0.0, 0.0)
    outputs = []
    for t, x in enumerate(tokens, start):
        fast = running if t % PERIODS[0] == 0 else fast
        slow = running if t % PERIODS[1] == 0 else slow
        outputs.append(running + 10 * fast + 100 * slow)
        running = 0.5 * running + x * np.cos(fast - 0.3 * slow)
    return (running, fast, slow), np.array(outputs)


def run_chunk(state, tokens, active, due):
    """The same as a function of a chunk; inactive tokens leave the state alone."""
    running, fast, slow = state
    fast, slow = jnp.where(due[0], running, fast), jnp.where(due[1], running, slow)
    active = jnp.ones_like(tokens) if active is None else active.astype(tokens.dtype)

    def token(running, one):
        x, on = one
        new = 0.5 * running + x * jnp.cos(fast - 0.3 * slow)
        return jnp.where(on > 0, new, running), running + 10 * fast + 100 * slow

    running, outputs = jax.lax.scan(token, running, (tokens, active))
    return (running, fast, slow), outputs


def start():
    return tuple(map(jnp.asarray, (1.0, 0.0, 0.0)))


scan = jax.jit(
    lambda state, tokens, position: scan_levels(run_chunk, state, tokens, position=position, periods=PERIODS)
)


@pytest.mark.parametrize("cut", [(13,), (1, 12), (2, 3, 8), (5, 1, 1, 6), (1,) * 13, (6, 7)], ids=str)
def test_any_cut_of_a_sequence_equals_the_python_loop(x64, cut):
    tokens = np.random.default_rng(0).normal(size=13)
    expected_state, expected = python_loop(tokens)
    state, position, outputs = start(), 0, []
    for length in cut:
        state, out = scan(state, jnp.asarray(tokens[position : position + length]), position)
        outputs.append(out)
        position += length
    np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-12)
    np.testing.assert_allclose(state, expected_state, rtol=1e-12)


@pytest.mark.parametrize("position", [0, 3, 6])
def test_the_path_for_whole_periods_from_a_known_position_equals_the_general_one(x64, position):
    tokens = np.random.default_rng(1).normal(size=9)
    before, _ = python_loop(np.random.default_rng(2).normal(size=position))
    expected_state, expected = python_loop(tokens, position, before)
    how = dict(position=np.asarray(position, np.int32), periods=PERIODS)
    aligned = jax.jit(lambda state, tokens: scan_levels(run_chunk, state, tokens, **how))
    for run in (aligned, lambda *a: scan(*a, position)):
        state, outputs = run(tuple(map(jnp.asarray, before)), jnp.asarray(tokens))
        np.testing.assert_allclose(outputs, expected, rtol=1e-12)
        np.testing.assert_allclose(state, expected_state, rtol=1e-12)


def test_both_paths_have_the_same_gradients(x64):
    tokens = jnp.asarray(np.random.default_rng(3).normal(size=6))

    def loss(tokens, position):
        state, outputs = scan_levels(run_chunk, start(), tokens, position=position, periods=PERIODS)
        return jnp.sum(outputs**2) + state[0]

    aligned = jax.jit(jax.grad(lambda x: loss(x, np.zeros((), np.int32))))(tokens)
    general = jax.jit(jax.grad(loss))(tokens, 0)
    assert np.all(np.abs(np.array(aligned)) > 0)
    np.testing.assert_allclose(aligned, general, rtol=1e-12)


@pytest.mark.parametrize("position, count, rows", [(0, 9, 3), (0, 4, 2), (2, 4, 2), (2, 9, 4), (1, 2, 1)])
def test_periods_without_real_tokens_are_not_computed(position, count, rows):
    computed = []

    def counted(*chunk):
        jax.debug.callback(lambda: computed.append(None))
        return run_chunk(*chunk)

    scan_levels(
        counted, start(), jnp.ones(9), position=jnp.asarray(position), periods=PERIODS, count=jnp.asarray(count)
    )
    jax.effects_barrier()
    assert len(computed) == rows


def test_a_level_is_due_at_multiples_of_its_period_and_at_the_start():
    assert [bool(due(step, 4)) for step in range(9)] == [True, False, False, False] * 2 + [True]
    assert all(bool(due(np.asarray(step), 1)) for step in range(3))


@pytest.mark.parametrize("period", [0, -3, 2.5])
def test_a_period_that_is_no_number_of_tokens_is_refused(untyped, period):
    with pytest.raises(UserError, match=str(period)):
        Level(period)


def test_periods_that_do_not_divide_each_other_are_refused():
    check_multiples((4, 16))
    with pytest.raises(UserError, match="6"):
        check_multiples((4, 6))


@pytest.mark.parametrize("periods", [(3,), (3, 6)])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("save, times", [(save_for_backward, 1), (lambda x: x, 2)], ids=["saved", "not saved"])
def test_what_a_chunk_saves_is_computed_once(save, times, known, periods):
    found = _sinh_in_gradient(scan_levels, save, known, periods)
    assert found >= times
    assert (found == 1) == (save is save_for_backward)


def test_loops_that_train_through_writes_save_nothing():
    def from_the_start(*arguments, position, periods):
        return scan_periods(*arguments, position=int(position), periods=periods)

    assert _sinh_in_gradient(from_the_start, save_for_backward, True, (3,)) == 2


def _sinh_in_gradient(scan, save, known, periods):
    """How often a chunk's sinh stands in the program of the gradient."""

    def product(state, tokens, active, due):
        return state * jnp.prod(save(jnp.sinh(tokens))), jnp.full(3, state)

    def loss(state, position):
        position = np.zeros((), np.int32) if known else position
        return scan(product, state, jnp.ones(12), position=position, periods=periods)[0]

    return str(jax.make_jaxpr(jax.grad(loss))(1.0, 0)).count("= sinh")


def test_a_gradient_of_a_gradient_keeps_only_states_where_a_period_may_be_skipped():
    """From an unknown position 16 tokens lie in 5 periods of 4; what a period computes inside is [4, 8, 8]."""

    def run_chunk(state, tokens, active, due):
        inside = jnp.sin(tokens[:, None, None] * state[None])
        return inside.sum(axis=0), inside.sum(axis=(1, 2))

    def loss(state, position):
        return jnp.sum(scan_levels(run_chunk, state, jnp.ones(16), position=position, periods=(4,))[1])

    twice = jax.grad(lambda state, position: jnp.sum(jax.grad(loss)(state, position) ** 2))
    program = str(jax.make_jaxpr(twice)(jnp.ones((8, 8)), 0))
    assert "f32[5,8,8]" in program and "f32[5,4,8,8]" not in program
