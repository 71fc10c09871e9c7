"""The training step: loss, rematerialisation, accumulation, precision; the optimizer with its levels and schedule."""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn

from hope_jax import MODELS, LanguageModel
from hope_jax import train as training
from hope_jax.errors import UserError
from hope_jax.nn.axes import decays
from hope_jax.optim import M3, AdamW
from hope_jax.train.step import mean_gradient

BYTES = np.arange(256) % 3 + 1


def narrow(name):
    """A named model at width 32 with two heads."""
    row = MODELS[name]
    return LanguageModel(dataclasses.replace(row, width=32, mixer=dataclasses.replace(row.mixer, heads=2)))


def build(name):
    """A narrow model with its parameters, its compiled loss with gradient, and 4 sequences of 32 tokens."""
    model = narrow(name)
    params = drawn(model.init, jnp.zeros((1, 1), jnp.int32), spread=0.18, retention_bias=4.0)
    batch = jax.random.randint(jax.random.key(1), (4, 33), 0, 256)
    grad = jax.jit(jax.value_and_grad(training.next_token_loss(model, BYTES), has_aux=True))
    return SimpleNamespace(config=model.config, model=model, params=params, batch=batch, grad=grad)


@pytest.fixture(scope="module")
def small():
    """A model with an attention cache and levels: quick to compile."""
    return build("hope_attention-tiny")


DEEP = [pytest.param(name, marks=pytest.mark.slow) for name in ("titans-tiny", "hope-tiny")]


@pytest.fixture(scope="module", params=["small", "titans_linear-tiny", *DEEP])
def each(request, small):
    """The same, and models whose memories are written in context from learned initial states."""
    return small if request.param == "small" else build(request.param)


