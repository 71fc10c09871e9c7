"""``fit``: the one training loop, for any model and loss; in memory, or in a run folder where it can be stopped.

    setup = train.Setup(init, loss, optax.adamw(1e-3), lambda step: 1e-3)
    result = train.fit(setup, train.ComputedBatches(make), heldout, train.Steps(2000, eval_every=50))

A run in a folder goes on where it was stopped, bit for bit, when the same call is made again; on another number of
devices sums are rounded differently. Ctrl-C, SIGTERM, SIGHUP and a closed terminal save and raise ``Stopped``.
Read ``setup.py`` and ``loop.py`` next.
"""

import contextlib
import functools
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from tqdm import tqdm

from hope_jax.config import to_json
from hope_jax.errors import Stopped, UserError
from hope_jax.signals import Interrupt
from hope_jax.storage.digests import write_sealed
from hope_jax.train.batches import Batches
from hope_jax.train.checkpoint import Manifest, find_step, set_aside
from hope_jax.train.clock import full_speed
from hope_jax.train.loop import Alarm, Steps, never, run_steps
from hope_jax.train.monitor import Monitor
from hope_jax.train.processes import Agreement, check_equal, found_by_first, is_first, told
from hope_jax.train.profile import PROFILE, Profiled
from hope_jax.train.record import Means, Record
from hope_jax.train.run import CONFIG_FILE, Run, resume
from hope_jax.train.saving import Saver, check_room, remove_parts
from hope_jax.train.setup import Heldout, Setup
from hope_jax.train.step import Metrics, StepFn, TrainState


class Result(NamedTuple):
    """A finished run.

    Attributes:
      state: after the last step.
      heldout: means over the held-out batches by step, in the order of the steps.
    """

    state: TrainState
    heldout: dict[int, Means]

    @property
    def params(self) -> Any:
        """The trained parameters."""
        return self.state.params

    @property
    def step(self) -> int:
        """Batches that were trained on."""
        return int(self.state.step)


def fit(
    setup: Setup,
    batches: Batches,
    heldout: Heldout,
    steps: Steps,
    *,
    seed: int = 0,
    start: TrainState | None = None,
    until: Callable[[Means], bool] = never,
    run: Run | None = None,
    label: str | None = None,
) -> Result:
    """Train ``setup``, from the last saved step of ``run`` if there is one.

    Args:
      setup: parameters, loss and optimizer; calls that share one share its compiled programs.
      batches: to train on; a resumed run moves them to its position.
      heldout: batches that are measured before, during and after training, or several sets of them by name, see
        ``Setup.evaluator``; each batch is kept in memory.
      steps: how many batches, and how often to measure and save.
      seed: of the initial parameters.
      start: the state to begin with instead, such as ``setup.start(seed, params)`` with those of another run.
      until: takes the held-out means of a measurement; where it returns True, training ends.
      run: folder and configuration of the run. None: nothing is written down and nothing can be resumed.
      label: the name of the progress line.

    Raises:
      Diverged: a parameter or held-out loss became infinite or NaN, or too many steps in a row were skipped.
      Stopped: somebody asked to stop; the run can go on.
      UserError: the folder belongs to another configuration, is damaged or full.
    """
    state = _state(setup, batches, steps, start, seed, run)
    with contextlib.ExitStack() as stack:
        stop, done = Interrupt(), int(state.step)
        record = stack.enter_context(_record(run, done))
        closed = functools.partial(stop.request, signal.SIGPIPE) if run else None
        speed = functools.partial(full_speed, setup)
        monitor = stack.enter_context(Monitor(record, done, steps.total, setup.tokens, label, closed, speed))
        if run:  # without a folder there is nothing to save: Ctrl-C is an exception as ever
            stack.enter_context(stop)
        saving = stack.enter_context(_Saving(setup, batches, steps, run))
        state = run_steps(
            steps,
            state,
            batches,
            step_fn=_step(setup, run, done, stack),
            evaluate=setup.evaluator(heldout),
            save=saving.save,
            monitor=monitor,
            stop=_Asked(stop, saving),
            due=saving.due,
            until=until,
        )
    result = Result(state, dict(sorted(record.heldout.items())))
    finished = result.step == steps.total or (result.step in result.heldout and until(result.heldout[result.step]))
    if run and stop.signal and not finished:
        where = f"Stopped at step {result.step} of {steps.total} in {run.folder}; nothing is lost."
        raise Stopped(where, stop.signal)
    return result


def _record(run: Run | None, done: int) -> Record:
    """The record, which process 0 alone writes; all know what was measured before."""
    opened: list[Record] = []  # in process 0

    def open_first() -> dict[int, Means]:
        opened.append(Record(run.folder if run else None, done))
        return opened[0].heldout

    measured = found_by_first(open_first)
    return opened[0] if opened else Record(None, done, measured)


