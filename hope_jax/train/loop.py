"""The training loop: dispatch step n, then look at step n-1, so that the device never waits for the host.

The caller hands it everything that it uses: the step and evaluation functions (``step.py``), the batches
(``batches.py``), the monitor (``monitor.py``), what saves (``checkpoint.py``) and the wish to stop (``signals.py``). A
state is saved only after the numbers of its own step, and its held-out means where they are measured, were found
finite: nothing bad is written over something good. Read ``fit.py`` next: it is the caller.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hope_jax.errors import whole
from hope_jax.train.batches import Batches
from hope_jax.train.monitor import Monitor
from hope_jax.train.record import Means
from hope_jax.train.step import StepFn, TrainState


@dataclass(frozen=True)
class Steps:
    """How many batches to train on, and after which to measure and to save.

    Attributes:
      total: batches to train on in all.
      eval_every: batches between two measurements on held-out batches; 0: none are made.
      save_every: batches between two checkpoints. The last state is always saved.
      most_skipped: steps in a row that may be skipped; after one more the run stops.
    """

    total: int
    eval_every: int = 100
    save_every: int = 100
    most_skipped: int = 10

    def __post_init__(self) -> None:
        for name, least in (("total", 0), ("eval_every", 0), ("save_every", 1), ("most_skipped", 0)):
            whole(name, getattr(self, name), least)

    def evaluates(self, done: int) -> bool:
        """Whether held-out batches are measured after ``done`` updates: before training, at intervals, at the end."""
        return self.eval_every > 0 and (done % self.eval_every == 0 or done == self.total)

    def saves(self, done: int) -> bool:
        """Whether the state is saved after ``done`` updates: at intervals and at the end."""
        return done % self.save_every == 0 or done == self.total


class Alarm:
    """Rings when ``minutes`` have passed since it was set; None: never. Its clock is monotonic."""

    def __init__(self, minutes: float | None):
        self._seconds = math.inf if minutes is None else 60 * minutes
        self.set()

    def set(self) -> None:
        """Begin to count anew."""
        self._since = time.monotonic()

    def __call__(self) -> bool:
        """Whether it rings."""
        return time.monotonic() - self._since >= self._seconds


def never(means: Means) -> bool:
    """An ``until`` that never ends the training."""
    return False


def run_steps(
    steps: Steps,
    state: TrainState,
    batches: Batches,
    *,
    step_fn: StepFn,
    evaluate: Callable[[Any], Means],
    save: Callable[[TrainState], None],
    monitor: Monitor,
    stop: Callable[[], bool],
    due: Callable[[], bool],
    until: Callable[[Means], bool] = never,
) -> TrainState:
    """Train from the step of ``state`` to the last one, until ``stop()``, or until ``until`` accepts a measurement.

    ``evaluate`` takes the parameters and returns the means over the held-out batches. ``stop`` is asked once
    per step, and so is ``due``: whether to save between the planned steps. The state that is returned was handed to
    ``save``. ``state`` is donated.

    Raises:
        Diverged: too many steps in a row were skipped, and the state is saved; or a parameter or a held-out loss is not
            finite, and the last saved step stays as it is.
    """

    def measure(done: int, state: TrainState) -> bool:
        # Also makes up for a measurement that was skipped because somebody asked to stop.
        if not steps.evaluates(done):
            return False
        if done not in monitor.record.heldout:
            monitor.heldout(done, evaluate(state.params))
        return until(monitor.record.heldout[done])

    done, unseen = int(state.step), None
    ending = measure(done, state)
    monitor.clock.restart(done)
    leaving = stop()
    while done < steps.total and not (leaving or ending):
        state, metrics = step_fn(state, monitor.clock.read(batches))
        if unseen is not None:
            monitor.train(done, unseen)
        done, unseen, leaving = done + 1, metrics, stop()
        planned = due() or steps.saves(done)
        if planned or leaving or steps.evaluates(done) or monitor.skipped > steps.most_skipped:
            monitor.train(done, unseen)
            unseen, lost = None, monitor.skipped > steps.most_skipped
            if not lost and (not leaving or done == steps.total):
                ending = measure(done, state)
            if leaving or ending or lost or done == steps.total or (planned and not monitor.skipped):
                save(state)
            if lost:
                raise monitor.lost(done)
            monitor.clock.restart(done)
    return state
