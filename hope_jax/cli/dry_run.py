"""``pretrain --dry-run``: the arithmetic and the memory of a run, before anything is trained."""

from typing import Any

import jax
import jax.numpy as jnp

from hope_jax import train as training


def costs(setup: training.Setup, batch: int, length: int, steps: int) -> dict[str, str]:
    """FLOPs and bytes of a run on text, by name; the step is compiled for it.

    ``batch``: sequences per batch, ``length``: tokens per sequence, ``steps``: batches in all.
    """
    windows, state = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32), setup.shapes()
    flops, params, rest = setup.flops(windows), size(state.params), size(state.opt_state)
    return {
        "tokens": f"{steps * setup.tokens:,} in all",
        "FLOPs": f"{flops / setup.tokens:.3g} per token, {flops:.3g} per step, {steps * flops:.3g} in all",
        "state": f"{params + rest:,} bytes: parameters {params:,}, optimizer {rest:,}",
        "step": f"{setup.temporary_bytes(windows):,} bytes more on each device while a step runs",
    }


def size(tree: Any) -> int:
    """Bytes of arrays or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
