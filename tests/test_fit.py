"""``train.fit`` with a model and loss of one's own: in memory, in a folder, stopped and gone on with, in phases."""

import dataclasses
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import train as training
from hope_jax.cli.pretrain import PretrainConfig
from hope_jax.errors import Stopped, UserError
from hope_jax.train.run import CONFIG_FILE

pytestmark = pytest.mark.usefixtures("heard")


@dataclass(frozen=True)
class LineConfig:
    """What decides what is learned."""

    slope: float = 2.0
    rate: float = 0.1


def points(index):
    """Batch number ``index``: 8 points near y = 2 x, as a pair of arrays."""
    draw = np.random.default_rng(index)
    x = draw.normal(size=8).astype(np.float32)
    return x, 2 * x + 0.01 * draw.normal(size=8).astype(np.float32)


def loss(params, batch):
    """Mean square error, and the share of points that are hit."""
    x, y = batch
    error = params["slope"] * x - y
    count = jnp.float32(x.size)
    hit = jnp.sum(jnp.abs(error) < 0.1)
    metrics = {"loss": training.Mean(jnp.sum(error**2), count), "hit": training.Mean(hit, count)}
    return jnp.mean(error**2), metrics


SETUP = training.Setup(
    init=lambda key: {"slope": jax.random.normal(key) - 2},
    loss=loss,
    tx=optax.adam(0.1),
    rate=lambda step: 0.1,
    tokens=8,
)
HELDOUT = [points(10_000), points(10_001)]
STEPS = training.Steps(30, eval_every=10, save_every=5)


def fit(total=30, folder=None, batches=None, setup=SETUP, **options):
    """The same run each time, unless told otherwise."""
    run = None if folder is None else training.Run(folder, LineConfig())
    batches = training.ComputedBatches(points) if batches is None else batches
    return training.fit(setup, batches, HELDOUT, training.Steps(total, 10, 5), run=run, **options)


@pytest.fixture(scope="module")
def straight():
    """Thirty steps in memory."""
    return fit()


def sending(number, at):
    """The batches, and a signal to this process with batch ``at``."""

    def make(index):
        if index == at:
            os.kill(os.getpid(), number)
        return points(index)

    return training.ComputedBatches(make)


