"""The one place where numbers of a run come back from the device: check that they are finite, time them, show them.

Read ``record.py`` next: it writes down what this one saw.
"""

import math
import sys
import time
from collections.abc import Mapping

import jax
from tqdm import tqdm

from hope_jax.errors import UserError
from hope_jax.train.record import Record
from hope_jax.train.step import Metrics


class Diverged(UserError):
    """A loss, gradient or parameter became infinite or NaN; nothing was saved over an earlier step."""


class Monitor:
    """Progress of a run of ``steps`` updates that stands at ``done``; a context manager.

    ``tokens_per_step``: targets of one batch.
    """

    def __init__(self, record: Record, done: int, steps: int, tokens_per_step: int):
        # In a log file a line now and then instead of twice a second.
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self._bar = tqdm(initial=done, total=steps, unit="step", mininterval=interval, dynamic_ncols=True)
        self._bar.set_postfix_str("compiling")
        self._record, self._tokens_per_step = record, tokens_per_step
        self._compiled = False
        self.restart_clock(done)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def train(self, done: int, metrics: Metrics) -> None:
        """Wait for the metrics of update number ``done``, check and show them.

        Raises:
            Diverged: one of them is not finite.
        """
        means = {name: float(mean.value) for name, mean in jax.device_get(metrics).items()}
        _check_finite(done, means)
        speed = self._speed(done)
        self._record.add(done, done * self._tokens_per_step, "train", means | {"tokens_per_second": speed})
        shown = f"loss {means['loss']:.3f}, {means['bits_per_byte']:.3f} bits/byte, {speed:,.0f} tokens/s"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(1)

    def restart_clock(self, done: int) -> None:
        """Measure the speed from here on: called after whatever is not training."""
        self._since, self._clock = done, time.monotonic()

    def _speed(self, done: int) -> float:
        """Tokens per second since the clock was started; the first update, which waits for the compiler, apart."""
        seconds = max(time.monotonic() - self._clock, 1e-9)
        speed = (done - self._since) * self._tokens_per_step / seconds
        if not self._compiled:
            self._compiled = True
            self.restart_clock(done)
        return speed

    def measured(self, done: int) -> bool:
        """Whether the held-out text was measured after ``done`` updates, in this run or before it was resumed."""
        return done in self._record.heldout

    def heldout(self, done: int, means: Mapping[str, float]) -> None:
        """Check and note what the held-out text gave after ``done`` updates.

        Raises:
            Diverged: one of the means is not finite.
        """
        _check_finite(done, {f"held-out {name}": value for name, value in means.items()})
        self._record.add(done, done * self._tokens_per_step, "heldout", means)
        self._bar.write(f"step {done}: held-out {means['bits_per_byte']:.3f} bits per byte", file=sys.stderr)


def _check_finite(step: int, means: Mapping[str, float]) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        name = next((name for name in bad if name.endswith("loss")), bad[0])
        raise Diverged(
            f"Training stopped at step {step}: the {name.replace('_', ' ')} became {means[name]}. Nothing was saved "
            "since, and the checkpoints that exist are untouched. Start again in a new run folder with a lower "
            "--optimizer.learning-rate, a longer --optimizer.warmup or --dtype float32."
        )
