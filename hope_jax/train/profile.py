"""``pretrain --profile START:STOP``: what the devices do in some steps of a run, for the viewers of JAX's profiler."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from hope_jax.errors import UserError
from hope_jax.train.step import Metrics, StepFn, TrainState

PROFILE = "profile"  # folder inside that of the run


class Profiled(contextlib.AbstractContextManager["Profiled"]):
    """A step function of a run that has done ``done`` updates; steps START to STOP are recorded in ``folder``.

    A context manager: the record of a run that ends before STOP is written, too. Raises UserError for a run that is
    beyond START.
    """

    def __init__(self, step: StepFn, folder: Path, steps: range, done: int):
        if done > steps.start:
            raise UserError(f"--profile begins at step {steps.start}; the run is at step {done} already.")
        self._step, self._folder, self._steps, self._done = step, folder, steps, done
        self._recording = False

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        if self._done == self._steps.start:
            jax.profiler.start_trace(str(self._folder))
            self._recording = True
        state, metrics = self._step(state, batch)
        self._done += 1
        if self._done == self._steps.stop:
            jax.block_until_ready(metrics)
            self._close()
        return state, metrics

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()


def profiled_steps(text: str, total: int) -> range:
    """The steps that ``START:STOP`` names: after START updates, up to STOP. Raises UserError for other texts."""
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop) <= total):
        raise UserError(f"--profile is {text!r}; give START:STOP with START < STOP <= --steps, such as 10:12.")
    return range(int(start), int(stop))
