"""Several processes on this machine train as one: same numbers, one set of files, and none is left alone."""

import concurrent.futures
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from saved_steps import filled, like, make_state
from test_cli import FLAGS, MODELS, SMALL, flip_a_bit, logged
from test_fit import SETUP, STEPS, LineConfig, points

from hope_jax import train as training
from hope_jax.cli.main import main
from hope_jax.errors import UserError
from hope_jax.train import processes, saving
from hope_jax.train.checkpoint import check, find_step, latest_good
from hope_jax.train.fit import _record, _state
from hope_jax.train.processes import Agreement, ProcessesConfig, found_by_first
from hope_jax.train.record import METRICS_FILE

SCRIPT = """
import os, signal, sys
sys.path[:0] = [".", "tests"]
import test_cli
from hope_jax.cli.main import main
from hope_jax.train import processes
processes.SHARING = 3
test_cli.MODELS["small"] = test_cli.SMALL
if at := os.environ.get("STOP_AT"):
    test_cli.FIT.Monitor = test_cli.stop_at(int(at), signal.SIGTERM)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """The arguments of a run on a small text, but for its folder."""
    monkeypatch.setitem(MODELS, "small", SMALL)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(60) for j in range(60)))
    return ["pretrain", *FLAGS, "--batch", "6", "--data.path", str(tmp_path / "text.txt")]


@pytest.fixture
def together(tmp_path):
    """``together(arguments, runs, stop_at)``: processes of one device each.

    ``runs``: the folder of each; ``stop_at``: when the second one gets SIGTERM.
    """
    running = []

    def start(arguments, runs, stop_at=None):
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        for index, run in enumerate(runs):
            environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
            environment |= {"STOP_AT": str(stop_at)} if index and stop_at else {}
            which = ["--processes.coordinator", f"localhost:{port}", "--processes.count", str(len(runs))]
            which += ["--processes.index", str(index), "--run", str(run)]
            command = [sys.executable, "-c", SCRIPT, *arguments, *which]
            with (tmp_path / f"log-{index}.txt").open("w") as log:
                where = {"cwd": Path(__file__).parent.parent, "env": environment, "stdout": log, "stderr": log}
                running.append(subprocess.Popen(command, **where))
        return running[-len(runs) :]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def said(tmp_path):
    """What the processes wrote."""
    return [path.read_text() for path in sorted(tmp_path.glob("log-*.txt"))]


def losses(run):
    """Step, kind and loss of everything that a run measured."""
    return [(row["step"], row["split"], row["loss"]) for row in logged(run)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_a_run_of_two_processes_is_stopped_by_one_and_goes_on_in_one_and_in_three(flags, together, tmp_path, mesh):
    """The three skip its last step, which is damaged."""
    run, straight, three = tmp_path / "run", tmp_path / "straight", tmp_path / "three"
    both = together([*flags, f"--mesh.{mesh}", "2"], [run] * 2, stop_at=2)
    assert [process.wait(300) for process in both] == [143, 143], said(tmp_path)
    first, second = said(tmp_path)
    stopped = max(training.saved_steps(run))
    assert 3 <= stopped <= 4 and f"Stopped at step {stopped} of 6" in first and "Stopped" not in second
    assert check(run, stopped).about["devices"] == 2
    flip_a_bit(shutil.copytree(run, three), stopped)
    assert [process.wait(300) for process in together([*flags, "--mesh.data", "3"], [three] * 3)] == [0] * 3, said(
        tmp_path
    )
    first, *others = said(tmp_path)
    assert "from step 2 of 6" in first and "It is skipped." in first and not any("skipped" in other for other in others)
    for folder in (run, straight):
        assert main([*flags, "--run", str(folder), "--mesh.data", "1"]) == 0
    for folder in (run, three):
        for ours, theirs in zip(losses(folder), losses(straight), strict=True):
            assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_within_a_minute_with_one_sentence(flags, together, tmp_path, victim):
    run = tmp_path / "run"
    running = together([*flags, "--steps", "100000", "--mesh.data", "3"], [run] * 3)
    while not training.saved_steps(run):
        assert all(process.poll() is None for process in running), said(tmp_path)
        time.sleep(0.2)
    before, until = said(tmp_path), time.monotonic() + 60
    running.pop(victim).send_signal(signal.SIGKILL)
    assert [process.wait(until - time.monotonic()) for process in running] == [1, 1], said(tmp_path)
    added = [text.removeprefix(old) for text, old in zip(said(tmp_path), before, strict=True)]
    del added[victim]
    for error in added:
        assert error.count("has ended before its time, so this one ends, too") == 1
        assert "Traceback" not in error and "Terminating process" not in error and "stack trace" not in error, error
    check(run, max(training.saved_steps(run)))


@pytest.mark.slow
def test_processes_that_do_not_share_the_run_folder_end_with_one_sentence_before_they_train(flags, together, tmp_path):
    both = together([*flags, "--mesh.data", "2"], [tmp_path / "run", tmp_path / "other"])
    assert [process.wait(120) for process in both] == [2, 2], said(tmp_path)
    for text, who in zip(said(tmp_path), ("another", "this"), strict=True):
        assert f"but not for {who} process: all processes need the same folder" in text and "Traceback" not in text
    assert not training.saved_steps(tmp_path / "run")


@pytest.fixture
def as_process(monkeypatch):
    """``as_process(index)``: from here on this process is that one of two; process 1 hears what process 0 said."""
    said = []

    def be(index):
        if index == 0:
            said.clear()
        monkeypatch.setattr(processes, "count", lambda: 2)
        monkeypatch.setattr(processes, "is_first", lambda: index == 0)
        hear = (lambda data: said.append(data) or data) if index == 0 else (lambda data: said.pop(0))
        monkeypatch.setattr(processes, "_bytes_of_first", hear)

    monkeypatch.setattr(processes, "_any", np.bool_)
    monkeypatch.setattr(processes, "SHARING", 0)
    return be


def test_all_processes_go_on_from_the_step_that_process_0_finds_or_say_that_they_do_not_see_it(tmp_path, as_process):
    (tmp_path / "ours").mkdir()
    ours = filled(tmp_path / "ours")
    stale, found = shutil.copytree(ours, tmp_path / "stale"), []
    shutil.rmtree(stale / "checkpoints" / "6")
    for index, run in enumerate((ours, stale)):
        as_process(index)
        with pytest.raises(UserError, match=r"no saved step 5 in .*ours; saved steps: \[3, 6\]"):
            found_by_first(functools.partial(find_step, run, 5))
        latest = found_by_first(functools.partial(find_step, run, None))
        found.append((latest, latest_good(run, functools.partial(training.read_manifest, run))))
    assert found[0] == found[1] and found[0][0] == found[0][1].step == 6
    as_process(0)
    training.restore(ours, 6, like(make_state(6)))
    as_process(1)
    with pytest.raises(UserError, match="step 6 in .*stale is there for process 0 but not for this process"):
        training.restore(stale, 6, like(make_state(6)))


def test_processes_with_another_text_or_other_steps_end_before_they_train(tmp_path, as_process):
    def begin(index, steps, config):
        as_process(index)
        start = training.TrainState.first({"slope": jnp.ones(())}, ())
        _state(SETUP, training.ComputedBatches(points), steps, start, 0, training.Run(tmp_path, config))

    for steps, config in ((STEPS, LineConfig(slope=3.0)), (training.Steps(30, 10, 6), LineConfig())):
        begin(0, STEPS, LineConfig())
        with pytest.raises(UserError, match="the steps or the mesh of this process are not those of process 0"):
            begin(1, steps, config)
    begin(0, STEPS, LineConfig())
    begin(1, STEPS, LineConfig())


def test_what_process_0_cannot_read_ends_all_with_its_sentence(tmp_path, as_process):
    (tmp_path / METRICS_FILE).write_text("altered\n")
    run, gone = training.Run(tmp_path, None), tmp_path / "gone"
    for index in (0, 1):
        as_process(index)
        with pytest.raises(UserError, match="Line 1 of .* is not JSON"):
            _record(run, 3)
        with pytest.raises(UserError, match="Cannot read or write .*gone: No such file"):
            found_by_first(gone.read_bytes)


def test_all_processes_hear_from_process_0_whether_a_step_is_sealed(tmp_path, as_process, monkeypatch):
    """No process looks for the seal on its disk: one that does not see the folder would wait for ever."""

    def wait(index, problem):
        as_process(index)
        monkeypatch.setattr(saving, "is_first", lambda: index == 0)
        saver = saving.Saver(tmp_path, keep=2)
        saver._last = concurrent.futures.Future()
        if index == 0 and problem:
            saver._last.set_exception(problem)
        else:
            saver._last.set_result(None)  # what a process has written itself
        saver.wait()

    wait(0, None)
    wait(1, None)
    for index in (0, 1):
        with pytest.raises(UserError, match="Step 3 could not be saved"):
            wait(index, UserError("Step 3 could not be saved."))


def test_a_process_alone_decides_for_itself_at_once():
    wishes = iter([False, True])
    agreed = Agreement(lambda: next(wishes))
    assert [agreed(), agreed()] == [False, True] and training.told(3) == 3 and training.is_first()


def test_a_wish_that_was_granted_is_not_granted_again(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "_any", np.bool_)
    agreed = Agreement(lambda: True)
    assert [agreed(), agreed()] == [False, True]
    agreed.forget()
    assert not agreed()


def test_slurm_and_tpus_name_several_processes(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert not ProcessesConfig().several and ProcessesConfig("auto").several
    for name, one, two in (("SLURM_STEP_NUM_TASKS", "1", "2"), ("TPU_WORKER_HOSTNAMES", "a", "a,b")):
        with monkeypatch.context() as patch:
            patch.setenv(name, one)
            assert not ProcessesConfig().several
            patch.setenv(name, two)
            assert ProcessesConfig().several


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a:1",), "--processes.count and --processes.index belong together"),
        ((None, 2, 0), "belong together"),
        (("a:1", 2, 2), "processes.index is 2; give a number below processes.count, 2"),
        (("a", 2, 0), "processes.coordinator is 'a'; give HOST:PORT"),
        (("a:1", 0, 0), "processes.count is 0; give a whole number of at least 1"),
    ],
)
def test_processes_that_are_named_by_halves_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        ProcessesConfig(*given)
