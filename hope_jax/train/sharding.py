"""A mesh of devices, and where on it parameters, optimizer states and batches lie. Read ``setup.py`` next.

A mesh has three axes. Devices along ``data`` and ``fsdp`` share each batch, those along ``tensor`` share each sequence.
Where a parameter lies follows from the names of its axes (``nn/axes.py``) by two lists, ``RULES`` and ``LEFT_OVER``;
what the optimizer keeps of a parameter in the parameter's shape lies where the parameter does. The training step does
not mention devices: JAX follows the placement of its arguments and moves between devices what has to be moved.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from hope_jax.errors import UserError, closest, whole
from hope_jax.memory.mesh import SHARE_BATCH, SHARE_HEADS
from hope_jax.models import LanguageModel, ModelConfig
from hope_jax.nn.axes import AXES, Axes, Names, matrices, of_parameters
from hope_jax.optim.matrices import MATRIX, MuonDimensionNumbers
from hope_jax.train import processes
from hope_jax.train.devices import cores

MESH = (*SHARE_BATCH, *SHARE_HEADS)
RULES: Mapping[str, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "all_heads": "tensor",
    "hidden": "tensor",
    # Every device has all of these: they are small, or counted by loops, or rows that are looked up. The gates of an
    # LSTM are taken apart at every token, where their parts would have to be moved.
    **dict.fromkeys(("layers", "memories", "levels", "vocab", "taps", "persistent", "places", "cell_gates")),
    **dict.fromkeys(("head_dim", "memory_hidden", "gate", "rank")),
}
"""Axis name of a parameter -> axis of the mesh that it is split along, which must divide it; None: it is not split."""
LEFT_OVER: Mapping[str, str] = dict.fromkeys(("all_heads", "hidden", "head_dim", "memory_hidden"), "fsdp")
"""The same for axes of the mesh that ``RULES`` leaves over in a parameter, and only where they divide it."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices there are along each axis of the mesh."""

    data: int | None = None
    """Devices that share each batch and hold all parameters each; on a CPU, cores. None: as many as are left and divide
    the batch."""
    fsdp: int = 1
    """Devices that share each batch, and the parameters with the optimizer's state: each keeps a part of the model's
    features. Must divide the width and, times data, the batch."""
    tensor: int = 1
    """Devices that share each sequence: each has a part of the heads and of the hidden features. Must divide them."""

    def __post_init__(self) -> None:
        for name, count in self.given.items():
            whole(f"mesh.{name}", count, 1, "devices")

    @property
    def given(self) -> dict[str, int]:
        """The axes whose devices are counted."""
        return {name: count for name in MESH if (count := getattr(self, name)) is not None}

    @property
    def of_host(self) -> int | None:
        """How many devices a CPU is split into for it; None: one for each core (``split_host``)."""
        count = math.prod(self.given.values())
        return None if count == 1 and self.data is None else count * (1 if self.data else max(1, cores() // count))

    def check_batch(self, batch: int) -> None:
        """Raise UserError unless the devices can share batches of so many sequences."""
        count = (self.data or 1) * self.fsdp
        if batch % count:
            which = "mesh.fsdp" if self.data is None else "mesh.data x mesh.fsdp"
            raise UserError(f"{which} is {count}, which cannot share {batch} sequences; give a divisor of that")

    def check_model(self, model: ModelConfig) -> None:
        """Raise UserError unless the devices divide the model's width and heads."""
        if model.width % self.fsdp:
            raise UserError(f"mesh.fsdp is {self.fsdp}; give a divisor of the model's width, {model.width}")
        for part in _configs((model.mixer,)):
            for name in ("heads", "key_heads"):
                heads = getattr(part, name, None)
                heads = heads(model.width) if callable(heads) else heads
                if heads and heads % self.tensor:
                    raise UserError(f"mesh.tensor is {self.tensor}; give a divisor of the model's {name}, {heads}")

    def make(self, batch: int, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh, for batches of so many sequences; of ``devices``, None: those of this machine, of a CPU its cores.

        Raises:
          UserError: the product of the axes does not divide the devices that there are, or they cannot share a batch;
            or a mesh of this shape does not fit into their network.
        """
        self.check_batch(batch)
        found, count = jax.devices() if devices is None else devices, math.prod(self.given.values())
        if len(found) % count:
            asked = ", ".join(f"mesh.{name} {size}" for name, size in self.given.items())
            raise UserError(
                f"{asked}: {count} devices are asked for, which do not divide the {len(found)} that there are"
            )
        of_hosts = cores() * processes.count() if devices is None and found[0].platform == "cpu" else len(found)
        data = self.data or self._left(batch // self.fsdp, min(of_hosts, len(found)))
        shape = (data, self.fsdp, self.tensor)
        used = found[: math.prod(shape)]
        if devices is None and len({device.process_index for device in used}) < processes.count():
            raise UserError(
                f"{len(used)} devices share the work, which leaves out some of {processes.count()} processes: give "
                "a batch or numbers of mesh.* that use all devices, or start fewer processes"
            )
        return _laid_out(shape, used)

    def _left(self, batch: int, most: int) -> int:
        """The most devices along data that can share a batch, of so many in all."""
        return max(n for n in range(1, max(1, most // (self.fsdp * self.tensor)) + 1) if batch % n == 0)


def _laid_out(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    """The mesh whose neighbours are neighbours in the network of the devices, as far as that is possible."""
    try:
        places = create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError) as error:
        asked = " x ".join(f"{name} {size}" for name, size in zip(MESH, shape, strict=True))
        raise UserError(f"a mesh of {asked} does not fit into the network of the devices: {error}") from error
    return Mesh(places, MESH, axis_types=(AxisType.Auto,) * len(MESH))


def _configs(tree: Any) -> Iterator[Any]:
    """All configurations inside tuples and inside one another."""
    if dataclasses.is_dataclass(tree):
        yield tree
        tree = tuple(vars(tree).values())
    for part in tree if isinstance(tree, tuple) else ():
        yield from _configs(part)


def model_on(mesh: Mesh | None, config: ModelConfig, remat: bool = False) -> LanguageModel:
    """A model as it is computed on a mesh: the same parameters and, up to rounding, the same numbers.

    Raises UserError where the devices do not divide its width or heads.
    """
    if mesh is None or mesh.size == 1:
        return LanguageModel(config, remat)
    MeshConfig(**mesh.shape).check_model(config)
    return LanguageModel(config, remat, NamedSharding(mesh, PartitionSpec(SHARE_BATCH)))


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


def specs_of_parameters(mesh: Mesh, axes: Axes, params: Any) -> Specs:
    """Where parameters with these axes lie. Raises UserError where devices do not divide what they are to share."""
    names_at = of_parameters(axes, tuple)(params)
    named = tree_leaves_with_path(names_at, is_leaf=lambda node: isinstance(node, tuple))
    found = {}
    for (path, names), leaf in zip(named, jax.tree.leaves(params), strict=True):
        found[keystr(path)] = leaf.shape, (spec := partition(mesh.shape, names, leaf.shape))
        for name, size, axis in zip(names, leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                what = f"{size} on axis {name!r} ({AXES[name]}) of parameter {keystr(path)}"
                raise UserError(f"mesh.{axis} is {mesh.shape[axis]}; give a divisor of {what}")
    return found


def specs_of_matrices(mesh: Mesh, axes: Axes, params: Any) -> Specs:
    """Where an optimizer works on matrices: each is whole in one place, and equal ones are spread over the devices.

    Where the devices do not divide them, several devices hold the same matrices.
    """
    labels = matrices(axes)(params)
    labelled = tree_leaves_with_path(labels, is_leaf=lambda node: isinstance(node, MuonDimensionNumbers))
    found = {}
    for (path, label), leaf in zip(labelled, jax.tree.leaves(params), strict=True):
        if isinstance(label, MuonDimensionNumbers):  # its first axes count matrices
            found[keystr(path)] = leaf.shape, _spread(mesh.shape, leaf.shape[:-2])
        elif label == MATRIX:
            found[keystr(path)] = leaf.shape, PartitionSpec()
    return found


def _spread(devices: Mapping[str, int], sizes: Sequence[int]) -> PartitionSpec:
    """Axes of the mesh along the axes of an array with these sizes, which they divide: as many devices as possible."""
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
