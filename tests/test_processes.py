"""Two processes on this machine train as one: same numbers, one set of files, and none is left alone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_cli import FLAGS, MODELS, SMALL, logged

from hope_jax import train as training
from hope_jax.cli.main import main
from hope_jax.errors import UserError
from hope_jax.train import processes
from hope_jax.train.checkpoint import check
from hope_jax.train.processes import Agreement, ProcessesConfig

SCRIPT = """
import os, signal, sys
sys.path[:0] = [".", "tests"]
import test_cli
from hope_jax.cli.main import main
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
    return ["pretrain", *FLAGS, "--batch", "4", "--data.path", str(tmp_path / "text.txt")]


@pytest.fixture
def together(tmp_path):
    """``together(arguments, stop_at)``: two processes of one device each; ``stop_at``: when the second gets SIGTERM."""
    running = []

    def start(arguments, stop_at=None):
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        for index in range(2):
            environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
            environment |= {"STOP_AT": str(stop_at)} if index and stop_at else {}
            which = ["--processes.coordinator", f"localhost:{port}", "--processes.count", "2"]
            command = [sys.executable, "-c", SCRIPT, *arguments, *which, "--processes.index", str(index)]
            with (tmp_path / f"log-{index}.txt").open("w") as log:
                where = {"cwd": Path(__file__).parent.parent, "env": environment, "stdout": log, "stderr": log}
                running.append(subprocess.Popen(command, **where))
        return running[-2:]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def said(tmp_path):
    """What the two processes wrote."""
    return [(tmp_path / f"log-{index}.txt").read_text() for index in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [["--mesh.data", "2"], ["--mesh.fsdp", "2"]], ids=["data", "fsdp"])
def test_a_run_of_two_processes_is_stopped_by_one_and_goes_on_in_one(flags, together, tmp_path, mesh):
    run, straight = tmp_path / "run", tmp_path / "straight"
    both = together([*flags, "--run", str(run), *mesh], stop_at=2)
    assert [process.wait(300) for process in both] == [143, 143], said(tmp_path)
    first, second = said(tmp_path)
    stopped = max(training.saved_steps(run))
    assert 3 <= stopped <= 4 and f"Stopped at step {stopped} of 6" in first and "Stopped" not in second
    assert check(run, stopped).about["devices"] == 2
    assert main([*flags, "--run", str(run), "--mesh.data", "1"]) == 0
    assert main([*flags, "--run", str(straight), "--mesh.data", "1"]) == 0
    ours, theirs = logged(run), logged(straight)
    assert [(row["step"], row["split"]) for row in ours] == [(row["step"], row["split"]) for row in theirs]
    np.testing.assert_allclose([row["loss"] for row in ours], [row["loss"] for row in theirs], rtol=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_within_a_minute_with_one_sentence(flags, together, tmp_path):
    run = tmp_path / "run"
    first, second = together([*flags, "--run", str(run), "--steps", "100000", "--mesh.data", "2"])
    while not training.saved_steps(run):
        assert first.poll() is None and second.poll() is None, said(tmp_path)
        time.sleep(0.2)
    second.send_signal(signal.SIGKILL)
    assert first.wait(60) == 1, said(tmp_path)
    error = said(tmp_path)[0]
    assert "Traceback" not in error and "Process 1 of 2 has ended before its time, so this one ends, too" in error
    check(run, max(training.saved_steps(run)))


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