def _state(
    setup: Setup, batches: Batches, steps: Steps, start: TrainState | None, seed: int, run: Run | None
) -> TrainState:
    """The state to begin with, of a saved step or fresh; ``batches`` are moved to its position."""
    if run is None:
        return setup.spread(start or setup.start(seed))
    mesh = None if setup.mesh is None else dict(setup.mesh.shape)
    given = to_json(run.config), steps, seed, run.resume_from, setup.accumulate, mesh
    check_equal(given, "The text, the configuration, the steps or the mesh")
    step = found_by_first(functools.partial(find_step, run.folder, run.resume_from))
    if (step or 0) > steps.total:
        raise UserError(
            f"The run in {run.folder} is at step {step} already, beyond --steps {steps.total}: raise --steps, or go "
            "back with --resume-from."
        )
    like = setup.shapes()
    found_by_first(functools.partial(_make_room, run, like))
    if step is None:
        state = start or setup.start(seed)
    else:
        state, manifest = resume(run, like)
        batches.set_state(manifest.data)
        tqdm.write(_continuation(setup, run, steps, state, manifest))
    done = told(int(state.step))  # all processes have read the folder
    found_by_first(functools.partial(_tidy, run, done))
    return setup.spread(state)


def _make_room(run: Run, like: TrainState) -> None:
    """Remove parts of saves that were killed, and check that there is room for the next ones."""
    remove_parts(run.folder)
    check_room(run.folder, like, run.keep)


def _tidy(run: Run, done: int) -> None:
    """Write the configuration, and move later steps than ``done`` and unfinished ones out of the way."""
    write_sealed(run.folder / CONFIG_FILE, to_json(run.config))
    for place in set_aside(run.folder, done):
        tqdm.write(f"Moved what does not lead to step {done} to {place}.")


def _step(setup: Setup, run: Run | None, done: int, stack: contextlib.ExitStack) -> StepFn:
    """The step on batches of the host; recorded by the profiler where the run asks for it."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return setup.step(state, setup.place(batch))

    if run is None or run.profile is None or not is_first():
        return step
    return stack.enter_context(Profiled(step, run.folder / PROFILE, run.profile, done))


def _continuation(setup: Setup, run: Run, steps: Steps, state: TrainState, manifest: Manifest) -> str:
    """One line: where the run goes on, and what changes if its number of devices or steps has changed."""
    step, planned, devices = manifest.step, manifest.about["steps"], manifest.about["devices"]
    if step == steps.total:
        return f"The run in {run.folder} has finished its {step} steps; raise --steps to train on."
    line = f"Continuing {run.folder} from step {step} of {steps.total}."
    if devices != setup.devices:
        line += (
            f" It was saved on {devices} devices and goes on on {setup.devices}: sums are rounded differently there."
        )
    if planned != steps.total:
        line += (
            f" It was planned for {planned} steps: the learning-rate schedule now ends at {steps.total}, and the "
            f"learning rate goes on at {setup.rate_at(state):.2e} instead of {manifest.about['learning_rate']:.2e}."
        )
    return line


class _Saving(contextlib.ExitStack):
    """Saves the run ``run``, and knows when it is time to; None: saves nothing."""

    def __init__(self, setup: Setup, batches: Batches, steps: Steps, run: Run | None):
        super().__init__()
        self._setup, self._batches, self._steps = setup, batches, steps
        self._saver = self.enter_context(Saver(run.folder, run.keep, run.keep_every)) if run else None
        self._alarm = Alarm(run and run.save_minutes)
        self.due = Agreement(lambda: is_first() and self._alarm())  # process 0 decides by its clock

    def save(self, state: TrainState) -> None:
        """Begin to save a state, see ``Saver``."""
        self._alarm.set()
        self.due.forget()
        if self._saver:
            rate = self._setup.rate_at(state)
            about = {"steps": self._steps.total, "devices": self._setup.devices, "learning_rate": rate}
            self._saver.save(state, self._batches.get_state(), about)

    def check(self) -> None:
        """Raise the error of a save in the background, if there was one."""
        if self._saver:
            self._saver.check()


class _Asked:
    """Whether any process was asked to stop. Raises UserError where the last state could not be saved."""

    def __init__(self, stop: Interrupt, saving: _Saving):
        self._stop, self._saving, self._agreed = stop, saving, Agreement(lambda: stop.requested)

    def __call__(self) -> bool:
        self._saving.check()
        agreed = self._agreed()
        if agreed:
            self._stop.request(signal.SIGTERM)  # this process may not have been asked itself
        return agreed
