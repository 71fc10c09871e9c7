"""``pretrain --dry-run``: the arithmetic and the memory of a run, before anything is trained."""

import jax
import jax.numpy as jnp

from hope_jax import train as training


def costs(setup: training.Setup, batch: int, length: int, steps: int) -> dict[str, str]:
    """FLOPs and bytes of a run on text, by name; the step is compiled for it.

    ``batch``: sequences per batch, ``length``: tokens per sequence, ``steps``: batches in all.
    """
    windows, state = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32), setup.shapes()
    flops, params, rest = setup.flops(windows), *map(training.count_bytes, (state.params, state.opt_state))
    return {
        "tokens": f"{steps * setup.tokens:,} in all",
        "FLOPs": f"{flops / setup.tokens:.3g} per token, {flops:.3g} per step, {steps * flops:.3g} in all",
        "state": f"{params + rest:,} bytes: parameters {params:,}, optimizer {rest:,}",
        "step": f"{setup.temporary_bytes(windows):,} bytes more on each device while a step runs",
    }
