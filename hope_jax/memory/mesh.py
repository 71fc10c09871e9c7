"""The mesh of the devices that a program is for: the names of its axes, and which part of an array each device has.

The mesh is that of the context (``jax.set_mesh``; models enter theirs). Where there is no mesh, and inside code that
runs on each device separately, functions here change nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

SHARE_BATCH = ("data", "fsdp")  # axes of a mesh that batches lie along
SHARE_TOKENS = ("sequence",)  # axes that tokens lie along, outside of mixers
SHARE_HEADS = ("tensor", *SHARE_TOKENS)  # axes that heads lie along, inside of mixers


def of_context() -> Any | None:
    """The mesh whose devices share the work here; None: there is one device, or each works for itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or AxisType.Auto not in mesh.axis_types else mesh


def devices_along(mesh: Any | None, names: tuple[str, ...]) -> int:
    """How many devices there are along these axes; 1 for axes that the mesh does not have."""
    return 1 if mesh is None else math.prod(mesh.shape.get(name, 1) for name in names)


def dividing(mesh: Any, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The axes of these names that the mesh has; None where there are none, or their devices do not divide ``size``."""
    there = tuple(name for name in names if name in mesh.shape)
    return there if there and size % devices_along(mesh, there) == 0 else None


def on_each(
    run: Callable[..., Any],
    shared: tuple[Any, ...],
    own: tuple[Any, ...],
    share: tuple[str, ...] = SHARE_HEADS,
    common: tuple[Any, ...] = (),
) -> Any:
    """``run(*common, *shared, *own)`` on each device for its sequences and its heads.

    ``shared`` is what the sequences of a batch share, leaves [H,...], ``own`` what each has, leaves [B,H,...]; so are
    the results. Each device receives its part of them once, before; inside nothing is moved. Where an axis of the mesh
    does not divide the batch or the heads, its devices do the same work. ``share``: the axes that heads lie along; ():
    there are no heads, leaves are [...] and [B,...]. ``common``: numbers that all devices have. Other arrays from
    outside that are differentiated may not be used by ``run``. Numpy arrays in ``common`` stay known to the compiler.
    """
    mesh = of_context()
    if mesh is None:
        return run(*common, *shared, *own)
    arrays = {at: x for at, x in enumerate(common) if isinstance(x, jax.Array)}

    def run_part(arrays: dict[int, Any], shared: tuple[Any, ...], own: tuple[Any, ...]) -> Any:
        return run(*(arrays.get(at, x) for at, x in enumerate(common)), *shared, *own)

    batch, heads = jax.tree.leaves(own)[0].shape[:2]
    along_batch, along_heads = dividing(mesh, SHARE_BATCH, batch), dividing(mesh, share, heads)
    of_own = PartitionSpec(along_batch, along_heads)
    specs = PartitionSpec(), PartitionSpec(along_heads), of_own  # one for all leaves of an argument
    return jax.shard_map(run_part, mesh=mesh, in_specs=specs, out_specs=of_own, check_vma=False)(arrays, shared, own)
