"""The clock of a run, on a time that the test sets; the peak of the devices; profiles that end with the run."""

from types import SimpleNamespace

import jax.numpy as jnp
import optax
import pytest

from hope_jax import train as training
from hope_jax.errors import UserError
from hope_jax.train import clock as clocks
from hope_jax.train import profile as profiles
from hope_jax.train.clock import Clock, full_speed
from hope_jax.train.monitor import Monitor
from hope_jax.train.profile import Profiled
from hope_jax.train.record import Record


class Time:
    """Seconds that pass when somebody waits."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    """The time of the module ``clock``."""
    monkeypatch.setattr(clocks, "time", time := Time())
    return time


def run(clock, time, steps, done=0):
    """Updates that take so many seconds, one of them for reading; what the clock says of the last."""

    def make(index):
        time.wait(1.0)
        return "batch"

    batches = training.ComputedBatches(make)
    for seconds in steps:
        clock.read(batches)
        time.wait(seconds - 1)
        means = clock.step(done := done + 1)
    return means


def test_speed_percentiles_and_reading_are_those_of_the_steps_after_the_first(time):
    clock = Clock(0, tokens=10, full_speed={"batch": 50.0}.get)
    first = {"tokens_per_second": 1 / 6, "step_p50": 60, "step_p95": 60, "data_wait": 1 / 60, "mfu": 1 / 300}
    assert run(clock, time, [60]) == pytest.approx(first)
    means = run(clock, time, [2] * 18 + [3, 11], done=1)
    assert means == {"tokens_per_second": 4.0, "step_p50": 2, "step_p95": 3, "data_wait": 0.4, "mfu": 0.08}
    assert means.keys() == set(clocks.TIMED)


def test_what_is_not_training_does_not_count_and_old_steps_are_forgotten(time):
    clock = Clock(0, tokens=10)
    run(clock, time, [60, 9])
    time.wait(1000)
    clock.restart(2)
    assert run(clock, time, [2], done=2) == {"tokens_per_second": 5.0, "step_p50": 5.5, "step_p95": 9, "data_wait": 0.5}
    assert run(clock, time, [4] * clocks.RECENT, done=3)["step_p95"] == 4


def test_the_utilisation_is_in_the_record_where_the_peak_is_known(tmp_path):
    metrics = {
        name: training.Mean(value, 1.0) for name, value in (("loss", 2.0), ("parameter_norm", 1.0), ("skipped", 0.0))
    }
    with Record(tmp_path, 0) as record, Monitor(record, 0, 2, 10, full_speed=lambda batch: 1e9) as monitor:
        monitor.clock.read(training.ComputedBatches(str))
        monitor.train(1, metrics)
    (row,) = training.read_rows(tmp_path / "metrics.jsonl")
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] / 1e9) and set(clocks.TIMED) <= row.keys()


def product(params, batch):
    """A loss with one product of rows of 4 numbers and a column."""
    loss = jnp.sum(batch @ params["w"])
    return loss, {"loss": training.Mean(loss, 1.0)}


def test_the_full_speed_is_the_peak_of_all_devices_over_the_flops_of_a_token(monkeypatch):
    def init(key):
        return {"w": jnp.ones((4, 1))}

    mesh, batch = training.MeshConfig(2).make(6), jnp.ones((6, 4))
    setup = training.Setup(init, product, optax.sgd(1.0), optax.constant_schedule(0.0), tokens=6, mesh=mesh)
    assert full_speed(setup, batch) is None
    monkeypatch.setattr("hope_jax.train.clock.peak_flops", {mesh.devices.flat[0].device_kind: 1e6}.get)
    assert full_speed(setup, batch) == pytest.approx(2 * 1e6 / (3 * 2 * 4))


def test_a_profile_covers_the_steps_from_start_to_stop_and_is_written_when_the_run_ends_early(monkeypatch, tmp_path):
    seen = []
    profiler = SimpleNamespace(start_trace=lambda path: seen.append("start"), stop_trace=lambda: seen.append("stop"))
    monkeypatch.setattr(profiles.jax, "profiler", profiler)

    def step(state, batch):
        seen.append(state.step)
        return state.replace(step=state.step + 1), {}

    for steps, expected in ((range(1, 3), [0, "start", 1, 2, "stop", 3]), (range(2, 9), [0, 1, "start", 2, 3, "stop"])):
        with Profiled(step, tmp_path, steps, 0) as profiled:
            state = training.TrainState.first({}, ()).replace(step=0)
            for _ in range(4):
                state, _ = profiled(state, None)
        assert seen == expected
        seen.clear()


def test_a_profile_that_begins_before_the_run_stands_is_refused(tmp_path):
    with pytest.raises(UserError, match="begins at step 2; the run is at step 6 already"):
        Profiled(lambda state, batch: (state, {}), tmp_path, range(2, 4), 6)
