"""Outer-mode levels: every level's parameters have their own optimizer, stepped once per period (Eq. 71; SPEC 3.1)."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax
from jax.tree_util import DictKey, tree_leaves_with_path, tree_map_with_path

from hope_jax.errors import UserError, closest

STATIC = "static"


def level_labels(params: Any, labels: Mapping[str, int]) -> Any:
    """For each leaf, the one of ``labels`` on its path, or "static". Raises UserError for a label that no path has."""
    found = tree_map_with_path(lambda path, _: next((n for n in _names(path) if n in labels), STATIC), params)
    absent = sorted(labels.keys() - {STATIC} - set(jax.tree.leaves(found)))
    if absent:
        known = {name for path, _ in tree_leaves_with_path(params) for name in _names(path)}
        raise UserError(f"no parameter has {absent} on its path; {closest(absent[0], known)}")
    return found


def _names(path: tuple[Any, ...]) -> list[str]:
    return [entry.key for entry in path if isinstance(entry, DictKey)]


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
    if STATIC not in every or min(every.values()) < 1:
        raise UserError(f"every is {dict(every)}; expected 1 or more batches for each level and for {STATIC!r}")

    def level(n: int) -> optax.GradientTransformation:
        return make_optimizer(n) if n == 1 else optax.MultiSteps(make_optimizer(n), n).gradient_transformation()

    transforms: dict[Hashable, optax.GradientTransformation] = {name: level(n) for name, n in every.items()}
    return optax.partition(transforms, lambda params: level_labels(params, every))
