"""What one training step carries to the next, and how it begins. Read ``step.py`` next: it turns one into the next.

The number of tokens seen is not stored: it is ``step * batch * length``, exact in Python where an int32 would overflow.
The data position belongs to the iterator and is saved beside this state (``checkpoint.py``).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from hope_jax.types import PRNGKeyArray


class TrainState(struct.PyTreeNode):
    """Everything that is trained or that training needs to go on. A pytree, so it can be sharded leaf by leaf.

    ``step``: optimizer updates done, int32 scalar. ``params``: nested dict of arrays. ``opt_state``: the optimizer's.
    Leaves are arrays, or shapes or placements of arrays, hence the open types.
    """

    step: Any
    params: Any
    opt_state: Any


def fresh_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first batch."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def init_params(model: Any, key: PRNGKeyArray) -> Any:
    """Parameters of a language model; they depend on ``key`` alone."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def init_state(model: Any, tx: optax.GradientTransformation, key: PRNGKeyArray) -> TrainState:
    """The state of a language model before the first batch."""
    return fresh_state(init_params(model, key), tx)


def abstract(make: Callable[[], Any]) -> Any:
    """Shapes, dtypes and placement (the first device) of what ``make`` returns, without computing it."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


def abstract_state(model: Any, tx: optax.GradientTransformation) -> TrainState:
    """``abstract`` of ``init_state``."""
    return abstract(lambda: init_state(model, tx, jax.random.key(0)))


def abstract_params(model: Any) -> Any:
    """``abstract`` of ``init_params``."""
    return abstract(lambda: init_params(model, jax.random.key(0)))


def count_parameters(params: Any) -> int:
    """Numbers in ``params``, arrays or their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def count_bytes(tree: Any) -> int:
    """Bytes of the arrays (or shapes) of ``tree``: what a checkpoint of it takes at most."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
