"""``pretrain --dry-run``: the arithmetic and the memory of a run, before anything is trained."""

from typing import Any

import jax
import jax.numpy as jnp

from hope_jax import train as training


def bytes_each(tree: Any) -> int:
    """The bytes of a tree on one device, of arrays that lie in equal parts on all of them or whole on each."""
    return training.count_bytes(jax.tree.map(_part, tree))


def _part(leaf: Any) -> Any:
    place = getattr(leaf, "sharding", None)
    return leaf if place is None else jax.ShapeDtypeStruct(place.shard_shape(leaf.shape), leaf.dtype)


def costs(setup: training.Setup, batch: int, length: int, steps: int) -> dict[str, str]:
    """FLOPs and bytes of a run on text, by name; the step is compiled for it.

    ``batch``: sequences per batch, ``length``: tokens per sequence, ``steps``: batches in all.
    """
    windows, state = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32), setup.shapes()
    flops, params, rest = setup.flops(windows), *map(bytes_each, (state.params, state.opt_state))
    return {
        "tokens": f"{steps * setup.tokens:,} in all",
        "FLOPs": f"{flops / setup.tokens:.3g} per token, {flops:.3g} per step, {steps * flops:.3g} in all",
        "state": f"{params + rest:,} bytes on each device: parameters {params:,}, optimizer {rest:,}",
        "step": f"{setup.temporary_bytes(windows):,} bytes more on each device while a step runs",
    }
