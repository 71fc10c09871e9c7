"""The optimizers x what every one of them owes: a new optimizer is one row of ``optimizer_rows.ROWS``.

Further properties, of an optimizer inside optax's wrappers, are in ``test_optimizer_wrappers.py``; when the levels of
``by_level`` move and by which gradient is in ``test_by_level.py``.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimizer_rows import descend, gradient, parameters, run, table


@functools.cache
def plain_run(make, **extra):
    """``run`` at a learning rate of 0.01 from the table's parameters: compiled once for all tests of a row."""
    return run(make(1e-2), parameters(), **extra)


@table
def test_the_state_can_be_planned_without_computing_it(row):
    params, tx = parameters(), row.make(1e-2)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, shapes), jax.tree.map(jnp.asarray, tx.init(params))
    )
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(params))


@table
def test_an_update_leaves_the_kind_of_its_state_alone_and_never_compiles_twice(row):
    _, state, update = plain_run(row.make, **row.extra)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.tree.map(jnp.asarray, row.make(1e-2).init(parameters())))
    assert update._cache_size() == 1


@table
def test_arguments_that_nobody_asked_for_change_nothing(row):
    plain, *_ = plain_run(row.make, **row.extra)
    given, *_ = run(row.make(1e-2), parameters(), **row.extra, value=jnp.float32(3.0), unheard_of=jnp.ones(2))
    chex.assert_trees_all_equal(given, plain)


@table
def test_updates_have_the_dtype_of_bfloat16_parameters(row):
    params, tx = parameters(jnp.bfloat16), row.make(1e-2)
    updates, _ = jax.jit(tx.update)(gradient(0, params), tx.init(params), params, **row.extra)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    moved, *_ = run(tx, params, **row.extra)
    chex.assert_tree_all_finite(moved)
    assert all(jnp.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True))


@table
def test_its_degenerate_limit_is_a_known_optimizer(row):
    ours, known = (run(tx, parameters(), **row.extra)[0] for tx in row.limit)
    chex.assert_trees_all_close(ours, known, rtol=1e-6, atol=1e-6)


@table
def test_bfloat16_parameters_have_a_float32_state(row):
    state = row.make(1e-2).init(parameters(jnp.bfloat16))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(jnp.float32)} if row.wide_state else jnp.dtype(jnp.bfloat16) in kinds


@table
def test_it_finds_the_minimum_of_a_quadratic(row):
    target = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), parameters())
    slope = lambda params: jax.tree.map(jnp.subtract, params, target)  # noqa: E731
    found = descend(row, row.make(row.rate), parameters(), slope, row.steps)
    chex.assert_trees_all_close(found, target, atol=row.tolerance)


@table
def test_it_finds_the_map_between_two_sets_of_vectors(row):
    draw = np.random.default_rng(3)
    inputs, wanted = draw.normal(size=(64, 4)), draw.normal(size=(4, 6))
    loss = lambda p: 0.5 * jnp.mean(jnp.sum((inputs @ (p["level_0"]["kernel"] - wanted)) ** 2, -1))  # noqa: E731
    start = {"level_0": {"kernel": jnp.zeros((4, 6))}, "level_1": {"unused": jnp.zeros(2)}}
    found = descend(row, row.make(row.rate), start, jax.grad(loss), row.steps)
    assert loss(found) < max(1e-3, row.tolerance**2 * 100) < 1e-2 * loss(start)


@table
def test_it_goes_down_the_valley_of_rosenbrock(row):
    def loss(params):
        x, y = params["level_0"]["kernel"].T
        return jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2)

    rate, steps = row.valley
    start = {"level_0": {"kernel": jnp.array([[-1.2, 1.0], [0.0, 1.2]])}, "level_1": {"unused": jnp.zeros(2)}}
    assert loss(descend(row, row.make(rate), start, jax.grad(loss), steps)) < 0.1 < loss(start)


@table
def test_the_learning_rate_can_be_injected_and_then_changed(row):
    injected = optax.inject_hyperparams(row.make)(1e-2)
    params = parameters()
    plain, *_ = plain_run(row.make, **row.extra)
    moved, state, update = run(injected, params, **row.extra)
    chex.assert_trees_all_close(moved, plain, rtol=1e-6, atol=1e-6)
    state.hyperparams["rate"] *= 0.0
    updates, _ = update(gradient(9, params), state, params, **row.extra)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    assert update._cache_size() == 1


@table
def test_under_multi_steps_it_sees_the_mean_of_the_gradients(row):
    params, tx = parameters(), row.make(1e-2)
    every = optax.MultiSteps(tx, 2)
    state, update = every.init(params), jax.jit(every.update)
    once, twice = gradient(0, params), gradient(1, params)
    updates, state = update(once, state, params, **row.extra)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(twice, state, params, **row.extra)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, once, twice)
    expected, _ = tx.update(mean, tx.init(params), params, **row.extra)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@table
def test_it_can_be_a_link_of_a_chain_and_be_masked(row):
    params, tx = parameters(), row.make(1e-2)
    plain, *_ = plain_run(row.make, **row.extra)
    chained, *_ = run(optax.chain(optax.identity(), tx), params, **row.extra)
    chex.assert_trees_all_equal(chained, plain)
    chosen = {"embedding": False, "ffn": True}
    masked, *_ = run(optax.masked(tx, chosen), params, **row.extra)
    chex.assert_trees_all_close(masked["ffn"], plain["ffn"], rtol=1e-6)
    summed = sum(gradient(step, params)["embedding"] for step in range(8))
    chex.assert_trees_all_close(masked["embedding"], params["embedding"] + summed, rtol=1e-5)


@table
def test_eight_devices_hold_the_state_as_they_hold_the_parameters_and_reach_the_same(row):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    params = parameters()
    sharded = jax.device_put(params, place)
    expected, *_ = plain_run(row.make, **row.extra)
    found, after, _ = run(row.make(1e-2), sharded, **row.extra)
    before = row.make(1e-2).init(sharded)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-6, atol=1e-6)
    arrays = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]  # noqa: E731
    assert len(arrays(before)) >= len(shapes := {p.shape for p in arrays(params)})
    for leaf in [*arrays(before), *arrays(after), *arrays(found)]:
        assert leaf.addressable_shards[0].data.size == leaf.size // 8, (leaf.shape, leaf.sharding)
        if leaf.shape in shapes:
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.shape, leaf.sharding)
