"""What every head of every sequence computes; on a mesh, a kernel computes each head on the device that has it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from hope_jax.memory.kernels import Impl, cpu

SHARE_BATCH = ("data", "fsdp")  # axes of a mesh that batches lie along
SHARE_HEADS = ("tensor",)


def over_heads(head: Callable[..., Any], shared: tuple[Any, ...], own: tuple[Any, ...], impl: Impl) -> Any:
    """``head(*shared, *own)`` of every head of every sequence, leaves [B,H,...].

    ``shared`` is what the sequences of a batch share, leaves [H,...], ``own`` what each has, leaves [B,H,...].
    """
    if impl == "auto":
        return cpu.batch_and_heads_as_one(head, shared, own)
    of_sequence = jax.vmap(head)
    run = jax.vmap(of_sequence, in_axes=(None,) * len(shared) + (0,) * len(own))
    return _on_mesh(run, shared, own) if impl == "pallas" else run(*shared, *own)


def _on_mesh(run: Callable[..., Any], shared: tuple[Any, ...], own: tuple[Any, ...]) -> Any:
    """``run`` on each device for its part of the batch and of the heads: JAX cannot part what a kernel computes.

    The mesh is that of the context (``jax.set_mesh``; models enter that of their sequences). An axis that does not
    divide the batch or the heads does not part them: its devices do the same work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Auto not in mesh.axis_types:
        return run(*shared, *own)
    batch, heads = jax.tree.leaves(own)[0].shape[:2]
    along_batch, along_heads = _dividing(mesh, SHARE_BATCH, batch), _dividing(mesh, SHARE_HEADS, heads)
    of_shared, of_own = PartitionSpec(along_heads), PartitionSpec(along_batch, along_heads)
    specs = (of_shared,) * len(shared) + (of_own,) * len(own)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=of_own, check_vma=False)(*shared, *own)


def _dividing(mesh: Any, names: tuple[str, ...], size: int) -> tuple[str, ...] | None:
    """The axes of these names that the mesh has, where all of them together divide ``size``."""
    there = tuple(name for name in names if name in mesh.shape)
    return there if there and size % math.prod(mesh.shape[name] for name in there) == 0 else None
