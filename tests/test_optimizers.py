"""The optimizers x what every one of them owes: a new optimizer is one row of ``ROWS``.

Rows for now are settings of ``optim.by_level``; when its levels move and by which gradient is in ``test_by_level.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.optim import by_level

LEVELS = {"static": 1, "level_0": 2, "level_1": 4}
ALL_AT_ONCE = dict.fromkeys(LEVELS, 1)


@dataclass(frozen=True)
class Row:
    """An optimizer and what the table needs to know of it.

    Attributes:
      make: the optimizer at a learning rate, a number or a traced array.
      limit: the same where it should be a known optimizer, and that optimizer.
      rate: a learning rate that reaches the minimum of a small quadratic in ``steps`` updates, to ``tolerance``.
      extra: arguments of ``update`` beyond optax's own that it reads.
    """

    make: Callable[[Any], optax.GradientTransformation]
    limit: tuple[optax.GradientTransformation, optax.GradientTransformation]
    rate: float
    steps: int = 400
    tolerance: float = 1e-3
    extra: Mapping[str, Any] = field(default_factory=dict)


def levels(every: Mapping[str, int], optimizer: Callable[[Any], optax.GradientTransformation]) -> Callable:
    """``by_level`` with the same optimizer on every level, as a function of the learning rate."""
    return lambda rate: by_level(lambda n: optimizer(rate), every)


def adamw(rate: Any) -> optax.GradientTransformation:
    """AdamW that also decays, which sets it apart from Adam."""
    return optax.adamw(rate, weight_decay=1e-3)


def momentum(rate: Any) -> optax.GradientTransformation:
    """Gradient descent with momentum."""
    return optax.sgd(rate, momentum=0.9)


def limit(optimizer: Callable[[Any], optax.GradientTransformation]):
    """All levels at once are no levels."""
    return levels(ALL_AT_ONCE, optimizer)(1e-2), optimizer(1e-2)


ROWS = {
    "adamw, all at once": Row(levels(ALL_AT_ONCE, adamw), limit(adamw), rate=3e-2, tolerance=1e-2),
    "adamw, levels": Row(levels(LEVELS, adamw), limit(adamw), rate=3e-2, steps=1200, tolerance=1e-2),
    "momentum, levels": Row(levels(LEVELS, momentum), limit(momentum), rate=3e-2, steps=1200),
}
table = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def parameters(dtype: Any = jnp.float32):
    """A tree like a model's, one leaf per level; the first axis can be cut into eight."""
    shapes = {"embedding": (16, 3), "ffn": {"level_0": {"kernel": (8, 2)}, "level_1": {"kernel": (8,)}}}
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s), dtype), shapes, is_leaf=lambda s: type(s) is tuple)


def gradient(step: int, like: Any):
    """Gradient number ``step``, of the shapes, dtypes and placement of ``like``."""
    draw = np.random.default_rng(step + 1)
    return jax.tree.map(lambda p: jnp.zeros_like(p) + draw.normal(size=p.shape).astype(p.dtype), like)


def run(tx: optax.GradientTransformation, params: Any, steps: int = 8, **extra: Any):
    """Parameters and state after so many compiled updates, and the compiled update."""
    tx = optax.with_extra_args_support(tx)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradient(step, params), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state, update


@table
def test_the_state_can_be_planned_without_computing_it(row):
    params, tx = parameters(), row.make(1e-2)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, shapes), jax.tree.map(jnp.asarray, tx.init(params))
    )


@table
def test_an_update_leaves_the_kind_of_its_state_alone_and_never_compiles_twice(row):
    params, tx = parameters(), row.make(1e-2)
    _, state, update = run(tx, params, **row.extra)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.tree.map(jnp.asarray, tx.init(params)))
    assert update._cache_size() == 1


@table
def test_arguments_that_nobody_asked_for_change_nothing(row):
    plain, *_ = run(row.make(1e-2), parameters(), **row.extra)
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
def test_it_finds_the_minimum_of_a_quadratic(row):
    target = jax.tree.map(lambda p: 0.5 * jnp.ones_like(p), parameters())
    tx = row.make(row.rate)

    @jax.jit
    def descend(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.subtract, params, target), state, params, **row.extra)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=row.steps)[0][0]

    chex.assert_trees_all_close(descend(parameters()), target, atol=row.tolerance)


@table
def test_the_learning_rate_can_be_injected_and_then_changed(row):
    injected = optax.inject_hyperparams(row.make)(1e-2)
    params = parameters()
    plain, *_ = run(row.make(1e-2), params, **row.extra)
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
    plain, *_ = run(tx, params, **row.extra)
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
    expected, *_ = run(row.make(1e-2), params, **row.extra)
    found, state, _ = run(row.make(1e-2), sharded, **row.extra)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-6, atol=1e-6)
    shapes = {p.shape for p in jax.tree.leaves(params)}
    like_parameters = [leaf for leaf in jax.tree.leaves(state) if leaf.shape in shapes]
    assert len(like_parameters) >= len(shapes)
    for leaf in [*like_parameters, *jax.tree.leaves(found)]:
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.shape, leaf.sharding)
