"""The training loop: dispatch step n, then look at step n-1, so that the device never waits for the host.

Everything it uses is handed to it: the step and evaluation functions (``step.py``), the saver (``checkpoint.py``), the
monitor (``monitor.py``) and the wish to stop (``interrupt.py``). A state is saved only after the numbers of its own
step, and its held-out text where that is measured, were seen to be finite: nothing bad is written over something good.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hope_jax.train.checkpoint import Saver
from hope_jax.train.monitor import Monitor
from hope_jax.train.state import TrainState
from hope_jax.train.step import StepFn


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of ``[B, T+1]`` token ids that knows its position."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON."""
        ...


@runtime_checkable
class Stop(Protocol):
    """Somebody who may want training to end early."""

    @property
    def requested(self) -> bool:
        """Asked once per step: whether that step is the last."""
        ...


@dataclass(frozen=True)
class Plan:
    """How many updates to do, and after which to pause."""

    steps: int
    eval_every: int
    save_every: int

    def evaluates(self, done: int) -> bool:
        """Whether held-out text is measured after ``done`` updates: before training, at intervals and at the end."""
        return done % self.eval_every == 0 or done == self.steps

    def saves(self, done: int) -> bool:
        """Whether the state is saved after ``done`` updates: at intervals and at the end."""
        return done % self.save_every == 0 or done == self.steps


def train(
    plan: Plan,
    state: TrainState,
    batches: Batches,
    *,
    step_fn: StepFn,
    evaluate: Callable[[Any], Mapping[str, float]],
    saver: Saver,
    monitor: Monitor,
    stop: Stop,
) -> TrainState:
    """Train from where ``state`` stands to the plan's last step, or until asked to stop; the result is saved.

    ``evaluate`` takes the parameters and returns named means of the held-out text. ``state`` is donated.

    Raises:
        Diverged: a loss (held-out too), gradient or parameter is not finite; the last saved step stays as it is.
    """

    def measure(done: int, state: TrainState) -> None:
        # Also makes up for a measurement that was skipped because somebody asked to stop.
        if plan.evaluates(done) and not monitor.measured(done):
            monitor.heldout(done, evaluate(state.params))

    done, unseen = int(state.step), None
    measure(done, state)
    monitor.restart_clock(done)
    leaving = stop.requested
    while done < plan.steps and not leaving:
        state, metrics = step_fn(state, next(batches))
        if unseen is not None:
            monitor.train(done, unseen)
        done, unseen, leaving = done + 1, metrics, stop.requested
        if leaving or plan.saves(done) or plan.evaluates(done):
            monitor.train(done, unseen)
            unseen = None
            if not leaving or done == plan.steps:
                measure(done, state)
            if leaving or plan.saves(done):
                saver.save(state, batches.get_state())
            monitor.restart_clock(done)
    return state