def assert_equal(left, right):
    """All of two results, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, left.state, right.state)
    assert left.heldout == right.heldout


def test_a_line_is_learned_and_held_out_means_are_measured_before_during_and_after(straight):
    assert list(straight.heldout) == [0, 10, 20, 30] and straight.step == 30
    assert straight.heldout[30]["loss"] < 0.1 * straight.heldout[0]["loss"]
    x, y = (np.concatenate(part) for part in zip(*HELDOUT, strict=True))
    expected = np.mean((float(straight.params["slope"]) * x - y) ** 2)
    assert straight.heldout[30]["loss"] == pytest.approx(expected, rel=1e-5)


# Step 20 is measured on held-out batches: by the run that goes on, since the one that is asked to stop leaves at once.
SIGNALS = [(signal.SIGINT, 13), (signal.SIGTERM, 20), pytest.param(signal.SIGHUP, 1, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("number", "step"), SIGNALS)
def test_a_run_that_is_stopped_and_gone_on_with_is_the_run_without_a_stop(straight, tmp_path, number, step):
    with training.open_run(tmp_path / "run") as folder:
        with pytest.raises(Stopped, match=f"Stopped at step {step} of 30") as caught:
            fit(folder=folder, batches=sending(number, step - 1))
        assert caught.value.signal == number and training.saved_steps(folder)[-1] == step
        measured = [row["step"] for row in training.read_rows(folder / "metrics.jsonl") if row["split"] == "heldout"]
        assert step not in measured
        assert_equal(fit(folder=folder), straight)
        assert_equal(fit(folder=folder), straight)  # finished: nothing is done again
    rows = training.read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, 31))
    assert rows[-1]["tokens"] == 240 and {"loss", "hit"} <= rows[-1].keys()


def test_without_a_folder_ctrl_c_is_the_exception_that_it_always_was():
    with pytest.raises(KeyboardInterrupt):
        fit(batches=sending(signal.SIGINT, 12))


def test_a_signal_that_is_ignored_stays_ignored_and_the_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training.Interrupt() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Broken:
    """A terminal that goes away after ``count`` writes."""

    encoding = "utf-8"

    def __init__(self, count):
        self.left = count

    def write(self, text):
        """As a pipe without a reader does."""
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError
        return len(text)

    def flush(self):
        """Nothing."""

    def isatty(self):
        """So that every step is shown."""
        return True


@pytest.mark.parametrize("count", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_a_terminal_that_is_closed_saves_and_stops_as_sigterm_does(straight, tmp_path, monkeypatch, count):
    with training.open_run(tmp_path / "run") as folder:
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", Broken(count))
            with pytest.raises(Stopped) as caught:
                fit(folder=folder)
        assert caught.value.signal == signal.SIGPIPE
        assert_equal(fit(folder=folder), straight)


def test_a_run_ends_where_the_measurement_is_good_enough_and_stays_ended(tmp_path):

    def good(means):
        return means["loss"] < 1.0

    with training.open_run(tmp_path / "run") as folder:
        first = fit(folder=folder, until=good)
        again = fit(folder=folder, until=good, batches=training.ComputedBatches(lambda index: 1 / 0))
    assert 0 < first.step < 30 and first.heldout[first.step]["loss"] < 1.0
    assert all(means["loss"] >= 1.0 for step, means in first.heldout.items() if step < first.step)
    assert_equal(first, again)


def test_a_second_phase_begins_with_the_parameters_of_the_first_and_leaves_them_alone(straight):
    kept = float(straight.params["slope"])
    second = fit(
        total=10,
        start=SETUP.start(0, straight.params),
        batches=training.ComputedBatches(lambda index: points(index + 99)),
    )
    assert float(straight.params["slope"]) == kept
    assert second.heldout[0] == straight.heldout[30] and second.heldout[10] != second.heldout[0]


def test_runs_of_one_setup_share_its_programs(straight):
    assert SETUP.step is SETUP.step and SETUP.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    fit(total=3, seed=1)
    assert SETUP.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_devices_share_a_batch_of_several_arrays(straight):
    setup = training.Setup(SETUP.init, loss, SETUP.tx, SETUP.rate, 8, accumulate=2, mesh=training.MeshConfig(2).make(4))
    found = fit(setup=setup)
    for step, means in found.heldout.items():
        assert means == pytest.approx(straight.heldout[step], rel=1e-4, abs=1e-5)


def test_a_folder_of_another_configuration_or_of_an_earlier_version_is_refused(tmp_path):
    with training.open_run(tmp_path / "run") as folder:
        fit(total=5, folder=folder)
        other = training.Run(folder, LineConfig(rate=0.2))
        with pytest.raises(UserError, match="rate is 0.1 there and 0.2 here"):
            training.fit(SETUP, training.ComputedBatches(points), HELDOUT, STEPS, run=other)
        config = folder / CONFIG_FILE
        sealed = config.read_text()
        config.write_text(sealed.replace("0.1", "0.2"))
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            fit(folder=folder)
        config.unlink()
        with pytest.raises(UserError, match=r"written by an earlier version of hope_jax and has no config\.json"):
            fit(folder=folder)
        assert json.loads(sealed)["body"]["class"].endswith(":LineConfig")


@pytest.mark.parametrize("state", [{}, {"next": -1}, {"next": "3"}, {"next": True}, {"next": 3, "more": 1}])
def test_a_position_that_is_none_is_refused(state):
    with pytest.raises(UserError, match="is no position of computed batches"):
        training.ComputedBatches(points).set_state(state)


@pytest.mark.parametrize("state", [{}, {"parts": 3}, {"parts": [{"next": 1}]}, {"parts": [{"next": 1}] * 2, "more": 1}])
def test_a_position_of_other_parts_is_refused(state):
    parts = [training.ComputedBatches(points) for _ in range(2)]
    with pytest.raises(UserError, match="is no position of joined batches; expected one of each of 2 parts"):
        training.JoinedBatches(*parts).set_state(state)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: training.Steps(-1), "total is -1; give a whole number of at least 0"),
        (lambda: training.Steps(3, save_every=0), "save_every is 0; give a whole number of at least 1"),
        (lambda: training.Steps(1.5), "total is 1.5; give a whole number of at least 0"),
        (lambda: training.Run(None, None, keep=1), r"keep is 1; give a whole number of at least 2 \(checkpoints\)"),
        (
            lambda: training.Run(None, None, keep_every=0),
            r"keep_every is 0; give a whole number of at least 1 \(steps\)",
        ),
        (lambda: PretrainConfig(Path("x"), save_minutes=0.0), "save_minutes is 0.0; give a number above 0"),
        (lambda: PretrainConfig(Path("x"), seed=-1), "seed is -1; give a whole number of at least 0"),
        (lambda: training.Steps(1, most_skipped=-1), "most_skipped is -1; give a whole number of at least 0"),
        (lambda: dataclasses.replace(SETUP, spike=1.0), "spike is 1; expected above 1"),
        (lambda: SETUP.start(-1), "seed is -1; give a whole number of at least 0"),
        (lambda: SETUP.start(2**32), "seed is 4294967296; give a number below 4294967296"),
    ],
)
def test_numbers_outside_their_range_are_named(make, said, untyped):
    with pytest.raises(UserError, match=said):
        make()


def test_several_heldout_sets_are_measured_apart():
    means = SETUP.evaluator({"first": HELDOUT[:1], "second": HELDOUT[1:]})({"slope": jnp.float32(1.0)})
    alone = [SETUP.evaluator([batch])({"slope": jnp.float32(1.0)}) for batch in HELDOUT]
    assert means == {f"{name}/{metric}": value for name, of in zip(("first", "second"), alone, strict=True)
                     for metric, value in of.items()}  # fmt: skip
    assert means["first/loss"] != means["second/loss"]


def test_one_program_serves_all_rates():
    setup = dataclasses.replace(SETUP, tx=optax.sgd(1.0)).for_any_rate()
    reference = dataclasses.replace(SETUP, tx=optax.sgd(0.01))
    expected = fit(total=5, setup=reference).params["slope"]
    found = fit(total=5, setup=setup, start=training.at_rate(setup.start(0), 0.01)).params["slope"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert abs(float(expected) - float(setup.start(0).params["slope"])) > 1e-3


def test_joined_batches_are_one_below_the_other_and_go_on_where_they_were():
    def joined():
        parts = (lambda index: np.full((2, 3), index), lambda index: np.full((1, 3), -index))
        return training.JoinedBatches(*map(training.ComputedBatches, parts))

    batches = joined()
    next(batches)
    assert next(batches).tolist() == [[1] * 3, [1] * 3, [-1] * 3]
    again = joined()
    again.set_state(json.loads(json.dumps(batches.get_state())))
    np.testing.assert_array_equal(next(again), next(batches))
