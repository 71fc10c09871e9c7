"""The speed of a run: tokens per second, seconds per step, share of time for reading, model FLOPs utilisation."""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax

from hope_jax.train.batches import Batches
from hope_jax.train.flops import peak_flops
from hope_jax.train.setup import Setup

RECENT = 100  # steps that percentiles are taken over
TIMED = ("tokens_per_second", "step_p50", "step_p95", "data_wait", "mfu")
"""What a clock adds to the rows of a record. Nothing else differs between two runs of one configuration."""


def no_peak(batch: Any) -> None:
    """The peak of the devices is not known."""


def full_speed(setup: Setup, batch: Any) -> float | None:
    """Tokens per second of batches like this at the peak of the devices; None where their peak is not known."""
    device = jax.devices()[0] if setup.mesh is None else setup.mesh.devices.flat[0]
    if (peak := peak_flops(device.device_kind)) is None:
        return None
    flops = setup.flops(batch)
    return peak * setup.devices * setup.tokens / flops if flops else None


class Clock:
    """Times the updates of a run that has done ``done`` of them.

    ``tokens``: targets of one batch. ``full_speed``: tokens per second at the peak of the devices, of such a batch;
    None where it is not known.
    """

    def __init__(self, done: int, tokens: int, full_speed: Callable[[Any], float | None] = no_peak):
        self._tokens, self._full_speed_of = tokens, full_speed
        self._full_speed: float | None = None
        self._started = self._compiled = False
        self._recent: deque[float] = deque(maxlen=RECENT)
        self.restart(done)

    def restart(self, done: int) -> None:
        """Measure from here on. Called after everything that is not training."""
        self._since, self._reading = done, 0.0
        self._start = self._last = time.monotonic()

    def read(self, batches: Batches) -> Any:
        """The next batch. Meanwhile devices work on the step before; when they have finished it, they wait."""
        since = time.monotonic()
        batch = next(batches)
        self._reading += time.monotonic() - since
        if not self._started:
            self._started, self._full_speed = True, self._full_speed_of(batch)
        return batch

    def step(self, done: int) -> dict[str, float]:
        """Measurements at the end of update number ``done``; the first update, which is compiled, is measured alone.

        ``tokens_per_second`` and ``data_wait`` are since the last restart. ``data_wait`` is the share of the time in
        which batches are read; devices wait less, as they may still work on the step before. ``step_p50`` and
        ``step_p95`` are percentiles of the seconds of recent steps. ``mfu``: model FLOPs per second, as a share of the
        peak of the devices.
        """
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        self._recent.append(now - self._last)
        self._last = now
        speed = (done - self._since) * self._tokens / seconds
        means = {"tokens_per_second": speed, **self._percentiles(), "data_wait": self._reading / seconds}
        if not self._compiled:
            self._compiled = True
            self._recent.clear()
            self.restart(done)
        return means if self._full_speed is None else means | {"mfu": speed / self._full_speed}

    def _percentiles(self) -> dict[str, float]:
        times = sorted(self._recent)
        return {"step_p50": statistics.median(times), "step_p95": times[int(0.95 * (len(times) - 1) + 0.5)]}
