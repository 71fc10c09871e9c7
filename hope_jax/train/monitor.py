"""The one place where numbers of a run come back from the device: check that they are finite, time them, show them.

Read ``record.py`` next: it writes down what this one saw.
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
from hope_jax.train.record import Means, Record
from hope_jax.train.step import MEASURED_BY_STEP, Metrics


class Diverged(UserError):
    """A loss, gradient or parameter became infinite or NaN; nothing was saved over an earlier step.

    ``heldout``: what held-out batches gave before, means by step.
    """

    heldout: Mapping[int, Means] = MappingProxyType({})


def progress(*arguments: Any, **options: Any) -> Any:
    """A bar of tqdm, which in a log file is seldom redrawn."""
    interval = 0.5 if sys.stderr.isatty() else 20.0
    return tqdm(*arguments, dynamic_ncols=True, mininterval=interval, **options)


class Monitor(contextlib.AbstractContextManager["Monitor"]):
    """Progress of a run of ``steps`` updates that stands at ``done``; a context manager.

    ``tokens``, ``full_speed``: as in ``Clock``. ``label``: what the progress line is called. ``when_closed`` is called
    once when nobody reads that line any more, because its terminal or pipe is gone.
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
        # With a delay nothing is written yet: that a terminal is gone is noticed in ``_show``.
        self._bar = progress(desc=label, initial=done, total=steps, unit="step", delay=1e-9)
        self._show(self._bar.set_postfix_str, "compiling")

    def __exit__(self, *error: object) -> None:
        self._show(self._bar.close)

    def _show(self, action: Callable[..., object], *arguments: Any, **options: Any) -> None:
        """Write to the terminal. One that is gone is no mistake: training has still to be saved."""
        if self._closed:
            return
        try:
            action(*arguments, **options)
        except OSError:
            self._closed = self._bar.disable = True
            if self._when_closed:
                self._when_closed()

    def train(self, done: int, metrics: Metrics) -> None:
        """Wait for the metrics of update number ``done``, check and show them. Raises Diverged: one is not finite."""
        means = {name: float(mean.value) for name, mean in jax.device_get(metrics).items()}
        self._check_finite(done, means)
        speed = self.clock.step(done)
        self.record.add(done, done * self._tokens, "train", means | speed)
        shown = _shown({name: value for name, value in means.items() if name not in MEASURED_BY_STEP})
        self._show(self._bar.set_postfix_str, f"{shown}, {self._paced(speed)}", refresh=False)
        self._show(self._bar.update)

    def _paced(self, speed: Means) -> str:
        """How the measurements of the clock are shown."""
        unit = "tokens" if self._tokens > 1 else "steps"
        line = f"{speed['tokens_per_second']:,.0f} {unit}/s, data {speed['data_wait']:.0%}"
        line += f", step {speed['step_p50']:.3g} s, p95 {speed['step_p95']:.3g} s"
        return line + (f", MFU {speed['mfu']:.0%}" if "mfu" in speed else "")

    def heldout(self, done: int, means: Means) -> None:
        """Check and note what held-out batches gave after ``done`` updates. Raises Diverged: one is not finite."""
        self._check_finite(done, {f"held-out {name}": value for name, value in means.items()})
        self.record.add(done, done * self._tokens, "heldout", means)
        self._show(tqdm.write, f"step {done}: held-out {_shown(means)}", file=sys.stderr)

    def _check_finite(self, step: int, means: Means) -> None:
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            name = next((name for name in bad if name.endswith("loss")), bad[0])
            error = Diverged(
                f"Training stopped at step {step}: the {name.replace('_', ' ')} became {means[name]}. Nothing was "
                "saved since, and the checkpoints that exist are untouched. Start again in a new run folder with a "
                "lower --optimizer.learning-rate, a longer --optimizer.warmup or --dtype float32."
            )
            error.heldout = dict(self.record.heldout)
            raise error


def _shown(means: Means) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in means.items())
