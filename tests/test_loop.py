"""The loop, its record and its interrupt: what is done in which order, and what is on disk when it ends early."""

import errno
import json
import signal
import struct
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from hope_jax import train as training
from hope_jax.errors import UserError
from hope_jax.train.loop import Alarm, run_steps
from hope_jax.train.monitor import Monitor
from hope_jax.train.record import Record

pytestmark = pytest.mark.usefixtures("heard")


def test_a_resumed_record_drops_rows_beyond_the_restored_step_and_a_line_cut_by_a_kill(tmp_path):
    with Record(tmp_path, 0) as record:
        for step in range(1, 6):
            record.add(step, 10 * step, "train", {"bits_per_byte": 1.0})
        record.add(4, 40, "heldout", {"bits_per_byte": 2.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')
    with Record(tmp_path, 3) as record:
        record.add(4, 40, "train", {"bits_per_byte": 7.0})
        assert 4 not in record.heldout
    steps = [row["step"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert steps == [1, 2, 3, 4]


def test_a_record_at_step_zero_forgets_an_earlier_attempt(tmp_path):
    with Record(tmp_path, 0) as record:
        record.add(0, 0, "heldout", {"bits_per_byte": 8.0})
    with Record(tmp_path, 0) as record:
        assert record.heldout == {} and training.read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("refused", ["write", "flush", "close"])
def test_a_full_disk_ends_tensorboard_with_one_sentence_and_not_the_rows(tmp_path, monkeypatch, capfd, refused):
    method = getattr(RecordWriter, refused)

    def full(*arguments):
        method(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with Record(tmp_path, 0) as record:
        monkeypatch.setattr(RecordWriter, refused, full)
        for step in range(50):
            record.add(step, 10 * step, "train", {"bits_per_byte": 1.0, "loss": 2.0})
    assert len(training.read_rows(tmp_path / "metrics.jsonl")) == 50
    said = f"No more TensorBoard events in {tmp_path / 'tensorboard'}: No space left on device.\n"
    assert capfd.readouterr().err == said


def events_of(data: bytes):
    """The events of a file: each is its length (8 bytes), a checksum (4), the event, another checksum (4)."""
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_tensorboard_has_every_number_while_the_run_goes_on(tmp_path):
    with Record(tmp_path, 0) as record:
        record.add(1, 10, "train", {"bits_per_byte": 7.0, "loss": 5.0})
        record.add(1, 10, "heldout", {"bits_per_byte": 6.0})
        (path,) = (tmp_path / "tensorboard").iterdir()
        events = list(events_of(path.read_bytes()))
    values = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert values == [(1, "train/bits_per_byte", 7.0), (1, "train/loss", 5.0), (1, "heldout/bits_per_byte", 6.0)]


def test_tensorboard_hides_what_an_earlier_attempt_wrote_after_the_restored_step(tmp_path, monkeypatch):
    """Files are read in the order of their names; a start hides the earlier events of its step and later ones."""
    clock = iter([1795e6, *[1794e6] * 99])  # it is set back
    monkeypatch.setattr("hope_jax.train.record.time", SimpleNamespace(time=clock.__next__))
    for stands in (0, 3):
        with Record(tmp_path, stands) as record:
            for step in range(stands + 1, stands + 5):
                record.add(step, 10 * step, "train", {"bits_per_byte": 7.0})
    files = [list(events_of(path.read_bytes())) for path in sorted((tmp_path / "tensorboard").iterdir())]
    assert [[event.step for event in file if event.summary.value] for file in files] == [[1, 2, 3, 4], [4, 5, 6, 7]]
    start = event_pb2.SessionLog.START
    assert [[event.step for event in file if event.session_log.status == start] for file in files] == [[0], [4]]


ROW = {"step": 1, "tokens": 10, "split": "train", "bits_per_byte": 1.0}


def test_only_a_last_line_without_its_end_may_be_left_out(tmp_path):
    path, whole = tmp_path / "metrics.jsonl", json.dumps(ROW)
    for text, count in {"": 0, whole: 1, f"{whole}\n": 1, f"{whole}\n{whole[:-5]}": 1, whole[:9]: 0}.items():
        path.write_text(text)
        assert training.read_rows(path) == [ROW] * count


@pytest.mark.parametrize(
    "line, problem",
    [
        (json.dumps(ROW)[:-5], "is not JSON"),
        ("", "is not JSON"),
        ("3", "has no step, tokens, split:"),
        (json.dumps({name: value for name, value in ROW.items() if name != "step"}), "has no step:"),
    ],
)
@pytest.mark.parametrize("after", ["", json.dumps(ROW) + "\n"])
def test_any_other_line_that_is_no_row_is_named(tmp_path, line, problem, after):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n{after}")
    with pytest.raises(UserError, match=f"Line 2 of .*metrics.jsonl {problem}"):
        training.read_rows(path)


class FakeBatches:
    """Batch n is n; the position is the number of batches given out."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.given += 1
        return self.given

    def get_state(self):
        return {"given": self.given}

    def set_state(self, state):
        self.given = state["given"]


def fake_run(
    tmp_path,
    steps,
    *,
    poison=None,
    skipped=(),
    stop_after=None,
    heldout=(3.0,) * 9,
    until=lambda _: False,
    minutes=None,
):
    """Train a counter through the real loop, saver, record and monitor; returns the events and the final state."""
    events, heldout = [], iter(heldout)

    class Watching(Monitor):
        def train(self, done, metrics):
            events.append(("seen", done))
            super().train(done, metrics)

    def step_fn(state, batch):
        events.append(("dispatched", batch))
        value = jnp.nan if batch == poison or batch in skipped else 1.0
        means = {"loss": value, "bits_per_byte": value, "parameter_norm": 1.0, "skipped": float(batch in skipped)}
        metrics = {name: training.Mean(jnp.float32(mean), jnp.float32(1)) for name, mean in means.items()}
        return state.replace(step=state.step + 1), metrics

    def evaluate(params):
        events.append(("measured",))
        return {"loss": (value := next(heldout)), "bits_per_byte": value}

    state = training.TrainState.first({"w": jnp.ones(2)}, ())
    batches = FakeBatches()

    due = Alarm(minutes)

    def save(state):
        due.set()
        events.append(("saved", int(state.step), batches.given))
        training.save(tmp_path, state, batches.get_state(), {}, 2)

    with Record(tmp_path, 0) as record, Watching(record, 0, steps.total, 10) as monitor:
        handed = {"step_fn": step_fn, "evaluate": evaluate, "save": save, "monitor": monitor, "due": due}

        def stop():
            return batches.given == stop_after

        try:
            state = run_steps(steps, state, batches, until=until, stop=stop, **handed)
        except training.Diverged as error:
            events.append(("diverged", str(error)))
    return events, state


def test_the_loop_looks_at_step_n_minus_1_after_dispatching_n_and_pauses_only_where_planned(tmp_path):
    events, _ = fake_run(tmp_path, training.Steps(total=4, eval_every=4, save_every=3))
    assert events == [
        ("measured",),
        ("dispatched", 1),
        ("dispatched", 2),
        ("seen", 1),
        ("dispatched", 3),
        ("seen", 2),
        ("seen", 3),
        ("saved", 3, 3),
        ("dispatched", 4),
        ("seen", 4),
        ("measured",),
        ("saved", 4, 4),
    ]


def test_a_request_to_stop_finishes_the_step_and_saves_it_with_the_data_position(tmp_path):
    events, state = fake_run(tmp_path, training.Steps(total=9, eval_every=9, save_every=9), stop_after=2)
    assert int(state.step) == 2
    assert events[-2:] == [("seen", 2), ("saved", 2, 2)]
    assert training.read_manifest(tmp_path, 2).data == {"given": 2}


def test_a_state_is_saved_when_minutes_have_passed_whatever_the_clock_on_the_wall_says(tmp_path, monkeypatch):
    seconds = iter([0.0, 30.0, 61.0, 61.0, 100.0, 130.0, 130.0])  # set, asked, asked, set, ...
    monkeypatch.setattr("hope_jax.train.loop.time", SimpleNamespace(monotonic=seconds.__next__))
    events, _ = fake_run(tmp_path, training.Steps(total=4, eval_every=9, save_every=9), minutes=1.0)
    assert [event[1] for event in events if event[0] == "saved"] == [2, 4]
    assert next(seconds, None) is None


@pytest.mark.parametrize("poison", [2, 3, 4])
def test_nan_stops_before_anything_is_saved_over_the_last_good_step_and_names_the_step(tmp_path, poison):
    events, _ = fake_run(tmp_path, training.Steps(total=9, eval_every=9, save_every=2), poison=poison)
    assert events[-1][0] == "diverged" and f"step {poison}: the loss became nan" in events[-1][1]
    assert training.saved_steps(tmp_path) == [step for step in (2, 4) if step < poison]


def test_steps_that_are_skipped_push_out_no_saved_step_and_too_many_in_a_row_end_the_run(tmp_path):
    steps = training.Steps(total=20, eval_every=20, save_every=2, most_skipped=2)
    events, _ = fake_run(tmp_path, steps, skipped={3, 4, 6, 7, 10, 11, 12, 13, 14, 15})
    assert [event[1] for event in events if event[0] == "saved"] == [2, 8, 12]
    assert "step 12: the last 3 steps were skipped, because the loss was nan in the last of them" in events[-1][1]
    assert "Nothing has changed since step 9." in events[-1][1]
    rows = training.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("skipped")] == [3, 4, 6, 7, 10, 11, 12]
    assert [row["loss"] for row in rows if row["step"] in (2, 3)] == [1.0, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_held_out_measurement_that_is_not_finite_stops_before_its_step_is_saved(tmp_path, value):
    steps = training.Steps(total=9, eval_every=2, save_every=2)
    events, _ = fake_run(tmp_path, steps, heldout=(3.0, 3.0, value))
    assert events[-2] == ("measured",) and f"step 4: the held-out loss became {value}" in events[-1][1]
    assert training.saved_steps(tmp_path) == [2]
    rows = training.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "heldout"] == [0, 2]


def test_ctrl_c_sets_the_request_once_and_a_second_one_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with training.Interrupt() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested and stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
