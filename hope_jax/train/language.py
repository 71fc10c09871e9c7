"""The training problem of a language model as a ``Setup``: loss, optimizer and schedule; also bytes of its state."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hope_jax.context.schedule import learns_in_context
from hope_jax.context.stream import start
from hope_jax.kept import RematStates
from hope_jax.memory.kernels import Impl
from hope_jax.models import LanguageModel, with_impl
from hope_jax.train.kernels import check_kernels
from hope_jax.train.optimizer import OptimizerConfig, optimizer, schedule
from hope_jax.train.remat import Remat, check_states, chosen_remat
from hope_jax.train.run import TextRun
from hope_jax.train.schedules import COSINE, Schedule
from hope_jax.train.setup import Setup
from hope_jax.train.sharding import model_on
from hope_jax.train.step import LossFn, count_bytes, init_params, next_token_loss


def model_setup(
    model: LanguageModel,
    loss: LossFn,
    config: OptimizerConfig,
    steps: int,
    tokens: int,
    *,
    every: Mapping[str, int] | None = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    shape: Schedule = COSINE,
    spike: float | None = None,
) -> Setup:
    """The setup of a language model with any loss.

    Args:
      config: the training optimizer, with or without a learning rate; the model's levels have a copy each.
      steps: batches in all, which the learning-rate schedule is for.
      every: batches between two updates of each level; None: as the model's levels say.
      shape: of the schedule after the warmup.
      model, loss, tokens, accumulate, mesh, spike: as in ``Setup``.
    """
    config = config.at_width(model.config.width)
    every = model.config.update_every(tokens) if every is None else every
    tx, rate = optimizer(config, steps, every, model.axes(), shape), schedule(config, steps, shape)
    init, whole = functools.partial(init_params, model), config.method.by_matrix
    return Setup(init, loss, tx, rate, tokens, accumulate, mesh, model.axes(), whole, spike=spike)


def text_setup(
    run: TextRun,
    steps: int,
    byte_lengths: np.ndarray,
    *,
    remat: Remat = "auto",
    remat_every: int | None = None,
    remat_states: RematStates = "exact",
    impl: Impl | None = None,
    mesh: Mesh | None = None,
    **more: Any,
) -> Setup:
    """``model_setup`` of a language model on text.

    ``byte_lengths``, ``remat_every``: as in ``next_token_loss``; ``remat``, ``remat_states``: see ``remat.py``;
    ``impl``: as in ``with_impl``. Raises UserError where kernels are asked for and none would run, and where states
    are to be rounded and none are kept.
    """
    platform = None if mesh is None else mesh.devices.flat[0].platform
    config = with_impl(run.model, impl)
    check_states(remat_states, config, remat_every)
    word = chosen_remat(remat, remat_every, platform)
    model = model_on(mesh, config, word != "none", remat_states, word == "nested")
    loss = next_token_loss(model, byte_lengths, remat_every, run.z_loss)
    more = {"mesh": mesh, "shape": run.schedule, "spike": run.spike} | more
    setup = model_setup(model, loss, run.optimizer, steps, run.batch * run.length, **more)
    # Model FLOPs leave out what rematerialisation computes again, so the model alone is counted.
    setup = dataclasses.replace(setup, counted=next_token_loss(LanguageModel(run.model), byte_lengths))
    batch = jax.ShapeDtypeStruct((run.batch, run.length + 1), jnp.int32)
    check_kernels(model, loss, setup.shapes().params, batch, remat_every)
    return setup


def state_bytes(model: Any, params: Any, capacity: int) -> int:
    """Bytes of the state that reads one sequence of ``capacity`` tokens: of the mixers, and of what levels store.

    Levels store something only where training writes them in context. ``params``: arrays or their shapes.
    """

    def state(params: Any) -> Any:
        if learns_in_context(model):
            return start(model, params, 1, capacity).blocks
        return model.init_state(params, 1, capacity)

    return count_bytes(jax.eval_shape(state, params))
