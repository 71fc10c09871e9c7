"""Where on a mesh of devices parameters, optimizer states and batches lie. Read ``setup.py`` next.

Where a parameter lies follows from the names of its axes (``nn/axes.py``) by two lists, ``RULES`` and ``LEFT_OVER``;
what the optimizer keeps of a parameter in the parameter's shape lies where the parameter does. The training step does
not mention devices: JAX follows the placement of its arguments and moves between devices what has to be moved.
"""

import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from hope_jax.errors import UserError, closest
from hope_jax.kept import RematStates
from hope_jax.memory.mesh import SHARE_BATCH, SHARE_TOKENS
from hope_jax.models import LanguageModel, ModelConfig
from hope_jax.nn.axes import AXES, Axes, Names, matrices, of_parameters
from hope_jax.optim.matrices import MATRIX, MuonDimensionNumbers
from hope_jax.train.mesh import MESH, MeshConfig
from hope_jax.train.step import init_params

RULES: Mapping[str, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "all_heads": "tensor",
    "hidden": "tensor",
    # Every device has all of these: they are small, or loops run over them, or rows are looked up in them. The gates
    # of an LSTM are split at every token, and their parts would have to be moved there.
    **dict.fromkeys(("layers", "memories", "levels", "vocab", "taps", "persistent", "places", "cell_gates")),
    **dict.fromkeys(("head_dim", "memory_hidden", "gate", "rank")),
}
"""Axis name of a parameter -> axis of the mesh that it is split along, which must divide it; None: it is not split."""
LEFT_OVER: Mapping[str, str] = dict.fromkeys(("all_heads", "hidden", "head_dim", "memory_hidden"), "fsdp")
"""The same for axes of the mesh that ``RULES`` does not use for a parameter, and only where they divide it."""


def model_on(
    mesh: Mesh | None,
    config: ModelConfig,
    remat: bool = False,
    remat_states: RematStates = "exact",
    nested: bool = False,
) -> LanguageModel:
    """The model for a mesh: it has the same parameters and, up to rounding, computes the same numbers.

    ``remat``, ``remat_states``, ``nested``: as in ``LanguageModel``.

    Raises UserError where the devices do not divide its width or heads.
    """
    if mesh is None or mesh.size == 1:
        return LanguageModel(config, remat, None, remat_states, nested)
    MeshConfig(**mesh.shape).check_model(config)
    sequences = NamedSharding(mesh, PartitionSpec(SHARE_BATCH, SHARE_TOKENS))
    return LanguageModel(config, remat, sequences, remat_states, nested)


def check_shares(config: MeshConfig, model: ModelConfig) -> None:
    """Raise UserError unless the devices divide the model's width and heads, and the axes of parameters they share."""
    config.check_model(model)
    devices = dict.fromkeys(MESH, 1) | config.given
    if devices["fsdp"] * devices["tensor"] > 1:
        whole = LanguageModel(model)
        key = jax.eval_shape(jax.random.key, 0)
        specs_of_parameters(devices, whole.axes(), jax.eval_shape(functools.partial(init_params, whole), key))


def partition(devices: Mapping[str, int], names: Names, sizes: Sequence[int]) -> PartitionSpec:
    """Where a parameter with axes of these names and sizes lies on a mesh of so many ``devices`` along each axis.

    Each axis of the mesh with more than one device splits one axis of the parameter at most: the first that ``RULES``
    gives it, else the first that ``LEFT_OVER`` gives it and that it divides.

    Raises UserError for a name without a rule.
    """
    parts: list[str | None] = [None] * len(names)
    for name in names:
        if name not in RULES:
            raise UserError(f"there is no rule for the axis {name!r}; {closest(name, RULES)}")
    for rules in (RULES, LEFT_OVER):
        for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
            axis = rules.get(name)
            if axis is None or axis in parts or parts[place] is not None or devices[axis] == 1:
                continue
            if rules is RULES or size % devices[axis] == 0:
                parts[place] = axis
    return PartitionSpec(*parts)


