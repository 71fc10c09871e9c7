"""Ad-hoc level stacking: a trained Transformer becomes Hope-Attention, its MLPs levels (section 7.3; SPEC 3.3).

Nothing is added: the layers' own MLPs are parted into groups, earlier layers faster, the last group never written. With
every rate 0 it is the Transformer, to the bit; continual training from there learns the rates.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from hope_jax.errors import UserError
from hope_jax.levels import Level, check_multiples
from hope_jax.nn.config import ModelConfig
from hope_jax.nn.feed_forward.fast import Writes
from hope_jax.nn.feed_forward.swiglu import SwiGLUConfig


def stack_levels(
    config: ModelConfig, params: Any, periods: Sequence[int], writes: Writes | None = None
) -> tuple[ModelConfig, Any]:
    """The configuration and parameters of the model whose MLPs are levels.

    Args:
      config, params: a model with SwiGLU layers, such as ``transformer_pp`` or a Llama of ``interop.load``.
      periods: of the levels in tokens, fastest first, each a multiple of the one before; Hope-1, -2, -3 of the paper
        have one, two, three. The layers are parted into one group more, the last of which stays as it is.
      writes: how they are written; None: the defaults.

    Raises:
      UserError: another kind of model, fewer layers than groups, or periods that are none or do not nest.
    """
    part, writes = config.feed_forward, Writes() if writes is None else writes
    if not isinstance(part, SwiGLUConfig) or part.levels:
        raise UserError("stacking needs a model with SwiGLU layers that are no levels yet, such as transformer_pp")
    if not 1 <= len(periods) < config.layers:
        most = config.layers - 1
        raise UserError(f"there are {len(periods)} periods for {config.layers} layers; expected 1 to {most}")
    check_multiples(periods)
    groups = np.array_split(np.arange(config.layers), len(periods) + 1)
    levels = [Level(period) for period, group in zip(periods, groups, strict=False) for _ in group]
    levels = (*levels, *[None] * len(groups[-1]))
    rate = jnp.full((config.layers, 1), writes.rate, params["norm"]["scale"].dtype)
    ours = params["blocks"]["feed_forward"] | {"rate": rate}
    stacked = replace(config, feed_forward=replace(part, levels=levels, writes=writes))
    return stacked, params | {"blocks": params["blocks"] | {"feed_forward": ours}}
