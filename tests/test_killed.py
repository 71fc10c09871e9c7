"""A run that is killed again and again, at random moments, ends with the parameters of a run that was left alone.

``KILLS=30 make test-all ARGS=tests/test_killed.py`` kills it thirty times.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import FLAGS, MODELS, SMALL, assert_same_run

from hope_jax import train as training
from hope_jax.cli.main import main
from hope_jax.train.checkpoint import check

KILLS = int(os.environ.get("KILLS", "6"))
STEPS = 15 * KILLS
SLOWED = """
import sys, time
sys.path[:0] = [".", "tests"]
import test_cli
from hope_jax.cli.main import main

class Slow(test_cli.FIT.Monitor):
    def train(self, done, metrics):
        super().train(done, metrics)
        time.sleep(0.1)

test_cli.MODELS["small"] = test_cli.SMALL
test_cli.FIT.Monitor = Slow
sys.exit(main(sys.argv[1:]))
"""


def start(arguments, folder):
    """The run in a process of its own, each step slowed down so that a kill can hit any part of it."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
    command = [sys.executable, "-c", SLOWED, *arguments]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=environment, stdout=log, stderr=log)


def wait_for_steps(process, metrics, size):
    """Return when the run has written more than ``size`` bytes of metrics, or has ended."""
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_like_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {j} is {i * j}.\n" for i in range(60) for j in range(60)))
    flags = [
        *FLAGS,
        "--steps",
        str(STEPS),
        "--eval-every",
        "50",
        "--save-every",
        "3",
        "--data.path",
        str(tmp_path / "text.txt"),
    ]
    run, straight = tmp_path / "run", tmp_path / "straight"
    metrics, draw, reached = run / "metrics.jsonl", random.Random(0), []
    for kill in range(KILLS):
        process = start(["pretrain", "--run", str(run), *flags], tmp_path)
        if kill % 4 == 3:  # while it starts
            time.sleep(draw.uniform(0, 6))
        else:
            wait_for_steps(process, metrics, metrics.stat().st_size if metrics.exists() else 0)
            time.sleep(draw.uniform(0, 1.2))
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
        process.kill()
        process.wait()
        reached.append(max(training.saved_steps(run), default=0))
        for step in training.saved_steps(run):
            check(run, step)
    assert reached == sorted(reached) and 0 < reached[-1] < STEPS, reached
    process = start(["pretrain", "--run", str(run), *flags], tmp_path)
    assert process.wait(300) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    log = (tmp_path / "log.txt").read_text()
    for step in filter(None, reached):
        assert f"from step {step} of {STEPS}" in log
    assert main(["pretrain", "--run", str(straight), *flags]) == 0
    assert_same_run(run, straight, STEPS)
