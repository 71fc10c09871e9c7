"""The only place where numbers of a run come back from the device: they are checked, timed, shown and recorded.

Read ``record.py`` next: it writes them down.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from tqdm import tqdm

from hope_jax.errors import UserError
from hope_jax.train.clock import Clock, no_peak
from hope_jax.train.processes import is_first
from hope_jax.train.record import Means, Record
from hope_jax.train.step import MEASURED_BY_STEP, Metrics

ADVICE = (
    "Start again in a new run folder with a lower --optimizer.learning-rate, a longer --optimizer.warmup or --dtype "
    "float32."
)


class Diverged(UserError):
    """Training cannot go on: numbers became infinite or NaN, or too many steps in a row were skipped.

    ``heldout``: held-out means by step, as far as they were measured.
    """

    heldout: Mapping[int, Means] = MappingProxyType({})


def progress(*arguments: Any, **options: Any) -> Any:
    """A progress bar of tqdm, which is drawn less often into a log file."""
    interval = 0.5 if sys.stderr.isatty() else 20.0
    return tqdm(*arguments, dynamic_ncols=True, mininterval=interval, **options)


class Monitor(contextlib.AbstractContextManager["Monitor"]):
    """Progress of a run that has done ``done`` of ``steps`` updates; a context manager.

    ``tokens``, ``full_speed``: as in ``Clock``. ``label``: the name of the progress line. ``when_closed`` is called
    once when the terminal or pipe of that line is gone.

    ``skipped``: how many of the last steps in a row changed nothing (see ``guard.py``).
    """

    def __init__(
        self,
        record: Record,
        done: int,
        steps: int,
        tokens: int,
        label: str | None = None,
        when_closed: Callable[[], object] | None = None,
        full_speed: Callable[[Any], float | None] = no_peak,
    ):
        self.record, self.clock, self._tokens = record, Clock(done, tokens, full_speed), tokens
        self._closed, self._when_closed = False, when_closed
        self.skipped, self._all_skipped, self._reason = 0, 0, ""
        # The delay keeps tqdm from writing here: ``_show`` is where a terminal that is gone is noticed.
        quiet = None if is_first() else True
        self._bar = progress(desc=label, initial=done, total=steps, unit="step", delay=1e-9, disable=quiet)
        self._show(self._bar.set_postfix_str, "compiling")

    def __exit__(self, *error: object) -> None:
        self._show(self._bar.close)

    def _show(self, action: Callable[..., object], *arguments: Any, **options: Any) -> None:
        """Write to the terminal. One that is gone is no error: training must still be saved."""
        if self._closed:
            return
        try:
            action(*arguments, **options)
        except OSError:
            self._closed = self._bar.disable = True
            if self._when_closed:
                self._when_closed()

    def train(self, done: int, metrics: Metrics) -> None:
        """Wait for the metrics of step number ``done``, check and show them.

        Raises Diverged if one is not finite although the step was not skipped.
        """
        means = {name: float(mean.value) for name, mean in jax.device_get(metrics).items()}
        skipped = bool(means["skipped"])
        self._check_finite(done, {"parameter_norm": means["parameter_norm"]} if skipped else means)
        self.skipped = self.skipped + 1 if skipped else 0
        self._all_skipped += skipped
        self._reason = _reason(means) if skipped else ""
        speed = self.clock.step(done)
        self.record.add(done, done * self._tokens, "train", means | speed)
        shown = _shown({name: value for name, value in means.items() if name not in MEASURED_BY_STEP})
        self._show(self._bar.set_postfix_str, f"{shown}, {self._paced(speed)}", refresh=False)
        self._show(self._bar.update)

    def _paced(self, speed: Means) -> str:
        """The measurements of the clock as text."""
        unit = "tokens" if self._tokens > 1 else "steps"
        line = f"{speed['tokens_per_second']:,.0f} {unit}/s, data {speed['data_wait']:.0%}"
        line += f", step {speed['step_p50']:.3g} s, p95 {speed['step_p95']:.3g} s"
        line += f", {self._all_skipped} skipped" if self._all_skipped else ""
        return line + (f", MFU {speed['mfu']:.0%}" if "mfu" in speed else "")

    def lost(self, done: int) -> Diverged:
        """The error to raise when too many steps in a row, up to step ``done``, were skipped."""
        return self._diverged(
            f"Training stopped at step {done}: the last {self.skipped} steps were skipped, because {self._reason} in "
            f"the last of them. Nothing has changed since step {done - self.skipped}. {ADVICE}"
        )

    def heldout(self, done: int, means: Means) -> None:
        """Check and record the held-out means after ``done`` updates. Raises Diverged if one is not finite."""
        self._check_finite(done, {f"held-out {name}": value for name, value in means.items()})
        self.record.add(done, done * self._tokens, "heldout", means)
        if is_first():
            self._show(tqdm.write, f"step {done}: held-out {_shown(means)}", file=sys.stderr)

    def _check_finite(self, step: int, means: Means) -> None:
        if bad := _not_finite(means):
            raise self._diverged(
                f"Training stopped at step {step}: the {bad[0].replace('_', ' ')} became {means[bad[0]]}. Nothing was "
                f"saved since, and the checkpoints that exist are untouched. {ADVICE}"
            )

    def _diverged(self, sentence: str) -> Diverged:
        error = Diverged(sentence)
        error.heldout = dict(self.record.heldout)
        return error


def _reason(means: Means) -> str:
    """Why a step was skipped."""
    name = next(iter(_not_finite(means)), "gradient_norm")
    return f"the {name.replace('_', ' ')} was {means[name]:.6g}"


def _not_finite(means: Means) -> list[str]:
    """The names of means that are not finite, losses first."""
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    return sorted(bad, key=lambda name: not name.endswith("loss"))


def _shown(means: Means) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in means.items())
