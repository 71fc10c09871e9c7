"""What is trained and how, before the first step: a loss, parameters, an optimizer, and the programs made of them.

Anything with a loss can be trained; ``model_setup`` and ``text_setup`` fill the slots for language models. Programs are
compiled once per ``Setup``, whatever the number of runs. Read ``fit.py`` next: it trains a setup.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hope_jax.errors import check_seed
from hope_jax.models import LanguageModel
from hope_jax.train.devices import DATA, abstract
from hope_jax.train.optimizer import OptimizerConfig, Schedule, optimizer, schedule
from hope_jax.train.run import TextRun
from hope_jax.train.step import LossFn, StepFn, TrainState, init_params, mean_over, next_token_loss, train_step
from hope_jax.types import PRNGKeyArray

Heldout = Iterable[Any] | Mapping[str, Iterable[Any]]
"""Held-out batches, or several sets of them by name."""


def keep_programs(folder: Path) -> None:
    """Compile once for all runs and processes, unless the environment says where compiled programs are kept."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs add up


@dataclass(frozen=True)
class Setup:
    """A training problem.

    Attributes:
      init: ``key -> parameters``.
      loss: ``(parameters, batch) -> (loss, metrics)``; every metric is a ``Mean``, one is called "loss".
      tx: the training optimizer.
      rate: learning rate of batch 0, 1, ...: what is recorded.
      tokens: targets of one batch: what speed and progress are counted in.
      accumulate: slices of a batch that are computed one after another; must divide the batch.
      mesh: devices that share each batch; None: the first device.
    """

    init: Callable[[PRNGKeyArray], Any]
    loss: LossFn
    tx: optax.GradientTransformation
    rate: Schedule
    tokens: int = 1
    accumulate: int = 1
    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """How many devices share each batch."""
        return 1 if self.mesh is None else self.mesh.size

    @functools.cached_property
    def step(self) -> StepFn:
        """The compiled training step on placed batches."""
        return train_step(self.loss, self.tx, self.rate, self.accumulate)

    def temporary_bytes(self, batch: Any) -> int:
        """What the compiled step needs besides its arguments and results; ``batch`` may be its shapes alone.

        The step is compiled for this, once more if it has been before.
        """
        step: Any = self.step
        return step.lower(self.shapes(), batch).compile().memory_analysis().temp_size_in_bytes

    @functools.cached_property
    def _measure(self) -> Callable[[Any, Any], Any]:
        return jax.jit(lambda params, batch: self.loss(params, batch)[1])

    @functools.cached_property
    def _start(self) -> Callable[[PRNGKeyArray, Any], TrainState]:
        def start(key: PRNGKeyArray, params: Any) -> TrainState:
            params = self.init(key) if params is None else jax.tree.map(jnp.copy, params)
            return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=self.tx.init(params))

        return jax.jit(start)

    def start(self, seed: int, params: Any = None) -> TrainState:
        """The state before the first batch; it begins with a copy of ``params``, None: with what ``init`` draws."""
        return self._start(jax.random.key(check_seed(seed)), params)

    def shapes(self) -> TrainState:
        """Shapes, dtypes and placement of ``start`` without computing it: what a checkpoint is restored into."""
        return abstract(lambda: self.start(0))

    def place(self, batch: Any) -> Any:
        """A batch (arrays [B, ...]) with an equal part on every device; the whole on each, where B cannot be shared."""
        if self.mesh is None:
            return batch
        size = len(jax.tree.leaves(batch)[0])
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(None if size % self.mesh.size else DATA)))

    def spread(self, state: TrainState) -> TrainState:
        """A state on every device; placed alike whether it is fresh or restored, so that one program does."""
        place = jax.devices()[0] if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.device_put(state, place)

    def evaluator(self, batches: Heldout) -> Callable[[Any], dict[str, float]]:
        """``parameters -> means by name`` over these held-out ``batches``, which are read once.

        Of several sets by name the means are called ``SET/METRIC``.
        """
        if not isinstance(batches, Mapping):
            return functools.partial(mean_over, self._measure, [self.place(batch) for batch in batches])
        sets = {name: self.evaluator(part) for name, part in batches.items()}

        def measure(params: Any) -> dict[str, float]:
            found = {name: of_set(params) for name, of_set in sets.items()}
            return {f"{name}/{metric}": value for name, means in found.items() for metric, value in means.items()}

        return measure

    def for_any_rate(self) -> "Setup":
        """The same with a factor on all updates in the optimizer's state: one program for all learning rates."""
        factor = optax.inject_hyperparams(optax.scale)(step_size=1.0)
        return dataclasses.replace(self, tx=optax.chain(self.tx, factor))


def at_rate(state: TrainState, factor: float) -> TrainState:
    """A state of ``Setup.for_any_rate`` whose updates are multiplied by ``factor``."""
    return state.replace(opt_state=optax.tree.set(state.opt_state, step_size=jnp.float32(factor)))


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
) -> Setup:
    """The setup of a language model with any loss.

    Args:
      config: the training optimizer; the model's levels have a copy each.
      steps: batches in all, which the learning-rate schedule is for.
      every: batches between two updates of each level; None: as the model's levels say.
      model, loss, tokens, accumulate, mesh: as in ``Setup``.
    """
    every = model.config.update_every(tokens) if every is None else every
    tx, rate = optimizer(config, steps, every, model.axes()), schedule(config, steps)
    return Setup(functools.partial(init_params, model), loss, tx, rate, tokens, accumulate, mesh)


def text_setup(
    run: TextRun, steps: int, byte_lengths: np.ndarray, *, remat_every: int | None = None, **more: Any
) -> Setup:
    """``model_setup`` of a language model on text; ``byte_lengths``, ``remat_every``: as in ``next_token_loss``."""
    model = LanguageModel(run.model)
    loss = next_token_loss(model, byte_lengths, remat_every)
    return model_setup(model, loss, run.optimizer, steps, run.batch * run.length, **more)
