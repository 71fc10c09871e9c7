"""Parameters drawn by numpy, where their values do not matter: ``init`` would compile all its draws."""

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.nn.language_model import LOGIT_GAIN


def drawn(init, *arguments, seed=0, spread=0.35, **near):
    """Parameters as ``init(key, *arguments)`` makes them, but of random numbers: only the shapes are asked for.

    Scales are near 1, that of a model's last norm near 1 / ``LOGIT_GAIN``, and leaves called NAME near ``near[NAME]``;
    the others have ``spread``.
    """
    draw, shapes = np.random.default_rng(seed), jax.eval_shape(init, jax.random.key(0), *arguments)["params"]

    def leaf(path, shape):
        *outer, name = (key.key for key in path)
        scale = 1 / LOGIT_GAIN if outer == ["norm"] else 1.0
        start = near.get(name, scale if name.startswith("scale") else 0.0)
        return jnp.asarray(start + (0.05 * start or spread) * draw.normal(size=shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
