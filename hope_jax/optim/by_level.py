"""Outer-mode levels: every level's parameters have their own optimizer, stepped once per period (Eq. 71; SPEC 3.1)."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax

from hope_jax.errors import UserError, closest

STATIC = "static"


def level_labels(params: Any, labels: Mapping[str, int]) -> Any:
    """For each leaf, the one of ``labels`` on its path, or "static".

    Raises:
      UserError: one of ``labels`` but "static" is on no path.
    """

    def label(path, _):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return next((name for name in names if name in labels), STATIC)

    found = jax.tree_util.tree_map_with_path(label, params)
    absent = sorted(labels.keys() - {STATIC} - set(jax.tree.leaves(found)))
    if absent:
        raise UserError(f"no parameter has {absent} on its path; {closest(absent[0], _names(params))}")
    return found


def _names(params: Any) -> set[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {key.key for path in paths for key in path if isinstance(key, jax.tree_util.DictKey)}


def by_level(
    make_optimizer: Callable[[int], optax.GradientTransformation], every: Mapping[str, int]
) -> optax.GradientTransformationExtraArgs:
    """One optimizer per level; level parameters step every n-th call by the mean of the last n gradients.

    Args:
      make_optimizer: ``n -> optax transformation`` for parameters stepped every n-th call. It counts its own
        steps, so a schedule over training steps must be read at n times its count, plus n - 1.
      every: label -> n, as from ``ModelConfig.update_every``. Labels are names on a parameter's path
        (``level_0``, ...); everything else is "static".

    Returns:
      An optax transformation. Between its updates a level's update is exactly 0; the accumulated gradient is
      one extra copy of the parameters of every level with n > 1.

    Raises:
      UserError: an n below 1, or no entry for "static"; in ``init``, a label that is on no parameter's path.
    """
    bad = {name: n for name, n in every.items() if n < 1}
    if bad or STATIC not in every:
        raise UserError(f"every is {dict(every)}; expected 1 or more batches for each level and for {STATIC!r}")
    transforms: dict[Hashable, optax.GradientTransformation] = {
        name: _every(make_optimizer(n), n) for name, n in every.items()
    }
    return optax.partition(transforms, lambda params: level_labels(params, every))


def _every(optimizer: optax.GradientTransformation, n: int) -> optax.GradientTransformation:
    return optimizer if n == 1 else optax.MultiSteps(optimizer, n).gradient_transformation()