def assert_close(left, right, tolerance):
    """Equal relative to the largest entry of each array, with the array named if not."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True):
        error = jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-12)
        assert error < tolerance, (jax.tree_util.keystr(path), float(error))


def test_loss_is_the_cross_entropy_of_the_next_token_and_counts_its_bytes(small):
    (loss, metrics), _ = small.grad(small.params, small.batch)
    logits, _ = jax.jit(small.model.apply)({"params": small.params}, small.batch[:, :-1])
    logits, targets = np.asarray(logits, np.float64), np.asarray(small.batch[:, 1:])
    top = logits.max(-1, keepdims=True)
    logs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    nats = -np.take_along_axis(logs, targets[..., None], -1).sum()
    assert float(loss) == pytest.approx(nats / targets.size, rel=1e-5)
    assert float(metrics["bits_per_byte"].value) == pytest.approx(nats / math.log(2) / BYTES[targets].sum(), rel=1e-5)


def test_every_parameter_gets_a_gradient_initial_memories_included(each):
    _, gradient = each.grad(each.params, each.batch)
    dead = [jax.tree_util.keystr(p) for p, g in jax.tree_util.tree_leaves_with_path(gradient) if not jnp.any(g != 0)]
    assert not dead


def test_rematerialised_pieces_with_carried_state_give_the_loss_and_gradient_of_the_whole(each):
    cut = jax.jit(jax.value_and_grad(training.next_token_loss(each.model, BYTES, remat_every=8), has_aux=True))
    (loss, _), gradient = each.grad(each.params, each.batch)
    (other, _), other_gradient = cut(each.params, each.batch)
    assert float(other) == pytest.approx(float(loss), rel=1e-6)
    assert_close(other_gradient, gradient, 5e-4)


def test_accumulated_slices_give_the_gradient_and_metrics_of_the_full_batch(small):
    loss = training.next_token_loss(small.model, BYTES)
    (_, metrics), gradient = small.grad(small.params, small.batch)
    sliced, sliced_metrics = jax.jit(lambda p, b: mean_gradient(loss, p, b, 4))(small.params, small.batch)
    assert_close(sliced, gradient, 5e-4)
    for name, mean in metrics.items():
        assert float(sliced_metrics[name].value) == pytest.approx(float(mean.value), rel=1e-6)


def test_evaluation_in_parts_is_the_mean_over_all_tokens_not_over_batches(small):
    (_, whole), _ = small.grad(small.params, small.batch)
    uneven = [small.batch[:1], small.batch[1:]]
    loss = training.next_token_loss(small.model, BYTES)
    found = training.Setup(lambda key: {}, loss, optax.sgd(1.0), lambda step: 1.0).evaluator(uneven)(small.params)
    for name, value in found.items():
        assert value == pytest.approx(float(whole[name].value), rel=1e-5)


@functools.cache
def setup_of(name, method):
    """How a narrow model is trained: levels that move every second and third batch, at a rate that warms up."""
    model = narrow(name)
    config = training.OptimizerConfig(learning_rate=3e-3, warmup=2, method=method)
    tx = training.optimizer(config, 20, {"static": 1, "level_0": 2, "level_1": 3}, model.axes())
    init, loss = functools.partial(training.init_params, model), training.next_token_loss(model, BYTES)
    return training.Setup(init, loss, tx, training.schedule(config, 20))


@pytest.mark.parametrize("method", [AdamW(), pytest.param(M3(), marks=pytest.mark.slow)], ids=["adamw", "m3"])
def test_a_second_step_reuses_the_compiled_program_and_the_loss_falls(small, method):
    setup = setup_of("hope_attention-tiny", method)
    step: Any = setup.step
    params = jax.tree.map(jnp.copy, small.params)  # the step donates its state
    state = training.TrainState.first(params, setup.tx.init(params))
    state, losses, programs = setup.spread(state), [], 0  # after the first step: other tests have this step, too
    for _ in range(20):
        state, metrics = step(state, small.batch)
        losses.append(float(metrics["loss"].value))
        programs = programs or step._cache_size()
    assert step._cache_size() == programs
    assert int(state.step) == 20 and losses[-1] < losses[0] - 0.3


def test_bfloat16_flag_keeps_parameters_and_loss_in_float32(small):
    model = LanguageModel(dataclasses.replace(small.config, dtype=jnp.dtype("bfloat16")))
    params = training.abstract_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    loss, _ = jax.jit(training.next_token_loss(model, BYTES))(small.params, small.batch)
    (exact, _), _ = small.grad(small.params, small.batch)
    assert loss.dtype == jnp.float32 and float(loss) != float(exact)
    assert float(loss) == pytest.approx(float(exact), rel=0.02)


RUNS = [pytest.param("hope_attention-tiny", AdamW(), id="levels")]
RUNS += [pytest.param("hope-tiny", AdamW(), id="hope", marks=pytest.mark.slow)]
RUNS += [pytest.param("hope-tiny", M3(), id="hope, m3", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_three_steps_a_save_a_restore_and_three_more_are_bit_for_bit_six(tmp_path, name, method):
    setup, draw = setup_of(name, method), np.random.default_rng(0)
    step, like = setup.step, setup.shapes()
    params = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(0, 0.02, leaf.shape), leaf.dtype), like.params)
    start = setup.spread(training.TrainState.first(params, setup.tx.init(params)))

    def advance(state):
        for _ in range(3):
            batch = jax.random.randint(jax.random.key(int(state.step)), (4, 33), 0, 256)
            state, metrics = step(state, batch)
        return state, jax.device_get(metrics)

    middle, _ = advance(start)
    training.save(tmp_path, middle, {}, {}, keep=2)
    expected, expected_metrics = advance(middle)
    found, metrics = advance(training.restore(tmp_path, 3, like))
    assert metrics == expected_metrics and math.isfinite(metrics["loss"].value)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(a, b), jax.tree_util.keystr(path)


def test_learning_rate_warms_up_linearly_peaks_and_ends_at_the_final_fraction():
    rate = training.schedule(training.OptimizerConfig(learning_rate=1.0, warmup=10, final_fraction=0.1), 110)
    assert [float(rate(n)) for n in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert [float(rate(n)) for n in (60, 110, 500)] == pytest.approx([0.55, 0.1, 0.1])


def test_the_default_peak_falls_with_the_width_and_a_given_one_does_not():
    default, given = training.OptimizerConfig(), training.OptimizerConfig(learning_rate=0.1)
    assert [default.at_width(width).learning_rate for width in (16, 192, 2048)] == pytest.approx(
        [5e-3, 5e-3, 4.6875e-4]
    )
    assert given.at_width(2048) is given
    with pytest.raises(UserError, match="no learning rate; give one"):
        training.schedule(default, 100)


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # of batches 0, 9, 10, 60, 89, 90, 100, 110 and 500; the last 20 of the 100 after the warmup are the cooldown
        ("wsd", [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1, 0.1]),
        ("constant", [0.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules_meet_at_the_peak_and_go_on_as_their_names_say(name, expected):
    config = training.OptimizerConfig(learning_rate=1.0, warmup=10, final_fraction=0.1)
    rate = training.schedule(config, 110, training.SCHEDULES[name])
    found = [float(rate(n)) for n in (0, 9, 10, 60, 89, 90, 100, 110, 500)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_cooldown_of_nothing_is_refused():
    with pytest.raises(UserError, match="cooldown is 0; expected above 0"):
        dataclasses.replace(training.SCHEDULES["wsd"], cooldown=0.0)


class Table:
    """A model whose logits are rows of its parameters."""

    config = SimpleNamespace(feed_forward=None)
    remat_states = "exact"

    def apply(self, variables, tokens, state=None):
        return variables["params"][tokens], state

    def init_state(self, params, batch, capacity):
        return ()


@pytest.mark.parametrize("every", [None, 4])
def test_the_gradient_of_the_z_loss_is_that_of_its_formula(x64, every):
    draw, z = np.random.default_rng(0), 0.3
    table, batch = draw.normal(0, 2, (5, 5)), draw.integers(0, 5, (2, 9))
    loss = training.next_token_loss(Table(), np.ones(5), every, z_loss=z)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, batch)
    inputs, targets = batch[:, :-1].ravel(), batch[:, 1:].ravel()
    logits = table[inputs]
    logs = np.log(np.exp(logits).sum(-1))
    nats, squares = logs - logits[np.arange(16), targets], z * logs**2
    assert float(value) == pytest.approx((nats + squares).mean(), rel=1e-9)
    assert float(metrics["loss"].value) == pytest.approx(nats.mean(), rel=1e-9)
    assert float(metrics["z_loss"].value) == pytest.approx(squares.mean(), rel=1e-9)
    share = np.exp(logits - logs[:, None])
    slopes = share - np.eye(5)[targets] + 2 * z * logs[:, None] * share
    expected = np.zeros((5, 5))
    np.add.at(expected, inputs, slopes / 16)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


@pytest.mark.parametrize("field, value", [("learning_rate", 0.0), ("clip", -1.0), ("final_fraction", 2.0)])
def test_a_field_of_the_schedule_out_of_range_is_named(field, value):
    with pytest.raises(UserError, match=f"{field} is {value:g}; expected"):
        training.OptimizerConfig(**{field: value})


def test_weight_decay_moves_matrices_only(small):
    """With a zero gradient the only thing that moves a parameter is its decay."""
    axes = small.model.axes()
    config = training.OptimizerConfig(learning_rate=2e-3, warmup=0)
    tx = training.optimizer(config, 10, {"static": 1, "level_0": 1, "level_1": 4}, axes)
    zero = jax.tree.map(np.zeros_like, small.params)
    state, updates, step = tx.init(small.params), zero, jax.jit(tx.update)
    for _ in range(4):  # a slow level moves with the last of its batches
        update, state = step(zero, state, small.params)
        updates = jax.tree.map(np.add, updates, update)
    moved = [path for path, update in jax.tree_util.tree_leaves_with_path(updates) if np.any(update != 0)]
    decayed = decays(axes)(small.params)
    expected = [path for path, decays in jax.tree_util.tree_leaves_with_path(decayed) if decays]
    assert moved == expected and len(moved) > 5


def test_levels_move_every_nth_batch_and_see_the_learning_rate_of_that_batch():
    config = training.OptimizerConfig(AdamW(weight_decay=0.0), learning_rate=1.0, warmup=4)
    axes = {"static": {"kernel": ()}, "level_0": {"kernel": ()}}
    tx = training.optimizer(config, 100, {"static": 1, "level_0": 2}, axes)
    params = {"static": {"kernel": jnp.zeros(())}, "level_0": {"kernel": jnp.zeros(())}}
    gradient, state, update = jax.tree.map(jnp.ones_like, params), tx.init(params), jax.jit(tx.update)
    seen = []
    for _ in range(4):
        updates, state = update(gradient, state, params)
        seen.append([float(update) for update in jax.tree.leaves(updates)])
    slow, fast = zip(*seen, strict=True)
    assert fast == pytest.approx((-0.25, -0.5, -0.75, -1.0), rel=1e-3)
    assert slow == pytest.approx((0.0, -0.5, 0.0, -1.0), rel=1e-3)


def test_m3_steps_a_slow_level_as_a_fast_one_at_the_learning_rate_of_that_batch():
    """Step m is that of the m-th mean gradient; all gradients are alike."""
    config = training.OptimizerConfig(M3(slow_period=2), learning_rate=1.0, warmup=4)
    axes = dict.fromkeys(("static", "level_0"), {"kernel": ("embed", "hidden")})
    params, gradient = (
        dict.fromkeys(axes, {"kernel": leaf}) for leaf in np.stack([np.zeros((2, 2)), np.eye(2)]).astype("float32")
    )
    tx = training.optimizer(config, 100, {"static": 1, "level_0": 2}, axes)
    state, update, seen = tx.init(params), jax.jit(tx.update), []
    for _ in range(4):
        updates, state = update(gradient, state, params)
        seen.append([np.asarray(update) for update in jax.tree.leaves(updates)])
    slow, fast = zip(*seen, strict=True)
    assert not np.any(slow[0]) and not np.any(slow[2]) and np.all(np.diag(fast[0]) < -0.01)
    np.testing.assert_allclose(slow[1::2], 2 * np.array(fast[:2]), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_together_before_they_reach_the_levels():
    config = training.OptimizerConfig(AdamW(b1=0.0), 2e-3, clip=0.5)
    axes = {"static": {"kernel": ("embed",)}, "level_0": {"kernel": ("embed",)}}
    tx = training.optimizer(config, 10, {"static": 1, "level_0": 1}, axes)
    params = {"static": {"kernel": jnp.ones(2)}, "level_0": {"kernel": jnp.ones(2)}}
    _, state = jax.jit(tx.update)(jax.tree.map(lambda p: 1000 * p, params), tx.init(params), params)
    moments = [value for _, value in optax.tree_utils.tree_get_all_with_path(state, "mu")]
    assert float(optax.tree.norm(moments)) == pytest.approx(0.5, rel=1e-5)
