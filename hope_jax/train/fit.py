"""``fit``: the one training loop, for any model and loss; in memory, or in a run folder where it can be stopped.

    setup = train.Setup(init, loss, optax.adamw(1e-3), lambda step: 1e-3)
    result = train.fit(setup, train.ComputedBatches(make), heldout, train.Steps(2000, eval_every=50))

A run in a folder goes on where it was stopped, bit for bit, when the same call is made again; on another number of
devices the sums are rounded otherwise. Ctrl-C, SIGTERM, SIGHUP and a closed terminal save and raise ``Stopped``.
Read ``setup.py`` and ``loop.py`` next.
"""

import contextlib
import functools
import signal
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from hope_jax.errors import Stopped
from hope_jax.train.batches import Batches
from hope_jax.train.checkpoint import Manifest, Saver, check_room, set_aside
from hope_jax.train.interrupt import Interrupt
from hope_jax.train.loop import Means, Steps, run_steps
from hope_jax.train.monitor import Monitor
from hope_jax.train.record import Record
from hope_jax.train.resume import resume, step_to_resume
from hope_jax.train.run import Run, write_config
from hope_jax.train.setup import Heldout, Setup
from hope_jax.train.state import TrainState


class Result(NamedTuple):
    """A finished run.

    Attributes:
      state: after the last step.
      heldout: means over the held-out batches by step, in the order of the steps.
    """

    state: TrainState
    heldout: dict[int, Mapping[str, float]]

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
    until: Callable[[Means], bool] | None = None,
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
      start: the state to begin with instead, such as ``setup.start`` of parameters of a run before this one.
      until: whether the means of a measurement are good enough to end there.
      run: folder and configuration of the run. None: nothing is written down and nothing can be resumed.
      label: what the progress line is called.

    Raises:
      Diverged: a loss, gradient or parameter became infinite or NaN.
      Stopped: somebody asked to stop; the run can go on.
      UserError: the folder belongs to another configuration, is damaged or full.
    """
    until = until or _never
    state = _state(setup, batches, steps, start, seed, run)
    with contextlib.ExitStack() as stack:
        stop, done = Interrupt(), int(state.step)
        record = stack.enter_context(Record(run and run.folder, done))
        closed = functools.partial(stop.request, signal.SIGPIPE) if run else _nothing
        monitor = stack.enter_context(Monitor(record, done, steps.total, setup.tokens, label, closed))
        saver = stack.enter_context(_saver(setup, run, steps)) if run else None
        if run:  # without a folder there is nothing to save: Ctrl-C is an exception as ever
            stack.enter_context(stop)
        state = run_steps(
            steps,
            state,
            batches,
            step_fn=lambda state, batch: setup.step(state, setup.place(batch)),
            evaluate=setup.evaluator(heldout),
            save=functools.partial(_save, saver, setup, batches),
            monitor=monitor,
            stop=stop,
            until=until,
        )
    result = Result(state, dict(sorted(record.heldout.items())))
    if run and stop.signal and not _finished(result, steps, until):
        where = f"Stopped at step {result.step} of {steps.total} in {run.folder}; nothing is lost."
        raise Stopped(where, stop.signal)
    return result


def _never(means: Means) -> bool:
    return False


def _nothing() -> None:
    pass


def _finished(result: Result, steps: Steps, until: Callable[[Means], bool]) -> bool:
    means = result.heldout.get(result.step)
    return result.step == steps.total or (means is not None and until(means))


def _state(
    setup: Setup, batches: Batches, steps: Steps, start: TrainState | None, seed: int, run: Run | None
) -> TrainState:
    """The state to begin with, with ``batches`` moved to its place: that of a saved step, or a fresh one."""
    if run is None:
        return setup.spread(start or setup.start(seed))
    step = step_to_resume(run.folder, run.resume_from, steps.total)
    like = setup.shapes()
    check_room(run.folder, like, run.keep)
    if step is None:
        state = start or setup.start(seed)
        write_config(run.folder, run.config)
    else:
        state, manifest = resume(run, step, like)
        batches.set_state(manifest.data)
        tqdm.write(_continuation(setup, run, steps, manifest))
    for place in set_aside(run.folder, step or 0):
        tqdm.write(f"Moved what does not lead to step {step or 0} to {place}.")
    return setup.spread(state)


def _continuation(setup: Setup, run: Run, steps: Steps, manifest: Manifest) -> str:
    """A line on where the run goes on, and what a changed number of devices or steps does to it."""
    step, planned, devices = manifest.step, manifest.about["steps"], manifest.about["devices"]
    if step == steps.total:
        return f"The run in {run.folder} has finished its {step} steps; raise --steps to train on."
    line = f"Continuing {run.folder} from step {step} of {steps.total}."
    if devices != setup.devices:
        line += (
            f" It was saved on {devices} devices and goes on on {setup.devices}: sums are rounded differently there."
        )
    if planned == steps.total:
        return line
    return (
        f"{line} It was planned for {planned} steps: the learning-rate schedule now ends at {steps.total}, and the "
        f"learning rate goes on at {float(setup.rate(step)):.2e} instead of {manifest.about['learning_rate']:.2e}."
    )


def _saver(setup: Setup, run: Run, steps: Steps) -> Saver:
    return Saver(run.folder, {"steps": steps.total, "devices": setup.devices}, run.keep)


def _save(saver: Saver | None, setup: Setup, batches: Batches, state: TrainState) -> None:
    if saver is not None:
        saver.save(state, batches.get_state(), learning_rate=float(setup.rate(int(state.step))))
