"""Parameters drawn by numpy, where their values do not matter: ``init`` would compile all its draws."""

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.nn.language_model import LOGIT_GAIN
from hope_jax.nn.mixers.memory import START_GAIN


def drawn(init, *arguments, seed=0, spread=0.35, **near):
    """Parameters as ``init(key, *arguments)`` makes them, but of random numbers: only the shapes are asked for.

    Scales are near 1, that of a model's last norm near 1 / ``LOGIT_GAIN``, and leaves called NAME near ``near[NAME]``;
    the others have ``spread``, initial weights of memories included.
    """
    draw, shapes = np.random.default_rng(seed), jax.eval_shape(init, jax.random.key(0), *arguments)["params"]

    def leaf(path, shape):
        *outer, name = (key.key for key in path)
        scale = 1 / LOGIT_GAIN if outer == ["norm"] else 1.0
        start = near.get(name, scale if name.startswith("scale") else 0.0)
        return jnp.asarray(start + (0.05 * start or spread) * draw.normal(size=shape.shape), shape.dtype)

    return enlarged(jax.tree_util.tree_map_with_path(leaf, shapes))


def enlarged(params):
    """``params`` with those of initial weights of memories so large that the weights themselves are as they were."""

    def leaf(path, value):
        starts = str(path[-1].key).startswith(("start_memory", "start_projections", "start_gates"))
        return value / START_GAIN if starts else value

    return jax.tree_util.tree_map_with_path(leaf, params)
