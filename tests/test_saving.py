"""Steps are written while training goes on, count when they are whole, and are removed when there are newer ones."""

import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from saved_steps import filled, like, make_state
from test_fit import assert_equal, fit

from hope_jax import train as training
from hope_jax.errors import Stopped, UserError
from hope_jax.train import checkpoint, saving


@pytest.fixture
def run(tmp_path):
    """A run folder with steps 3 and 6."""
    return filled(tmp_path)


def test_only_the_last_steps_are_kept(run):
    killed = run / "checkpoints" / "7.orbax-checkpoint-tmp"
    killed.mkdir()
    training.save(run, make_state(9), {}, {}, keep=2)
    assert training.saved_steps(run) == [6, 9] and not killed.exists()


def test_steps_whose_number_is_a_multiple_of_keep_every_stay(run):
    for step in (8, 9, 12):
        training.save(run, make_state(step), {}, {}, keep=2, keep_every=6)
    assert training.saved_steps(run) == [6, 9, 12]


@pytest.mark.parametrize(("error", "waits"), [(training.Diverged, True), (UserError, False)])
def test_a_run_that_diverged_leaves_when_its_last_step_is_sealed(run, monkeypatch, error, waits):
    waited = []
    with pytest.raises(error), training.Saver(run, keep=3) as saver:
        monkeypatch.setattr(saver, "wait", lambda: waited.append(None))
        raise error("no more")
    assert len(waited) == waits


def everywhere(state, devices):
    """A state that each of so many devices holds all of."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


@pytest.mark.parametrize("devices", [1, 2])
def test_training_goes_on_while_a_step_is_written_which_counts_when_it_is_sealed(run, monkeypatch, devices):
    sealing, force = threading.Event(), saving._force_to_disk
    monkeypatch.setattr(saving, "_force_to_disk", lambda folder: (sealing.wait(60), force(folder)))
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    with training.Saver(run, keep=3) as saver:
        saver.save(state := everywhere(make_state(9), devices), {}, {})
        jax.block_until_ready(overwrite(state))
        saver.check()
        assert training.saved_steps(run) == [3, 6]
        sealing.set()
        saver.save(make_state(12), {}, {})  # waits for the one before
        assert training.saved_steps(run) == [3, 6, 9]
    assert training.saved_steps(run) == [6, 9, 12]
    found = training.restore(run, 9, like(make_state(9)))
    for a, b in zip(jax.tree.leaves(make_state(9)), jax.tree.leaves(found), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_error_in_the_background_is_told_at_the_next_step_and_leaves_the_saved_steps(run, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_force_to_disk", full)
    with pytest.raises(UserError, match=r"Step 9 could not be saved.*No space left.*\[3, 6\]"):  # noqa: SIM117
        with training.Saver(run, keep=2) as saver:
            saver.save(make_state(9), {}, {})
            for _ in range(1000):
                saver.check()
                time.sleep(0.01)
    checkpoint.check(run, 6)
    assert training.saved_steps(run) == [3, 6]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "6"]  # a full disk keeps its room


def test_what_a_killed_save_left_is_removed_before_room_is_asked_for(tmp_path, monkeypatch):
    with training.open_run(tmp_path / "run") as folder:
        part = folder / "checkpoints" / "7.orbax-checkpoint-tmp"
        part.mkdir(parents=True)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if part.exists() else 2**30))
        fit(0, folder)


def test_sigterm_while_a_step_is_saved_loses_nothing(tmp_path, monkeypatch):
    force, forced = saving._force_to_disk, []

    def terminated(folder):
        if not forced:
            os.kill(os.getpid(), signal.SIGTERM)
        forced.append(folder.name)
        force(folder)

    monkeypatch.setattr(saving, "_force_to_disk", terminated)
    with training.open_run(tmp_path / "run") as folder:
        with pytest.raises(Stopped) as caught:
            fit(folder=folder)
        assert caught.value.signal == signal.SIGTERM and forced[0] == "5"
        assert [str(checkpoint.check(folder, step).step) for step in training.saved_steps(folder)] == forced
        assert_equal(fit(folder=folder), fit())


def test_a_save_that_reads_otherwise_than_it_was_written_is_told_at_once_and_not_finished(run, monkeypatch):
    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", lambda folder, like: checkpoint.parted(make_state(8)))
    with pytest.raises(UserError, match="Step 9 could not be saved.*differs"):
        training.save(run, make_state(9), {}, {}, keep=2)
    assert training.saved_steps(run) == [3, 6]


def test_a_failed_save_is_a_plain_error_and_leaves_the_saved_steps(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.ocp, "save_checkpointables_async", full)
    with pytest.raises(UserError, match=r"Step 9 could not be saved.*No space left.*\[3, 6\]"):
        training.save(run, make_state(9), {}, {}, keep=2)
    training.restore(run, 6, like(make_state(6)))


def test_too_little_disk_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**26))
    small, large = (training.TrainState.first(jnp.zeros(size, jnp.uint8), ()) for size in (2**20, 2**24))
    saving.check_room(tmp_path, small, keep=3)
    with pytest.raises(UserError, match=r"64 MiB free.*16 MiB need 64 MiB"):
        saving.check_room(tmp_path, large, keep=3)
