"""The optimizers x what every one of them owes: a new optimizer is one row of ``optimizer_rows.ROWS``.

Further properties, of an optimizer inside optax's wrappers, are in ``test_optimizer_wrappers.py``; when the levels of
``by_level`` move and by which gradient is in ``test_by_level.py``. Compiling is what costs here: a row's update at the
rate 0.01 is one program for all tests (``optimizer_rows.compiled``), and wrappers call it as they are. What a row
computes is tested for every row; what depends on the kind of its state alone, for one row of each kind (``kinds``).
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optimizer_rows import compiled, descend, gradient, kinds, parameters, plain_run, program, run, table, walk, wrapped


@functools.cache
def compiled_run(tx):
    """``run`` from the table's parameters; several rows have the same known optimizer as their limit."""
    return run(tx, parameters())[0]


@kinds
def test_the_state_can_be_planned_without_computing_it(row):
    params, tx = parameters(), row.make(1e-2)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, shapes), jax.tree.map(jnp.asarray, tx.init(params))
    )
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(params))


@kinds
def test_an_update_leaves_the_kind_of_its_state_alone_and_never_compiles_twice(row):
    _, state, programs = plain_run(row.make)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.tree.map(jnp.asarray, row.make(1e-2).init(parameters())))
    assert programs == 1


@kinds
def test_arguments_that_nobody_asked_for_change_nothing(row):
    tx, params = row.make(1e-2), parameters()
    assert program(tx, params, value=jnp.float32(3.0), unheard_of=jnp.ones(2)) == program(tx, params)


@kinds
def test_updates_have_the_dtype_of_bfloat16_parameters(row):
    params, tx = parameters(jnp.bfloat16), row.make(1e-2)
    moved, _, update = run(tx, params)
    updates, _ = update(gradient(0, params), tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_tree_all_finite(moved)
    assert all(jnp.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True))


@table
def test_its_degenerate_limit_is_a_known_optimizer(row):
    ours, known = map(compiled_run, row.limit)
    chex.assert_trees_all_close(ours, known, rtol=1e-6, atol=1e-6)


@table
def test_bfloat16_parameters_have_a_float32_state(row):
    state = jax.eval_shape(row.make(1e-2).init, parameters(jnp.bfloat16))
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {jnp.dtype(jnp.float32)} if row.wide_state else jnp.dtype(jnp.bfloat16) in kinds


DRAW = np.random.default_rng(3)
INPUTS, WANTED = DRAW.normal(size=(64, 4)), DRAW.normal(size=(4, 6))


def quadratic(params):
    """The squared distance from 1/2."""
    return 0.5 * sum(jnp.sum((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(params))


def regression(params):
    """The mean squared error of a map between two sets of vectors."""
    error = INPUTS @ (params["level_0"]["kernel"] - WANTED)
    return 0.5 * jnp.mean(jnp.sum(error**2, -1))


def both(params):
    """Two problems side by side: no optimizer of the table mixes leaves, so that one program solves both."""
    return quadratic(params["quadratic"]) + regression(params["map"])


def both_starts():
    """Where ``both`` begins."""
    kernels = {"level_0": {"kernel": jnp.zeros((4, 6))}, "level_1": {"unused": jnp.zeros(2)}}
    return {"quadratic": parameters(), "map": kernels}


@table
def test_it_finds_the_minimum_of_a_quadratic(row):
    found = descend(row.make, row.rate, row.steps, both, both_starts)["quadratic"]
    chex.assert_trees_all_close(found, jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), found), atol=row.tolerance)


@table
def test_it_finds_the_map_between_two_sets_of_vectors(row):
    found = descend(row.make, row.rate, row.steps, both, both_starts)["map"]
    assert regression(found) < max(1e-3, row.tolerance**2 * 100) < 1e-2 * regression(both_starts()["map"])


def rosenbrock(params):
    """Two walkers in a bent valley."""
    x, y = params["level_0"]["kernel"].T
    return jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2)


def hillside():
    """Where they begin."""
    return {"level_0": {"kernel": jnp.array([[-1.2, 1.0], [0.0, 1.2]])}, "level_1": {"unused": jnp.zeros(2)}}


@kinds
def test_it_goes_down_the_valley_of_rosenbrock(row):
    assert rosenbrock(descend(row.make, *row.valley, rosenbrock, hillside)) < 0.1 < rosenbrock(hillside())


@wrapped
def test_the_learning_rate_can_be_injected_and_then_changed(row):
    params = parameters()
    moved, state, update = run(optax.inject_hyperparams(row.make)(1e-2), params)
    chex.assert_trees_all_close(moved, plain_run(row.make)[0], rtol=1e-6, atol=1e-6)
    state.hyperparams["rate"] *= 0.0
    updates, _ = update(gradient(9, params), state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))
    assert update._cache_size() == 1


@wrapped
def test_under_multi_steps_it_sees_the_mean_of_the_gradients(row):
    params, tx = parameters(), compiled(row.make)
    every = optax.MultiSteps(row.make(1e-2), 2)
    state, update = every.init(params), jax.jit(every.update)
    once, twice = gradient(0, params), gradient(1, params)
    updates, state = update(once, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(twice, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, once, twice)
    expected, _ = tx.update(mean, tx.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


@wrapped
def test_it_can_be_a_link_of_a_chain_and_be_masked(row):
    params, tx = parameters(), compiled(row.make)
    plain, *_ = plain_run(row.make)
    chained, _ = walk(optax.chain(optax.identity(), tx), params)
    chex.assert_trees_all_equal(chained, plain)
    masked, _ = walk(optax.masked(tx, {"embedding": False, "ffn": True}), params)
    chex.assert_trees_all_close(masked["ffn"], plain["ffn"], rtol=1e-6)
    summed = sum(gradient(step, params)["embedding"] for step in range(8))
    chex.assert_trees_all_close(masked["embedding"], params["embedding"] + summed, rtol=1e-5)


@kinds
def test_eight_devices_hold_the_state_as_they_hold_the_parameters_and_reach_the_same(row):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    params, tx = parameters(), row.make(1e-2)
    sharded = jax.device_put(params, place)
    found, after, _ = run(tx, sharded)
    before = tx.init(sharded)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(plain_run(row.make)[0]), rtol=1e-6, atol=1e-6)
    shapes = {p.shape for p in jax.tree.leaves(params)}
    assert len(arrays(before)) >= len(shapes)
    for leaf in [*arrays(before), *arrays(after), *arrays(found)]:
        assert leaf.addressable_shards[0].data.size == leaf.size // 8, (leaf.shape, leaf.sharding)
        if leaf.shape in shapes:
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.shape, leaf.sharding)


def arrays(tree):
    """The leaves that are no scalars."""
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
