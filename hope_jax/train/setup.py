"""What is trained and how, before the first step: a loss, parameters, an optimizer, and the programs made of them.

Anything with a loss can be trained; ``language.py`` fills the slots for language models. Programs are compiled once per
``Setup``, whatever the number of runs. Read ``fit.py`` next: it trains a setup.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding, use_abstract_mesh

from hope_jax.errors import check_seed
from hope_jax.memory.mesh import SHARE_BATCH
from hope_jax.nn.axes import Axes
from hope_jax.train.devices import shape_at
from hope_jax.train.flops import model_flops
from hope_jax.train.guard import check_spike
from hope_jax.train.optimizer import Rate
from hope_jax.train.processes import count
from hope_jax.train.sharding import (
    Specs,
    between,
    placed,
    specs_of_matrices,
    specs_of_parameters,
)
from hope_jax.train.step import LossFn, StepFn, TrainState, mean_over, train_step
from hope_jax.types import PRNGKeyArray

Heldout = Iterable[Any] | Mapping[str, Iterable[Any]]
"""Held-out batches, or several sets of them by name."""


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
      mesh: devices that share the work, see ``sharding.py``; None: the first device.
      axes: names of the parameters' axes, which decide where parameters lie on the mesh; None: on every device.
      by_matrix: the optimizer needs whole matrices, so each is moved to one place for it.
      counted: the loss whose model FLOPs are counted, where ``loss`` computes parts twice; None: ``loss``.
      spike: steps are skipped, too, whose gradient norm is more than so many times the usual one; None: only steps
        that are not finite.
    """

    init: Callable[[PRNGKeyArray], Any]
    loss: LossFn
    tx: optax.GradientTransformation
    rate: Rate
    tokens: int = 1
    accumulate: int = 1
    mesh: Mesh | None = None
    axes: Axes | None = None
    by_matrix: bool = False
    counted: LossFn | None = None
    spike: float | None = None

    def __post_init__(self) -> None:
        check_spike(self.spike)

    @property
    def devices(self) -> int:
        """How many devices share the work."""
        return 1 if self.mesh is None else self.mesh.size

    @functools.cached_property
    def step(self) -> StepFn:
        """The compiled training step on placed batches."""
        tx = self.tx
        if self.mesh is not None and self.by_matrix:
            tx = between(tx, placed(self.mesh, self._specs[1], self._shapes.params), self.placement.params)
        return train_step(self.loss, tx, self.rate, self.accumulate, self._out, self.spike)

    def lower(self, batch: Any) -> Any:
        """The training step of placed batches, not compiled; ``batch`` may be its shapes alone.

        Nothing is computed, so the devices of the mesh need not be there.
        """
        step: Any = self.step
        if self.mesh is not None:
            where = self._share(batch)
            batch = jax.tree.map(functools.partial(shape_at, where), batch)
        with nullcontext() if self.mesh is None else use_abstract_mesh(self.mesh.abstract_mesh):
            return step.lower(self.shapes(), batch)  # the mesh tells a kernel which chip it is for

    def temporary_bytes(self, batch: Any) -> int:
        """Bytes of the compiled step on each device besides arguments and results; ``batch``: as in ``lower``.

        This compiles the step, even if it has been compiled before.
        """
        return self.lower(batch).compile().memory_analysis().temp_size_in_bytes

    def flops(self, batch: Any) -> int:
        """Model FLOPs of one step, see ``flops.py``; ``batch`` may be its shapes alone."""
        return model_flops(self.counted or self.loss, self._shapes.params, batch)

    @functools.cached_property
    def _measure(self) -> Callable[[Any, Any], Any]:
        return jax.jit(lambda params, batch: self.loss(params, batch)[1])

    def _fresh(self, key: PRNGKeyArray, params: Any = None) -> TrainState:
        params = self.init(key) if params is None else jax.tree.map(jnp.copy, params)
        return TrainState.first(params, self.tx.init(params))

    @functools.cached_property
    def _start(self) -> Callable[[PRNGKeyArray, Any], TrainState]:
        return jax.jit(self._fresh, out_shardings=self._out)

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._fresh, jax.random.key(0))

    @functools.cached_property
    def placement(self) -> TrainState:
        """Where a state lies: a sharding for each of its leaves."""
        if self.mesh is None:
            one = SingleDeviceSharding(jax.devices()[0])
            return jax.tree.map(lambda _: one, self._shapes)
        place = functools.partial(placed, self.mesh)
        params, rest = place(self._specs[0], self._shapes.params), place(self._specs[1], self._shapes.opt_state)
        step, *guard = (place({}, getattr(self._shapes, name)) for name in ("step", "usual_norm", "skipped"))
        return TrainState(step, params, rest, *guard)

    @functools.cached_property
    def _specs(self) -> tuple[Specs, Specs]:
        """Where parameters lie, and where the optimizer works on them."""
        if self.mesh is None or self.axes is None:
            return {}, {}
        given = self.mesh.shape, self.axes, self._shapes.params
        specs = specs_of_parameters(*given)
        return specs, specs | specs_of_matrices(*given) if self.by_matrix else specs

    @property
    def _out(self) -> TrainState | None:
        """Where programs put a state; None: where JAX puts it, on one device."""
        return None if self.mesh is None else self.placement

    def start(self, seed: int, params: Any = None) -> TrainState:
        """The state before the first batch, each part created where it lies.

        Its parameters are a copy of ``params``; None: those that ``init`` draws.
        """
        if params is not None and self.mesh is not None:
            params = jax.device_put(params, self.placement.params)
        return self._start(jax.random.key(check_seed(seed)), params)

    def rate_at(self, state: TrainState) -> float:
        """The learning rate of the next step; skipped steps do not move the schedule on."""
        return float(self.rate(int(state.step) - int(state.skipped)))

    def shapes(self) -> TrainState:
        """Shapes, dtypes and placement of ``start`` without computing it: what a checkpoint is restored into."""
        return jax.tree.map(shape_at, self.placement, self._shapes)

    def place(self, batch: Any) -> Any:
        """A batch (arrays [B, ...]) with an equal part on every device, or whole on each where B cannot be shared."""
        if self.mesh is None:
            return batch
        if count() == 1:
            return jax.device_put(batch, self._share(batch))
        return jax.tree.map(functools.partial(_own_part, self._share(batch)), batch)

    def _share(self, batch: Any) -> NamedSharding:
        """Where a batch lies on the mesh."""
        assert self.mesh is not None
        shared = math.prod(self.mesh.shape[axis] for axis in SHARE_BATCH)
        size = jax.tree.leaves(batch)[0].shape[0]
        return NamedSharding(self.mesh, PartitionSpec(None if size % shared else SHARE_BATCH))

    def spread(self, state: TrainState) -> TrainState:
        """A state on its devices; a fresh and a restored one are placed alike, so that one program is enough."""
        return jax.device_put(state, jax.devices()[0] if self.mesh is None else self.placement)

    def evaluator(self, batches: Heldout) -> Callable[[Any], dict[str, float]]:
        """``parameters -> means by name`` over these held-out ``batches``, which are read once.

        The means of several sets are called ``SET/METRIC``.
        """
        if not isinstance(batches, Mapping):
            return functools.partial(mean_over, self._measure, [self.place(batch) for batch in batches])
        sets = {name: self.evaluator(part) for name, part in batches.items()}

        def measure(params: Any) -> dict[str, float]:
            found = {name: of_set(params) for name, of_set in sets.items()}
            return {f"{name}/{metric}": value for name, means in found.items() for metric, value in means.items()}

        return measure

    def for_any_rate(self) -> "Setup":
        """The same with a factor for all updates in the optimizer's state: one program for all learning rates."""
        factor = optax.inject_hyperparams(optax.scale)(step_size=1.0)
        return dataclasses.replace(self, tx=optax.chain(self.tx, factor))


def _own_part(place: NamedSharding, array: Any) -> jax.Array:
    """Make one array on all devices: each process has the whole, and puts its part on its devices."""
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def at_rate(state: TrainState, factor: float) -> TrainState:
    """A state of ``Setup.for_any_rate`` whose updates are multiplied by ``factor``."""
    return state.replace(opt_state=optax.tree.set(state.opt_state, step_size=jnp.float32(factor)))