Specs = dict[str, tuple[tuple[int, ...], PartitionSpec]]
"""Path of a parameter -> its shape, and where it lies."""


def specs_of_parameters(devices: Mapping[str, int], axes: Axes, params: Any) -> Specs:
    """Where parameters with these axes lie on a mesh of so many ``devices`` along each axis.

    Raises UserError where devices do not divide an axis that they are to share.
    """
    names_at = of_parameters(axes, tuple)(params)
    named = tree_leaves_with_path(names_at, is_leaf=lambda node: isinstance(node, tuple))
    found = {}
    for (path, names), leaf in zip(named, jax.tree.leaves(params), strict=True):
        found[keystr(path)] = leaf.shape, (spec := partition(devices, names, leaf.shape))
        for name, size, axis in zip(names, leaf.shape, spec, strict=True):
            if axis is not None and size % devices[axis]:
                what = f"{size} on axis {name!r} ({AXES[name]}) of parameter {keystr(path)}"
                raise UserError(f"mesh.{axis} is {devices[axis]}; give a divisor of {what}")
    return found


def specs_of_matrices(devices: Mapping[str, int], axes: Axes, params: Any) -> Specs:
    """Where an optimizer works on matrices: each is whole in one place, and equal ones are spread over the devices.

    Where the devices do not divide them, several devices hold the same matrices.
    """
    labels = matrices(axes)(params)
    labelled = tree_leaves_with_path(labels, is_leaf=lambda node: isinstance(node, MuonDimensionNumbers))
    found = {}
    for (path, label), leaf in zip(labelled, jax.tree.leaves(params), strict=True):
        if isinstance(label, MuonDimensionNumbers):  # its first axes count matrices
            found[keystr(path)] = leaf.shape, _spread(devices, leaf.shape[:-2])
        elif label == MATRIX:
            found[keystr(path)] = leaf.shape, PartitionSpec()
    return found


def _spread(devices: Mapping[str, int], sizes: Sequence[int]) -> PartitionSpec:
    """Axes of the mesh for the axes of an array with these sizes, so that as many devices as possible divide them."""
    axes = [axis for axis, count in devices.items() if count > 1]
    best, most = [()] * len(sizes), 1
    for places in itertools.product(range(len(sizes) + 1), repeat=len(axes)):  # the last place is none
        parts = [tuple(axis for axis, at in zip(axes, places, strict=True) if at == i) for i in range(len(sizes))]
        counts = [math.prod(devices[axis] for axis in part) for part in parts]
        if math.prod(counts) > most and not any(map(operator.mod, sizes, counts)):
            best, most = parts, math.prod(counts)
    return PartitionSpec(*(part or None for part in best))


def placed(mesh: Mesh, specs: Specs, tree: Any) -> Any:
    """A sharding for every leaf of a tree that holds parameters, or arrays that belong to them, such as momenta.

    A leaf belongs to the parameter whose path its own path ends with. Where there is none, or it has another shape,
    every device holds all of it.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        where = keystr(path)
        owner = max((name for name in specs if where.endswith(name)), key=len, default="")
        shape, spec = specs.get(owner, ((), PartitionSpec()))
        return NamedSharding(mesh, spec if shape == leaf.shape else PartitionSpec())

    return tree_map_with_path(place, tree)


def between(tx: optax.GradientTransformation, there: Any, back: Any) -> optax.GradientTransformation:
    """``tx`` on gradients and parameters that are moved to the shardings ``there``; its updates are moved ``back``."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved = jax.lax.with_sharding_constraint(updates, there)
        params = None if params is None else jax.lax.with_sharding_constraint(params, there)
        updates, state = tx.update(moved, state, params)
        return jax.lax.with_sharding_constraint(updates, back), state

    return optax.GradientTransformation(tx.init, update)


def own(params: Any) -> Any:
    """Parameters as arrays of this process alone; None where it has only a part of them."""
    leaves = jax.tree.leaves(params)
    if all(leaf.is_fully_addressable for leaf in leaves):
        return params
    if all(leaf.is_fully_replicated for leaf in leaves):
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    return None
